"""A saved model loaded again as a stranger would: by a process that knows nothing but its folder, on the CPU."""

import json
import logging
import os
import signal
import site
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..core.chat import load_chat
from ..core.errors import UserError
from ..core.models import load_model, resolve_model
from .data import Row
from .rendering import end_with_parent

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reloaded:
    """What a saved model is: how it renders, where it stops, and what it computes."""

    fingerprint: str  # of its tokenizer and chat template
    stop_ids: list[int]
    loss: float  # -log P(answer | prompt) per token of the rows it was asked about, in nats


def reload(folder: Path, rows: Sequence[Row]) -> Reloaded:
    """Load a saved model, on the CPU, and compute its loss on rows. Raises UserError where its files cannot be read."""
    from .likelihood import answer_loss

    ref = resolve_model(folder)
    chat = load_chat(ref)
    return Reloaded(fingerprint=chat.fingerprint(), stop_ids=list(chat.stop_ids), loss=answer_loss(load_model(ref), rows))


def reload_apart(folder: Path, rows: Sequence[Row]) -> Reloaded:
    """Do what `reload` does in a process of its own, which sees no GPU: a training may hold all of its memory.

    Raises UserError as `reload` does, and where the process dies or gives no answer. Ctrl-C ends it with this one, and not before.
    Where none can be started it is done in this process, which is said.
    """
    try:
        return _apart(folder, rows)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no process can be started to load the saved model (%s): it is loaded in this one", error)
        return reload(folder, rows)


def _apart(folder: Path, rows: Sequence[Row]) -> Reloaded:
    if not sys.executable:
        raise OSError("this Python does not know its own path")
    told = json.dumps([{"ids": row.ids, "labels": row.labels} for row in rows])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    home = str(Path(__file__).parents[2])  # of the package
    if home in sys.path and home not in site.getsitepackages():  # a notebook may have put it there
        environment["PYTHONPATH"] = os.pathsep.join(each for each in (os.environ.get("PYTHONPATH"), home) if each)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "sftkit.train.reloaded", str(folder)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        errors="replace", preexec_fn=end_with_parent, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            written, said = process.communicate(told)
        finally:
            process.kill()  # alive only when this process is being stopped
            process.wait()
    try:
        answer = json.loads(written)
    except ValueError:
        answer = None
    if answer is None or process.returncode:
        raise UserError(f"{folder}: loaded again to be checked, in a process of its own, which {_end(process.returncode, said)}")
    if "error" in answer:
        raise UserError(answer["error"])
    return Reloaded(**answer)


def _end(code: int, said: str) -> str:
    """Say how a process ended that did not do its work, with the end of what it said."""
    how = f"ended with exit code {code} and without a whole answer"
    if code < 0:
        why = ", as a rule for want of memory" if code == -signal.SIGKILL else ""
        name = {each.value: each.name for each in signal.Signals}.get(-code, f"signal {-code}")
        how = f"was killed by {name} (exit code {code}{why})"
    words = [line.strip() for line in said.splitlines() if line.strip()]
    return f"{how}; {'its last words: ' + words[-1][-300:] if words else 'it said nothing'}"


def _answer(folder: Path) -> None:
    """Be that process: rows come as JSON on stdin, and the answer goes to stdout, to which nothing else may write."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        rows = [Row(("", 0), each["ids"], [label != -100 for label in each["labels"]]) for each in json.load(sys.stdin)]
        answer = asdict(reload(folder, rows))
    except UserError as error:
        answer = {"error": str(error)}
    json.dump(answer, out)
    out.close()
    sys.stderr.flush()
    os._exit(0)  # what has been imported takes most of a second to be taken apart


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
