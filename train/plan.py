"""What fits on a card, and how long it takes: predicted before anything runs, and what `train sft` chooses by."""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..core.chat import load_chat
from ..core.errors import UserError, unknown_name
from ..core.hardware import half_precision, measured_peak, pick_device
from ..core.models import context_length, load_settings, resolve_model
from ..core.progress import duration
from .compiling import COMPILED_STEPS
from .config import TrainConfig
from .data import DataReport
from .memory import Load, Memory, NotReplayed, bare_model, copied, experts_taken, gathered, predict, token_flops
from .prepared import load_rows
from .recorded import can_record

log = logging.getLogger(__name__)

TOKENS = (32_768, 24_576, 16_384, 12_288, 8_192, 6_144, 4_096, 3_072, 2_048, 1_536, 1_024, 768, 512, 256)  # of a pass: what is tried
FEW_TOKENS = 4_096  # a pass with fewer leaves a card idle: before that, activations are computed twice
SLACK = 1.05  # what the allocator holds beyond the bytes in use
CONTEXT = 0.6e9  # bytes that CUDA itself takes
CHECKPOINTED = 0.8  # of the speed

# Share of the measured matrix-product peak that a step reached, by the model's width, on one H200 (docs/training-speed.md).
SHARES = {
    "compiled": ((576, 0.48), (896, 0.64), (1536, 0.68)),
    "plain": ((576, 0.24), (896, 0.31), (1536, 0.44)),  # the first is not measured: on the line through the others
}
ADAPTER_SHARES = {"compiled": 0.46 / 0.65, "plain": 0.23 / 0.31}  # of a full step's share; measured at widths of 1024 and 896
SHORT_PASS = 0.1  # seconds; the passes behind the shares took more, and in shorter ones a card waits for a host that launches them
SHORT_RECORDED = 0.005  # the same where they are recorded: of 2,000 tokens and more, none was slower than long ones
MATRIX_SHARE = 0.8  # of its data sheet's figure a card reaches in a large matrix product: 795 of 989 TFLOP/s on that H200
FORM = re.compile(r"(?i)\b(sxm\d?|hbm\d?e?|\d+ ?gb)\b")  # what a card's own name says beside its model
SAME_SIZE = 0.1  # of the memory that PyTorch reports the round figure in a name is off: 80 GB are 85.0


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card: its memory in bytes and its operations a second in 16-bit matrix products added up in float32."""

    name: str
    memory: float
    flops: float  # 0: not known
    measured: bool = False
    bfloat16: bool = True


# Memory as PyTorch reports it, operations from NVIDIA's data sheets (dense).
CARDS = (
    Card("T4", 15.6e9, 65e12, bfloat16=False),
    Card("V100", 16.9e9, 125e12, bfloat16=False),
    Card("RTX 3060", 12.6e9, 25.6e12),
    Card("RTX 3080", 10.5e9, 59.5e12),
    Card("RTX 3090", 25.4e9, 71e12),
    Card("RTX 4090", 25.3e9, 165e12),
    Card("L4", 23.6e9, 121e12),
    Card("A10", 23.6e9, 125e12),
    Card("L40S", 47.7e9, 362e12),
    Card("A100-40GB", 42.3e9, 312e12),
    Card("A100", 85.0e9, 312e12),
    Card("H100", 85.0e9, 989e12),
    Card("H200", 150.1e9, 989e12),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to train, and what it takes."""

    method: str  # full, LoRA, QLoRA; on several GPUs that share the weights with fsdp
    dtype: str  # of the weights
    checkpointing: bool
    batch_tokens: int
    memory: Memory
    room: float  # bytes that the card has for it
    tokens_per_second: float  # nan: not known
    hours: float
    launched: bool  # the host launches each kernel of each pass: none is recorded
    gpus: int = 1  # on each of which it takes that, and which have that speed together

    @property
    def fits(self) -> bool:
        """Say whether it fits, with what the allocator needs on top."""
        return self.memory.peak * SLACK <= self.room

    @property
    def waits(self) -> bool:
        """Say whether a forward pass is so short that the card waits for its host: the speed is then lower than foretold."""
        return self.gpus * self.batch_tokens < (SHORT_PASS if self.launched else SHORT_RECORDED) * self.tokens_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """All options on a card."""

    card: Card
    report: DataReport
    options: tuple[Option, ...]
    basis: str  # where the speed comes from

    def summary(self) -> str:
        """Write it for people."""
        tokens = f"{self.report.train_rows:,} rows, {self.report.tokens:,} tokens an epoch, the longest row has {self.report.longest:,}"
        gpus = self.options[0].gpus
        card, each_has = (self.card.name, "") if gpus == 1 else (f"{gpus} x {self.card.name}", " each")
        lines = [f"{card}: {self.card.memory / 1e9:.1f} GB{each_has}; {tokens}", ""]
        head = f"{'method':12}{'weights':10}{'checkpointing':15}{'tokens a pass':>14}{'peak':>10}{'fits':>6}{'tokens/s':>15}{'time':>14}"
        lines.append(head)
        for each in self.options:
            known = not math.isnan(each.tokens_per_second)
            rate, time = (f"{each.tokens_per_second:,.0f}", duration(each.hours * 3600)) if known else ("?", "?")
            if each.waits:
                rate, time = f"< {rate}", f"> {time}"
            lines.append(
                f"{each.method:12}{each.dtype:10}{'yes' if each.checkpointing else 'no':15}{each.batch_tokens:14,}"
                f"{each.memory.peak / 1e9:7.1f} GB{'yes' if each.fits else 'no':>6}{rate:>15}{time:>14}"
            )
        waits = ["", "<: passes so short that the card waits for its host; a larger batch_size fills them"]
        return "\n".join([*lines, *(waits if any(each.waits for each in self.options) else []), "", self.basis])


def find_card(text: str) -> Card:
    """Return the card that a name or an amount of memory (24GB) means. Raises UserError for an unknown one."""
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|G)", text.strip(), re.IGNORECASE)) and float(match[1]):
        return Card(f"a card of {match[1]} GB", float(match[1]) * 1e9, 0.0)

    names = {_plain(each.name): each for each in CARDS}
    wanted = _plain(text)
    found = names.get(wanted) or names.get(f"rtx{wanted}")
    if found is None and (size := re.search(r"(?i)\b(\d+) ?GB\b", text)):  # PyTorch's own name, as NVIDIA A100-SXM4-80GB
        named = names.get(_plain(FORM.sub("", text)))
        found = named if named and abs(named.memory / 1e9 - float(size[1])) < SAME_SIZE * named.memory / 1e9 else None
        found = names.get(f"{_plain(FORM.sub('', text))}{size[1]}gb") or found
    if found is None:
        raise unknown_name("GPU", text, [*(each.name for each in CARDS), "its memory, as 24GB"], "gpu")
    return found


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def rated_flops(device: str) -> float:
    """Return the operations a second that the data sheet of a card promises, by its name as PyTorch knows it; 0 for one not known."""
    name = _plain(FORM.sub("", device))
    return next((each.flops for each in CARDS if _plain(each.name) == name), 0.0)


def this_card(memory_gb: float | None = None) -> Card | None:
    """Return the card of this machine, at most `memory_gb` of it; without a GPU one of that memory, or None."""
    import torch

    if pick_device() == "cpu":
        return Card(f"a card of {memory_gb:g} GB", memory_gb * 1e9, 0.0) if memory_gb else None
    total = torch.cuda.get_device_properties(0).total_memory
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() + CONTEXT  # what others hold is not ours
    memory = min(total, free, *([memory_gb * 1e9 + CONTEXT] if memory_gb else []))
    bfloat16 = half_precision("cuda") is torch.bfloat16
    return Card(torch.cuda.get_device_name(), memory, measured_peak("cuda"), measured=True, bfloat16=bfloat16)


def plan(data: str | Path, model: str, config: TrainConfig, *, gpu: str | None = None, revision: str | None = None) -> MemoryPlan:
    """Predict what full fine-tuning, LoRA and QLoRA of `model` on `data` take on a card: the one named, else this machine's.

    Raises UserError without a card to plan for, and for rows or models that cannot be trained.
    """
    return plans(data, model, config, gpus=[gpu] if gpu else [], revision=revision)[0]


def plans(
    data: str | Path | Sequence[str], model: str, config: TrainConfig, *, gpus: Sequence[str], revision: str | None = None
) -> list[MemoryPlan]:
    """Predict it for several cards, or for this machine's where none is named; the rows are looked at once. Raises UserError as `plan`."""
    cards = [_card(config, each) for each in gpus or (None,)]
    ref = resolve_model(model, revision=revision)
    settings = load_settings(ref)
    size = getattr(settings.get_text_config(), "vocab_size", None)
    report = load_rows(data, load_chat(ref), config, context=context_length(settings), vocabulary=size).report
    known: dict[Load, Memory] = {}
    try:
        return [
            MemoryPlan(
                card=card, report=report, options=tuple(_options(settings, report, config, card, known)), basis=_basis(card, settings)
            )
            for card in cards
        ]
    except NotReplayed as error:
        raise UserError(f"plan: memory cannot be planned for {settings.model_type} ({error}); `sftkit train sft` finds by trying what fits"
        ) from error  # fmt: skip


def _card(config: TrainConfig, gpu: str | None) -> Card:
    """Return the card that is named, else this machine's; of both no more than the settings allow."""
    card = find_card(gpu) if gpu else this_card(config.memory_gb)
    if card is None:
        raise UserError("plan: this machine has no GPU; say which one to plan for, as --gpu T4 or --gpu 24GB")
    return replace(card, memory=min(card.memory, config.memory_gb * 1e9 + CONTEXT)) if gpu and config.memory_gb else card


def _basis(card: Card, settings: Any) -> str:
    if not card.flops:
        return "speed: not known for a card without a name"
    if experts_taken(settings.get_text_config()):
        return "speed: not known for a model of experts: none was measured"
    peak = f"{card.flops / 1e12:.0f} TFLOP/s {'measured here' if card.measured else 'by its data sheet'}"
    return f"speed: from {peak} and the share of it that models of this width reached on an H200, not measured on this card"


def _options(settings: Any, report: DataReport, config: TrainConfig, card: Card, known: dict[Load, Memory]) -> Iterator[Option]:
    """Yield all options; `known` has the memory of steps that were looked at for another card."""
    limits = (config.batch_tokens,) if config.batch_tokens else (32_768, 8_192, 2_048)
    for method, dtype in (("full", "float32"), ("full", "bfloat16"), ("LoRA", "bfloat16"), ("QLoRA", "bfloat16")):
        if dtype == "bfloat16" and method == "full" and not card.bfloat16:
            continue
        kind = replace(config, lora=method == "LoRA", qlora=method == "QLoRA", parallel="auto")
        for parallel in ways(kind, None if card.bfloat16 else "torch.float16"):
            for checkpointing in (False, True):
                for tokens in sorted({pass_tokens(each, report, config) for each in limits}, reverse=True):
                    chosen = replace(kind, parallel=parallel, gradient_checkpointing=checkpointing)
                    yield _option(settings, report, chosen, card, tokens, dtype, known)


def pass_tokens(batch_tokens: int, report: DataReport, config: TrainConfig) -> int:
    """Return how many tokens a forward pass has: what falls to it of the largest update, and no fewer than the longest row.

    An update's passes are of one size, and as many on each GPU. With three data sets and 8 to 512 rows an update, that was 0 to 22 % too
    much where passes are not cut short by `batch_tokens`, 1 % as a rule.
    """
    rows = min(config.batch_size, report.train_rows)
    passes = math.ceil(rows * report.tokens / report.train_rows / max(batch_tokens, report.longest))
    passes = math.ceil(passes / config.gpus) * config.gpus
    whole = math.ceil(rows / passes) * report.tokens / report.train_rows  # each row is
    largest = math.ceil(max(_largest_update(report, config) / passes, whole))
    return max(min(batch_tokens, largest), report.longest)


def _largest_update(report: DataReport, config: TrainConfig) -> float:
    """Return its tokens: rows are dealt to updates by length, so that it has one of the longest rows and is else as the others.

    Rows that come in the order of a score may be as unlike as can be: all of an update may be the longest.
    """
    rows = min(config.batch_size, report.train_rows)
    others = (rows - 1) * report.longest if config.curriculum else (rows - 1) * report.tokens / report.train_rows
    return others + report.longest


def _steps(report: DataReport, config: TrainConfig) -> int:
    return math.ceil(math.ceil(report.train_rows / config.batch_size) * config.epochs)


def load_of(report: DataReport, config: TrainConfig, tokens: int, *, dtype: Any, half: Any, experts: bool = False) -> Load:
    """Return what a step is made of, by the settings of a run. `dtype`: of the weights, `half`: what is computed in."""
    compiled = _steps(report, config) >= COMPILED_STEPS if config.compile is None else config.compile
    several = _largest_update(report, config) > tokens * config.gpus  # passes on each
    recorded = compiled and can_record(config, half, experts=experts)  # then passes add to gradients that stand, an only one, too
    return Load(
        tokens=tokens, scored=max(1, round(tokens * report.trained_share)), accumulates=several or recorded,
        adapter=config.adapter, quantised=config.qlora, rank=config.lora_rank, checkpointing=bool(config.gradient_checkpointing),
        compiled=compiled, recorded=recorded, dtype=dtype, half=half,
    )  # fmt: skip


def _option(
    settings: Any, report: DataReport, config: TrainConfig, card: Card, tokens: int, dtype: str, known: dict[Load, Memory]
) -> Option:
    import torch

    half = torch.bfloat16 if card.bfloat16 else torch.float16
    weights = getattr(torch, dtype) if card.bfloat16 or not config.adapter else half
    computed = None if dtype == "bfloat16" and not config.adapter else half
    experts = bool(experts_taken(settings.get_text_config()))  # the shares of the peak were measured on models without
    load = load_of(report, config, tokens, dtype=weights, half=computed, experts=experts)
    memory = known[load] = known[load] if load in known else predict(settings, load)
    memory = _on_each(memory, settings, load, config)
    mean = report.tokens / report.train_rows
    peak = config.gpus * card.flops * (1 if card.measured else MATRIX_SHARE)
    model = bare_model(settings, load)
    rate = 0.0 if experts else share_of_peak(settings, load) * peak / token_flops(model, mean)
    hours = report.tokens * config.epochs / rate / 3600 if rate else math.nan
    method = "QLoRA" if config.qlora else "LoRA" if config.lora else "full"
    method += " fsdp" if config.gpus > 1 and config.parallel == "fsdp" else ""
    return Option(
        method=method, dtype="4 bits" if config.qlora else str(weights).removeprefix("torch."), checkpointing=load.checkpointing,
        batch_tokens=tokens, memory=memory, room=card.memory - CONTEXT, tokens_per_second=rate or math.nan, hours=hours,
        launched=not load.recorded, gpus=config.gpus,
    )  # fmt: skip


def share_of_peak(settings: Any, load: Load) -> float:
    """Return the share of a card's matrix-product rate that a step is expected to reach: between the widths that were measured."""
    width = settings.get_text_config().hidden_size
    kind = "compiled" if load.compiled else "plain"
    points = SHARES[kind]
    share = points[0][1] if width <= points[0][0] else points[-1][1]
    for (low, one), (high, two) in pairwise(points):
        if low <= width <= high:
            share = one + (two - one) * (width - low) / (high - low)
    return share * (ADAPTER_SHARES[kind] if load.adapter else 1) * (CHECKPOINTED if load.checkpointing else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a run begins with: tokens of a forward pass, whether activations are computed twice, and what that should take."""

    batch_tokens: int
    checkpointing: bool
    parallel: str = "ddp"  # how several GPUs share a run
    memory: Memory | None = None
    card: Card | None = None

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, for plan.json."""
        told: dict[str, Any] = {
            "batch_tokens": self.batch_tokens,
            "gradient_checkpointing": self.checkpointing,
            "parallel": self.parallel,
        }
        if self.memory and self.card:
            told |= {"predicted_gb": round(self.memory.peak / 1e9, 2), "card": self.card.name, "card_gb": round(self.card.memory / 1e9, 2)}
        return told


def choose(settings: Any, report: DataReport, config: TrainConfig, card: Card, *, dtype: Any, half: Any, most: int = TOKENS[0]) -> Choice:
    """Return the largest forward pass that fits on a card, with activations computed twice only where that is needed.

    Several GPUs share the weights (FSDP2) where that is asked for, or nothing fits otherwise. What `config` says is kept, `most` is the
    largest limit tried. Where nothing fits, the smallest, with a warning.
    """
    limits = (config.batch_tokens,) if config.batch_tokens else tuple(each for each in TOKENS if each <= most)
    sizes = {pass_tokens(each, report, config): each for each in limits[::-1]}  # of limits that give the same pass, the largest
    both = (False, True) if config.gradient_checkpointing is None else (config.gradient_checkpointing,)
    known: dict[Load, Memory] = {}
    experts = bool(experts_taken(settings.get_text_config()))
    for parallel in ways(config, half):
        for checkpointing in both:
            for tokens, limit in sorted(sizes.items(), reverse=True):
                if not checkpointing and len(both) == 2 and tokens < min(FEW_TOKENS, max(sizes)):
                    break
                tried = replace(config, gradient_checkpointing=checkpointing, parallel=parallel)
                load = load_of(report, tried, tokens, dtype=dtype, half=half, experts=experts)
                known[load] = known[load] if load in known else predict(settings, load)
                memory = _on_each(known[load], settings, load, tried)
                choice = Choice(batch_tokens=limit, checkpointing=checkpointing, parallel=parallel, memory=memory, card=card)
                if memory.peak * SLACK <= card.memory - CONTEXT:
                    return choice
    log.warning(
        "the smallest step that these settings allow is expected to take %.1f GB, and %s has %.1f: it is tried all the same; less is taken"
        " by dtype: bfloat16, --lora, --qlora, or a smaller max_length (see `sftkit train plan`)",
        memory.peak / 1e9, card.name, card.memory / 1e9,
    )  # fmt: skip
    return choice


def ways(config: TrainConfig, half: Any = None) -> tuple[str, ...]:
    """Return the ways in which a run's GPUs may share it, the one to be preferred first. `half`: the 16-bit format that is computed in."""
    if config.parallel != "auto":
        return (config.parallel,)
    whole = config.gpus == 1 or config.qlora or str(half) == "torch.float16"  # whose scaled losses FSDP was not tried with
    return ("ddp",) if whole else ("ddp", "fsdp")


def _on_each(memory: Memory, settings: Any, load: Load, config: TrainConfig) -> Memory:
    """Return what a step takes on each GPU, where there are several: a share of what stands with FSDP2, and what they send."""
    if config.gpus == 1:
        return memory
    shared = config.parallel == "fsdp"
    if shared:
        memory = memory.shared(config.gpus, gathered(settings, load), accumulates=load.accumulates, adapter=config.adapter)
    return memory.averaged(copied(settings, load, shared=shared), recorded=load.recorded)
