"""DPO on the packs of fine-tuning: both answers of a pair in one forward pass, so that all that holds for rows holds for pairs too.

Of the reference model its log-probabilities alone are kept, taken before the first step, so that one model is in memory. TRL's own
trainer pads, weighs a last, smaller forward pass of an update like a full one, and wants forward passes of one size from all processes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from trl.trainer.utils import disable_dropout_in_model

from ..core.errors import UserError
from ..core.files import write_atomically
from .checkpoints import last_checkpoint
from .collective import over_processes
from .config import PreferenceConfig, TrainConfig
from .data import Row
from .head import log_likelihoods, scored_states, weighted_loss
from .packing import Packs, collate
from .trainer import Trainer

REFERENCE = "reference.npz"  # among the checkpoints: a run that goes on has no untrained model to ask


class PairPacks(Packs):
    """Forward passes over pairs. Each pair is both its rows, the better answer's first, which stand end to end like any two."""

    def __init__(self, pairs: Sequence[Row], **told: Any) -> None:
        self._cuts = [len(pair) for pair in pairs]  # where the worse answer's row begins
        self.reference = np.full((len(pairs), 2), np.nan, dtype=np.float32)  # log p of both answers under the model that was begun with
        super().__init__([_joined(pair) for pair in pairs], **told)

    def largest_shape(self) -> tuple[int, int, int]:
        """Return the most tokens, scored positions and rows that a pack of any epoch has: two rows a pair."""
        tokens, scored, pairs = super().largest_shape()
        return tokens, scored, 2 * pairs

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a pack; `row_of` [scored] says which row a scored position is of, `lengths` [rows] how many a row has.

        `reference` [rows] is what the start model gave. `num_pairs` may be 0: processes have equally many packs.
        """
        ids, scored = [], []
        for pair in self._packs[index]:
            cut, places = self._cuts[pair], self._scored[pair]
            ids += [self._ids[pair][:cut], self._ids[pair][cut:]]
            scored += [places[places < cut], places[places >= cut] - cut]
        lengths = [len(each) for each in scored]
        filling = [] if ids else [np.full(2, self._pad, dtype=np.int32)] * 2  # as many rows as a pair where each is a pass of its own
        batch = collate(
            ids or filling, scored or [np.zeros(0, dtype=np.int32)] * 2, pad=self._pad, longest=self.longest, static=self._shape
        )
        row_of = np.full(len(batch["targets"]), len(ids))
        row_of[: batch["num_targets"]] = np.repeat(np.arange(len(ids)), lengths)
        facts = {"row_of": row_of, "lengths": np.array(lengths, dtype=np.float32), "reference": self.reference[self._packs[index]].ravel()}
        tensors = {name: torch.from_numpy(each) for name, each in facts.items()}
        return {**batch, **tensors, "num_tokens": sum(map(len, ids)), "num_pairs": len(ids) // 2, "alone": self._alone}


def _joined(pair: Row) -> Row:
    """Return both rows of a pair as one: the first token of neither is learned."""
    better, worse = pair.sides()
    trained = np.concatenate([better.trained, [False], worse.trained[1:]])
    return Row(pair.key, np.concatenate([better.tokens, worse.tokens]), trained, pair.source)


def pair_losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the loss of a pack, summed over its pairs, and what its rewards sum up to, as told in `REWARDS`; [5], float32.

    Logits are made twice: how much a token counts is known when all of its pair are. With `likelihoods` in the batch: log p of its
    rows instead, [rows].
    """
    scored, found = scored_states(model, batch)
    rows = 2 * batch["num_pairs"]
    likelihoods = log_likelihoods(scored, found, batch["targets"])
    if batch.get("likelihoods"):
        return _of_rows(likelihoods, batch, rows)
    with torch.enable_grad():
        likelihoods.requires_grad_()
        gains = (_of_rows(likelihoods, batch, rows) - batch["reference"]).view(-1, 2)
        loss = _objective(gains, batch["lengths"].view(-1, 2), batch["objective"], batch["beta"]).sum()
        (slopes,) = torch.autograd.grad(loss, likelihoods)
    if torch.is_grad_enabled():
        straight = weighted_loss(scored, found, batch, -slopes)  # has the loss's gradient
        loss = loss.detach() + (straight - straight.detach())
    rewards = batch["beta"] * gains.detach()
    better = (rewards[:, 0] > rewards[:, 1]).float()
    return torch.cat([loss.view(1), rewards.sum(0), better.sum().view(1), (rewards[:, 0] - rewards[:, 1]).sum().view(1)])


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")  # as TRL calls them


def _of_rows(likelihoods: torch.Tensor, batch: dict[str, Any], rows: int) -> torch.Tensor:
    """Sum the log-probabilities of each row's tokens; what fills a static shape up is of none."""
    return likelihoods.new_zeros(rows + 1).index_add(0, batch["row_of"], likelihoods)[:rows]


def _objective(gains: torch.Tensor, lengths: torch.Tensor, name: str, beta: float) -> torch.Tensor:
    """Return the losses of pairs [N] from log p / log p of the reference [N, 2], and how many tokens each answer has [N, 2]."""
    margin = gains[:, 0] - gains[:, 1]
    if name == "sigmoid":  # Rafailov et al. 2023, arXiv 2305.18290, equation 7
        return -torch.nn.functional.logsigmoid(beta * margin)
    if name == "hinge":  # Zhao et al. 2023, arXiv 2305.10425, equation 8
        return torch.relu(1 - beta * margin)
    assert name == "ipo", name  # Azar et al. 2023, arXiv 2310.12036, equation 17, by token as in TRL, on the authors' word
    each = gains / lengths.clamp(min=1)
    return (each[:, 0] - each[:, 1] - 1 / (2 * beta)) ** 2


class PreferenceTrainer(Trainer):
    """The trainer on pairs; the loss is the mean over the pairs of an update, however many forward passes or processes they take."""

    make_packs = PairPacks
    losses = staticmethod(pair_losses)

    packs: PairPacks
    validation: PairPacks | None

    def learn(self, config: TrainConfig) -> None:
        """Take the objective from the settings; nothing is dropped out, for the reference has nothing dropped out either."""
        assert isinstance(config, PreferenceConfig)
        self.learning = {"objective": config.objective, "beta": config.beta}
        self._rewards = torch.zeros(4, device=self.args.device)
        self._num_pairs = 0
        disable_dropout_in_model(self.model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make it, and know the reference: the model stands on its devices now, and no step is done unless a checkpoint is gone on from."""
        made = super().create_optimizer(*args, **kwargs)
        self._know_reference()
        return made

    def _know_reference(self) -> None:
        all_packs = [each for each in (self.packs, self.validation) if each]
        place = Path(self.args.output_dir) / REFERENCE
        if over_processes(place.exists())[0] == self.args.world_size:
            with np.load(place) as kept:
                for packs, name in zip(all_packs, kept.files, strict=True):
                    packs.reference[:] = kept[name]
            return
        if last_checkpoint(place.parent):
            raise UserError(f"{place}: is gone, and the checkpoints beside it need it; remove {place.parent} to begin anew")
        for packs in all_packs:
            packs.reference[:] = self._reference(packs)
        if self.args.process_index == 0:
            with write_atomically(place) as temporary, open(temporary, "wb") as file:
                np.savez(file, *(each.reference for each in all_packs))  # type: ignore[arg-type]

    @torch.no_grad()
    def _reference(self, packs: PairPacks) -> npt.NDArray[np.float64]:
        """Return log p of both answers to each pair, [pairs, 2], under the model as it is."""
        found = np.zeros((len(packs.reference), 2))
        training = self.model.training
        self.model.eval()
        for place in range(self.args.process_index, len(packs), self.args.world_size):
            batch = self._prepare_inputs(packs[place])
            with self.accelerator.autocast():  # which a model brings along by itself once it is prepared
                likelihoods = self.model(packed={**batch, "likelihoods": True})
            found[packs.rows()[place]] = likelihoods.view(-1, 2).cpu().numpy()
        self.model.train(training)
        return np.array(over_processes(*found.ravel())).reshape(-1, 2)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> torch.Tensor:
        (count,) = over_processes(sum(batch["num_pairs"] for batch in batch_samples))
        return torch.full((), count, device=device)

    def count(self, inputs: dict[str, Any]) -> None:
        """Count pairs, too."""
        super().count(inputs)
        self._num_pairs += inputs["num_pairs"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return this pack's part of the update's loss."""
        found: torch.Tensor = model(packed={**inputs, **self.learning})
        self._rewards += found[1:].detach()
        return found[0] / num_items_in_batch * self.args.world_size  # gradients are averaged over the processes

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the loss of a validation pair on average, and its rewards."""
        assert self.validation is not None
        training = self.model.training
        self.model.eval()
        total, count = torch.zeros(5, device=self.args.device), 0
        for place in range(self.args.process_index, len(self.validation), self.args.world_size):
            batch = self._prepare_inputs(self.validation[place])
            with self.compute_loss_context_manager():
                total += self.model(packed={**batch, **self.learning})
            count += batch["num_pairs"]
        self.model.train(training)
        *summed, pairs = over_processes(*total.tolist(), count)
        metrics = {f"{metric_key_prefix}_{name}": each / pairs for name, each in zip(("loss", *REWARDS), summed, strict=True)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the rewards of the pairs since the last time."""
        if "loss" in logs:
            *summed, pairs = over_processes(*self._rewards.tolist(), self._num_pairs)
            logs = {**logs, **{name: each / max(pairs, 1) for name, each in zip(REWARDS, summed, strict=True)}}
            self._rewards.zero_()
            self._num_pairs = 0
        super().log(logs, start_time)
