"""What `distill --dry-run` says a run will take, and what it then takes: tokens, seconds of generation, and with the engine's start.

    python benchmarks/dry_run.py MODEL [--prompts 3000] [-k 4] [--max-new-tokens 64] [--engine transformers]
    python benchmarks/dry_run.py TOKENIZER --shape 135m --engine vllm --prompts 20000 --max-new-tokens 128       on a GPU, 4 min
    python benchmarks/dry_run.py --lengths DATA [--prompts 800] [--draws 12] [--max-new-tokens 512]              the tokens alone, no model

The dry run's answers are the run's own, so that the run makes what is left. With --shape the model has random weights and the folder's
tokenizer, and all answers are as long as they may be. A difference of up to 15 % is asked for. With --lengths the answers of a data set
stand for the teacher's, a token for each 4.2 characters: of many draws of so many prompts, how far off the tokens of what was left were.
Where the seconds are off, "tokens/s by tens of seconds" shows the pace that the dry run and the run had from one answer to the next, and
"seconds by fiftieths" when so many of the answers were there; "between" is what the dry run said the least and the most seconds are.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from sftkit.core.engines.base import Completion, EngineConfig, Request
from sftkit.core.formats import iterate_examples, split_prompt
from sftkit.core.store import SampleStore
from sftkit.curate import distill as distill_module
from sftkit.curate import estimate as estimate_module
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import Distillation, distill
from sftkit.curate.estimate import estimate
from teachers import random_teacher, write_questions


class Told:
    """An engine whose answers are as long as it was told for each prompt."""

    identity, chat, context_length, steps = "openai:told", None, None, 0

    def __init__(self, lengths: dict[str, int]) -> None:
        self._lengths = lengths

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            yield Completion(key=request.key, text="…", num_tokens=self._lengths[str(request.messages[-1]["content"])])

    def close(self) -> None:
        pass


class Timeline:
    """Counts the tokens of the answers by tens of seconds, for each call of `Distillation.generate` while it is entered."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        generate = Distillation.generate

        def watched(work: Distillation, missing: Any, label: str = "distill", enough: Callable[..., bool] | None = None) -> Any:
            tens, times = list[int](), list[float]()
            work.teacher.engine  # noqa: B018  its start is not counted
            began = time.monotonic()

            def counted(completion: Completion, under_way: int) -> bool:
                times.append(round(time.monotonic() - began, 2))
                place = int(times[-1] / 10)
                tens.extend([0] * (place + 1 - len(tens)))
                tens[place] += completion.num_tokens
                return enough is not None and enough(completion, under_way)

            found = generate(work, missing, label, counted)
            told = {"label": label, "samples": found[0], "seconds": round(found[2], 1)}
            shown = [times[(len(times) * part - 1) // 50] for part in range(1, 51)] if len(times) >= 50 else times
            self.calls.append({**told, "tokens/s by tens of seconds": [round(each / 10) for each in tens], "seconds by fiftieths": shown})
            return found

        with mock.patch.object(Distillation, "generate", watched):
            yield


def of_lengths(given: argparse.Namespace) -> None:
    """Draw prompts of a data set many times; print how far off the estimate of the tokens was."""
    lengths: dict[str, int] = {}
    for example in iterate_examples(given.lengths):
        messages, answer = split_prompt(example)
        if answer:
            lengths.setdefault(str(messages[-1]["content"]), max(1, min(given.max_new_tokens, round(len(answer) / 4.2))))
    distill_module.open_engine = lambda *_, **__: Told(lengths)
    engine = EngineConfig(engine="openai", base_url="http://localhost:1/v1")
    config = DistillConfig(teacher="told", max_new_tokens=given.max_new_tokens, engine=engine)
    mean = statistics.mean(lengths.values())
    row = {"data": Path(given.lengths).name, "prompts": given.prompts, "draws": given.draws, "mean tokens": round(mean)}
    print(json.dumps({**row, "spread / mean": round(statistics.pstdev(lengths.values()) / mean, 2)}))
    for most in (estimate_module.PROBE, estimate_module.MOST_PROBED):
        estimate_module.MOST_PROBED = most
        off, probed = offs(given, config, lengths)
        told = {"most asked": most, "asked": round(statistics.mean(probed)), "off by %": [round(100 * each, 1) for each in sorted(off)]}
        print(json.dumps({**told, "within 15 %": sum(abs(each) <= 0.15 for each in off)}), flush=True)


def offs(given: argparse.Namespace, config: DistillConfig, lengths: dict[str, int]) -> tuple[list[float], list[int]]:
    """Return for each draw how far off the estimate was, as a share, and how many prompts were asked for it."""
    off, probed = [], []
    for draw in range(given.draws):
        some = random.Random(draw).sample(sorted(lengths), given.prompts)
        with tempfile.TemporaryDirectory() as scratch:
            prompts, run = Path(scratch) / "prompts.jsonl", Path(scratch) / "run"
            prompts.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in some))
            dry = estimate(prompts, run, config)
            with SampleStore(run / "curate" / "samples.sqlite") as store:
                written, _ = store.tokens()
        assert dry.new_tokens is not None
        off.append(dry.new_tokens / (sum(lengths[each] for each in some) - written) - 1)
        probed.append(dry.probed)
    return off, probed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--lengths")
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--shape")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--out", default="dry_run.jsonl")
    given = parser.parse_args()
    given.prompts = given.prompts or (800 if given.lengths else 3000)
    given.max_new_tokens = given.max_new_tokens or (512 if given.lengths else 64)
    if given.lengths:
        of_lengths(given)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_teacher(given.shape, Path(given.model), folder / "model") if given.shape else given.model
        questions = write_questions(folder / "questions.jsonl", given.prompts)
        engine = EngineConfig(engine=given.engine)
        if given.engine == "vllm":
            engine = EngineConfig(engine="vllm", enforce_eager=True, max_model_len=2048)
        config = DistillConfig(teacher=model, k=given.k, max_new_tokens=given.max_new_tokens, engine=engine)
        timeline = Timeline()
        with timeline.watching():
            dry = estimate(questions, folder / "run", config)
            print(dry.summary(), *timeline.calls, sep="\n", flush=True)
            began = time.monotonic()
            result = distill(questions, folder / "run", config)
            whole = time.monotonic() - began
        assert dry.new_tokens is not None
        assert dry.seconds is not None
        said = dry.seconds + (dry.seconds_to_start or 0.0)
        row = {
            "engine": given.engine,
            "samples before": dry.probed,
            "samples": result.new_samples,
            "full": dry.full,
            "tokens said": round(dry.new_tokens),
            "tokens": result.new_tokens,
            "seconds said": round(dry.seconds, 1),
            "between": dry.seconds_between and [round(each, 1) for each in dry.seconds_between],
            "seconds": round(result.seconds, 1),
            "with start said": round(said, 1),
            "with start": round(whole, 1),
        }
        row["off by %"] = [round(100 * (row[f"{each} said"] / row[each] - 1), 1) for each in ("tokens", "seconds", "with start")]
        row["calls"] = timeline.calls
        print(json.dumps(row))
        with open(given.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
