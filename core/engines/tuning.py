"""Which settings run a model fastest on this machine: short measurements of the real work, remembered by model and card."""

import hashlib
import itertools
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..catalogue import cache_dir
from ..errors import UserError
from ..files import read_json, write_json
from ..hardware import installed_version, pick_device
from .base import Engine, EngineConfig, Request
from .loading import choose
from .registry import open_engine

log = logging.getLogger(__name__)

# One after the other, each with the best of those before; the next value of one is tried only if the one before was faster, since
# each costs a start of the engine.
STEPS: dict[str, tuple[tuple[str, tuple[Any, ...]], ...]] = {
    # several processes on one card: small models are bound by the host
    "vllm": (("replicas", (2, 3)), ("max_num_seqs", (2048, 4096)), ("max_num_seqs", (512, 256)), ("max_num_batched_tokens", (32_768,))),
    "transformers": (("batch_tokens", (4096, 1024)), ("batch_tokens", (65_536,))),
}
BETTER = 1.02  # another setting has to be so much faster: less is not worth it
MEASURED = 3  # times, what is to take the place of the best so far


@dataclass(frozen=True, slots=True)
class Trial:
    """One measurement."""

    settings: dict[str, Any]
    tokens_per_second: float  # 0 where it could not be run
    seconds_to_start: float
    error: str = ""


def tune(
    model: str,
    config: EngineConfig,
    requests: Sequence[Request],
    *,
    revision: str | None = None,
    warm_up: float = 20.0,
    seconds: float = 30.0,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> EngineConfig:
    """Measure tokens per second with the settings of STEPS, remember the best by model and card, and return them in a config.

    Each trial opens the engine, answers `requests` over and over, with other random numbers each time, and counts the answers
    that finish within `seconds` after `warm_up`, as `rate` says. The first trial is the config as it is. The same settings are not
    as fast from one time to the next where other programs run, so that what seems faster than the best so far is measured again, in
    turns with that, and takes its place only if the slowest of its MEASURED times is faster than the other's fastest. A setting that
    cannot be run (too little memory) is told and left out. Raises UserError when not even the first can be run.
    """
    name = choose(config)
    if name not in STEPS:
        raise UserError(f"tune: the engine {name} has no settings of its own to try; tune the server where it runs")

    def measured(settings: EngineConfig) -> Trial:
        trial, _ = _measure(model, settings, requests, revision, warm_up, seconds)
        tell(trial)
        return trial

    best = config
    trial, identity = _measure(model, config, requests, revision, warm_up, seconds)
    if trial.error:
        raise UserError(f"tune: {trial.error}")
    tell(trial)
    rates = [trial.tokens_per_second]  # of the best
    for setting, values in STEPS[name]:
        for value in values:
            if value in (getattr(best, setting), getattr(config, setting)):
                continue
            other = replace(best, **{setting: value})
            others = [measured(other).tokens_per_second]
            while (faster := min(others) > BETTER * max(rates)) and len(others) < MEASURED:
                rates.append(measured(best).tokens_per_second)
                others.append(measured(other).tokens_per_second)
            if not faster:
                break
            best, rates = other, others
    found = {"settings": tuned_settings(best), "tokens_per_second": round(statistics.median(rates), 1)}
    write_json(_path(identity, config), {**found, **_facts(identity, config)})
    return best


def tuned_settings(config: EngineConfig) -> dict[str, Any]:
    """Return the settings of a config that `tune` tries."""
    return {name: getattr(config, name) for name, _ in STEPS[choose(config)]}


def tuned(config: EngineConfig, identity: str) -> EngineConfig:
    """Return a config with what `tune` found for this model and card, in the place of settings that have their defaults."""
    if choose(config) not in STEPS:
        return config
    path = _path(identity, config)
    if not path.exists():
        return config
    defaults = {each.name: each.default for each in fields(EngineConfig)}
    found = {name: value for name, value in read_json(path)["settings"].items() if getattr(config, name, value) == defaults.get(name)}
    changed = {name: value for name, value in found.items() if value != defaults[name]}
    if changed:
        log.info("settings that were the fastest here: %s", ", ".join(f"{name} {value}" for name, value in changed.items()))
    return replace(config, **found)


def _measure(
    model: str, config: EngineConfig, requests: Sequence[Request], revision: str | None, warm_up: float, seconds: float
) -> tuple[Trial, str]:
    settings = tuned_settings(config)
    start = time.perf_counter()
    try:
        engine = open_engine(model, config, revision=revision)
    except UserError as error:
        return Trial(settings, 0.0, time.perf_counter() - start, str(error)), ""
    with closing(engine):
        if hasattr(engine, "wait_for_all"):
            engine.wait_for_all()  # several processes on one card start one after another
        started = time.perf_counter() - start
        try:
            return Trial(settings, rate(engine, requests, warm_up, seconds), started), engine.identity
        except UserError as error:
            return Trial(settings, 0.0, started, str(error)), engine.identity


def rate(engine: Engine, requests: Sequence[Request], warm_up: float, seconds: float) -> float:
    """Return the tokens per second of the answers that finish within `seconds`, after a warm-up in which none are counted.

    Answers come in waves: what the engine has taken at the end of the warm-up goes by first (for `seconds` at most), and the count
    ends with a whole number of times as many (for thrice as long at most; a warning tells where not even one of them came).
    """
    begin = time.perf_counter() + warm_up
    latest = begin + seconds  # of the time that the count begins
    tokens, first, last = 0, None, begin
    asked = answered = counted = under_way = passing = 0
    done = False

    def feed() -> Iterator[Request]:
        nonlocal asked
        for number in itertools.count():
            for request in requests:
                if done or (first is None and time.perf_counter() > latest):
                    return
                asked += 1
                yield replace(request, key=f"{number}/{request.key}", seed=(request.seed + number) % 2**63)

    stream = engine.generate(feed())
    for completion in stream:
        now = time.perf_counter()
        answered += 1
        if now <= begin:
            continue
        if first is None:
            if now > latest:
                break
            first, under_way = now, asked - answered  # the time is counted from an answer to an answer
            passing = under_way
        elif passing and now <= latest:
            first, passing = now, passing - 1
        else:
            passing = 0
            tokens, counted, last = tokens + completion.num_tokens, counted + 1, now
            whole = counted % max(1, under_way) == 0  # waves, about
            if now >= first + seconds and (whole or now > first + 3 * seconds):
                break
    done = True
    stream.close()  # type: ignore[attr-defined]
    if first is None or last <= first:
        raise UserError(f"no two answers came within {seconds:g} s: give shorter answers, or more seconds")
    if counted < under_way:
        log.warning(
            "warning: of %s requests under way %s were answered in %.0f s: the next rate may be far off; give more seconds",
            f"{under_way:,}",
            f"{counted:,}",
            last - first,
        )
    return tokens / (last - first)


def _facts(identity: str, config: EngineConfig) -> dict[str, Any]:
    """Return what a measurement holds for."""
    engine, device = choose(config), pick_device(config.device)
    card = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        import torch

        card = torch.cuda.get_device_name(device)
    kept = ("dtype", "gpu_memory_utilization", "max_model_len", "enforce_eager")
    same = {name: value for name, value in asdict(config).items() if name in kept}
    return {"identity": identity, "engine": engine, "version": installed_version(engine), "card": card, **same}


def _path(identity: str, config: EngineConfig) -> Path:
    digest = hashlib.sha256(json.dumps(_facts(identity, config), sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "tuning" / f"{digest}.json"
