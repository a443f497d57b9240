"""What a user may write for a model, and what identifies it: its weights, wherever they lie."""

import json
import logging
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from sftkit.core.engines.base import EngineConfig, Request, Sampling
from sftkit.core.engines.registry import open_engine
from sftkit.core.errors import UserError
from sftkit.core.models import (
    ModelRef,
    context_length,
    final_facts,
    load_model,
    load_settings,
    load_tokenizer,
    model_identity,
    quantisation,
    resolve_model,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_folder_is_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(model) == ModelRef(str(model), path=model)
    monkeypatch.chdir(model.parent)
    assert resolve_model("model") == ModelRef("model", path=model)
    assert resolve_model("./model").path is not None
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve_model("~/model") == ModelRef("~/model", path=model)


def test_a_run_is_its_final_model(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "b"
    (run / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="this run has no finished model"):
        resolve_model(run)
    shutil.copytree(model, run / "train" / "final")
    assert resolve_model(run).path == run / "train" / "final"
    assert resolve_model(run / "train").path == run / "train" / "final"
    assert resolve_model(run / "train" / "final").path == run / "train" / "final"
    assert final_facts(resolve_model(run)) == {}
    (run / "train" / "final" / "sftkit.json").write_text('{"template": "x"}')
    assert final_facts(resolve_model(run)) == {"template": "x"}
    assert final_facts(ModelRef("org/name", hub_id="org/name")) == {}
    (run / "train" / "final" / "sftkit.json").write_text('{"templ')
    with pytest.raises(UserError, match=r"sftkit\.json: is not valid JSON"):
        final_facts(resolve_model(run))


def test_a_gguf_file_is_found_alone_or_as_the_only_one_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF and so on")
    assert resolve_model(folder / "a.gguf") == resolve_model(folder / "a.gguf")
    assert resolve_model(folder).path == folder / "a.gguf"
    assert resolve_model(folder).pretrained() == (str(folder), {"gguf_file": "a.gguf"})
    (folder / "b.gguf").write_bytes(b"GGUF and so on")
    with pytest.raises(UserError, match=r"holds 2 .gguf files; name one of them, as .*a.gguf"):
        resolve_model(folder)
    (folder / "c.gguf").write_bytes(b"not")
    with pytest.raises(UserError, match=r"c.gguf: is not a GGUF file \(it begins with b'not', not b'GGUF'\)"):
        resolve_model(folder / "c.gguf")


def test_a_link_into_the_hubs_cache_keeps_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0f3a").write_bytes(b"GGUF and so on")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "blobs" / "0f3a")
    assert resolve_model(tmp_path / "model.gguf").pretrained() == (str(tmp_path), {"gguf_file": "model.gguf"})


def test_a_name_of_the_hub_is_taken_with_its_revision() -> None:
    ref = resolve_model("org/name", revision="main")
    assert ref == ModelRef("org/name", hub_id="org/name", revision="main")
    assert ref.pretrained() == ("org/name", {"revision": "main"})
    assert resolve_model("org/name").pretrained() == ("org/name", {})
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert model_identity(resolve_model("org/name", revision=commit)) == f"hub:org/name@{commit}"


def test_the_hub_out_of_reach_is_one_line() -> None:
    """The tests run offline."""
    ref = resolve_model("nobody/nothing")
    for load in (load_tokenizer, load_settings, load_model, model_identity):
        with pytest.raises(
            UserError, match=r"^model nobody/nothing: not found on the Hub, nor in its cache \(.*\); check the name, `--revision`"
        ):
            load(ref)


def test_a_model_of_the_hub_that_comes_as_a_package_is_named() -> None:
    with pytest.raises(UserError, match=r"\); `sftkit models list` has it as a package, by the name gemma-3-270m; else check the name"):
        load_settings(resolve_model("google/Gemma-3-270m"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2-135m-instruct", "model smollm2-135m-instruct is not here yet: `sftkit models get smollm2-135m-instruct` fetches it"),
        (
            "smollm2-135m-instrukt",
            "unknown model 'smollm2-135m-instrukt': did you mean 'smollm2-135m-instruct'? known are all-minilm-l6-v2",
        ),
        ("./nothing", "./nothing: no such model folder or file"),
        ("/no/such/folder", "/no/such/folder: no such model folder or file"),
        ("a/b/c", "a/b/c: no such model folder or file"),
        ("x.gguf", "x.gguf: no such model folder or file"),
        ("zzz", "unknown model 'zzz': known are all-minilm-l6-v2"),
        ("zzz", "smollm2-135m-instruct; or give a folder, a .gguf file or a Hub id (ORGANISATION/NAME)"),
    ],
)
def test_what_is_no_model_here(name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_model(name)
    assert words in str(error.value)


def test_a_catalogue_name_is_its_folder_once_it_was_fetched(cache: Path, model: Path) -> None:
    folder = cache / "models" / "smollm2-135m-instruct"
    shutil.copytree(model, folder)
    assert resolve_model("smollm2-135m-instruct") == ModelRef("smollm2-135m-instruct", path=folder)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a model folder \(no config.json in it\)"):
        resolve_model(tmp_path)


def change_one_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_identity_follows_the_weights_and_not_the_place(model: Path, tmp_path: Path) -> None:
    first = model_identity(resolve_model(model))
    assert first.startswith("sha256:")
    assert model_identity(resolve_model(model)) == first
    moved = Path(shutil.move(model, tmp_path / "elsewhere"))
    assert model_identity(resolve_model(moved)) == first
    (moved / "README.md").write_text("what a model may have beside it")
    (moved / "training_args.bin").write_bytes(b"what a trainer leaves beside it")
    (moved / "tokenizer_config.json").write_text("{}")  # prompts are compared by their token ids
    assert model_identity(resolve_model(moved)) == first
    change_one_weight(moved)
    assert model_identity(resolve_model(moved)) != first


def test_weights_that_change_under_the_same_path_size_and_date_are_noticed(model: Path) -> None:
    first = model_identity(resolve_model(model))
    status = (model / "model.safetensors").stat()
    change_one_weight(model)
    os.utime(model / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (model / "model.safetensors").stat().st_size == status.st_size
    assert model_identity(resolve_model(model)) != first


def test_settings_that_change_what_is_computed_change_the_identity(model: Path) -> None:
    first = model_identity(resolve_model(model))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.5}))
    assert model_identity(resolve_model(model)) != first


def test_a_hash_is_remembered_and_a_damaged_memory_is_not_trusted(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = model_identity(resolve_model(model))
    remembered = sorted((cache / "hashes").iterdir())
    weights = next(each for each in remembered if "model.safetensors" in each.read_text())
    told = json.loads(weights.read_text())
    weights.write_text(json.dumps({**told, "sha256": "0" * 64}))
    assert model_identity(resolve_model(model)) != first, "it is read, not computed again"
    weights.write_text("{")
    with caplog.at_level(logging.WARNING, "sftkit"):
        assert model_identity(resolve_model(model)) == first
    assert "the file is hashed again" in caplog.text


def test_a_memory_that_cannot_be_written_does_not_stop_anything(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    assert model_identity(resolve_model(model)).startswith("sha256:")
    (told,) = [each.getMessage() for each in caplog.records]  # once, and not for each file
    assert told.startswith(f"{cache}: cannot be written (")
    assert told.endswith("hashes of models are made anew each time; SFTKIT_CACHE names another place")


def test_a_name_that_is_empty_is_not_this_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    with pytest.raises(UserError, match="the name of the model is empty"):
        resolve_model("")
    assert resolve_model(".").path is not None


def test_a_model_without_weights_has_no_identity(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights \(\*.safetensors\)"):
        model_identity(resolve_model(model))
    with pytest.raises(UserError, match="cannot be read"):
        load_model(resolve_model(model))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_one_line(file: str, model: Path) -> None:
    content = (model / file).read_bytes()
    (model / file).write_bytes(content[: len(content) // 2])
    ref = resolve_model(model)
    load: Any = {"model.safetensors": load_model, "config.json": load_settings}.get(file, load_tokenizer)
    with pytest.raises(UserError) as error:
        load(ref)
    told = str(error.value)
    assert str(model) in told
    assert "\n" not in told
    assert len(told) < 400


def test_a_model_without_a_tokenizer(model: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"has no tokenizer \(no tokenizer.json\); copy the base model's tokenizer files into it"):
        load_tokenizer(resolve_model(model))


def test_a_model_loads_ready_to_answer(model: Path) -> None:
    ref = resolve_model(model)
    loaded = load_model(ref)
    assert not loaded.training
    assert loaded.dtype == torch.float32
    assert load_model(ref, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert context_length(loaded.config) == 512
    assert context_length(load_settings(ref)) == 512


def test_the_context_is_that_of_the_text_part() -> None:
    class Text:
        max_position_embeddings = 77

    class Whole:
        max_position_embeddings = 5

        def get_text_config(self) -> Text:
            return Text()

    class Old:
        n_positions = 1024

    assert context_length(Whole()) == 77
    assert context_length(Old()) == 1024
    assert context_length(object()) is None


def quantised(model: Path, **settings: Any) -> ModelRef:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return resolve_model(model)


def test_quantised_weights_are_read_or_it_is_said_what_reads_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantisation(resolve_model(model)) is None
    unknown = quantised(model, quant_method="nonsense")
    assert quantisation(unknown) == "nonsense"
    with pytest.raises(UserError, match=r"its weights are quantised \(nonsense\), which transformers cannot read; take the engine vllm"):
        load_model(unknown)
    monkeypatch.setattr("transformers.quantizers.quantizer_awq.is_gptqmodel_available", lambda: False)
    with pytest.raises(UserError, match=r"its weights are quantised \(awq\): .*pip install gptqmodel.*; or take the engine vllm"):
        load_model(quantised(model, quant_method="awq", bits=4, group_size=64, zero_point=True, version="gemm"))


def test_quantised_in_no_way_that_can_be_told_is_one_line(model: Path) -> None:
    with pytest.raises(
        UserError, match=r"quantised \(in a way that it does not name\), which transformers cannot read; take the engine vllm"
    ):
        load_model(quantised(model))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "quantization_config": "awq"}))
    with pytest.raises(UserError, match="its config cannot be read"):
        load_model(resolve_model(model))


def test_a_model_that_bitsandbytes_quantised_answers(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    place = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(model, quantization_config=place, dtype=torch.bfloat16, device_map="cpu")
    packed.save_pretrained(tmp_path / "packed")
    for file in model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "packed")
    with closing(open_engine(str(tmp_path / "packed"), EngineConfig(engine="transformers", device="cpu"))) as engine:
        sampling = Sampling(temperature=0, max_new_tokens=4)
        (found,) = engine.generate([Request(key="a", prompt_ids=(5, 6, 7), messages=[], sampling=sampling, seed=0)])
        assert engine.identity == model_identity(resolve_model(tmp_path / "packed"))
    assert (found.error, found.num_tokens > 0) == (None, True)


def test_an_adapter_is_no_model_whether_or_not_a_config_lies_beside_it(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "adapter_config.json").write_text("{}")
    (model / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"is an adapter, not a whole model; `sftkit train merge .* -o FOLDER` makes FOLDER one"):
        resolve_model(model)
