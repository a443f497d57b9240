"""Show what is trained on, token by token: in the terminal and as one HTML file."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ..core.chat import Chat, load_chat
from ..core.files import write_text
from ..core.models import context_length, load_settings, resolve_model
from ..core.text import visible
from .config import TrainConfig
from .data import Row, TrainingData
from .prepared import load_rows

TRAINED, CONTEXT = "black on green", "dim"


def preview(
    data: str | Path | Sequence[str],
    model: str,
    config: TrainConfig,
    *,
    limit: int = 3,
    html_path: Path | None = None,
    revision: str | None = None,
    console: Console | None = None,
) -> TrainingData:
    """Print the report over the whole set and the tokens of `limit` rows; write `html_path` too when given. Trains nothing."""
    ref = resolve_model(model, revision=revision)
    chat = load_chat(ref)
    settings = load_settings(ref)
    size = getattr(settings.get_text_config(), "vocab_size", None)
    prepared = load_rows(data, chat, config, context=context_length(settings), vocabulary=size)
    console = console or Console()
    for name, value in report_lines(prepared):
        console.print(Text.assemble((f"{name}: ", "bold"), value))
    console.print(Text.assemble("trained on: ", ("like this", TRAINED), ", read only: ", ("like this", CONTEXT)))
    for row in prepared.train[:limit]:
        console.print(_panel(row, chat))
    if html_path:
        write_html(html_path, prepared, chat, limit=max(limit, 20))
        console.print(f"written: {html_path}")
    return prepared


def report_lines(data: TrainingData) -> list[tuple[str, str]]:
    """Return the report for people, as (name, value)."""
    report = data.report
    rejected = ", ".join(f"{count:,} {rule}" for rule, count in report.rejected.items()) or "none"
    rows = report.train_rows + report.validation_rows
    ended = rows / (rows + report.rejected.get("no_end_of_turn", 0))
    longer, empty = (report.rejected.get(rule, 0) for rule in ("over_max_length", "empty_answer"))
    return [
        ("rows", f"{report.rows:,} read, {report.train_rows:,} to train on, {report.validation_rows:,} to validate on"),
        ("left out", rejected),
        ("tokens", f"{report.tokens:,}, of which {report.trained_tokens:,} ({report.trained_share:.1%}) are trained on"),
        ("longest row", f"{report.longest:,} tokens" + (f" of {report.max_length:,} allowed" if report.max_length else "")),
        ("longer rows", f"{longer:,} left out, {report.split:,} cut between turns (overlong: {report.overlong})"),
        ("each answer ends with", f"{report.end_of_turn}, which is trained on in {ended:.2%} of the rows; others are left out"),
        ("empty answers", f"{empty:,} rows left out" if empty != 1 else "1 row left out"),
        ("two BOS tokens", "none: rows that begin with two are left out"),
        ("prompts of validation rows that are trained on, too", f"{report.repeated:,}"),
        *(("mind", warning) for warning in report.warnings),
    ]


def pieces(row: Row, chat: Chat) -> Iterator[tuple[str, bool]]:
    """Yield the text of each token and whether it is trained on. Tokens that hold parts of one character come as one piece."""
    waiting: list[int] = []
    for place, token in enumerate(row.ids):
        waiting.append(token)
        text = chat.tokenizer.decode(waiting, skip_special_tokens=False)
        whole = not text.endswith("\ufffd") or len(waiting) > 8
        if whole or place + 1 == len(row.ids) or row.mask[place + 1] != row.mask[place]:
            yield text, row.mask[place]
            waiting = []


def _panel(row: Row, chat: Chat) -> Panel:
    text, num_trained = Text(), sum(row.mask)
    for piece, trained in pieces(row, chat):
        text.append(visible(piece).replace("\n", "↵\n"), style=TRAINED if trained else CONTEXT)
    return Panel(text, title=f"{row.key[0]}: {num_trained:,} of {len(row.ids):,} tokens are trained on", title_align="left")


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2127;background:#fff}
table{border-collapse:collapse}td{padding:.1rem 1rem .1rem 0;vertical-align:top}td:first-child{color:#5b6570}
article{border:1px solid #d5dae0;border-radius:6px;padding:.7rem 1rem;margin:1rem 0;white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.7 ui-monospace,monospace}h2{font-size:.9rem;margin:0 0 .4rem;font-family:system-ui,sans-serif;color:#5b6570}
span{border-right:1px solid #e3e7eb;color:#6b7480}span.t{background:#d3f2dc;color:#0b3d1c;border-color:#a8dfb8}
@media(prefers-color-scheme:dark){body{background:#15181c;color:#dfe4ea}article{border-color:#333a42}
span{color:#8b95a1;border-color:#2a3037}span.t{background:#123d22;color:#c9f2d6;border-color:#1d5a34}}
"""


def write_html(path: Path, data: TrainingData, chat: Chat, *, limit: int) -> None:
    """Write the report and the tokens of the first rows as one file that needs no network. All text from the data is escaped."""
    table = "".join(f"<tr><td>{name}<td>{html.escape(value)}" for name, value in report_lines(data))
    articles = "".join(_article(row, chat) for row in data.train[:limit])
    write_text(
        path,
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>What is trained on</title><style>{STYLE}</style><h1>What is trained on</h1><table>{table}</table>"
        f"<p><span class=t>Green tokens</span> are trained on; the others are read only.</p>{articles}\n",
    )


def _article(row: Row, chat: Chat) -> str:
    tokens = "".join(
        f"<span{' class=t' if trained else ''}>{html.escape(visible(piece)).replace(chr(10), '↵' + chr(10))}</span>"
        for piece, trained in pieces(row, chat)
    )
    return f"<article><h2>{html.escape(row.key[0])}: {sum(row.mask):,} of {len(row.ids):,} tokens</h2>{tokens}</article>"
