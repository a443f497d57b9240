"""TRL's trainer, told what sftkit knows: the rows' labels, their order, an exact validation loss, when to save, what to report."""

import hashlib
import json
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..core.chat import Chat
from ..core.errors import UserError
from ..core.progress import Progress
from ..core.run import is_done, mark_done
from .config import TrainConfig
from .data import Row

log = logging.getLogger(__name__)

GROUP = 16  # updates whose rows are sorted by length together: less padding, and still a random mix


class EpochOrder(Sampler[int]):
    """The order of the rows in an epoch: a function of seed, epoch and lengths, so that a resumed run goes on in the same one.

    Rows are shuffled, then sorted by length within groups of GROUP updates, whose order is shuffled again; so an update holds the same
    rows into however many forward passes it is split. The update with the longest row of all comes first: what does not fit the
    memory fails in the first step, not in the night.
    """

    def __init__(self, lengths: Sequence[int], update_size: int, seed: int) -> None:
        self._lengths, self._size, self._seed = list(lengths), update_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        yield from (row for update in self.updates() for row in update)

    def updates(self) -> list[list[int]]:
        """Return the rows of each update of the epoch; all but the last have `update_size`."""
        size = self._size
        shuffled = sorted(range(len(self)), key=lambda row: _draw(self._seed, self._epoch, row))
        whole = len(shuffled) - len(shuffled) % size
        updates = []
        for start in range(0, whole, GROUP * size):
            group = sorted(shuffled[start : min(start + GROUP * size, whole)], key=lambda row: -self._lengths[row])
            updates += [group[place : place + size] for place in range(0, len(group), size)]
        updates.sort(key=lambda update: _draw(self._seed, self._epoch, update[0]))
        if updates:
            longest = max(range(len(updates)), key=lambda place: self._lengths[updates[place][0]])
            updates.insert(0, updates.pop(longest))
        rest = sorted(shuffled[whole:], key=lambda row: -self._lengths[row])
        return [*updates, rest] if rest else updates


def _draw(seed: int, epoch: int, row: int) -> bytes:
    return hashlib.sha256(f"{seed}/{epoch}/{row}".encode()).digest()[:8]


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with our order of rows, and a validation loss that is exact: the sum over all tokens, divided once."""

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        rows = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return EpochOrder([len(ids) for ids in rows["input_ids"]], size, self.args.seed)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return -log P(answer | prompt) per token over all validation rows, and how many tokens that were."""
        rows = sorted(self.eval_dataset if eval_dataset is None else eval_dataset, key=lambda row: -len(row["input_ids"]))
        training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        for start in range(0, len(rows), self.args.eval_batch_size):
            batch = self._prepare_inputs(self.data_collator(rows[start : start + self.args.eval_batch_size]))
            with self.compute_loss_context_manager():
                outputs = self.model(**batch, fused_lm_head=True)
            total -= float(outputs.log_probs.sum())
            count += int(outputs.label_mask.sum())
        self.model.train(training)
        metrics = {f"{metric_key_prefix}_loss": total / count, f"{metric_key_prefix}_tokens": float(count)}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Watch(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl, shows progress, saves every few minutes, stops cleanly when asked to, and refuses a loss that is no number."""

    def __init__(self, metrics: Path, chat: Chat, *, save_minutes: float) -> None:
        self.metrics, self.chat = metrics, chat
        self.stopped = False  # by a signal
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
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step and state.global_step > 0]
        steps = [line for line in map(json.loads, kept) if "loss" in line]
        self._before = (steps[-1]["num_tokens"], steps[-1]["seconds"]) if steps else (0, 0.0)
        self.metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._progress = Progress("train", total=state.max_steps, unit="steps", done=state.global_step).__enter__()
        if threading.current_thread() is threading.main_thread():
            self._former = {each: signal.signal(each, self._stop) for each in (signal.SIGINT, signal.SIGTERM)}

    def _stop(self, number: int, _frame: Any) -> None:
        if self.stopped:  # asked a second time
            raise KeyboardInterrupt
        log.info("stopping after this step, with a checkpoint; once more stops at once")
        self.stopped = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of a step."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock, and ask for a checkpoint when it is time or when this run is being stopped."""
        self._seconds += time.monotonic() - self._step_began
        if self._progress:
            self._progress.advance()
        if self.stopped:
            control.should_save = control.should_training_stop = True
        elif time.monotonic() - self._saved > self._save_seconds:
            control.should_save = True
        if control.should_save or state.global_step in (1, state.max_steps):
            control.should_log = True  # what is gone on from, the first and the last step are always in metrics.jsonl

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark a checkpoint as whole: only such a one is resumed from."""
        mark_done(Path(args.output_dir) / f"checkpoint-{state.global_step}", step=state.global_step)
        self._saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write a line of metrics.jsonl."""
        facts = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **(logs or {})}
        if "loss" in facts:
            self._tokens = int(facts["num_tokens"])
            fresh, seconds = self._tokens - self._logged[0], self._seconds - self._logged[1]
            self._logged = self._tokens, self._seconds
            facts["num_tokens"], facts["seconds"] = self._tokens + self._before[0], round(self._seconds + self._before[1], 3)
            facts["tokens_per_second"] = round(fresh / seconds, 1) if seconds else None
            log.info(
                "step %d of %d: loss %.4f, learning rate %.2g, gradient %.3g, %s tokens/s",
                state.global_step, state.max_steps, facts["loss"], facts["learning_rate"], facts["grad_norm"],
                f"{facts['tokens_per_second'] or 0:,.0f}",
            )  # fmt: skip
        elif "eval_loss" in facts:
            log.info("step %d: validation loss %.4f", state.global_step, facts["eval_loss"])
        numbers = [name for name in ("loss", "eval_loss", "grad_norm") if name in facts and not math.isfinite(facts[name])]
        facts = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in facts.items()}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        if numbers:
            raise UserError(
                f"step {state.global_step}: {numbers[0]} is not a finite number any more; lower the learning rate, or use dtype float32."
                " The last checkpoint stands before this step"
            )

    def close(self) -> None:
        """End the progress and give the signals back."""
        if self._progress:
            self._progress.__exit__()
        for number, former in self._former.items():
            signal.signal(number, former)


def make_trainer(
    model: Any, chat: Chat, train: Sequence[Row], validation: Sequence[Row], config: TrainConfig, *,
    checkpoints: Path, device: str, half: torch.dtype | None, watch: Watch, peft_config: Any = None,
) -> Trainer:  # fmt: skip
    """Return the trainer of a run. `half` is the 16-bit format that the forward pass computes in, None for the weights' own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.24 renames gradient_checkpointing, 5.17 knows no other name
        arguments = _arguments(config, checkpoints, device, half, bool(validation))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(train),
        eval_dataset=_dataset(validation) if validation else None,
        processing_class=chat.tokenizer,
        peft_config=peft_config,
        callbacks=[watch],
    )
    for name in ("PrinterCallback", "ProgressCallback"):  # Watch talks
        for callback in [each for each in trainer.callback_handler.callbacks if type(each).__name__ == name]:
            trainer.remove_callback(callback)
    return trainer


def _arguments(config: TrainConfig, checkpoints: Path, device: str, half: torch.dtype | None, validate: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=str(checkpoints),
        max_length=None,  # rows come rendered and measured: nothing is cut here
        shuffle_dataset=False,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        learning_rate=config.rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=half is torch.bfloat16,
        fp16=half is torch.float16,
        use_cpu=device == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",  # Watch says when
        save_total_limit=2,
        eval_strategy=("steps" if config.eval_steps else "epoch") if validate else "no",
        eval_steps=config.eval_steps,
        eval_on_start=validate,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        report_to="none",
    )


def _dataset(rows: Sequence[Row]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]})


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run; one that was cut off while it was written does not count."""
    whole = [each for each in folder.glob("checkpoint-*") if is_done(each)]
    return max(whole, key=lambda each: int(each.name.rpartition("-")[2]), default=None)
