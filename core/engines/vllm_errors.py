"""Why vLLM's processes ended: what they log of their errors, for the process that started them, which learns only that they did."""

import contextlib
import json
import logging
import os
from pathlib import Path

PLACE = "SFTKIT_VLLM_ERRORS"  # in the environment: the file that they write to
NOT_A_NUMBER = "not a number"  # the reason with which vllm_scheduler ends an answer as failed


class ErrorFile(logging.Handler):
    """Writes down the exceptions that are logged. Named in vllm_logging.json."""

    def emit(self, record: logging.LogRecord) -> None:
        """Add the exception to the file, if there is one."""
        path, error = os.environ.get(PLACE), record.exc_info[1] if record.exc_info else None
        if path and error is not None:
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:  # the engine is closed: nobody asks any more
                file.write(json.dumps(" ".join(f"{type(error).__name__}: {error}".split())[:500]) + "\n")


def first_error(path: Path | None = None) -> str | None:
    """Return the first exception in a file, of which those that follow are mostly the consequence; None where there is none."""
    path = Path(os.environ[PLACE]) if path is None else path
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return str(json.loads(lines[0])) if lines else None
