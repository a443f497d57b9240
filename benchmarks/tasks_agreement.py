"""Whether sftkit's tasks say what lm-eval says: IFEval's checks, GSM8K and MMLU, on the same answers or the same model, prompts and data.

    python benchmarks/tasks_agreement.py ifeval ANSWERS.parquet --lm-eval SITE_PACKAGES --nltk-data FOLDER
    python benchmarks/tasks_agreement.py programs SAMPLES.jsonl.gz --limit 2
    python benchmarks/tasks_agreement.py model MODEL --lm-eval SITE_PACKAGES --limit 500 --mmlu MMLU.jsonl.gz --mmlu-limit 1140

SITE_PACKAGES is a folder in which lm-eval 0.4.13 is installed (`pip install --target FOLDER --no-deps lm-eval==0.4.13`, and what it
imports); it is added to this Python's own packages in a process of its own. FOLDER has NLTK's `tokenizers/punkt_tab`, which
IFEval's reference downloads otherwise. ANSWERS.parquet is `evaluate/answers.parquet` of `sftkit evaluate compare` on IFEval's
prompts. SAMPLES has HumanEval's task_id and a list of samples in each row, or is HumanEval's own file with its solutions; programs
and tests in two sandboxes are held against both in one. Of a model both harnesses get the same token limit, the same texts to go on
from (five-shot), transformers, float32, greedy, on the same device. Every disagreement is listed with its reason: the texts differ
(and where), the same text is read in two ways, or the choices are as good as equally probable. `--out FILE` gets a line of JSON for
each score.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
from sftkit.core.checks.code import extract_program, run_tests
from sftkit.core.checks.instructions import check_instructions
from sftkit.core.checks.sandbox import Order, run
from sftkit.core.engines.base import EngineConfig
from sftkit.core.models import resolve_model
from sftkit.core.sources import iterate_rows
from sftkit.core.statistics import wilson
from sftkit.evaluate.benchmark import evaluate_tasks
from sftkit.evaluate.config import TasksConfig
from sftkit.evaluate.task_data import fetch_data, read_data
from sftkit.evaluate.tasks import open_task

IFEVAL = """
import json, sys
import langdetect
from lm_eval.tasks.ifeval import utils
langdetect.DetectorFactory.seed = 0
for line in sys.stdin:
    row = json.loads(line)
    given = utils.InputExample(row["key"], row["instruction_id_list"], row["prompt"], row["kwargs"])
    strict = utils.test_instruction_following_strict(given, row["answer"]).follow_instruction_list
    loose = utils.test_instruction_following_loose(given, row["answer"]).follow_instruction_list
    print(json.dumps([strict, loose]))
"""
HARNESS = """
import json, sys, time
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
folder, model, device, *tasks = sys.argv[1:]
manager = TaskManager(include_path=folder, include_defaults=False)
lm = HFLM(pretrained=model, dtype="float32", device=device, batch_size=1)
kept = {}
for task in tasks:
    name, _, size = task.partition(":")
    lm.batch_size_per_gpu = int(size)
    start = time.monotonic()
    found = simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True)
    print(f"lm-eval: {name} {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    kept[name] = [(each["doc"]["id"], each.get("filter"), each.get("exact_match", each.get("acc")), each["filtered_resps"], each["resps"])
                  for each in found["samples"][name]]
print("FOUND" + json.dumps(kept, default=str))
"""
GSM8K = """task: here_gsm8k
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{completion}}}}"
doc_to_target: "{{{{answer.split('####')[-1].strip()}}}}"
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: false,
     regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]}}
generation_kwargs: {{until: ["\\nQuestion:"], do_sample: false, temperature: 0.0, max_gen_toks: {tokens}}}
filter_list:
  - name: strict
    filter: [{{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}, {{function: take_first}}]
  - name: flexible
    filter: [{{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}, {{function: take_first}}]
num_fewshot: 0
"""
MMLU = """task: here_mmlu
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{completion}}}}"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
num_fewshot: 0
"""


def child(code: str, site_packages: Path, *arguments: str, given: str = "", **environment: str) -> str:
    """Run code with lm-eval on the path, and never this repository's folder, whose evaluate/ it would take for a library."""
    path = os.pathsep.join(filter(None, [str(site_packages), os.environ.get("PYTHONPATH")]))
    known = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code, *arguments], input=given, capture_output=True, text=True, env=known, cwd="/")
    if done.returncode:
        sys.exit(done.stderr[-3_000:])
    print("".join(f"{line}\n" for line in done.stderr.splitlines() if line.startswith("lm-eval:")), end="", flush=True)
    return done.stdout


def ifeval(answers: Path, site_packages: Path, nltk_data: Path) -> None:
    """Hold each check of each answer against the reference's."""
    said = {}
    for question, text in pl.read_parquet(answers).select("question", "text").iter_rows():
        said[json.loads(question)[-1]["content"]] = text or ""
    rows = [{**row, "answer": said[row["prompt"]]} for row in read_data("ifeval") if row["prompt"] in said]
    start = time.monotonic()
    ours = [check_instructions(row["answer"], row["instruction_id_list"], row["kwargs"]) for row in rows]
    took = time.monotonic() - start
    start = time.monotonic()
    out = child(IFEVAL, site_packages, given="".join(json.dumps(row) + "\n" for row in rows), NLTK_DATA=str(nltk_data))
    theirs = [json.loads(line) for line in out.splitlines() if line.startswith("[[")]
    checks, other_took = sum(len(each.strict) for each in ours), time.monotonic() - start
    print(f"{len(rows)} answers, {checks} checks: {took:.1f} s here, {other_took:.1f} s the reference, its start included")
    for name, place in (("strict", 0), ("loose", 1)):
        pairs = [
            (row, instruction, mine, other)
            for row, own, reference in zip(rows, ours, theirs, strict=True)
            for instruction, mine, other in zip(row["instruction_id_list"], getattr(own, name), reference[place], strict=True)
        ]
        agree = sum(mine == other for *_, mine, other in pairs)
        span = wilson(agree, len(pairs))
        share = f"{100 * agree / len(pairs):.2f} % (95 % {100 * span.low:.2f} to {100 * span.high:.2f})"
        print(f"{name}: {agree} of {len(pairs)} checks agree, {share}")
        for row, instruction, mine, other in pairs:
            if mine != other:
                print(f"  {row['key']} {instruction}: {mine} here, {other} there: {row['answer'][:80]!r}")


def programs(source: Path, limit: int) -> None:
    """Hold the verdicts on programs that cannot see their tests against those of one process that has both."""
    rows = {row["task_id"]: row for row in read_data("humaneval")}
    jobs = []
    for _, given in iterate_rows(source):
        row = rows[given["task_id"]]
        samples = given["samples"][:limit] if "samples" in given else [given["prompt"] + given["canonical_solution"]]
        jobs += [(row, extract_program(each, prompt=row["prompt"], entry_point=row["entry_point"])) for each in samples]

    def apart(job: tuple[dict[str, Any], str]) -> bool:
        return run_tests(job[1], job[0]["test"], entry_point=job[0]["entry_point"]).passed

    def together(job: tuple[dict[str, Any], str]) -> bool:
        (outcome,) = run([Order(f"{job[1]}\n{job[0]['test']}\ncheck({job[0]['entry_point']})\n")])
        return outcome.ended == "done"

    found = {}
    for way in (apart, together):
        start = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            found[way.__name__] = list(pool.map(way, jobs))
        print(f"{way.__name__}: {sum(found[way.__name__])} of {len(jobs)} pass, {time.monotonic() - start:.0f} s")
    for job, one, other in zip(jobs, found["apart"], found["together"], strict=True):
        if one != other:
            print(f"  {job[0]['task_id']}: {one} apart, {other} together: {job[1][-200:]!r}")


def of_model(model: str, given: argparse.Namespace) -> None:
    """Run GSM8K and MMLU in both harnesses on the same texts; print both scores and each item on which they differ."""
    place = Path(str(resolve_model(model).path)).resolve()
    names = {"gsm8k": given.limit, **({"mmlu": given.mmlu_limit} if given.mmlu is not None else {})}
    with tempfile.TemporaryDirectory() as folder:
        if given.mmlu:
            os.environ["SFTKIT_CACHE"] = f"{folder}/cache"
            fetch_data("mmlu", given.mmlu)
        results, scores, texts, tasks = [], {}, {}, []
        for name, limit in names.items():
            engine = EngineConfig(engine="transformers", dtype="float32", device=given.device, batch_tokens=given.batch_tokens)
            config = TasksConfig(limit=limit, ask="completion", max_new_tokens=given.max_new_tokens, engine=engine)
            start = time.monotonic()
            results.append(evaluate_tasks({"it": str(place)}, [name], Path(folder) / name, config))
            print(f"here: {name} {time.monotonic() - start:.0f} s", flush=True)
            kept = Path(folder) / name / "evaluate"
            scores[name] = pl.read_parquet(kept / "task_scores.parquet")
            texts[name] = dict(pl.read_parquet(kept / "task_answers.parquet").select("item", "text").iter_rows())
            data = Path(folder) / f"{name}.jsonl"
            items = open_task(name, config).items[:limit]
            lines = [{"id": item.id, "completion": item.completion, "answer": item.target["answer"]} for item in items]
            data.write_text("".join(json.dumps(line) + "\n" for line in lines))
            form = {"gsm8k": GSM8K, "mmlu": MMLU}[name]
            (Path(folder) / f"{name}.yaml").write_text(form.format(data=data, tokens=given.max_new_tokens))
            tasks.append(f"here_{name}:{given.batch_size if name == 'gsm8k' else max(1, given.batch_size // 16)}")
        start = time.monotonic()
        out = child(HARNESS, given.lm_eval, folder, str(place), given.device, *tasks)
        print(f"lm-eval: {time.monotonic() - start:.0f} s with its start", flush=True)
        theirs: dict[str, list[Any]] = json.loads(out.partition("FOUND")[2])
    print("\n\n".join(each.summary() for each in results))
    for name, metric, kept_as in (("gsm8k", "strict", "strict"), ("gsm8k", "flexible", "flexible"), ("mmlu", "likelihood", "none")):
        if name in names:
            rows = scores[name].filter(pl.col("metric") == metric).select("item", "value", "answer")
            mine = {item: (value, read) for item, value, read in rows.iter_rows()}
            other = {item: (float(value), read, raw) for item, kind, value, read, raw in theirs[f"here_{name}"] if kind in (kept_as, None)}
            hold_together(name, metric, mine, other, texts[name], given)


def hold_together(
    name: str, metric: str, mine: dict[str, Any], other: dict[str, Any], texts: dict[str, str], given: argparse.Namespace
) -> None:
    """Print a metric's score of both, and why they differ where they do."""
    a, b = sum(value for value, _ in mine.values()) / len(mine), sum(value for value, *_ in other.values()) / len(other)
    error = max((b * (1 - b) / len(other)) ** 0.5, 1e-9)
    differing = [item for item, (value, _) in mine.items() if value != other[item][0]]
    same = sum(told_apart(texts[item], other[item][2]) is None for item in mine) if name == "gsm8k" else None
    facts = {"task": name, "metric": metric, "n": len(mine), "here": a, "lm_eval": b, "standard_errors": (a - b) / error}
    print(
        f"{name} {metric}: {100 * a:.1f} % here, {100 * b:.1f} % lm-eval, n {len(mine):,}, {(a - b) / error:+.2f} standard errors,"
        f" {len(differing)} items differ" + (f"; {same:,} texts are the same" if same is not None else ""),
        flush=True,
    )
    reasons: dict[str, int] = {}
    for item in differing:
        value, read = mine[item]
        if name == "gsm8k":
            why = told_apart(texts[item], other[item][2]) or f"one text, read as {read!r} here and {str(other[item][1])[:40]} there"
        else:
            found = sorted((float(each[0][0]) for each in other[item][2]), reverse=True)
            why = f"{read!r} here; there the two most probable choices are {found[0] - found[1]:.2g} nats apart"
        kind = why.split(",")[0].split(" at ")[0] if name == "gsm8k" else "choices"
        reasons[kind] = reasons.get(kind, 0) + 1
        print(f"  {item}: {value:g} here, {other[item][0]:g} there: {why}")
    if given.out:
        with open(given.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({**facts, "differ": len(differing), "reasons": reasons, "same_texts": same}) + "\n")


def told_apart(mine: str, raw: Any) -> str | None:
    """Say where lm-eval's text is another one; None where they are the same up to blanks at the end."""
    theirs = str(raw[0][0] if isinstance(raw[0], list) else raw[0])
    one, two = mine.rstrip(), theirs.rstrip()
    if one == two:
        return None
    place = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
    return f"the texts differ at character {place:,} of {len(one):,} and {len(two):,}: {one[place:][:30]!r} and {two[place:][:30]!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ifeval", "programs", "model"))
    parser.add_argument("source", help="ANSWERS.parquet, SAMPLES.jsonl.gz, or a model")
    parser.add_argument("--lm-eval", type=Path)
    parser.add_argument("--nltk-data", type=Path)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--mmlu", nargs="?", const="", help="MMLU too: its file, or the one that `sftkit evaluate data get` has fetched")
    parser.add_argument("--mmlu-limit", type=int, default=57, help="questions, the first of all subjects first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="of a batch here")
    parser.add_argument("--batch-size", type=int, default=4, help="of lm-eval's answers; a sixteenth of it for MMLU")
    parser.add_argument("--out")
    given = parser.parse_args()
    if given.what == "programs":
        programs(Path(given.source), given.limit)
    elif given.what == "ifeval":
        ifeval(Path(given.source), given.lm_eval, given.nltk_data)
    else:
        of_model(given.source, given)


if __name__ == "__main__":
    main()
