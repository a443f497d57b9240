"""The engine for a GPU: runs a model with vLLM, fed continuously, each answer handed over as it finishes."""

import importlib.util
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..chat import Chat, load_chat
from ..errors import UserError, missing_package
from ..hardware import gpu_memory, visible_gpus
from ..models import ModelRef, context_length, load_settings, model_identity, resolve_model
from .base import NOT_FINITE, ChoiceRequest, Completion, EngineConfig, EngineDied, Request, Sampling, ScoreRequest, TokenLogprobs
from .stops import first_stop
from .vllm_errors import NOT_A_NUMBER, first_error
from .vllm_processes import Processes

log = logging.getLogger(__name__)

CPU_SHARE = 0.3  # on a CPU the "GPU memory" is the machine's: room must be left for everything else
CPU_CACHE_BYTES = 2 << 30
SECONDS_TO_END = 30.0
SHARE_OF_WEIGHTS = 0.85  # of the free memory: the rest is for the cache and the step's own tensors
GIB_TO_SPARE = 0.5  # a context of CUDA, and what the driver rounds up
# Tokens of a step for which a graph is kept. vLLM's own sizes end at 512, and a larger step is launched kernel by kernel, though it
# takes a thousand sequences at once and their prompts besides; sizes a fifth apart are fewer in all and start as fast.
GRAPH_SIZES = (
    *(1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512),
    *(640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048),
)

T = TypeVar("T", Request, ScoreRequest, ChoiceRequest)


@dataclass(slots=True)
class _Wanted(Generic[T]):
    """A request as vLLM takes it; with an error, if it cannot be given to it at all."""

    request: T
    ids: tuple[int, ...]
    length: int  # of prompt and longest answer
    params: Any  # vLLM's SamplingParams
    error: str | None


class VllmEngine:
    """Runs one model with vLLM, in processes that vLLM starts. See `core.engines.base.Engine`.

    A script that opens it needs `if __name__ == "__main__":`, as every program that starts processes anew.
    """

    def __init__(self, engine: Any, processes: Processes, chat: Chat, *, identity: str) -> None:
        self.chat: Chat | None = chat
        self.identity = identity
        self.context_length: int | None = engine.vllm_config.model_config.max_model_len
        self._engine, self._processes, self._chat = engine, processes, chat
        self._in_flight = 2 * engine.vllm_config.scheduler_config.max_num_seqs
        self._number = 0
        self.steps = 0
        self._ended = threading.Event()
        processes.when_one_ends(self._wake)

    def _wake(self) -> None:
        """Let `step` end, which otherwise waits forever for an engine that was killed (vLLM 0.25 to 0.30)."""
        self._ended.set()
        engine = self._engine
        if engine is not None:
            engine.engine_core.outputs_queue.put(RuntimeError("the engine has ended"))

    def close(self) -> None:
        """End vLLM's processes, and with them all that they hold."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.engine_core.shutdown(timeout=SECONDS_TO_END)
            self._processes.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests; each completion is given as soon as it is there. Twice as many as run at once are in flight."""
        for request, output, error in self._run(requests, self._answering):
            yield self._completion(request, output) if error is None else Completion(key=request.key, finish_reason="error", error=error)

    def logprobs(self, requests: Iterable[ScoreRequest]) -> Iterator[TokenLogprobs]:
        """Score texts; one that does not fit the context, with room for one more token, comes back with its error."""
        for request, output, error in self._run(requests, self._scoring):
            yield self._scores(request, output) if error is None else TokenLogprobs(key=request.key, error=error)

    def _answering(self, request: Request) -> _Wanted[Request]:
        sampling, ids = request.sampling, request.prompt_ids
        length = len(ids) + sampling.max_new_tokens
        error = None
        if not ids:
            error = "the prompt has no tokens"
        elif self.context_length is not None and length > self.context_length:  # vLLM would cut the answer there
            new = sampling.max_new_tokens
            error = f"prompt too long: {len(ids)} tokens and {new} new ones do not fit the context of {self.context_length}"
        params = self._params(sampling, seed=request.seed, logprobs=0 if request.logprob else None)
        return _Wanted(request, ids, length, params, error)

    def _scoring(self, request: ScoreRequest) -> _Wanted[ScoreRequest]:
        error = None
        if not 1 <= request.start < len(request.ids):
            error = f"nothing to score: {len(request.ids)} tokens, scored from token {request.start}"
        elif self.context_length is not None and len(request.ids) >= self.context_length:
            # scored with one token more than there is: vLLM always makes one
            error = f"too long: {len(request.ids)} tokens do not fit the context of {self.context_length} with room for another"
        params = self._params(Sampling(temperature=0, max_new_tokens=1), prompt_logprobs=0)
        return _Wanted(request, request.ids, len(request.ids), params, error)

    def choices(self, requests: Iterable[ChoiceRequest]) -> Iterator[TokenLogprobs]:
        """Give the log-probabilities of some tokens as the next one; prompts share what they begin with, as for answers."""
        for request, output, error in self._run(requests, self._choosing):
            yield self._chosen(request, output) if error is None else TokenLogprobs(key=request.key, error=error)

    def _choosing(self, request: ChoiceRequest) -> _Wanted[ChoiceRequest]:
        error = None
        if not request.ids or not request.choices:
            error = "nothing to choose: a prompt and choices are needed"
        elif self.context_length is not None and len(request.ids) >= self.context_length:
            error = f"too long: {len(request.ids)} tokens and one more do not fit the context of {self.context_length}"
        params = self._params(Sampling(temperature=0, max_new_tokens=1), logprob_token_ids=list(request.choices))
        return _Wanted(request, request.ids, len(request.ids), params, error)

    def _params(self, sampling: Sampling, **more: Any) -> Any:
        """Return vLLM's settings of one request. The stop ids are the chat's alone: they hold what the model's files list."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        if sampling.json_schema is not None:
            more["structured_outputs"] = StructuredOutputsParams(json=sampling.json_schema)
        if sampling.stop:
            more["stop"] = list(sampling.stop)
        try:
            return SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(self._chat.stop_ids),
                ignore_eos=True,
                detokenize=bool(sampling.stop),  # for vLLM to see a stop; the text is core.chat's, as for every engine
                flat_logprobs=True,
                skip_clone=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
                **more,
            )
        except _refusals() as error:
            raise UserError(f"vLLM does not take these settings: {_one_line(error)}") from error

    def _run(self, requests: Iterable[T], prepare: Callable[[T], _Wanted[T]]) -> Iterator[tuple[T, Any, str | None]]:
        """Yield each request with vLLM's output, or with an error, as they finish.

        Longest first within a look-ahead, so that no long one is left alone at the end; the sort keeps the order of equals,
        so that samples of one prompt stay together and share its prefix.
        """
        source = iter(requests)
        ahead: deque[_Wanted[T]] = deque()
        under_way: dict[str, T] = {}
        exhausted = False
        try:
            while True:
                while len(under_way) < self._in_flight:
                    if not ahead and not exhausted:
                        window = [prepare(each) for each in islice(source, self._in_flight)]
                        exhausted = not window
                        ahead.extend(sorted(window, key=lambda each: each.length, reverse=True))
                    if not ahead:
                        break
                    wanted = ahead.popleft()
                    error = wanted.error or self._add(wanted, under_way)
                    if error:
                        yield wanted.request, None, error
                if not under_way:
                    return
                for output in self._step():
                    request = under_way.pop(output.request_id, None)  # None: of a run that was left early
                    if request is not None:
                        yield request, output, None
        finally:
            self._abort(list(under_way))

    def _abort(self, names: list[str]) -> None:
        """Let vLLM forget requests whose answers nobody waits for."""
        if names and self._engine is not None:
            try:
                self._engine.abort_request(names)
            except Exception:
                if not self._ended.wait(1.0):  # an engine that has ended, by Ctrl-C for one, has forgotten them already
                    raise

    def _add(self, wanted: _Wanted[T], under_way: dict[str, T]) -> str | None:
        """Give a request to vLLM; return why it does not take it."""
        self._number += 1
        name = str(self._number)
        try:
            self._engine.add_request(name, {"type": "token", "prompt_token_ids": list(wanted.ids)}, wanted.params)
        except _refusals() as error:
            return _one_line(error)
        under_way[name] = wanted.request
        return None

    def _step(self) -> list[Any]:
        """Wait for the engine's next step; return what finished in it."""
        try:
            outputs = self._engine.step()
        except Exception as error:
            if not self._ended.is_set() and type(error).__name__ != "EngineDeadError":
                raise
            raise EngineDied(
                f"vLLM's engine {self._processes.ending()}; its messages are above. What finished is kept, and the same command goes on;"
                " where memory was the reason, lower gpu_memory_utilization, max_num_seqs or max_model_len first"
            ) from error
        self.steps += 1
        return [each for each in outputs if each.finished]

    def _completion(self, request: Request, output: Any) -> Completion:
        answer = output.outputs[0]
        ids, reason, logprob = tuple(answer.token_ids), answer.finish_reason, answer.cumulative_logprob
        infinite = not math.isfinite(logprob) if logprob is not None else request.logprob
        if infinite or (reason == "error" and answer.stop_reason == NOT_A_NUMBER):
            return Completion(key=request.key, finish_reason="error", error=f"{NOT_FINITE} for one of its tokens")
        if reason not in ("stop", "length") or not ids:
            return Completion(key=request.key, finish_reason="error", error=f"vLLM ended the answer with {reason!r}")
        text = self._chat.decode(ids[:-1] if reason == "stop" and not isinstance(answer.stop_reason, str) else ids)
        place = first_stop(text, request.sampling.stop)
        return Completion(
            key=request.key,
            text=text[:place],
            finish_reason="stop" if reason == "stop" or place is not None else "length",
            num_tokens=len(ids),
            # vLLM's "raw" mode: of the model itself, before temperature and top-p
            logprob=None if logprob is None else logprob / len(ids),
            token_ids=ids,
        )

    def _scores(self, request: ScoreRequest, output: Any) -> TokenLogprobs:
        listed = output.prompt_logprobs or []
        if len(listed) != len(request.ids):
            reason = output.outputs[0].finish_reason if output.outputs else None
            return TokenLogprobs(key=request.key, error=f"vLLM scored {len(listed)} of {len(request.ids)} tokens and ended with {reason!r}")
        values = tuple(listed[place][request.ids[place]].logprob for place in range(request.start, len(request.ids)))
        if not all(math.isfinite(each) for each in values):
            return TokenLogprobs(key=request.key, error=f"{NOT_FINITE} for one of its tokens")
        return TokenLogprobs(key=request.key, logprobs=values)

    def _chosen(self, request: ChoiceRequest, output: Any) -> TokenLogprobs:
        found = output.outputs[0].logprobs[0]
        values = tuple(float(found[each].logprob) for each in request.choices)
        if not all(math.isfinite(each) for each in values):
            return TokenLogprobs(key=request.key, error=f"{NOT_FINITE} for one of its tokens")
        return TokenLogprobs(key=request.key, logprobs=values)


def open(model: str, config: EngineConfig, *, revision: str | None = None) -> VllmEngine:
    """Start vLLM with a model: a minute or more. Raises UserError for a model that is not there or that vLLM cannot run."""
    if importlib.util.find_spec("vllm") is None:
        raise missing_package("vllm", "vllm")
    ref = resolve_model(model, revision=revision)
    if ref.path is not None and ref.path.is_file():
        raise UserError(f"{model}: vLLM runs model folders, not .gguf files; give a folder, or the engine transformers")
    config = fit_memory(ref, config)
    chat, identity = load_chat(ref), model_identity(ref)
    _prepare_environment()
    arguments = _arguments(ref, config)
    log.info("starting vLLM with %s", model)
    processes = Processes()
    try:
        engine = processes.start(lambda: _start(ref, arguments))
    except BaseException:
        processes.close()
        raise
    return VllmEngine(engine, processes, chat, identity=identity)


def fit_memory(ref: ModelRef, config: EngineConfig) -> EngineConfig:
    """Return a config that takes no more of the GPU's memory than is free; vLLM would stop a minute later without a number.

    Raises UserError for weights that do not fit, with what is missing, and for a card that is full.
    """
    cards = visible_gpus()
    memory = [each for each in map(gpu_memory, cards[: config.tensor_parallel_size]) if each]
    if not memory:
        return config
    free, total = min(memory)
    if ref.path is not None:
        files = [*ref.path.glob("*.safetensors")] or [*ref.path.glob("*.bin")]
        weights = sum(path.stat().st_size for path in files) / 2**30 / config.tensor_parallel_size
        if weights > SHARE_OF_WEIGHTS * free:
            raise UserError(
                f"{ref.name}: its weights take {weights:.1f} GiB, and {free:.1f} of the card's {total:.1f} GiB are free; with room to work"
                f" {weights / SHARE_OF_WEIGHTS - free:.1f} GiB are missing. Free the card, take a model of up to"
                f" {SHARE_OF_WEIGHTS * free:.1f} GiB, or several GPUs (tensor_parallel_size, {len(cards)} here)"
            )
    room = math.floor(100 * (free - GIB_TO_SPARE) / total) / 100
    if config.gpu_memory_utilization <= room:
        return config
    if room <= 0:
        raise UserError(f"{ref.name}: {free:.1f} of the card's {total:.1f} GiB are free, too few for vLLM to start on it. Free the card")
    log.warning(
        "%.1f of the card's %.1f GiB are free: vLLM takes %.2f of it instead of %.2f", free, total, room, config.gpu_memory_utilization
    )
    return replace(config, gpu_memory_utilization=room)


def _prepare_environment() -> None:
    """Set what vLLM reads from the environment when it is imported, except what the user has set."""
    wanted = {
        "VLLM_NO_USAGE_STATS": "1",  # it reports its use to its makers otherwise
        # a forked child would hold the run's lock and database, and hang in torch once this process has used its threads
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # counts them for each token on the card: it goes on sampling where the logits are none, and nobody else looks
        "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    }
    if not any(name.startswith("VLLM_LOGGING_") or name == "VLLM_CONFIGURE_LOGGING" for name in os.environ):
        # warnings on stderr, but not the one about schedulers that are not vLLM's own
        wanted["VLLM_LOGGING_CONFIG_PATH"] = str(Path(__file__).with_name("vllm_logging.json"))
    if importlib.util.find_spec("flashinfer") is None:
        wanted["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _arguments(ref: ModelRef, config: EngineConfig) -> dict[str, Any]:
    """Return what vLLM is started with."""
    from vllm.platforms import current_platform

    own = context_length(load_settings(ref))
    given = config.max_model_len
    arguments: dict[str, Any] = {
        "model": str(ref.path or ref.hub_id),
        "revision": ref.revision,
        "dtype": config.dtype,
        "max_model_len": -1 if given is None else min(given, own or given),  # -1: the model's own, or what the memory holds
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        "generation_config": "vllm",  # not the model's: our settings alone decide, its end-of-sequence ids are in the chat's
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    scheduler = "GatheringScheduler"
    if not current_platform.is_cpu():
        scheduler = "GatheringAsyncScheduler"
        arguments["async_scheduling"] = True
        if not config.enforce_eager:
            arguments["compilation_config"] = {"cudagraph_capture_sizes": list(GRAPH_SIZES)}  # those beyond a step's tokens are left out
    arguments["scheduler_cls"] = f"{__package__}.vllm_scheduler.{scheduler}"
    if config.kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    if current_platform.is_cpu():
        arguments["gpu_memory_utilization"] = min(config.gpu_memory_utilization, CPU_SHARE)
        arguments.setdefault("kv_cache_memory_bytes", CPU_CACHE_BYTES)  # VLLM_CPU_KVCACHE_SPACE wins over it
        # after a part of a prompt it takes back a seed's random number, which PyTorch's generators of a CPU have no way to (0.30)
        arguments["enable_chunked_prefill"] = False
    return arguments


def _start(ref: ModelRef, arguments: dict[str, Any]) -> Any:
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    refusals: tuple[type[Exception], ...] = (*_refusals(), RuntimeError, OSError)
    try:
        # the context decides how many sequences and tokens it takes at once: as for LLM, not as for a server
        return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
    except refusals as error:
        cause = error if (told := first_error()) is None else RuntimeError(told)
        raise UserError(
            f"{ref.name}: vLLM cannot start with it ({_one_line(cause)}); its messages above say more. Lower gpu_memory_utilization or"
            " max_model_len where memory is the reason, or take the engine transformers"
        ) from cause


def _refusals() -> tuple[type[Exception], ...]:
    """Return what vLLM raises for what it does not take: a ValueError, but from 0.30 on one that is none."""
    from vllm.exceptions import VLLMValidationError

    return (ValueError, VLLMValidationError)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
