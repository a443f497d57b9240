"""Held-out loss: how well each model predicts answers it was not trained on, on the same rows, with paired intervals."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..core.config import to_mapping
from ..core.engines.base import EngineConfig
from ..core.engines.loading import choose
from ..core.errors import UserError
from ..core.files import write_atomically
from ..core.formats import iterate_examples
from ..core.likelihood import HeldOut, Likelihood, likelihoods, read_row, read_texts
from ..core.named_models import NamedModel, find_models
from ..core.statistics import Estimate, bootstrap_ratio, bootstrap_ratio_difference, cluster_sums, holm, sign_flip
from ..core.text import counted as amount
from ..core.values import ValueStore
from .config import LossConfig
from .loss_parts import Pieces, by_source, by_turn
from .results import aligned, counted, finish_section, left_out, open_section, told

log = logging.getLogger(__name__)

LOSSES: dict[str, Any] = {
    "model": pl.String,
    "example_id": pl.String,
    "prompt_id": pl.String,  # rows of the same prompt are resampled together
    "source": pl.String,
    "num_bytes": pl.Int64,
    "num_tokens": pl.Int64,
    "sum_logprob": pl.Float64,
    "num_ends": pl.Int64,
    "end_logprob": pl.Float64,
    "turn_tokens": pl.List(pl.Int64),  # of each answer of the conversation
    "turn_logprobs": pl.List(pl.Float64),
    "key": pl.String,
    "error": pl.String,  # why this model has no loss here
    "left_out": pl.String,  # why the row counts for no model
}

FEW = 20  # prompts below which a bootstrap interval covers clearly less often than it says

Columns = Mapping[str, NDArray[np.float64]]  # the numbers of Likelihood, one for each row that counts


@dataclass(frozen=True, kw_only=True)
class ModelLoss:
    """The loss of one model over the rows that every model could be scored on. Natural logarithm, 95 % intervals.

    `loss` is the headline: the mean of -ln p over the tokens of all answers, each answer's end of turn among them; it is
    what training minimises. `bits_per_byte` is -log2 p of the same tokens over the UTF-8 bytes of the answers. The end of
    turn is counted and adds no byte: that the answer ends here is something every model has to predict, and with it the
    number is the length of a code for the whole answer, which compares models whatever their tokenizers are.
    """

    name: str
    reference: str
    identity: str
    template: str | None
    tokens: int
    loss: Estimate
    macro_loss: float  # mean over the rows of each row's mean: short answers count as much as long ones
    bits_per_byte: Estimate
    text_loss: float  # the loss without the ends of turn
    end_loss: float | None  # of the ends of turn alone; None for texts, which have none
    scored: int  # rows in this call; the others were stored
    by_source: dict[str, Estimate]  # the loss of each source's rows; empty where there is one source alone, or too many
    by_turn: dict[str, Estimate]  # of the first answers of conversations, the second, and so on; empty where there is one turn alone


@dataclass(frozen=True, kw_only=True)
class LossDifference:
    """A model minus the first one: below zero is better. 95 % intervals, paired, from whole prompts drawn anew."""

    model: str
    baseline: str
    loss: Estimate | None  # None where the two count different tokens in the same answers: then bits_per_byte compares them
    bits_per_byte: Estimate
    shown: bool  # the interval of the loss, or of bits_per_byte where there is no loss, leaves zero out, and the test agrees
    p_value: float  # sign flips of the prompts' differences
    p_adjusted: float  # Holm, over the models
    rows_better: int
    by_source: dict[str, Estimate]  # the loss, or bits per byte where there is no loss, of each part; as in ModelLoss
    by_turn: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """The held-out loss of all models, and how far each is from the first."""

    folder: Path | None  # evaluate/ of the run, where one was given
    heldout: str
    text: bool  # the rows were scored as plain texts
    rows: int
    used: int
    prompts: int  # of the used rows
    num_bytes: int  # of their answers
    left_out: dict[str, int]  # rows by reason
    models: list[ModelLoss]
    differences: list[LossDifference]

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, for results.json."""
        plain = {name: getattr(self, name) for name in ("heldout", "text", "rows", "used", "prompts", "num_bytes", "left_out")}
        models = {each.name: asdict(each) for each in self.models}
        return {**plain, "models": models, "differences": [asdict(each) for each in self.differences]}

    def summary(self) -> str:
        """Write it for people."""
        what = ("piece", "text", "text") if self.text else ("row", "prompt", "answers")
        size = f"{self.used:,} of {amount(self.rows, what[0])}, {amount(self.prompts, what[1])}"
        lines = [
            f"{self.heldout}: {size}, {amount(self.num_bytes, 'byte')} of {what[2]};"
            f" loss is the mean of -ln p over the tokens of the {what[2]}"
        ]
        if self.left_out:
            lines.append(f"left out for all models: {told(self.left_out)}")
        table: list[tuple[str, ...]] = [
            ("model", "loss", "95 %", "mean of rows", "text", "end of turn", "bits per byte", "95 %", "tokens", "newly scored")
        ]
        for each in self.models:
            end = "none" if each.end_loss is None else f"{each.end_loss:.3f}"
            numbers = [*_numbers(each.loss), f"{each.macro_loss:.3f}", f"{each.text_loss:.3f}", end, *_numbers(each.bits_per_byte)]
            table.append((each.name, *numbers, f"{each.tokens:,}", f"{each.scored:,}"))
        lines += aligned(table)
        for kind in ("source", "turn"):
            lines += self._parts(kind)
        lines += [_told_difference(each, self.used) for each in self.differences]
        if 1 < self.prompts < FEW:
            lines.append(f"{self.prompts} prompts are few: the intervals are rough, and narrower than they should be if anything")
        return "\n".join(
            [*lines, *([f"losses: {self.folder / ('text_losses.parquet' if self.text else 'losses.parquet')}"] if self.folder else [])]
        )

    def _parts(self, kind: str) -> list[str]:
        """Return a table of the losses of parts of the data, and of the differences in them."""
        field = f"by_{kind}"
        names = list(getattr(self.models[0], field))
        if not names:
            return []
        rows: list[tuple[str, ...]] = [(f"loss by {kind} (95 %)", *names)]
        for each in self.models:
            rows.append((each.name, *("{} ({})".format(*_numbers(getattr(each, field)[name])) for name in names)))
        for change in self.differences:
            label = f"{change.model} − {change.baseline}" + ("" if change.loss else ", bits per byte")
            rows.append((label, *("{} ({})".format(*_numbers(getattr(change, field)[name], "+.3f")) for name in names)))
        return aligned(rows)


def _numbers(estimate: Estimate, form: str = ".3f") -> tuple[str, str]:
    span = estimate.interval
    told = "one prompt" if span is None else f"{span.low:{form}} to {span.high:{form}}"
    return format(estimate.value, form).replace("-", "−"), told.replace("-", "−")


def _told_difference(each: LossDifference, used: int) -> str:
    headline = each.loss or each.bits_per_byte
    parts = []
    for name, estimate in (("loss", each.loss), ("bits per byte", each.bits_per_byte)):
        if estimate is not None:
            value, span = _numbers(estimate, "+.3f")
            parts.append(f"{name} {value} (95 % {span})")
    if headline.interval is None:
        verdict = "one prompt alone tells nothing about others"
    elif each.shown:
        verdict = f"{each.model} is {'better' if headline.value < 0 else 'worse'}"
    elif headline.interval.excludes(0.0):
        verdict = "the interval leaves zero out and the test does not agree, no difference is shown"
    else:
        verdict = "the interval holds zero, no difference is shown"
    tests = f"p {each.p_adjusted:.2g}, better on {each.rows_better:,} of {amount(used, 'row')}"
    return f"{each.model} − {each.baseline}: {', '.join(parts)}, {tests}: {verdict}"


def loss(heldout: str | Path, models: Mapping[str, str], out: Path | None, config: LossConfig) -> LossResult:
    """Score the answers of held-out rows with all models (name: reference); return their losses and the paired differences.

    All assistant turns of a conversation count, rendered as in training; with `text` all that the rows say, as it stands. A row
    that is too long for one model, or refused by its template, is left out for all of them. Into the run folder `out` go
    evaluate/losses.parquet and the section `loss` of evaluate/results.json (of texts: text_losses.parquet, `text_loss`);
    log-probabilities are stored under keys of what decides them, so that only what changed is computed again. Without `out`
    nothing is kept. Raises UserError when no row is left.
    """
    engine = _scoring_engine(config.engine)
    rows = read_heldout(heldout, config)
    found = find_models(models, engine)
    settings = {"heldout": str(heldout), "models": dict(models), **to_mapping(config)}
    section, table = _place(config.text)
    with open_section(out, section, settings) as folder:
        scored, new = {}, {}
        with ValueStore(folder / "logprobs.sqlite") as store:
            for model in found:
                scored[model.name], new[model.name] = likelihoods(model, rows, store)
        why = left_out({name: each[place].error for name, each in scored.items()} for place in range(len(rows)))
        for reason, count in counted(why).items():
            log.warning("left out for all models: %s %s, the first is %s", f"{count:,}", reason, rows[why.index(reason)].example.source)
        result = _result(folder if out else None, str(heldout), rows, scored, why, found, new, config)
        with write_atomically(folder / table) as temporary:
            _frame(rows, scored, why).write_parquet(temporary)
        finish_section(folder, section, result.facts(), {"models": list(models), "rows": len(rows)})
        return result


def read_heldout(heldout: str | Path, config: LossConfig) -> list[HeldOut]:
    """Return the held-out rows, or the pieces of texts, as `loss` scores them. Raises UserError where none can be scored."""
    examples = islice(iterate_examples(heldout), config.limit)
    rows = [row for example in examples for row in (read_texts(example) if config.text else [read_row(example)])]
    if all(row.error for row in rows):
        reasons = told(counted(row.error for row in rows))
        if config.text:
            raise UserError(f"{rows[0].example.source}: this and all other rows hold no text ({reasons})")
        raise UserError(
            f"{rows[0].example.source}: this and all other rows have no answer to score ({reasons}); expected conversations with an"
            " assistant turn, or a column completion, response, output or answer; --text scores plain texts"
        )
    return rows


def _place(text: bool) -> tuple[str, str]:
    """Return the section of results.json and the table of losses: those of texts stand beside those of answers."""
    return ("text_loss", "text_losses.parquet") if text else ("loss", "losses.parquet")


def _scoring_engine(engine: EngineConfig) -> EngineConfig:
    """Return the engine that gives the probabilities of a text; auto is transformers here."""
    if choose(engine) == "openai":
        raise UserError("loss: a server does not tell the probabilities of a given text; give models on disk, and the engine transformers")
    return replace(engine, engine="transformers") if engine.engine == "auto" else engine


def _frame(rows: Sequence[HeldOut], scored: Mapping[str, Sequence[Likelihood]], why: Sequence[str | None]) -> pl.DataFrame:
    lines = [
        {
            "model": name,
            "example_id": row.example.id,
            "prompt_id": row.prompt_id,
            "source": row.example.source,
            "num_bytes": row.num_bytes,
            **asdict(each),
            "left_out": reason,
        }
        for name, column in scored.items()
        for row, each, reason in zip(rows, column, why, strict=True)
    ]
    return pl.DataFrame(lines, schema=LOSSES)


def _result(
    folder: Path | None,
    heldout: str,
    rows: Sequence[HeldOut],
    scored: Mapping[str, Sequence[Likelihood]],
    why: Sequence[str | None],
    found: Sequence[NamedModel],
    new: Mapping[str, int],
    config: LossConfig,
) -> LossResult:
    counts = counted(why)
    used = [place for place, reason in enumerate(why) if reason is None]
    if not used:
        raise UserError(f"{heldout}: no row of {len(rows):,} can be scored with every model: {told(counts)}")
    assert len(rows) == len(used) + sum(counts.values())
    prompts = [rows[place].prompt_id for place in used]
    sizes = np.array([rows[place].num_bytes for place in used], dtype=np.float64)
    columns = {
        name: {
            field: np.array([getattr(each[place], field) for place in used], dtype=np.float64)
            for field in ("sum_logprob", "num_tokens", "end_logprob", "num_ends")
        }
        for name, each in scored.items()
    }
    drawn = {"clusters": prompts, "resamples": config.resamples, "seed": config.seed}
    kept = [rows[place] for place in used], {name: [each[place] for place in used] for name, each in scored.items()}
    pieces = by_source(*kept), by_turn(*kept)
    return LossResult(
        folder=folder,
        heldout=heldout,
        text=config.text,
        rows=len(rows),
        used=len(used),
        prompts=len(set(prompts)),
        num_bytes=int(sizes.sum()),
        left_out=counts,
        models=[_model_loss(model, columns[model.name], sizes, pieces, new[model.name], drawn) for model in found],
        differences=_differences(columns, sizes, pieces, drawn),
    )


def _model_loss(
    model: NamedModel, columns: Columns, sizes: NDArray[np.float64], pieces: Sequence[Pieces], new: int, drawn: Mapping[str, Any]
) -> ModelLoss:
    nats, tokens = -columns["sum_logprob"], columns["num_tokens"]
    end_nats, ends = -columns["end_logprob"].sum(), columns["num_ends"].sum()
    return ModelLoss(
        name=model.name,
        reference=model.reference,
        identity=model.identity,
        template=model.template,
        tokens=int(tokens.sum()),
        loss=bootstrap_ratio(nats, tokens, **drawn),
        macro_loss=float((nats / tokens).mean()),
        bits_per_byte=bootstrap_ratio(nats / math.log(2), sizes, **drawn),
        text_loss=float((nats.sum() - end_nats) / (tokens.sum() - ends)),
        end_loss=float(end_nats / ends) if ends else None,
        scored=new,
        **{f"by_{each.kind}": each.losses(model.name, drawn) for each in pieces},
    )


def _differences(
    columns: Mapping[str, Columns], sizes: NDArray[np.float64], pieces: Sequence[Pieces], drawn: Mapping[str, Any]
) -> list[LossDifference]:
    """Compare the first model with each other, row by row."""
    (baseline, first), *others = columns.items()
    changes = [first["sum_logprob"] - second["sum_logprob"] for _, second in others]  # nats; below zero the other is better
    by_prompt = [cluster_sums([each], drawn["clusters"])[:, 0] for each in changes]
    p_values = [sign_flip(each, resamples=drawn["resamples"], seed=drawn["seed"]) for each in by_prompt]
    differences = []
    for (name, second), change, p_value, adjusted in zip(others, changes, p_values, holm(p_values), strict=True):
        nats = None
        if (first["num_tokens"] == second["num_tokens"]).all():
            ratios = [(-each["sum_logprob"], each["num_tokens"]) for each in (first, second)]
            nats = bootstrap_ratio_difference(*ratios, **drawn)
        bits = bootstrap_ratio(change / math.log(2), sizes, **drawn)
        interval = (nats or bits).interval
        differences.append(
            LossDifference(
                model=name,
                baseline=baseline,
                loss=nats,
                bits_per_byte=bits,
                shown=interval is not None and interval.excludes(0.0) and adjusted <= 0.05,
                p_value=p_value,
                p_adjusted=adjusted,
                rows_better=int((change < 0).sum()),
                **{f"by_{each.kind}": each.differences(name, baseline, drawn) for each in pieces},
            )
        )
    return differences
