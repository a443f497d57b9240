"""What is saved in the end is what was trained, rounded: rounding is told, damage is refused, by a process that knows only the files."""

import logging
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from sftkit.core.chat import Chat, load_chat
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, resolve_model
from sftkit.train import final, reloaded
from sftkit.train.data import Row

KEPT = r"the saved model is in .*final, the checkpoints are in .*checkpoints: the same command goes on from the last"


@pytest.fixture
def rows(tiny_model: Path) -> list[Row]:
    ids = load_chat(resolve_model(tiny_model)).prompt(
        [{"role": "user", "content": "What is the difference between a thread and a process?"}]
    )
    return [Row(("a", 0), ids, [place > 4 for place in range(len(ids))]), Row(("b", 0), ids[:9], [place > 6 for place in range(9)])]


@pytest.fixture
def chat(tiny_model: Path) -> Chat:
    return load_chat(resolve_model(tiny_model))


def save(tiny_model: Path, chat: Chat, rows: list[Row], room: Path, dtype: torch.dtype = torch.float32) -> Path:
    ref = resolve_model(tiny_model)
    final.save_final(load_model(ref, dtype="float32"), ref, chat, rows, room, dtype=dtype, facts={})
    return room / "final"


def test_what_rounding_takes_is_told_and_no_damage(
    tiny_model: Path, chat: Chat, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ref = resolve_model(tiny_model)
    model = load_model(ref, dtype="float32")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(final, "TOLERANCE", 1e-6)
        final.save_final(model, ref, chat, rows, tmp_path, dtype=torch.bfloat16, facts={})  # its file is held against what was rounded
    assert "rounded to bfloat16, the model has a loss of" in caplog.text
    assert "adapter" not in caplog.text
    assert {each.dtype for each in model.buffers()} == {torch.float32}  # the frequencies of positions are no weights
    with pytest.raises(UserError, match=f"it was not saved whole; {KEPT}"):
        final.check_saved(tmp_path / "final", chat, rows, 1.05 * final.answer_loss(model, rows))


def test_a_fresh_process_finds_what_was_saved_and_what_was_damaged_after(
    loads_apart: None, tiny_model: Path, chat: Chat, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(reloaded, "load_model", lambda *_: pytest.fail("loaded by this process"))
    caplog.set_level(logging.INFO, logger="sftkit")
    folder = save(tiny_model, chat, rows, tmp_path)
    loss = final.answer_loss(load_model(resolve_model(tiny_model)), rows)
    assert f"saved: {folder}; loaded again by a fresh process, its loss on 2 rows is {loss:.4f}" in caplog.text

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].mul_(-4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"has a loss of [0-9.]+ on 2 rows, where it had {loss:.4f} in memory: .*; {KEPT}"):
        final.check_saved(folder, chat, rows, loss)


def test_what_a_fresh_process_cannot_read_is_one_line(
    loads_apart: None, chat: Chat, rows: list[Row], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "final").mkdir()
    with pytest.raises(UserError, match=f"final: .*; {KEPT}") as raised:
        final.check_saved(tmp_path / "final", chat, rows, 1.0)
    assert str(raised.value).count("final: ") == 1
    assert "\n" not in str(raised.value)
    assert "process of its own" not in str(raised.value)  # it did its work
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.kill(os.getpid(), 9)", r"was killed by SIGKILL \(exit code -9, as a rule for want of memory\); it said nothing"),
        ("sys.exit('no\\nroom')", r"ended with exit code 1 and without a whole answer; its last words: room"),
        ("print('{')", r"ended with exit code 0 and without a whole answer; it said nothing"),
    ],
)
def test_a_process_that_dies_over_it_is_one_line_with_its_last_words_and_where_things_are(
    code: str, said: str, loads_apart: None, chat: Chat, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, code, monkeypatch)
    with pytest.raises(UserError, match=f"final: loaded again to be checked, in a process of its own, which {said}; {KEPT}") as raised:
        final.check_saved(tmp_path / "final", chat, rows * 1000, 1.0)  # more than a pipe holds: it dies without reading them
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("python", ["", "/nowhere/python"])
def test_where_no_process_can_be_started_this_one_loads_it(
    python: str, loads_apart: None, tiny_model: Path, chat: Chat, rows: list[Row], monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    loss = final.answer_loss(load_model(resolve_model(tiny_model)), rows)
    monkeypatch.setattr(reloaded.sys, "executable", python)
    final.check_saved(tiny_model, chat, rows, loss)
    assert "no process can be started to load the saved model" in caplog.text


def test_ctrl_c_leaves_no_process_behind(
    loads_apart: None, chat: Chat, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'running'); time.sleep(60)", monkeypatch)
    monkeypatch.chdir(tmp_path)

    def interrupt() -> None:
        while not (tmp_path / "running").exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        final.check_saved(tmp_path / "final", chat, rows, 1.0)
    assert not psutil.pid_exists(int((tmp_path / "running").read_text()))


def stand_in(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a program with this code run instead of Python."""
    program = folder / "program"
    program.write_text(f"#!{os.path.realpath(reloaded.sys.executable)}\nimport os, sys, time\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(reloaded.sys, "executable", str(program))
