"""What is saved in the end is what was trained, rounded: rounding is told, damage is refused."""

import logging
from pathlib import Path

import pytest
import torch
from sftkit.core.chat import load_chat
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, resolve_model
from sftkit.train import final
from sftkit.train.data import Row


def test_what_rounding_takes_is_told_and_no_damage(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ref = resolve_model(str(tiny_model))
    model, chat = load_model(ref, dtype="float32"), load_chat(ref)
    ids = chat.prompt([{"role": "user", "content": "What is the difference between a thread and a process?"}])
    rows = [Row(("a", 0), ids, [place > 4 for place in range(len(ids))])]
    monkeypatch.setattr(final, "TOLERANCE", 1e-6)
    with caplog.at_level(logging.WARNING):
        final.save_final(model, ref, chat, rows, tmp_path, dtype=torch.bfloat16, facts={})  # its file is held against what was rounded
    assert "rounded to bfloat16, the model has a loss of" in caplog.text
    assert "adapter" not in caplog.text
    assert {each.dtype for each in model.buffers()} == {torch.float32}  # the frequencies of positions are no weights

    monkeypatch.undo()
    with pytest.raises(UserError, match="it was not saved"):
        final.check_saved(tmp_path / "final", chat, rows, 1.05 * final.answer_loss(model, rows))
