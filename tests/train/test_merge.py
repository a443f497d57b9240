"""A merged adapter is a whole model that says the same; what does not fit its base is refused."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from sftkit.cli import sftkit
from sftkit.core.chat import load_chat
from sftkit.core.errors import UserError
from sftkit.core.models import final_facts, load_model, resolve_model
from sftkit.train.export import export_gguf
from sftkit.train.merge import merge


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An adapter for the tiny model, with weights that change it, as other tools save one."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    torch.manual_seed(1)
    made = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_model(resolve_model(tiny_model)), made).save_pretrained(folder)
    return folder


def test_the_merged_model_is_base_and_adapter_in_one(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    result = CliRunner().invoke(sftkit, ["train", "merge", str(adapter), "-o", str(tmp_path / "merged")], catch_exceptions=False)
    assert "KL(adapter ‖ merged)" in result.output
    ref = resolve_model(tmp_path / "merged")
    chat = load_chat(ref)
    assert chat.fingerprint() == load_chat(resolve_model(tiny_model)).fingerprint() == final_facts(ref)["template"]
    ids = torch.tensor([chat.prompt([{"role": "user", "content": "What is the sea?"}])])
    with torch.no_grad():
        apart = PeftModel.from_pretrained(load_model(resolve_model(tiny_model)), adapter).eval()(ids).logits
        base = load_model(resolve_model(tiny_model))(ids).logits
        merged = load_model(ref)(ids).logits
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-4)
    assert float((merged - base).abs().max()) > 0.1
    assert 0 <= abs(final_facts(ref)["merged"]["kl"]) < 1e-6
    assert final_facts(ref)["merged"]["learned"] > 1e-3
    with pytest.raises(UserError, match="is there already; give a new folder"):
        merge(adapter, tmp_path / "merged")
    rounded = merge(adapter, tmp_path / "half", dtype="bfloat16")
    assert rounded.dtype == "bfloat16"
    assert rounded.kl > result_kl(ref)
    assert load_model(resolve_model(tmp_path / "half")).dtype is torch.bfloat16


def result_kl(ref) -> float:
    return float(final_facts(ref)["merged"]["kl"])


def test_rounding_that_changes_what_it_says_is_refused_with_the_figure(
    adapter: Path, tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("sftkit.train.merge.MOST_KL", 1e-9)
    with pytest.raises(
        UserError, match=r"merged in bfloat16 .*allowed 1e-09; the adapter is [0-9.e-]+ from its base\); give --dtype float32"
    ):
        merge(adapter, tmp_path / "merged", dtype="bfloat16")
    assert not (tmp_path / "merged").exists()


def test_the_bar_is_a_thousandth_of_a_nat(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Twelve times as strong, the adapter leaves weights that bfloat16 rounds too coarsely: 5e-3 nats a token, as it is 2e-5."""
    loud = tmp_path / "loud"
    shutil.copytree(adapter, loud)
    weights = load_file(loud / "adapter_model.safetensors")
    save_file({name: 12 * each if "lora_B" in name else each for name, each in weights.items()}, loud / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"KL\(adapter ‖ merged\) 0\.00[0-9]+ nats a token, allowed 0\.001; .*give --dtype float32"):
        merge(loud, tmp_path / "merged", dtype="bfloat16")
    assert not (tmp_path / "merged").exists()
    assert merge(loud, tmp_path / "whole", dtype="float32").kl < 1e-6
    assert 1e-6 < merge(adapter, tmp_path / "half", dtype="bfloat16").kl < 1e-3


def test_another_base_is_refused(adapter: Path, tiny_model: Path, tiny_base_model: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    shutil.copytree(adapter, told)
    (told / "sftkit.json").write_text(json.dumps({"identity": "sha256:other"}))
    with pytest.raises(UserError, match=r"was trained on .*tiny-chat, and .*tiny-base has other weights; give that one with --base"):
        merge(told, tmp_path / "merged", base=str(tiny_base_model))
    model = load_model(resolve_model(tiny_model))
    from sftkit.train.init import prune_layers

    prune_layers(model, {1})
    model.save_pretrained(tmp_path / "pruned")
    load_chat(resolve_model(tiny_model)).save(tmp_path / "pruned")
    with pytest.raises(UserError, match=r"belongs to another base: of 14 weights 0 are missing, 0 have another shape, 14 are unknown"):
        merge(adapter, tmp_path / "merged", base=str(tmp_path / "pruned"))
    gone = json.loads((told / "adapter_config.json").read_text())
    (told / "adapter_config.json").write_text(json.dumps({**gone, "base_model_name_or_path": "/nowhere/model"}))
    with pytest.raises(UserError, match=r"was trained on /nowhere/model, which is not here .*; give --base"):
        merge(told, tmp_path / "merged")


def test_what_is_no_adapter_is_named(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match="is no adapter"):
        merge(tiny_model, tmp_path / "merged")
    with pytest.raises(UserError, match="no such folder"):
        merge(tmp_path / "none", tmp_path / "merged")
    (tmp_path / "run" / "train" / "final").mkdir(parents=True)
    with pytest.raises(UserError, match="trained the whole model, there is nothing to merge"):
        merge(tmp_path / "run", tmp_path / "merged")
    damaged = tmp_path / "damaged"
    shutil.copytree(adapter, damaged)
    (damaged / "adapter_model.safetensors").write_bytes((damaged / "adapter_model.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        merge(damaged, tmp_path / "merged")
    for written, told in (("{", "is not valid JSON"), ("null", "is not a JSON object"), ("[1]", "is not a JSON object")):
        (damaged / "adapter_config.json").write_text(written)
        with pytest.raises(UserError, match=rf"adapter_config\.json: {told}.*; copy the file again"):
            merge(damaged, tmp_path / "merged")
    (damaged / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        merge(damaged, tmp_path / "merged")


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path: Path, tiny_model: Path, adapter: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sftkit.train.merge.load_base", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("sftkit.train.export.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"file: is no folder that can be written to \(File exists\); name another place"):
        merge(adapter, tmp_path / "file" / "merged")
    with pytest.raises(UserError, match=r"file: is no folder that can be written to"):
        export_gguf(tiny_model, tmp_path / "file" / "mine.gguf")


def test_an_adapter_is_no_model_to_begin_with(adapter: Path) -> None:
    with pytest.raises(UserError, match=r"is an adapter, not a whole model; `sftkit train merge .* -o FOLDER` makes FOLDER one"):
        resolve_model(adapter)


def test_on_a_full_disk_nothing_is_left_and_one_line_says_so(adapter: Path, tiny_model: Path, tmp_path: Path, cli) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for command in (["merge", adapter, "-o", tmp_path / "merged"], ["export", tiny_model, "--gguf", tmp_path / "model.gguf"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # stands for a full disk: writing past it fails in the same way
        try:
            code, _, err = cli("train", *command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert code == 1
        assert err.splitlines()[-1].endswith("cannot be written, the disk or a quota is full; make room: nothing is left of it")
        assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_a_gguf_file_knows_its_base_among_others(tmp_path: Path, tiny_model: Path, chats, recwarn) -> None:
    from sftkit.train.config import TrainConfig
    from sftkit.train.sft import train

    base = tmp_path / "models" / "base.gguf"
    export_gguf(tiny_model, base, format="f32")
    shutil.copyfile(base, base.with_name("another.gguf"))
    run = train(chats(8), str(base), tmp_path / "run", TrainConfig(lora=True, stop_check=0)).run
    assert json.loads((run / "train" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not [each for each in recwarn if "Could not find a config file" in str(each.message)]  # PEFT's, which looked in the folder
    assert merge(run, tmp_path / "merged").dtype == "bfloat16"  # what a .gguf file is saved in
