"""An export is pushed to a Hub, a small one of our own that speaks its protocol: what arrives, and what is said where it does not."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import yaml
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate.config import ExportConfig
from sftkit.curate.export import export, push

from .hub_server import TOKEN, Hub, Repository, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serve a Hub, and let huggingface_hub in this process take it for the real one."""
    with serving() as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the large storage that is plain HTTP
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def run(toy_run: Callable[..., Run]) -> Run:
    return toy_run([{"prompt": f"第{number}个问题", "response": "שלום 👩‍🚀 ok"} for number in range(3)], "mine")


def contents(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def held(hub: Hub, name: str = "me/data") -> dict[str, bytes]:
    return {path: content for path, content in hub.repositories[name].files.items() if path != ".gitattributes"}


def test_the_command_pushes_the_data_set_with_its_card(run: Run, tmp_path: Path) -> None:
    """In a process of its own, which is told of the Hub as a user would tell it: by HF_ENDPOINT and HF_TOKEN."""
    run.close()
    with serving() as hub:
        told = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "sftkit", "curate", "export", run.path, "-o", tmp_path / "out", "--push-to-hub", "me/data"]
        environment = {**os.environ, **told, "PYTHONSAFEPATH": "1"}
        done = subprocess.run([str(each) for each in command], env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"3 of 3 rows in {tmp_path / 'out'}\npushed to {hub.address}/datasets/me/data\n"
        assert held(hub) == contents(tmp_path / "out")
        assert hub.repositories["me/data"].private
    card = held(hub)["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"tags": ["sftkit"], "configs": [{"config_name": "default", "data_files": "train.jsonl"}]}
    assert "`train.jsonl`, format `trl-messages`: 3 of 3 rows" in card
    rows = [json.loads(line) for line in held(hub)["train.jsonl"].decode().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["第0个问题", "第1个问题", "第2个问题"]
    assert {row["messages"][1]["content"] for row in rows} == {"שלום 👩‍🚀 ok"}


def test_a_large_file_goes_to_the_large_storage_and_another_format_replaces_the_first(run: Run, hub: Hub, tmp_path: Path) -> None:
    export(run, tmp_path / "out", ExportConfig(format="openai", push_to_hub="me/data"))
    hub.repositories["me/data"].files["notes.md"] = b"my own"
    done = export(run, tmp_path / "out", ExportConfig(format="parquet", push_to_hub="me/data"))
    assert done.address == f"{hub.address}/datasets/me/data"
    assert list(hub.large.values()) == [(tmp_path / "out" / "train.parquet").read_bytes()]
    assert held(hub) == {**contents(tmp_path / "out"), "notes.md": b"my own"}  # no train.jsonl of before
    (tmp_path / "back.parquet").write_bytes(held(hub)["train.parquet"])
    assert pl.read_parquet(tmp_path / "back.parquet").height == 3
    assert push(tmp_path / "out", "me/data") == done.address  # the same once more
    assert hub.repositories["me/data"].commits[:2] == ["Export of sftkit"] * 2


def test_a_repository_that_holds_something_else_stays_as_it_is(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/thesis"] = Repository(private=False, files={".gitattributes": b"", "README.md": b"of ten years", "a.csv": b"1"})
    with pytest.raises(UserError, match=r"me/thesis: holds other files \(README.md, a.csv\) and is no export of sftkit; the files are in"):
        export(run, tmp_path / "out", ExportConfig(push_to_hub="me/thesis"))
    assert hub.repositories["me/thesis"].files["README.md"] == b"of ten years"
    assert hub.repositories["me/thesis"].commits == []
    hub.repositories["me/empty"] = Repository(private=False)
    export(run, tmp_path / "out", ExportConfig(push_to_hub="me/empty"))
    assert held(hub, "me/empty") == contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("token", "reason", "cure"),
    [
        (None, "there is no token of the Hub", "`hf auth login`, then again"),
        ("hf_of_another", "401: Invalid username or password.", "`hf auth login`, then again"),
    ],
)
def test_a_token_that_is_missing_or_not_valid(
    token: str | None, reason: str, cure: str, run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        export(run, out, ExportConfig(push_to_hub="me/data"))
    assert str(caught.value) == f"me/data: could not be pushed ({reason}); the files are in {out}: {cure}"
    assert hub.repositories == {}
    assert len((out / "train.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"refuses_at": ("commit", 403, "You may read here and not write")}, "(403: You may read here and not write); the files are in OUT: give the token the right to write there, then again"),
        ({"refuses_at": ("create", 429, "slow down")}, "(429: slow down); the files are in OUT: then again"),
        ({"refuses_at": ("preupload", 503, "down for an hour")}, "(503: down for an hour); the files are in OUT: then again"),
        ({"refuses_at": ("validate", 400, "tags: expected a list")}, "(Invalid metadata in README.md. - tags: expected a list); the files are in OUT: then again"),
        ({"hangs_up_at": "create"}, "(Server disconnected without sending a response.); the files are in OUT: then again"),
        ({"hangs_up_at": "/large/"}, "(Server disconnected without sending a response.); the files are in OUT: then again"),
        ({"hangs_up_at": "commit"}, "(Server disconnected without sending a response.); the files are in OUT: then again"),
    ],
    ids=lambda each: str(next(iter(each.values()))) if isinstance(each, dict) else "",
)  # fmt: skip
def test_what_is_cut_off_or_refused_is_one_line_and_the_same_command_mends_it(
    fault: dict, told: str, run: Run, hub: Hub, tmp_path: Path
) -> None:
    out, config = tmp_path / "out", ExportConfig(format="parquet", push_to_hub="me/data")
    for name, value in fault.items():
        setattr(hub, name, value)
    with pytest.raises(UserError) as caught:
        export(run, out, config)
    assert str(caught.value) == f"me/data: could not be pushed {told.replace('OUT', str(out))}"
    assert pl.read_parquet(out / "train.parquet").height == 3
    assert not hub.repositories or held(hub).keys() <= {"export.json"}, "half an export must not stand there"
    hub.hangs_up_at, hub.refuses_at = "", ("", 0, "")
    export(run, out, config)
    assert held(hub) == contents(out)


def test_a_hub_that_cannot_be_reached(run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^me/data: could not be pushed \(.*Connection refused\); the files are in .*out: then again$"):
        export(run, tmp_path / "out", ExportConfig(push_to_hub="me/data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=re.escape("offline mode is enabled")):
        push(tmp_path / "out", "me/data")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["a name", "me/my/data", "-me/data", "me/data.git"])
def test_a_name_that_the_hub_would_not_take(name: str, run: Run, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not be pushed \(.*[Rr]epo"):
        export(run, tmp_path / "out", ExportConfig(push_to_hub=name))
    assert hub.asked == []
