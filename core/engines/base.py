"""What an engine is: it takes requests as a stream and gives completions as they finish, in any order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..chat import Chat
from ..config import setting
from ..errors import UserError
from ..example import Message, Tool

EXECUTORS = ("local", "ray")
ENGINES = ("auto", "transformers", "vllm", "openai")
NOT_FINITE = "the model gave no finite probability"  # how the error of an answer begins whose numbers are not to be trusted


class EngineDied(UserError):
    """The process that runs a model has ended or stopped moving: what it was answering may be asked again of a new one."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is run. None of this decides what a sample is, beyond rounding."""

    engine: str = setting(
        "auto",
        "What runs the model; auto is openai with a base_url, vllm where it and a GPU are, else transformers.",
        choices=ENGINES,
    )
    base_url: str | None = setting(
        None,
        "Address of an OpenAI-compatible server (engine openai), as http://localhost:8000/v1; several of the same model, parted by commas,"
        " share the work. Samples are known by the first, or, with a revision, by that and the model's name.",
    )
    concurrency: int = setting(64, "Requests in flight at a server; twice this waits in memory.")
    batch_tokens: int = setting(
        16_384, "Most tokens (prompt and answer) in a batch of the transformers engine; left as it is, a GPU takes 16 times that to answer."
    )
    device: str | None = setting(
        None, "Where the model runs: cpu (which vLLM does not take), cuda, cuda:1; found by itself when not given."
    )
    dtype: str = setting("auto", "Number format of the weights.", choices=("auto", "bfloat16", "float16", "float32"))
    gpu_memory_utilization: float = setting(0.9, "Share of the GPU's memory that vLLM may take.")
    kv_cache_gib: float | None = setting(
        None,
        "GiB that each vLLM process takes for its cache; not given, it measures what is left of its share, which one at a time can do.",
    )
    max_num_seqs: int | None = setting(None, "Sequences vLLM runs at once; its own default when not given.")
    replicas: str | int | None = setting(
        None, "Engine processes, each with the whole model, spread over the GPUs; auto: one for each GPU. One that dies is started again."
    )
    executor: str = setting("local", "Where engine processes run: local, or ray, on the machines of a Ray cluster.", choices=EXECUTORS)
    ray_address: str | None = setting(None, "Address of the Ray cluster, as auto or ray-head:6379; this machine's own when not given.")
    stall_seconds: float = setting(600.0, "Seconds without a token after which an engine process counts as stalled and is started again.")
    max_num_batched_tokens: int | None = setting(None, "Tokens vLLM works on in one step; its own default when not given.")
    tensor_parallel_size: int = setting(1, "GPUs that share one model with vLLM, where it does not fit one.")
    max_model_len: int | None = setting(None, "Context length that vLLM reserves; the model's own when not given.")
    enforce_eager: bool = setting(False, "Start vLLM without compiling graphs: a faster start, slower tokens.")

    def __post_init__(self) -> None:
        if self.base_url and self.engine not in ("auto", "openai"):
            raise UserError(f"base_url: is the address of a server, which the engine openai asks, not {self.engine}; leave one of them out")
        count = str(self.replicas)
        if self.replicas not in (None, "auto") and not (count.isdecimal() and int(count) > 0):
            raise UserError(f"replicas: expected a whole number from 1, or auto (one for each GPU), found {count!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UserError(f"gpu_memory_utilization: expected a share above 0 and up to 1, found {self.gpu_memory_utilization}")
        for name in ("concurrency", "batch_tokens", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What decides an answer, given its prompt and model."""

    temperature: float = setting(0.8, "0 is greedy.")
    top_p: float = setting(0.95, "Sample from the smallest set of tokens that holds this probability.")
    max_new_tokens: int = setting(512, "Longest answer, in tokens; a longer one is cut and never eligible.")
    seed: int = setting(0, "Each sample has its own stream of random numbers, drawn from this, its prompt and its index.")
    json_schema: str | None = setting(None, "JSON schema that every answer follows, a file or its text; not with the transformers engine.")
    stop: tuple[str, ...] = setting((), "Texts before which an answer ends; a token of theirs counts, and they are not in its text.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer wanted. `prompt_ids` is the rendered prompt; a server is sent `messages` and renders for itself."""

    key: str  # comes back with the completion
    prompt_ids: tuple[int, ...]
    messages: list[Message]
    sampling: Sampling
    seed: int  # of this sample alone, below 2**63
    logprob: bool = True  # whether its log-probability is wanted, which costs throughput; an engine that has it anyway tells it
    tools: tuple[Tool, ...] = ()  # functions that can be called: what a server is told; the ids hold them already


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished answer, or why there is none. The text has no end-of-turn token; `num_tokens` counts it when it came."""

    key: str
    text: str = ""
    finish_reason: Literal["stop", "length", "error"] = "stop"
    num_tokens: int = 0
    logprob: float | None = None  # mean over the tokens, natural logarithm, of the model's own distribution (before temperature and top-p)
    error: str | None = None  # set exactly when finish_reason is "error"
    token_ids: tuple[int, ...] = field(default=(), repr=False)  # empty where the engine does not tell
    reasoning: str | None = None  # thoughts that a server keeps apart from the text; their tokens count
    prompt_tokens: int | None = None  # as a server counts them; None where the caller rendered the prompt itself


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """A text whose tokens are to be scored: log p(ids[i] | ids[:i]) for each i >= start."""

    key: str
    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRequest:
    """A prompt, and tokens of which the log-probability to come next is wanted: log p(choice | ids) for each."""

    key: str
    ids: tuple[int, ...]
    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural-log probabilities of what a request asks for, in order; empty with `error` set when they could not be computed."""

    key: str
    logprobs: tuple[float, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Texts of like length that are embedded together."""

    key: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """The vectors of a request's texts, in order, as rows of a NumPy array; None with `error` set when they could not be computed."""

    key: str
    vectors: Any = None
    error: str | None = None


class EmbeddingEngine(Protocol):
    """Runs one embedding model. `embed` pulls requests as it has room for them and yields results as they finish."""

    identity: str

    def embed(self, requests: Iterable[EmbedRequest]) -> Iterator[Embedding]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """Runs one model. `generate` and `logprobs` pull requests as they have room for them and yield results as they finish.

    A request that fails comes back with its error and never stops the others. Closing gives the memory back.
    """

    identity: str  # what the key of a sample takes for the model: see core.models.model_identity
    chat: Chat | None  # None where a server renders
    context_length: int | None  # tokens of prompt and answer together; None where unknown
    steps: int  # of the model so far: it grows while something is under way, or the engine has stalled

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]: ...

    def logprobs(self, requests: Iterable[ScoreRequest]) -> Iterator[TokenLogprobs]: ...

    def close(self) -> None: ...


def choice_logprobs(engine: Engine, requests: Iterable[ChoiceRequest]) -> Iterator[TokenLogprobs]:
    """Give the log-probabilities of choices with any engine that scores texts.

    Where the engine has no `choices` of its own, each choice is a text to score, the prompt followed by it.
    """
    if hasattr(engine, "choices"):
        yield from engine.choices(requests)
        return
    waiting: dict[str, tuple[ChoiceRequest, dict[int, float]]] = {}

    def texts() -> Iterator[ScoreRequest]:
        for request in requests:
            waiting[request.key] = request, {}
            for place, choice in enumerate(request.choices):
                yield ScoreRequest(key=f"{place}/{request.key}", ids=(*request.ids, choice), start=len(request.ids))

    for scored in engine.logprobs(texts()):
        place, _, key = scored.key.partition("/")
        if key not in waiting:
            continue  # another of its choices failed
        request, found = waiting[key]
        if scored.error:
            del waiting[key]
            yield TokenLogprobs(key=key, error=scored.error)
            continue
        found[int(place)] = scored.logprobs[0]
        if len(found) == len(request.choices):
            del waiting[key]
            yield TokenLogprobs(key=key, logprobs=tuple(found[each] for each in range(len(found))))
