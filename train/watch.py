"""What is seen of a training while it runs: metrics, progress, checkpoints when they are due, a clean stop, a loss that is no number."""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..core.chat import Chat
from ..core.errors import Diverged
from ..core.files import read_json_lines, write_json_lines
from ..core.progress import Progress
from .checkpoints import mark_whole
from .collective import over_processes
from .stops import AFTER_SAVING

log = logging.getLogger(__name__)

NAMED = 8  # rows in an error


class Watch(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl, shows progress, saves every few minutes, stops cleanly when asked to, and refuses a loss that is no number."""

    def __init__(
        self, metrics: Path, chat: Chat, *, save_minutes: float, peak: float = 0.0, rated: float = 0.0, deadline: float | None = None
    ) -> None:
        """`peak` is what the device reaches in a matrix product, `rated` what its data sheet promises, in operations a second; 0: not told.

        `deadline` is the moment, as time.monotonic() counts, after which it stops with a checkpoint.
        """
        self.metrics, self.chat, self.peak, self.rated = metrics, chat, peak, rated
        self.token_flops = 0.0  # operations for one token
        self.stopped = False  # by a signal
        self.late = False  # stopped by the deadline
        self.rows_of: Callable[[int], Sequence[str]] = lambda step: ()  # where the rows of a step stand, as file:row
        self._trained = False  # the last step is done
        self._sound = 0  # the last step whose numbers were logged and finite
        self._deadline = deadline
        self._tokens, self._seconds = 0, 0.0  # of the training steps, in this process
        self._before = (0, 0.0)  # of those before it
        self._save_seconds = save_minutes * 60
        self._saved = time.monotonic()
        self._step_began = 0.0
        self._logged: tuple[int, float] = (0, 0.0)
        self._progress: Progress | None = None
        self._former: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Begin the progress, and keep of metrics.jsonl what stands before the step that is gone on from."""
        self.chat.configure(model)  # the trainer has just written the tokenizer's single end of sequence into it
        kept = [line for line in read_json_lines(self.metrics) if line["step"] <= state.global_step and state.global_step > 0]
        steps = [line for line in kept if "loss" in line]
        self._before = (steps[-1]["num_tokens"], steps[-1]["seconds"]) if steps else (0, 0.0)
        self._sound = state.global_step
        self._trained = state.global_step >= state.max_steps
        if state.global_step:  # the first evaluation stands; that of an epoch's end comes after a checkpoint there, and may be missing
            epoch_ended = self._trained or state.epoch == round(state.epoch)
            evaluated = any("eval_loss" in line and line["step"] == state.global_step for line in kept)
            args.eval_on_start = args.eval_strategy == "epoch" and epoch_ended and not evaluated
        if state.is_world_process_zero:
            write_json_lines(self.metrics, kept)
            self._progress = Progress("train", total=state.max_steps, unit="steps", done=state.global_step).__enter__()
        if threading.current_thread() is threading.main_thread():
            self._former = {each: signal.signal(each, self._stop) for each in (signal.SIGINT, signal.SIGTERM)}

    def _stop(self, number: int, _frame: Any) -> None:
        if self.stopped:  # asked a second time
            if torch.distributed.is_initialized():
                return  # a scheduler asks all processes, and their parent asks them once more: who wants them to end now kills them
            raise KeyboardInterrupt
        self.stopped = True  # first: a second signal may come while this is said
        log.info(AFTER_SAVING if self._trained else "stopping after this step, with a checkpoint; once more stops at once")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of a step."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock, and ask for a checkpoint when it is time or when this run is being stopped."""
        self._seconds += time.monotonic() - self._step_began
        if self._progress:
            self._progress.advance()
        self._trained = state.global_step >= state.max_steps
        self.late = self._deadline is not None and time.monotonic() > self._deadline
        due = time.monotonic() - self._saved > self._save_seconds
        # what one process wants, all have to do, at the same step
        asked, self.late, due = map(bool, over_processes(self.stopped, self.late, due))
        self.stopped = self.stopped or asked  # who is asked while the others are waited for tells them at the next step
        if asked or self.late:
            control.should_save = control.should_training_stop = True
        elif due:
            control.should_save = True
        if control.should_save or state.global_step in (1, state.max_steps):
            control.should_log = True  # what is gone on from, the first and the last step are always in metrics.jsonl

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop without an evaluation where an epoch is broken off: it is evaluated at its own end."""
        if (self.stopped or self.late) and not (self._trained or state.epoch == round(state.epoch)):
            control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark a checkpoint as whole: only such a one is resumed from."""
        over_processes(0)  # wait for all: each has its part of it
        if state.is_world_process_zero:
            mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
        self._saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write a line of metrics.jsonl."""
        facts = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **(logs or {})}
        if "loss" in facts:
            self._tokens = int(facts["num_tokens"])
            fresh, seconds = self._tokens - self._logged[0], self._seconds - self._logged[1]
            self._logged = self._tokens, self._seconds
            facts["num_tokens"], facts["seconds"] = self._tokens + self._before[0], round(self._seconds + self._before[1], 3)
            rate = fresh / seconds if seconds else 0.0
            facts["tokens_per_second"] = round(rate, 1)
            told = f"{rate:,.0f} tokens/s"
            if self.peak:
                facts["peak_share"] = round(rate * self.token_flops / self.peak, 4)
                told += f", {facts['peak_share']:.0%} of the {self.peak / 1e12:,.0f} TFLOP/s that this card reached"
            if self.rated:
                facts["mfu"] = round(rate * self.token_flops / self.rated, 4)
                told += f", MFU {facts['mfu']:.0%}"
            log.info(
                "step %d of %d: loss %.4f, learning rate %.2g, gradient %.3g, %s",
                state.global_step, state.max_steps, facts["loss"], facts["learning_rate"], facts["grad_norm"], told,
            )  # fmt: skip
        elif "eval_loss" in facts:
            log.info("step %d: validation loss %.4f", state.global_step, facts["eval_loss"])
        numbers = [
            name
            for name in ("loss", "eval_loss", *(() if args.fp16 else ("grad_norm",)))
            if name in facts and not math.isfinite(facts[name])
        ]
        facts = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in facts.items()}
        if state.is_world_process_zero:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        if numbers:
            learned = [row for step in range(self._sound + 1, state.global_step + 1) for row in self.rows_of(step)]
            rows = ", ".join(learned[:NAMED]) + (f" and {len(learned) - NAMED:,} more" if len(learned) > NAMED else "")
            if state.global_step == 0 or (state.global_step == 1 and numbers[0] != "eval_loss"):  # computed before the first update
                raise Diverged(
                    f"step {state.global_step}: {numbers[0]} is no finite number before anything was learned: some weights of the start"
                    " model are none, or too large for its number format; copy its files again, or give dtype: float32"
                    + (f"; the rows are {rows}" if rows else "")
                )
            raise Diverged(
                f"step {state.global_step}: {numbers[0]} is not a finite number any more; lower the learning rate, or use dtype float32."
                " The last checkpoint stands before this step"
                + (f"; since the last sound step, {self._sound}, it learned from {rows}" if rows else "")
            )
        self._sound = state.global_step

    def close(self) -> None:
        """End the progress and give the signals back."""
        if self._progress:
            self._progress.__exit__()
        for number, former in self._former.items():  # of several processes the parent has been asked, too: these go on to the end
            signal.signal(number, signal.SIG_IGN if torch.distributed.is_initialized() else former)
