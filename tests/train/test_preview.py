"""The preview shows each token once, trained or not, and lets nothing of the data act."""

import io
from pathlib import Path

from rich.console import Console
from sftkit.core.chat import load_chat
from sftkit.core.models import resolve_model
from sftkit.train.config import TrainConfig
from sftkit.train.preview import pieces, preview

TEXT = "你好，世界 🎉\x1b[31m <script>alert(1)</script>"


def test_pieces_are_the_whole_text_and_its_trained_part(tmp_path: Path, tiny_model: Path, chats) -> None:
    path = chats(0, [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT + " 什麼"}])
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    data = preview(path, str(tiny_model), TrainConfig(), console=console, html_path=tmp_path / "p.html")
    chat = load_chat(resolve_model(tiny_model))
    (row,) = data.train
    shown = list(pieces(row, chat))
    assert "".join(text for text, _ in shown) == chat.tokenizer.decode(row.ids)
    assert "".join(text for text, trained in shown if trained) == f"{TEXT} 什麼<|im_end|>"
    page = (tmp_path / "p.html").read_text()
    assert "<script>" not in page
    assert "&lt;" in page
    assert "\x1b[31m " not in page
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "你" in out
    assert "\\x1b" in out
    assert "1 to train on" in out


def test_fewer_rows_than_none_are_refused(tiny_model: Path, chats, cli) -> None:
    assert cli("train", "preview", chats(3), "--model", tiny_model, "-n", "-1")[0] == 2
    assert "Calculate" not in cli("train", "preview", chats(3), "--model", tiny_model, "-n", "0")[1]


def test_the_report_names_everything_that_is_looked_for(tiny_model: Path, chats) -> None:
    user, assistant = ({"role": role, "content": "Tell me. "} for role in ("user", "assistant"))
    long, empty = {**assistant, "content": "word " * 300}, {**assistant, "content": " "}
    repeated = [[user, {**assistant, "content": f"Answer {n}."}] for n in range(30)]
    path = chats(0, *repeated, [user, long], [user, empty], [user, assistant, user, long, user, assistant])
    console = Console(file=io.StringIO(), width=200)
    preview(path, str(tiny_model), TrainConfig(validation=0.1, max_length=200, overlong="split"), console=console, limit=0)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    for line in (
        "rows: 33 read, 27 to train on, 3 to validate on",
        "left out: 2 over_max_length, 1 empty_answer",
        "longer rows: 2 left out, 0 cut between turns (overlong: split)",
        "each answer ends with: <|im_end|>, which is trained on in 100.00% of the rows; others are left out",
        "empty answers: 1 row left out",
        "two BOS tokens: none: rows that begin with two are left out",
        "prompts of validation rows that are trained on, too: 3",
        "are trained on",
    ):
        assert line in out
