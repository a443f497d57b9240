"""Compare settings: one run for each combination on the same rows and tokens, and a table of held-out losses with intervals."""

import gc
import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from ..core.chat import load_chat
from ..core.config import load_config, to_mapping
from ..core.errors import Diverged, UserError, unknown_name
from ..core.files import read_json, write_json
from ..core.hardware import pick_device
from ..core.models import context_length, load_model, load_settings, resolve_model
from ..core.progress import duration
from ..core.statistics import cluster_sums
from .config import TrainConfig
from .init import check_init
from .prepared import load_rows
from .sft import train

log = logging.getLogger(__name__)

VARIED = (  # settings that leave rows and tokens as they are
    *("learning_rate", "batch_size", "schedule", "warmup", "weight_decay", "max_grad_norm", "lora", "lora_rank", "lora_alpha"),
    *("lora_dropout", "loss", "neftune", "dtype", "init"),
)
ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout")  # which say something of runs with LoRA alone
MOST_RUNS = 64
FEW = 30  # prompts
DIVERGED = "diverged.json"
Z = 1.959964  # 95 %, two-sided

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run of a sweep. Losses are -log P(answer | prompt) per token of the held-out rows, in nats; nan in a run that diverged."""

    name: str
    settings: dict[str, Any]
    loss: float
    margin: float  # half of the 95 % interval of the loss
    change: float  # from the first run, on the same rows
    change_margin: float  # half of the 95 % interval of the change
    tokens: int
    seconds: float
    diverged: str = ""  # what such a run said

    def facts(self) -> dict[str, Any]:
        """Return it as plain values; None for what is no number."""
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """All runs, the lowest loss first."""

    out: Path
    first: str  # what the changes are from
    rows: int  # held out
    prompts: int  # of which they are answers
    entries: tuple[Entry, ...]

    def summary(self) -> str:
        """Write it for people."""
        width = max(len(each.name) for each in self.entries) + 2
        held = f"{self.rows:,} rows of {self.prompts:,} prompts"
        lines = [f"held-out loss of {held}, with 95 % intervals over prompts; change from {self.first}, prompt by prompt", ""]
        lines.append(f"{'run':{width}}{'loss':>18}{'change':>20}{'tokens':>12}{'time':>14}")
        for each in self.entries:
            if each.diverged:
                lines.append(f"{each.name:{width}}diverged: {each.diverged.partition(';')[0]}")
                continue
            change = "" if each.name == self.first else f"{each.change:+.4f} ± {each.change_margin:.4f}"
            lines.append(
                f"{each.name:{width}}{f'{each.loss:.4f} ± {each.margin:.4f}':>18}{change:>20}{each.tokens:12,}{duration(each.seconds):>14}"
            )
        few = f"{self.prompts:,} held-out prompts are few: the intervals are rough, or too narrow; give --validation 0.2, or more rows"
        return "\n".join([*lines, "", *([few] if self.prompts < FEW else []), f"written: {self.out / 'sweep.json'}"])


def parse_variations(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read `NAME=VALUE,VALUE,…` of each setting. Raises UserError for a setting that changes what is learned from, or is unknown."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        # an init may list layers, as prune:3,5
        parts = re.split(r",(?=\s*prune:)" if name == "init" else ",", values)
        if not equals or not all(each.strip() for each in parts):
            raise UserError(f"vary {text!r}: expected NAME=VALUE,VALUE, as learning_rate=1e-5,5e-5")
        if name not in VARIED:
            raise unknown_name("setting", name, VARIED, "vary (what leaves rows and tokens as they are)")
        if name in found:
            raise UserError(f"vary: {name} is given twice; give all its values at once, as {name}=VALUE,VALUE")
        try:
            found[name] = [yaml.safe_load(each) for each in parts]
        except yaml.YAMLError:
            raise UserError(f"vary {text!r}: expected values as YAML has them, found {values!r}") from None
    if not found:
        raise UserError("vary: nothing to compare; give --vary learning_rate=1e-5,5e-5")
    return found


def sweep(
    data: str | Sequence[str],
    model: str,
    out: Path,
    config: TrainConfig,
    variations: Mapping[str, Sequence[Any]],
    *,
    revision: str | None = None,
) -> SweepResult:
    """Train one run for each combination of settings into a folder of `out`, and compare them on the held-out rows.

    Runs that are done are not run again, so that a sweep that was stopped goes on; one that diverges is told of beside the others.
    Raises UserError where the held-out rows are of fewer than two prompts, where all runs diverge, and where `out` is a run itself.
    """
    if out.exists() and (not out.is_dir() or (out / "config.yaml").exists()):
        raise UserError(f"{out}: is a {'run' if out.is_dir() else 'file'}; give a folder for the runs of this sweep")
    names = list(variations)
    chosen = [dict(zip(names, values, strict=True)) for values in itertools.product(*variations.values())]
    if len(chosen) > MOST_RUNS:
        raise UserError(f"{len(chosen)} combinations: more than {MOST_RUNS}; vary fewer settings at a time")
    told = to_mapping(config)
    made = [load_config(TrainConfig, {**told, **each}, "vary") for each in chosen]
    chosen = [{name: getattr(each, name) for name in names} for each in made]  # numbers as numbers, however they were written
    runs = {_name(settings): each for settings, each in zip(chosen, made, strict=True)}
    if len(runs) < len(made):
        raise UserError("vary: two combinations are the same; give each value once")
    idle = next((name for name in names if name in ADAPTERS and not all(each.adapter for each in made)), None)
    if idle:
        raise UserError(f"vary: {idle} changes nothing in a run without an adapter; give --lora")
    ref = resolve_model(model, revision=revision)
    settings = load_settings(ref)
    for each in made:
        check_init(each.init, settings)
    size = getattr(settings.get_text_config(), "vocab_size", None)
    rows = load_rows(data, load_chat(ref), config, context=context_length(settings), vocabulary=size).validation
    prompts = [row.key[0].partition("~")[0] for row in rows]  # by which `split` held them out
    if len(set(prompts)) < 2:
        there = f"{len(rows):,} held-out rows of {len(set(prompts))} prompts"
        raise UserError(f"a sweep compares held-out rows of two prompts or more, not {there}: give validation: 0.1, or more rows")
    losses: dict[str, Losses] = {}
    facts: dict[str, Any] = {}
    for number, (name, each) in enumerate(runs.items(), start=1):
        log.info("run %d of %d: %s", number, len(runs), name)
        given = {"data": data, "model": model, "revision": revision, **to_mapping(each)}
        said = _diverged(out / name, given)
        if not said:
            try:
                result = train(data, model, out / name, replace(each, stop_check=each.stop_check or 0), revision=revision)
            except Diverged as error:
                said = str(error)
                write_json(out / name / DIVERGED, {"given": given, "said": said})
        if said:
            log.warning("%s: %s; the other runs go on", name, said)
            facts[name] = {"tokens": 0, "seconds": 0.0, "diverged": said}
            losses[name] = np.full(len(rows), math.nan)
        else:
            losses[name] = _held_out(result.run, rows)
            facts[name] = {"tokens": result.tokens, "seconds": result.seconds}
        gc.collect()  # the model that diverged, or was asked: they stand in circles, and on the card beside the next run's
    first = next((name for name in runs if "diverged" not in facts[name]), None)
    if first is None:
        raise UserError(f"all {len(runs)} runs diverged, as {next(iter(runs))}: {next(iter(facts.values()))['diverged']}")
    counts = np.array([int(row.trained[1:].sum()) for row in rows], dtype=np.float64)
    entries = [_entry(name, chosen[place], losses, first, counts, prompts, facts[name]) for place, name in enumerate(runs)]
    ranked = sorted(entries, key=lambda each: (bool(each.diverged), each.loss))
    found = SweepResult(out=out, first=first, rows=len(rows), prompts=len(set(prompts)), entries=tuple(ranked))
    plain = {"first": first, "rows": found.rows, "prompts": found.prompts}
    write_json(out / "sweep.json", {**plain, "runs": [each.facts() for each in found.entries]})
    return found


def _diverged(run: Path, given: Mapping[str, Any]) -> str:
    """Return what a run of the same settings said when it diverged before: it would again."""
    told = read_json(run / DIVERGED) if (run / DIVERGED).exists() else {"given": None}
    return str(told["said"]) if told["given"] == given else ""


def _name(settings: Mapping[str, Any]) -> str:
    return "_".join(f"{name}-{value}" for name, value in settings.items()).replace("/", "-").replace(":", "-")


def _held_out(run: Path, rows: Sequence[Any]) -> Losses:
    """Return the loss of each held-out row under a run's final model, summed over its tokens; computed once."""
    from .likelihood import row_losses

    place = run / "train" / "heldout.json"
    if not place.exists():
        write_json(place, row_losses(load_model(resolve_model(run), device=pick_device()), rows))
    return np.asarray(read_json(place))


def _entry(
    name: str,
    settings: dict[str, Any],
    losses: Mapping[str, Losses],
    first: str,
    counts: Losses,
    prompts: Sequence[str],
    facts: Mapping[str, Any],
) -> Entry:
    loss, margin = mean_and_margin(losses[name], counts, prompts)
    change, change_margin = mean_and_margin(losses[name] - losses[first], counts, prompts)
    return Entry(name=name, settings=settings, loss=loss, margin=margin, change=change, change_margin=change_margin, **facts)


def mean_and_margin(sums: Losses, counts: Losses, prompts: Sequence[str] | None = None) -> tuple[float, float]:
    """Return the mean a token of sums over rows, and half of its 95 % interval: a ratio of two sums over prompts drawn at random.

    Rows of one prompt are drawn together; each row is drawn by itself where no prompts are given. The variance is by linearisation
    (Cochran, Sampling Techniques, 3rd ed., section 6.4, for whole clusters), and the interval normal, so for some tens of prompts or more.
    """
    totals, tokens = cluster_sums([sums, counts], prompts).T
    mean = float(totals.sum() / tokens.sum())
    off = totals - mean * tokens
    drawn = len(off)
    return mean, Z * math.sqrt(drawn / (drawn - 1) * float(off @ off)) / float(tokens.sum())
