"""TRL's DPO trainer, given pairs that are rendered, ordered and weighed as sftkit does: the guarantees of fine-tuning hold for it too.

Of the reference model its log-probabilities alone are kept, taken before the first step, so that one model is in memory. What TRL would
do otherwise is overridden here: it would render the pairs anew, and weigh a last, smaller forward pass of an update like a full one.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch.utils.data import Sampler
from trl import DPOConfig, DPOTrainer

from ..core.chat import Chat
from .config import PreferenceConfig
from .data import Row
from .packing import draw
from .trainer import Watch, arguments_of, quieten, token_flops


class Order(Sampler[int]):
    """The pairs of an epoch: shuffled by seed and epoch alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.of(self.epoch))

    def of(self, epoch: int) -> list[int]:
        """Return the places of an epoch's pairs."""
        return sorted(range(self.count), key=lambda row: draw(self.seed, epoch, row))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.epoch = epoch


class PreferenceTrainer(DPOTrainer):  # type: ignore[misc]
    """DPOTrainer on rendered pairs; the loss is the mean over the pairs of an update, however many forward passes they take."""

    loss_is_scaled_for_ga = True  # it is divided by the update's pairs already

    def __init__(self, *args: Any, order: Order, pairs: int, **kwargs: Any) -> None:
        self.order, self.pairs = order, pairs
        super().__init__(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def update(self, number: int) -> list[int]:
        """Return the places of the pairs of an update, counted from 0 over all epochs."""
        epoch, place = divmod(number, math.ceil(len(self.order) / self.pairs))
        return self.order.of(epoch)[place * self.pairs : (place + 1) * self.pairs]

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_: Any) -> Order:
        return self.order

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> torch.Tensor:
        return torch.tensor(sum(len(batch["input_ids"]) // 2 for batch in batch_samples), device=device)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return this forward pass's part of the update's loss."""
        loss = super().compute_loss(model, inputs, return_outputs)
        if num_items_in_batch is None or return_outputs:  # an evaluation
            return loss
        return loss * (len(inputs["input_ids"]) // 2) / num_items_in_batch


def make_preference_trainer(
    model: Any, chat: Chat, train: Sequence[Row], validation: Sequence[Row], config: PreferenceConfig, *,
    checkpoints: Path, device: str, half: torch.dtype | None, batch_tokens: int, watch: Watch, peft_config: Any = None,
) -> PreferenceTrainer:  # fmt: skip
    """Return the trainer of a run on pairs; `batch_tokens` is the most tokens of a forward pass, padded, both answers counted.

    An update has `batch_size` pairs, in as few forward passes of one size as memory allows.
    """
    disable_progress_bars()  # Watch talks
    longest = max(len(each) for row in (*train, *validation) for each in row.sides())
    fitting = max(1, batch_tokens // (2 * longest))
    together = max(size for size in range(1, config.batch_size + 1) if config.batch_size % size == 0 and size <= fitting)
    steps = math.ceil(len(train) / config.batch_size) * config.epochs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        arguments = arguments_of(
            config, checkpoints, device, half, config.batch_size // together, steps, bool(validation), kind=DPOConfig,
            per_device_train_batch_size=together, per_device_eval_batch_size=together, beta=config.beta, loss_type=[config.objective],
            precompute_ref_log_probs=True, precompute_ref_batch_size=together,
        )  # fmt: skip
        _ = arguments.n_gpu
        arguments._n_gpu = 1
    trainer = PreferenceTrainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(train),
        eval_dataset=_dataset(validation) if validation else None,
        processing_class=chat.tokenizer,
        peft_config=peft_config,
        callbacks=[watch],
        order=Order(len(train), config.seed),
        pairs=config.batch_size,
    )
    watch.token_flops = token_flops(trainer.model, sum(len(each) for row in train for each in row.sides()) / (2 * len(train)))
    quieten(trainer)
    return trainer


def _dataset(rows: Sequence[Row]) -> Dataset:
    """Return pairs as TRL's collator takes them: the prompt's ids, and each answer's up to its end of turn."""
    pairs = [(row, row.rejected) for row in rows if row.rejected]
    return Dataset.from_dict(
        {
            "prompt_ids": [row.ids[: row.answer_start] for row, _ in pairs],
            "chosen_ids": [row.answer().tolist() for row, _ in pairs],
            "rejected_ids": [worse.answer().tolist() for _, worse in pairs],
        }
    )
