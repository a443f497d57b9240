"""Did the curation pay? The same training on the selection and on each of its controls, and a paired test between the models."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..core.config import to_mapping
from ..core.errors import UserError
from ..core.example import tools_of
from ..core.files import read_json, read_parquet, write_json
from ..core.formats import iterate_examples
from ..core.run import Run, is_done
from ..core.statistics import Estimate, bootstrap_ratio_difference, cluster_sums, holm, sign_flip
from ..core.text import counted
from ..evaluate.results import aligned
from .config import AblationConfig

log = logging.getLogger(__name__)

SELECTION = "selection"
RESULTS = "ablation.json"

Columns = dict[str, NDArray[np.float64]]  # for each held-out row: nats and tokens, summed over the seeds


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One data set that was trained on, once with each seed."""

    name: str
    data: str
    rows: int
    tokens: int  # of the data set, rendered
    epochs: float
    trained_tokens: list[int]  # that went through the model, by seed
    losses: list[float]  # held-out loss by seed, in nats per token


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The selection minus one control: below zero the selection is better. Losses are means over the seeds."""

    control: str
    difference: Estimate  # nats per token; the 95 % interval is from whole prompts drawn anew
    by_seed: list[float]
    p_value: float  # sign flips of the prompts' differences
    p_adjusted: float  # Holm, over the controls

    @property
    def verdict(self) -> str:
        """Say what is shown: a difference is one whose interval excludes zero, whose test agrees, and whose sign every seed has."""
        interval = self.difference.interval
        if interval is None:
            return "one held-out prompt alone tells nothing about others"
        if not interval.excludes(0.0) or self.p_adjusted > 0.05:
            return "no difference is shown"
        if len({value < 0 for value in self.by_seed}) > 1:
            return "not the same way for every seed: the training's own luck is as large as the difference"
        return "the selection is better" if self.difference.value < 0 else "the selection is worse"


@dataclass(frozen=True, kw_only=True)
class AblationResult:
    """What came of the same training on the selection and on its controls."""

    run: Path
    heldout: str
    rows: int  # held-out, scored with every model
    prompts: int
    base_loss: float
    arms: list[Arm]
    contrasts: list[Contrast]

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, for ablation.json."""
        plain = {name: getattr(self, name) for name in ("heldout", "rows", "prompts", "base_loss")}
        contrasts = [{**asdict(each), "verdict": each.verdict} for each in self.contrasts]
        return {**plain, "arms": [asdict(each) for each in self.arms], "contrasts": contrasts}

    def summary(self) -> str:
        """Write it for people."""
        size = f"{counted(self.rows, 'row')} of {counted(self.prompts, 'prompt')}"
        lines = [f"{self.heldout}: {size}; held-out loss before training {self.base_loss:.3f}"]
        table: list[tuple[str, ...]] = [("trained on", "rows", "tokens seen", "epochs", "loss", "by seed")]
        for each in self.arms:
            seeds = ", ".join(f"{value:.3f}" for value in each.losses)
            tokens = f"{np.mean(each.trained_tokens):,.0f}"
            table.append((each.name, f"{each.rows:,}", tokens, f"{each.epochs:.2f}", f"{np.mean(each.losses):.3f}", seeds))
        lines += [*aligned(table), *map(told, (asdict(each) | {"verdict": each.verdict} for each in self.contrasts))]
        if len(self.arms[0].losses) == 1:
            lines.append("one seed: how much of it is the luck of one training is not known; --seeds 3 tells")
        return "\n".join([*lines, f"results: {self.run / RESULTS}"])


def told(contrast: Mapping[str, Any]) -> str:
    """Write a contrast, as it stands in ablation.json, as a sentence."""
    interval = contrast["difference"]["interval"]
    span = f" (95 % {interval['low']:+.3f} to {interval['high']:+.3f}, p {contrast['p_adjusted']:.2g})" if interval else ""
    numbers = f"{contrast['difference']['value']:+.3f}{span}".replace("-", "−")
    return f"{SELECTION} − {contrast['control']}: {numbers}: {contrast['verdict']}"


def ablate(source: Path, model: str, out: Path, config: AblationConfig, *, heldout: Path | None = None) -> AblationResult:
    """Train `model` on the selection of the run `source` and on each of its controls, and compare the models' held-out loss.

    Every arm has the same settings and, with `equal_tokens`, as many tokens: a control of longer rows gets fewer epochs. One run
    folder for each arm and seed stands in `out`; what is done is not done again. Held-out rows are those of `source`, or a file.
    Writes out/ablation.json. Raises UserError for a run without controls or held-out rows, and for such rows that are trained on.
    """
    data = _arms(source)
    rows = heldout or source / "curate" / "heldout.jsonl"
    if not rows.exists():
        raise UserError(f"{rows}: there is no such file; give --heldout FILE, or build the run with heldout: {{prompts: 100}}")
    from ..core.chat import load_chat  # after what a user may have to mend, and never for a report: torch takes seconds to import
    from ..core.models import resolve_model
    from ..evaluate.loss import loss, read_heldout
    from ..train.sft import train

    held = {each.example.id for each in read_heldout(rows, config.loss)}
    chat = load_chat(resolve_model(model))
    sizes = {}
    for name, path in data.items():
        num_rows, num_tokens, seen = _size(path, chat, held)
        if seen:
            told = f"{seen:,} of its {counted(len(held), 'conversation')} stand in {path}, which {name} is trained on"
            raise UserError(f"{rows}: {told}; give rows that none is trained on")  # it would win by them alone
        sizes[name] = (num_rows, num_tokens)
    with Run.create(out) as run:
        settings = {"source": str(source), "model": model, "heldout": str(rows), **to_mapping(config)}
        begun = [*out.glob("*/train/checkpoints/*"), *out.glob("*/train/done.json")]
        run.configure("ablation", settings, free=("seeds", "loss") if begun else ("*",))
    seeds = list(range(config.train.seed, config.train.seed + config.seeds))
    models, epochs, trained = {"base": model}, {}, {}
    for name, path in data.items():
        share = sizes[SELECTION][1] / sizes[name][1] if config.equal_tokens else 1.0
        epochs[name] = config.train.epochs * share
        for seed in seeds:
            folder = out / f"{name}-{seed}"
            if not is_done(folder / "train"):
                log.info("ablation: %s, seed %s", name, seed)
            done = train(path, model, folder, replace(config.train, seed=seed, epochs=epochs[name]))
            trained[name, seed] = done.tokens
            models[f"{name}-{seed}"] = str(done.model)
    scored = loss(rows, models, out, config.loss)
    columns, clusters = _columns(out / "evaluate" / "losses.parquet")
    by_model = {each.name: each.loss.value for each in scored.models}
    drawn = {"clusters": clusters, "resamples": config.loss.resamples, "seed": config.loss.seed}
    arms = [
        Arm(
            name=name,
            data=str(path),
            rows=sizes[name][0],
            tokens=sizes[name][1],
            epochs=epochs[name],
            trained_tokens=[trained[name, seed] for seed in seeds],
            losses=[by_model[f"{name}-{seed}"] for seed in seeds],
        )
        for name, path in data.items()
    ]
    contrasts = _contrasts(columns, arms, seeds, drawn)
    result = AblationResult(
        run=out, heldout=str(rows), rows=scored.used, prompts=scored.prompts, base_loss=by_model["base"], arms=arms, contrasts=contrasts
    )
    write_json(out / RESULTS, result.facts())
    return result


def _arms(source: Path) -> dict[str, Path]:
    """Return the data sets to train on by name, the selection first."""
    run = Run.open(source)
    selection = run.path / "curate" / "dataset.jsonl"
    controls = sorted((run.path / "curate" / "controls").glob("*.jsonl"))
    if not selection.exists():
        raise UserError(f"{source}: holds no data set; `sftkit curate build` or `select` makes one")
    if not controls:
        raise UserError(f"{source}: holds no controls to compare with; `sftkit curate select {source} --budget N --controls` writes them")
    stages = run.ledger.stages()
    for path in controls:
        stage = path.stem.removesuffix("length_matched").removesuffix("random").removesuffix("_") or "select"
        if stage in stages[:-1]:
            log.warning("%s: was drawn beside what %s kept, the data set is what %s kept: they are not matched", path, stage, stages[-1])
    return {SELECTION: selection, **{path.stem: path for path in controls}}


def _size(path: Path, chat: Any, held: set[str]) -> tuple[int, int, int]:
    """Return the rows of a data set, their tokens, and how many of the held-out conversations stand in it word for word."""
    lengths, seen = [], set()
    for each in iterate_examples(path):
        lengths.append(len(chat.render(each.messages, tools=tools_of(each.meta)).ids))
        seen |= {each.id} & held
    return len(lengths), sum(lengths), len(seen)


def _columns(losses: Path) -> tuple[dict[str, Columns], list[str]]:
    """Return each model's nats and tokens for each row that counts, and the rows' prompts."""
    used = read_parquet(losses).filter(pl.col("left_out").is_null())
    columns, clusters = {}, []
    for (name,), rows in used.group_by("model", maintain_order=True):
        columns[str(name)] = {"nats": -rows["sum_logprob"].to_numpy(), "tokens": rows["num_tokens"].to_numpy().astype(np.float64)}
        clusters = rows["prompt_id"].to_list()
    return columns, clusters


def _contrasts(columns: Mapping[str, Columns], arms: Sequence[Arm], seeds: Sequence[int], drawn: Mapping[str, Any]) -> list[Contrast]:
    def summed(name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        each = [columns[f"{name}-{seed}"] for seed in seeds]
        return np.sum([one["nats"] for one in each], axis=0), np.sum([one["tokens"] for one in each], axis=0)

    selection, *controls = arms
    chosen = summed(selection.name)
    p_values = []
    for control in controls:
        change = summed(control.name)[0] - chosen[0]
        by_prompt = cluster_sums([change], drawn["clusters"])[:, 0]
        p_values.append(sign_flip(by_prompt, resamples=drawn["resamples"], seed=drawn["seed"]))
    return [
        Contrast(
            control=control.name,
            difference=bootstrap_ratio_difference(summed(control.name), chosen, **drawn),
            by_seed=[one - other for one, other in zip(selection.losses, control.losses, strict=True)],
            p_value=p_value,
            p_adjusted=adjusted,
        )
        for control, p_value, adjusted in zip(controls, p_values, holm(p_values), strict=True)
    ]


def read_ablation(path: Path) -> dict[str, Any] | None:
    """Return what `ablate` wrote into a run folder, None where it did not."""
    file = path / RESULTS
    return dict(read_json(file)) if file.exists() else None
