"""What `distill --dry-run` says a run will take, and what the run then takes: tokens, and seconds of generation.

    python benchmarks/dry_run.py MODEL [--prompts 3000] [-k 4] [--max-new-tokens 64] [--engine transformers]
    python benchmarks/dry_run.py TOKENIZER --shape 135m --engine vllm --prompts 20000 --max-new-tokens 128       on a GPU, 4 min

The dry run's answers are the run's own, so that the run makes what is left. With --shape the model has random weights and the folder's
tokenizer, and all answers are as long as they may be. A difference of up to 15 % is asked for.
"""

import argparse
import json
import tempfile
from pathlib import Path

from sftkit.core.engines.base import EngineConfig
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import distill
from sftkit.curate.estimate import estimate
from teachers import random_teacher, write_questions


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--shape")
    parser.add_argument("--prompts", type=int, default=3000)
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--out", default="dry_run.jsonl")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_teacher(given.shape, Path(given.model), folder / "model") if given.shape else given.model
        questions = write_questions(folder / "questions.jsonl", given.prompts)
        engine = EngineConfig(engine=given.engine)
        if given.engine == "vllm":
            engine = EngineConfig(engine="vllm", enforce_eager=True, max_model_len=2048)
        config = DistillConfig(teacher=model, k=given.k, max_new_tokens=given.max_new_tokens, engine=engine)
        dry = estimate(questions, folder / "run", config)
        print(dry.summary(), flush=True)
        result = distill(questions, folder / "run", config)
        assert dry.new_tokens is not None
        assert dry.seconds is not None
        row = {
            "engine": given.engine,
            "samples before": dry.probed,
            "samples": result.new_samples,
            "full": dry.full,
            "tokens said": round(dry.new_tokens),
            "tokens": result.new_tokens,
            "seconds said": round(dry.seconds, 1),
            "seconds": round(result.seconds, 1),
        }
        row["off by %"] = [round(100 * (row[f"{each} said"] / row[each] - 1), 1) for each in ("tokens", "seconds")]
        print(json.dumps(row))
        with open(given.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
