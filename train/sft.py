"""Fine-tune a model on a data set: what is trained on is known before the first step, and the run goes on after any stop."""

import gc
import importlib.util
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.chat import Chat, load_chat
from ..core.config import to_mapping
from ..core.errors import UserError, missing_package
from ..core.files import read_json, read_json_lines, write_atomically, write_json
from ..core.hardware import half_precision, pick_device
from ..core.models import ModelRef, context_length, load_model, load_settings, model_identity, resolve_model
from ..core.progress import duration
from ..core.run import Run, is_done, mark_done
from ..core.text import counted
from .card import write_card
from .config import PreferenceConfig, TrainConfig
from .data import DataReport, TrainingData, fingerprint
from .disk import room_on_disk
from .init import check_init, make_start
from .memory import NotReplayed
from .parity import check_parity
from .plan import Choice, choose, pass_tokens, this_card, ways
from .prepared import Preparation
from .stops import AFTER_SAVING, handling_stops

log = logging.getLogger(__name__)

FREE = (  # settings that do not decide what the model becomes
    *("data", "model", "revision", "logging_steps", "save_minutes", "max_hours", "stop_check", "samples"),
    *("batch_tokens", "compile", "eval_steps", "gradient_checkpointing", "auto", "memory_gb", "gpus", "parallel", "trackers"),
)
PREVIEW_ROWS = 20
CPU_TOKENS, GPU_TOKENS = 2048, 32_768  # in one forward pass, to begin with
HIGH_RATE = 0.01
SAVED = "saved.json"  # the final model stands and was held against the trained one; gone when all is done


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run made. Losses are -log P(answer | prompt) per token, in nats."""

    run: Path
    model: Path  # the final model
    rows: int
    steps: int
    tokens: int  # that went through the model, prompts included
    seconds: float  # of the steps, in all calls
    first_loss: float
    last_loss: float
    validation: tuple[float, ...] | None  # loss on the validation rows before and after
    loss: str = "nll"  # what first_loss and last_loss are: of a token, or the objective of a pair
    preferred: float | None = None  # share of the validation pairs whose better answer the model moved towards, held against the worse
    stop_check: dict[str, Any] | None = None  # how many answers of the final model ended: sampling.StopCheck, with its text

    @property
    def tokens_per_second(self) -> float:
        """Return the rate of the training steps."""
        return self.tokens / self.seconds if self.seconds else math.nan

    def summary(self) -> str:
        """Write it for people."""
        rate = f"{self.tokens:,} tokens in {duration(self.seconds)} ({self.tokens_per_second:,.0f} tokens/s)"
        lines = [f"{self.run}: {self.rows:,} rows, {self.steps:,} steps, {rate}"]
        weighed = ", a token's times its p" if self.loss == "dft" else ""
        lines.append(f"training loss{weighed}: {self.first_loss:.3f} at the first logged step, {self.last_loss:.3f} at the last")
        if self.validation:
            lines.append(f"validation loss: {self.validation[0]:.3f} before, {self.validation[1]:.3f} after")
        if self.preferred is not None:
            lines.append(f"validation pairs: the better answer gained on the worse in {self.preferred:.0%}")
        if self.stop_check:
            lines.append(self.stop_check["text"])
        return "\n".join([*lines, f"model: {self.model}"])


def train(data: str | Path | Sequence[str], model: str, out: Path, config: TrainConfig, *, revision: str | None = None) -> TrainResult:
    """Fine-tune `model` on the rows of `data` into the run folder `out`; a run that was stopped goes on from its last checkpoint.

    `data` may be several sources, as mixture.parse_mixture reads them; pairs are learned from where `config` is a PreferenceConfig.

    Writes train/plan.json and preview.html before the first step, metrics.jsonl and checkpoints during it, and final/,
    results.json and done.json at the end. Raises UserError for rows or models that cannot be trained, and for a folder that
    holds another run. A single row that cannot be read is one of these: what is damaged is not trained on in part unless that was
    decided, by `sftkit curate import --max-failed`, whose ledger has each row that it left out.
    """
    from .merge import refuse_quantised
    from .processes import wait_for_last

    began = time.monotonic()
    ref = resolve_model(model, revision=revision)
    device = pick_device()
    _check_settings(config, device, half_precision(device))
    settings = load_settings(ref)
    refuse_quantised(ref)
    check_init(config.init, settings)
    _cap_memory(config, device)
    chat = load_chat(ref)
    size = getattr(settings.get_text_config(), "vocab_size", None)
    preparation = Preparation(data, chat, config, context=context_length(settings), vocabulary=size)
    with Run.create(out) as run:
        room = run.room("train")
        wait_for_last(room)
        begun = is_done(room) or (room / SAVED).exists() or any(map(is_done, (room / "checkpoints").glob("checkpoint-*")))
        own = room / "ledger.parquet"
        with write_atomically(own) if begun else nullcontext(own) as ledger:  # what stands here keeps its own, if this is another run
            prepared = preparation.rows(ledger)
            parity = check_parity(prepared.train + prepared.validation, chat)
            rows = fingerprint(prepared.train + prepared.validation)
            marks = {"identity": model_identity(ref), "template": chat.fingerprint(), "rows": rows}
            before = run.config().get("train", {})
            named = {"model": "identity", "data": "rows"}  # names are free, what they stand for is not: where that changed, both are told
            free = tuple(each for each in FREE if each not in named or before.get(named[each]) == marks[named[each]])
            told = {
                "data": str(data) if isinstance(data, (str, Path)) else list(data),
                "model": model,
                "revision": revision,
                **to_mapping(config),
                **marks,
            }
            changed = run.configure("train", told, free=free if begun else ("*",))
        if others := [each for each in changed if each not in free]:
            log.info("%s: nothing was trained here yet, it begins anew with other settings (%s)", out, ", ".join(others))
            for each in ("start", "checkpoints"):
                shutil.rmtree(room / each, ignore_errors=True)
        if is_done(room):
            log.info("%s: is trained already", out)
            return _result(run)
        _write_plan(room, prepared, chat, config, device)
        deadline = began + config.max_hours * 3600 if config.max_hours is not None else None
        return _train(run, ref, chat, prepared, config, device, {**marks, "parity": parity}, deadline)


def _check_settings(config: TrainConfig, device: str, half: Any) -> None:
    """Raise UserError for settings that this machine has no way to follow; say aloud what is seldom meant. `half`: its 16-bit format."""
    if config.rate > HIGH_RATE:
        log.warning("learning rate %g: is far above what models bear; 2e-5 is usual, with LoRA 2e-4", config.rate)
    if config.dtype == "bfloat16" and str(half) != "torch.bfloat16":
        if device != "cpu":
            raise UserError("dtype bfloat16: this GPU does not compute in it; leave dtype out (float32 weights, float16 in the products)")
        log.warning("dtype bfloat16: this processor only imitates it, slowly; leave dtype out to compute in float32")
    _check_gpus(config, device, half)
    for each in config.trackers:
        if importlib.util.find_spec(each) is None:
            raise UserError(f"tracker {each}: is not installed: pip install {each}")
    if config.samples and not config.validation:
        log.warning("samples: are taken at evaluations, and without validation rows there are none; give validation: 0.05")
    if config.qlora:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise missing_package("bitsandbytes", "quant") from None


def _check_gpus(config: TrainConfig, device: str, half: Any) -> None:
    """Raise UserError for processes that this machine has no cards for, or that the settings do not allow."""
    import torch

    if config.gpus == 1:
        return
    if device != "cpu" and torch.cuda.device_count() < config.gpus:
        raise UserError(f"gpus: {config.gpus} asked for, and this machine has {torch.cuda.device_count()}")
    if config.parallel == "fsdp" and config.dtype == "auto" and str(half) == "torch.float16":
        raise UserError("parallel: fsdp needs GPUs that compute in bfloat16; leave it out, and each has the whole model")


def _write_plan(room: Path, data: TrainingData, chat: Chat, config: TrainConfig, device: str) -> None:
    from .preview import write_html

    rows = len(data.train)
    steps = math.ceil(math.ceil(rows / config.batch_size) * config.epochs)
    plan = {**data.report.facts(), "steps": steps, "learning_rate": config.rate, "device": device}
    write_json(room / "plan.json", plan)
    write_html(room / "preview.html", data, chat, limit=PREVIEW_ROWS)
    log.info("plan: %s in %s, learning rate %.2g, on %s; train/preview.html shows what is trained on",
             counted(rows, "row"), counted(steps, "step"), config.rate, device)  # fmt: skip


def _train(
    run: Run, ref: ModelRef, chat: Chat, data: TrainingData, config: TrainConfig, device: str, marks: dict[str, Any], deadline: float | None
) -> TrainResult:
    from .sampling import check_stops

    room = run.path / "train"
    final = room / "final"
    if not ((room / SAVED).exists() and final.exists()):
        _make_final(room, ref, chat, data, config, device, marks, deadline)
    found = _results(room / "metrics.jsonl", data)
    losses = found["validation"]
    rose = losses is not None and losses[1] > losses[0]
    stops = check_stops(final, data, config.stop_check, device, worse=rose)
    told = {"stop_check": {**asdict(stops), "rate": stops.rate, "text": stops.text()} if stops else None}
    loss = config.objective if isinstance(config, PreferenceConfig) else config.loss
    write_json(room / "results.json", {**found, "loss": loss, **told})
    if rose:
        log.warning("validation loss rose from %.3f to %.3f: on rows that it did not learn from the model is worse than before; lower the"
                    " learning rate, or train for less", *losses)  # fmt: skip
    write_card(room, ref, _told(run.config()["train"]["data"]), data.report, config)
    mark_done(room, model="final")
    for each in ("checkpoints", "processes"):  # the final model stands: what they were for is done
        shutil.rmtree(room / each, ignore_errors=True)
    (room / SAVED).unlink(missing_ok=True)
    return _result(run)


def _make_final(
    room: Path, ref: ModelRef, chat: Chat, data: TrainingData, config: TrainConfig, device: str, marks: dict[str, Any],
    deadline: float | None,
) -> None:  # fmt: skip
    """Train, and save the final model: asked to stop while it is saved, it is saved first, for the last steps are in no checkpoint."""
    import torch

    from .final import save_final

    start = _start(ref, chat, config, room / "start") if config.init is not None else ref
    own = torch.bfloat16 if start.path is not None and start.path.is_file() else load_settings(start).dtype or torch.float32
    choice = _choose(load_settings(start), data.report, config, device, own)
    tokens, settings = choice.batch_tokens, replace(config, gradient_checkpointing=choice.checkpointing, parallel=choice.parallel)
    _note(room, choice)
    while True:
        try:
            trained, asked = _trained(room, start, chat, data, settings, device, own, tokens, deadline)
            break
        except torch.OutOfMemoryError:
            if tokens <= data.report.longest:
                raise UserError(
                    f"out of memory with one row of {data.report.longest:,} tokens: give gradient_checkpointing: true, dtype:"
                    " bfloat16, --lora, or a smaller max_length; `sftkit train plan` says what fits"
                ) from None
        tokens = max(min(tokens, pass_tokens(tokens, data.report, config)) // 2, data.report.longest)
        _note(room, replace(choice, batch_tokens=tokens))
        gc.collect()  # the model that did not fit
        torch.cuda.empty_cache()
        log.info("out of memory: going on with at most %s tokens in a forward pass; the steps stay the same", f"{tokens:,}")
    final = room / "final"
    facts = {"base": ref.name, **marks, "settings": to_mapping(config)}
    with _undisturbed(asked):
        with room_on_disk(final):
            save_final(trained, start, chat, data.validation or data.train, room, dtype=own, facts=facts)
        if check_parity(data.train + data.validation, load_chat(resolve_model(final))) != marks["parity"]:
            raise UserError(f"{final}: the saved tokenizer renders the training prompts otherwise than in training; it was not saved whole")
        write_json(room / SAVED, {})
    del trained
    gc.collect()


@contextmanager
def _undisturbed(asked: bool) -> Iterator[None]:
    """Let a block end before Ctrl-C or SIGTERM stops this process, as it may have `asked` before; asked again, it stops at once."""

    def ask(_number: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        log.info(AFTER_SAVING)

    with handling_stops(ask):
        yield
    if asked:
        raise KeyboardInterrupt


def _choose(settings: Any, report: DataReport, config: TrainConfig, device: str, own: Any) -> Choice:
    """Return the forward pass to begin with: what is given, else by the memory plan, else a usual one."""
    card = this_card(config.memory_gb) if config.auto else None
    most = GPU_TOKENS if device != "cpu" else CPU_TOKENS
    usual = Choice(batch_tokens=config.batch_tokens or most, checkpointing=bool(config.gradient_checkpointing), parallel=ways(config)[0])
    if card is None:
        return usual
    from .local import formats

    weights, half = formats(config, own, device)
    try:
        choice = choose(settings, report, config, card, dtype=weights, half=half, most=most)
    except NotReplayed as error:
        log.warning("memory: cannot be planned for %s (%s); at most %s tokens in a forward pass, fewer where memory runs out",
                    settings.model_type, error, f"{usual.batch_tokens:,}")  # fmt: skip
        return usual
    assert choice.memory
    log.info(
        "memory: %.1f GB expected of %.1f, at most %s tokens in a forward pass%s", choice.memory.peak / 1e9, card.memory / 1e9,
        f"{choice.batch_tokens:,}", ", activations computed twice" if choice.checkpointing else "",
    )  # fmt: skip
    return choice


def _note(room: Path, choice: Choice) -> None:
    """Write into plan.json what the forward passes are."""
    write_json(room / "plan.json", {**read_json(room / "plan.json"), "memory": choice.facts()})


def _cap_memory(config: TrainConfig, device: str) -> None:
    """Let this process take no more of a GPU than it may."""
    import torch

    if config.memory_gb is None or device == "cpu":
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, config.memory_gb * 1e9 / total))


def _trained(
    room: Path, start: ModelRef, chat: Chat, data: TrainingData, config: TrainConfig, device: str, own: Any, tokens: int,
    deadline: float | None,
) -> tuple[Any, bool]:  # fmt: skip
    """Train, here or on several processes; return the trained model as it was loaded, and whether it was asked to stop after that."""
    from .local import run_trainer
    from .processes import Job, train_on_processes
    from .trainer import unwrapped

    if config.gpus == 1:
        trainer = run_trainer(room, start, chat, data, config, device, own, tokens, deadline)
        return unwrapped(trainer), trainer.asked_to_stop
    job = Job(room=room, start=start, data=data, config=config, device=device, own=own, tokens=tokens, deadline=deadline)
    return train_on_processes(job)


def _start(ref: ModelRef, chat: Chat, config: TrainConfig, folder: Path) -> ModelRef:
    """Return the changed start model, made once."""
    if not is_done(folder):
        make_start(load_model(ref), chat, str(config.init), folder)
        mark_done(folder)
    return resolve_model(folder)


def _results(metrics: Path, data: TrainingData) -> dict[str, Any]:
    lines = read_json_lines(metrics)
    steps = [line for line in lines if "loss" in line]
    validation = [line["eval_loss"] for line in lines if "eval_loss" in line]
    right = [line["eval_rewards/accuracies"] for line in lines if "eval_rewards/accuracies" in line]
    preferred = {"preferred": right[-1]} if right else {}
    return {
        "rows": data.report.train_rows,
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["num_tokens"],
        "seconds": steps[-1]["seconds"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "validation": [validation[0], validation[-1]] if validation else None,
        **preferred,
    }


def _told(data: str | list[str]) -> str:
    return data if isinstance(data, str) else " ".join(data)


def _result(run: Run) -> TrainResult:
    facts = read_json(run.path / "train" / "results.json")
    validation = facts.pop("validation")
    return TrainResult(run=run.path, model=run.path / "train" / "final", validation=tuple(validation) if validation else None, **facts)
