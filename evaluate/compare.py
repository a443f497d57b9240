"""Compare: the greedy answers of all models to the same questions, side by side, and who stops by itself how often."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from ..core.config import to_mapping
from ..core.engines.base import Engine, Request, Sampling
from ..core.engines.loading import choose
from ..core.errors import UserError
from ..core.example import Example, Message, Sample, Tool, content_id, sent, tools_of
from ..core.files import read_json, read_parquet, write_atomically
from ..core.formats import iterate_examples, split_prompt
from ..core.hardware import installed_version
from ..core.named_models import NamedModel, find_models
from ..core.progress import Progress
from ..core.statistics import Interval, holm, mcnemar, minimum_detectable_difference, paired_difference, wilson
from ..core.store import SampleStore, decisive_settings, sample_key, sample_seed
from .config import CompareConfig
from .results import aligned, counted, finish_section, left_out, open_section, told, void_section

log = logging.getLogger(__name__)

QUESTIONS = (
    "Give me an 1-sentence introduction of LLM.",
    "Calculate 1+1-1",
    "What's the difference between thread and process?",
)

ANSWERS: dict[str, Any] = {
    "model": pl.String,
    "example_id": pl.String,
    "question": pl.String,  # JSON text of the messages, with the system message
    "text": pl.String,
    "finish_reason": pl.String,
    "num_tokens": pl.Int64,
    "logprob": pl.Float64,
    "key": pl.String,
    "error": pl.String,  # why there is no answer
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question, with the system message it is asked under. `error` says why it cannot be asked of any model."""

    id: str
    messages: list[Message]
    source: str
    error: str | None = None
    tools: tuple[Tool, ...] = ()  # the functions that can be called

    @property
    def text(self) -> str:
        """Return what the last message says."""
        return str(self.messages[-1].get("content") or "") if self.messages else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said, or why there is no answer. The text has no end-of-turn token; `num_tokens` counts it when it came."""

    key: str = ""
    text: str = ""
    finish_reason: str | None = None  # stop, or length where the answer was cut; None without an answer
    num_tokens: int = 0
    logprob: float | None = None  # mean over its tokens, in nats
    error: str | None = None

    @property
    def stopped(self) -> bool:
        """Say whether the model ended the answer by itself."""
        return self.finish_reason == "stop"


@dataclass(frozen=True, kw_only=True)
class ModelAnswers:
    """What a model's answers are like, over the questions that every model answered."""

    name: str
    reference: str
    identity: str
    template: str | None
    n: int
    stop_rate: float
    stop_interval: Interval  # 95 %
    mean_tokens: float  # of the model's own tokenizer, the end of turn included
    truncated_share: float
    empty_share: float
    generated: int  # in this call; the other answers were stored


@dataclass(frozen=True, kw_only=True)
class StopDifference:
    """The stop rate of a model minus that of the first one, over the same questions."""

    model: str
    baseline: str
    stop_rate: float
    interval: Interval  # 95 %, paired
    p_value: float  # exact McNemar
    p_adjusted: float  # Holm, over the models
    detectable: float | None  # difference that so many questions find four times in five; None: they are too few for any


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """The answers of all models, and what they are like. `answers[name][i]` is the answer to `questions[i]`."""

    folder: Path | None  # evaluate/ of the run, where one was given
    max_new_tokens: int
    questions: list[Question]
    answers: dict[str, list[Answer]]
    left_out: dict[str, int]  # questions that do not count, by reason
    models: list[ModelAnswers]
    differences: list[StopDifference]

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, without the answers, for results.json."""
        return {
            "questions": len(self.questions),
            "left_out": self.left_out,
            "max_new_tokens": self.max_new_tokens,
            "models": {each.name: asdict(each) for each in self.models},
            "differences": [asdict(each) for each in self.differences],
        }

    def summary(self) -> str:
        """Write it for people, without the answers."""
        n = self.models[0].n
        lines = [f"{n:,} question{'s' * (n != 1)} answered by every model, greedily, in at most {self.max_new_tokens} tokens"]
        if self.left_out:
            lines.append(f"left out for all models: {told(self.left_out)}")
        rows = [("model", "stopped by itself", "95 %", "mean tokens", "cut", "empty", "new answers")]
        for each in self.models:
            span = f"{100 * each.stop_interval.low:.0f} to {100 * each.stop_interval.high:.0f} %"
            shares = [f"{100 * share:.0f} %" for share in (each.stop_rate, each.truncated_share, each.empty_share)]
            rows.append((each.name, shares[0], span, f"{each.mean_tokens:.1f}", shares[1], shares[2], f"{each.generated:,}"))
        lines += aligned(rows)
        lines += [_told_difference(each, n) for each in self.differences]
        return "\n".join([*lines, *([f"answers: {self.folder / 'answers.parquet'}"] if self.folder else [])])


def _told_difference(each: StopDifference, n: int) -> str:
    points = f"{100 * each.stop_rate:+.0f} points (95 % {100 * each.interval.low:+.0f} to {100 * each.interval.high:+.0f})"
    line = f"{each.model} − {each.baseline}: stop rate {points.replace('-', '−')}, p {each.p_adjusted:.2g}"
    if each.p_adjusted > 0.05:
        size = "any difference would" if each.detectable is None else f"a difference below {100 * each.detectable:.0f} points would"
        line += f": none shown, and with {n:,} question{'s' * (n != 1)} {size} mostly go unseen"
    return line


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One answer that the comparison is to have."""

    question: Question
    key: str = ""
    ids: tuple[int, ...] = ()
    error: str | None = None


def compare(models: Mapping[str, str], questions: str | Path | None, out: Path | None, config: CompareConfig) -> CompareResult:
    """Ask all models (name: reference) the same questions; return the answers side by side and the stop rates, paired.

    `questions` is a file of any format (answers in it are not looked at), or None for three questions to begin with. Into
    the run folder `out` go evaluate/answers.parquet and the section `compare` of evaluate/results.json; the answers are
    stored under keys of what decides them, so that only what changed is generated again. Without `out` nothing is kept.
    Raises UserError for a model that is not there, and when no question is left that every model answered.
    """
    asked = read_questions(questions, config)
    found = find_models(models, config.engine, answers=(len(asked), config.max_new_tokens))
    settings = {"questions": None if questions is None else str(questions), "models": dict(models), **to_mapping(config)}
    with open_section(out, "compare", settings) as folder:
        answers, generated = {}, {}
        with SampleStore(folder / "answers.sqlite") as store:
            for model in found:
                identity = answer_identity(model)
                wanted = [_prepare(model, question, identity, config) for question in asked]
                generated[model.name] = _generate(model, wanted, identity, store, config)
                answers[model.name] = _collect(wanted, store)
        result = _result(folder if out else None, asked, answers, found, generated, config, questions)
        table = _frame(asked, answers)
        _void_judgements(folder, table)
        with write_atomically(folder / "answers.parquet") as temporary:
            table.write_parquet(temporary)
        finish_section(folder, "compare", result.facts(), {"models": list(models), "questions": len(asked)})
        return result


def _void_judgements(folder: Path, answers: pl.DataFrame) -> None:
    """Take away what a judge said of this run's answers where they are about to be others. Its verdicts stay stored."""
    path, before = folder / "results.json", folder / "answers.parquet"
    judged = read_json(path).get("judge") if path.exists() else None
    if judged is None or not judged.get("of_this_run", True):
        return
    said = ["model", "example_id", "question", "text", "error"]
    if not before.exists() or not read_parquet(before).select(said).equals(answers.select(said)):
        log.warning("the judgements in %s are of other answers and void now: `sftkit evaluate judge %s` judges these", path, folder.parent)
        void_section(folder, "judge")
        (folder / "judgements.parquet").unlink(missing_ok=True)


def read_questions(source: str | Path | None, config: CompareConfig) -> list[Question]:
    """Return the questions of a file, up to their last user turn, with the system message; the three of QUESTIONS without a file.

    Rules: `no_user_turn`, and `repeated` for a question that stood there before.
    """
    if source is None:
        texts = QUESTIONS[: config.limit]
        conversations: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
        examples = [Example(content_id(each), each, "built in") for each in conversations]
    else:
        examples = list(islice(iterate_examples(source), config.limit))
    questions: list[Question] = []
    before: set[str] = set()
    for example in examples:
        if not any(each["role"] == "user" for each in example.messages):
            questions.append(Question(example.id, example.messages, example.source, "no_user_turn"))
            continue
        messages, _ = split_prompt(example)
        if config.system is not None and not any(each["role"] == "system" for each in messages):
            messages = [{"role": "system", "content": config.system}, *messages]
        tools = tools_of(example.meta)
        # a greedy answer is the same each time: a question that stands there twice tells no more than once
        asked = content_id(sent(messages, tools))
        questions.append(Question(example.id, messages, example.source, "repeated" if asked in before else None, tools))
        before.add(asked)
    return questions


def answer_identity(model: NamedModel) -> str:
    """Return what the key of an answer holds of the model: its weights, what renders and stops it, and what runs it.

    The template's fingerprint stands for the tokens that stop an answer, too, which the weights' hash does not know.
    """
    engine = choose(model.engine)
    package = {"transformers": "transformers", "vllm": "vllm"}.get(engine)
    version = (installed_version(package) if package else None) or ""
    return "+".join(filter(None, [model.identity, model.template, f"{engine} {version}".strip(), model.engine.dtype]))


def _sampling(config: CompareConfig) -> Sampling:
    return Sampling(temperature=0.0, top_p=1.0, max_new_tokens=config.max_new_tokens, seed=0)


def _prepare(model: NamedModel, question: Question, identity: str, config: CompareConfig) -> _Wanted:
    if question.error:
        return _Wanted(question, error=question.error)
    ids: tuple[int, ...] = ()
    if model.chat is not None:
        try:
            ids = tuple(model.chat.prompt(question.messages, tools=question.tools))
        except UserError as error:
            log.warning("%s: %s", question.source, error)
            return _Wanted(question, error="refused_by_template")
        if model.context is not None and len(ids) + config.max_new_tokens > model.context:
            return _Wanted(question, error="too_long")
    prompt = ids or sent(question.messages, question.tools)
    key = sample_key(prompt=prompt, model_identity=identity, sampling=_sampling(config), index=0)
    return _Wanted(question, key, ids)


def _generate(model: NamedModel, wanted: Sequence[_Wanted], identity: str, store: SampleStore, config: CompareConfig) -> int:
    """Generate the answers that are not stored; return how many. The model is loaded only if there are any."""
    stored = store.keys()
    missing = {each.key: each for each in wanted if not each.error and each.key not in stored}
    if not missing:
        return 0
    sampling = _sampling(config)
    settings = {**decisive_settings(identity, sampling), "system": config.system}
    sampling_key = store.remember(model.reference, settings)
    requests = [
        Request(
            key=key,
            prompt_ids=each.ids,
            messages=each.question.messages,
            tools=each.question.tools,
            sampling=sampling,
            seed=sample_seed(key),
        )
        for key, each in missing.items()
    ]
    places = {key: (each.question.id, 0) for key, each in missing.items()}
    with model.running() as engine:
        return answer_into(store, engine, requests, places, label=f"ask {model.name}", model=model.reference, sampling_key=sampling_key)


def answer_into(
    store: SampleStore,
    engine: Engine,
    requests: Iterable[Request],
    places: Mapping[str, tuple[str, int]],  # by the request's key: whose answer it is, and which
    *,
    label: str,
    model: str,
    sampling_key: str,
) -> int:
    """Put the engine's answers to the requests, and why it failed at some, into the store; return how many came."""
    with Progress(label, total=len(places), unit="answers") as progress:

        def durable(samples: int, tokens: int) -> None:
            progress.advance(samples, tokens=tokens)

        with store.writer(durable) as writer:
            for completion in engine.generate(requests):
                example_id, index = places[completion.key]
                if completion.finish_reason == "error":
                    writer.put_failure(completion.key, example_id, index, completion.error or "the engine gave no reason")
                    continue
                sample = Sample(
                    example_id=example_id,
                    index=index,
                    text=completion.text,
                    finish_reason=completion.finish_reason,
                    num_tokens=completion.num_tokens,
                    logprob=completion.logprob,
                    model=model,
                    sampling_key=sampling_key,
                )
                writer.put(completion.key, sample)
    return progress.done


def _collect(wanted: Sequence[_Wanted], store: SampleStore) -> list[Answer]:
    keys = [each.key for each in wanted]
    stored = {row["key"]: row for row in store.frame().filter(pl.col("key").is_in(keys)).iter_rows(named=True)}
    failed = dict(store.failures().select("key", "error").iter_rows())
    names = ("text", "finish_reason", "num_tokens", "logprob")
    answers = []
    for each in wanted:
        if each.key in stored:
            answers.append(Answer(key=each.key, **{name: stored[each.key][name] for name in names}))
        else:
            answers.append(Answer(key=each.key, error=each.error or failed.get(each.key, "the engine gave no answer")))
    return answers


def _result(
    folder: Path | None,
    asked: list[Question],
    answers: dict[str, list[Answer]],
    found: Sequence[NamedModel],
    generated: Mapping[str, int],
    config: CompareConfig,
    source: str | Path | None,
) -> CompareResult:
    reasons = left_out({name: each[place].error for name, each in answers.items()} for place in range(len(asked)))
    counts = counted(reasons)
    counting = [place for place, reason in enumerate(reasons) if reason is None]
    if not counting:
        raise UserError(f"{source or 'questions'}: none of the {len(asked):,} questions was answered by every model: {told(counts)}")
    stopped = {name: [each[place].stopped for place in counting] for name, each in answers.items()}
    models = []
    for model in found:
        rows = [answers[model.name][place] for place in counting]
        stops = sum(stopped[model.name])
        models.append(
            ModelAnswers(
                name=model.name,
                reference=model.reference,
                identity=model.identity,
                template=model.template,
                n=len(rows),
                stop_rate=stops / len(rows),
                stop_interval=wilson(stops, len(rows)),
                mean_tokens=sum(each.num_tokens for each in rows) / len(rows),
                truncated_share=sum(each.finish_reason == "length" for each in rows) / len(rows),
                empty_share=sum(not each.text.strip() for each in rows) / len(rows),
                generated=generated[model.name],
            )
        )
    return CompareResult(
        folder=folder,
        max_new_tokens=config.max_new_tokens,
        questions=asked,
        answers=answers,
        left_out=counts,
        models=models,
        differences=_differences(stopped),
    )


def _differences(stopped: Mapping[str, Sequence[bool]]) -> list[StopDifference]:
    """Compare the first model's stops with each other's, question by question."""
    (baseline, first), *others = stopped.items()
    n = len(first)
    discordant = []
    for _, second in others:
        only_first = sum(one and not other for one, other in zip(first, second, strict=True))
        only_second = sum(other and not one for one, other in zip(first, second, strict=True))
        discordant.append((only_first, only_second))
    p_values = [mcnemar(*each) for each in discordant]
    return [
        StopDifference(
            model=name,
            baseline=baseline,
            stop_rate=(only_second - only_first) / n,
            interval=paired_difference(only_first, only_second, n),
            p_value=p_value,
            p_adjusted=adjusted,
            # the share of unequal pairs is not known exactly either: one of each kind more than were seen
            detectable=minimum_detectable_difference(n, (only_first + only_second + 2) / (n + 2), level=1 - 0.05 / len(others)),
        )
        for (name, _), (only_first, only_second), p_value, adjusted in zip(others, discordant, p_values, holm(p_values), strict=True)
    ]


def _frame(asked: Sequence[Question], answers: Mapping[str, Sequence[Answer]]) -> pl.DataFrame:
    rows = []
    for name, given in answers.items():
        for question, answer in zip(asked, given, strict=True):
            said = None if answer.error else answer
            rows.append(
                {
                    "model": name,
                    "example_id": question.id,
                    "question": json.dumps(question.messages, ensure_ascii=False, default=str),
                    **{column: getattr(said, column, None) for column in ("text", "finish_reason", "num_tokens", "logprob")},
                    "key": answer.key or None,
                    "error": answer.error,
                }
            )
    return pl.DataFrame(rows, schema=ANSWERS)
