"""Two GPUs of one host against one of them: training by DDP and FSDP2, distillation and tasks by replicas, and what a kill costs.

    python benchmarks/two_gpus.py CHATS TOKENIZER [--only equal,speed,kill,ends,distill,tasks] [--shapes 0.5b,1.5b] [--mmlu FILE]

CHATS is a data file with conversations, TOKENIZER a model folder whose tokenizer and template render them. Models have real shapes and
random weights. The stages, with what each needs on two H200s:

    equal    the losses of eight updates on one GPU and on two, by the same rows: in float32, and in bfloat16 products       (1.5 min)
    speed    tokens a second and peak memory of one GPU and of two, at the same forward passes on each                       (3 min a shape)
    kill     `sftkit train sft --gpus 2` killed (SIGKILL), gone on with on two and on one, against a run in one piece        (8 min)
    ends     the same command ended by Ctrl-C, by a kill of the command alone and of one of its processes, and gone on with  (3 min)
    distill  one replica and two, the same rows; then one of the two is killed on the way                                    (5 min)
    tasks    `sftkit evaluate tasks` with one replica and with two                                                           (4 min)

A line of JSON goes to the file named by --out as soon as something is measured; a stage that fails is told, and the next one begins.
Without GPUs (two processes on the CPU) give `--shapes tiny --teacher tiny --step-tokens 1024`, to see that the script is sound.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from sftkit.core.engines.base import EngineConfig
from sftkit.core.engines.registry import open_engine
from sftkit.core.files import read_json, read_json_lines
from sftkit.core.formats import read_examples
from train_speed import SHAPES
from training_process import DEVICE, GPU

WAYS = ("one", "ddp", "fsdp")
MICRO = {"135m": 65_536, "0.5b": 32_768, "1.5b": 16_384}  # tokens of a forward pass
STEPS = 20
WORKER = Path(__file__).with_name("training_process.py")
BAR = {"speed": 1.85, "distill": 1.9}


class Report:
    """Prints what was measured and appends it to a file."""

    def __init__(self, place: Path) -> None:
        self.place, self.lines = place, list[str]()

    def add(self, stage: str, told: str, **facts: Any) -> None:
        line = f"{stage:8} {told}"
        self.lines.append(line)
        print(line, flush=True)
        with open(self.place, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "card": torch.cuda.get_device_name() if GPU else "CPU", **facts}) + "\n")


# ---------------------------------------------------------------------------------------------- training: stages


def ordered(given: argparse.Namespace, tasks: list[dict[str, Any]], gpus: int) -> list[dict[str, Any]]:
    """Let `gpus` new processes do the tasks; where they die of one, new ones do the rest. Return what came out, in order."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // gpus)), **os.environ}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        order, out = Path(scratch) / "order.json", Path(scratch) / "out.jsonl"
        while len(found) < len(tasks):
            out.unlink(missing_ok=True)
            order.write_text(
                json.dumps({"chats": given.chats, "tokenizer": given.tokenizer, "out": str(out), "tasks": tasks[len(found) :]})
            )
            subprocess.run([sys.executable, *launch, str(WORKER), str(order)], env=environment, check=False)
            came = list(read_json_lines(out)) if out.exists() else []
            fell = {"error": "its process died"}
            found += came if came else [{**tasks[len(found)], **fell}]
    return found


def task_of(given: argparse.Namespace, way: str, **more: Any) -> dict[str, Any]:
    usual = {"step_tokens": given.step_tokens, "steps": STEPS, "compile": False, "half": True, "weak": True, "lora": False, "losses": False}
    return {**usual, "way": way, "gpus": 1 if way == "one" else 2, **more}


def both_counts(given: argparse.Namespace, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do tasks of one process and of two."""
    return [found for gpus in (1, 2) if (some := [each for each in tasks if each["gpus"] == gpus]) for found in ordered(given, some, gpus)]


def equal(given: argparse.Namespace, report: Report) -> None:
    """Hold the losses of two GPUs against one's. The rows of an update stand in the same two packs, done after or beside each other."""
    shape = given.shapes.split(",")[0]
    few = min(given.step_tokens, 8_192)
    kinds = [
        (layers == "compiled", half, lora)
        for layers in given.layers.split(",")
        for half in ((False, True) if GPU and layers == "plain" else (GPU,))  # on a GPU compiled layers are for 16 bits
        for lora in (False, True)
    ]
    tasks = [
        task_of(
            given, way, shape=shape, lora=lora, half=half, compile=compiled, weak=False, losses=True, steps=8, step_tokens=few,
            batch_tokens=round(few * 0.6),
        )
        for compiled, half, lora in kinds
        for way in WAYS
    ]  # fmt: skip
    found = both_counts(given, tasks)
    for compiled, half, lora in kinds:
        those = {each["way"]: each for each in found if (each["compile"], each["half"], each["lora"]) == (compiled, half, lora)}
        for way in ("ddp", "fsdp"):
            name = f"{shape} {'lora' if lora else 'full'} {way}, {'bf16 products' if half else 'float32'}{', compiled' if compiled else ''}"
            facts = {"shape": shape, "lora": lora, "way": way, "half": half, "compile": compiled}
            if way not in those or "error" in (each := those[way]) or "error" in (one := those["one"]):
                report.add("equal", f"{name}: FAILED {those.get(way, {}).get('error', 'no result')}", **facts, error=True)
                continue
            apart = [abs(a - b) for a, b in zip(one["losses"], each["losses"], strict=True)]
            parts = (one["parts"], each["parts"])
            report.add("equal", f"{name}: {len(apart)} updates of {parts} packs, losses apart by at most {max(apart):.1e} (first"
                       f" {one['losses'][0]:.4f}, last {one['losses'][-1]:.4f})", **facts, apart=max(apart), losses=each["losses"],
                       one=one["losses"], parts=parts)  # fmt: skip


def speed(given: argparse.Namespace, report: Report) -> None:
    """Measure tokens a second."""
    methods = [each == "lora" for each in given.methods.split(",")]
    for compiled in [each == "compiled" for each in given.layers.split(",")]:
        for shape in given.shapes.split(","):
            tasks = [
                task_of(given, way, shape=shape, lora=lora, compile=compiled, batch_tokens=MICRO.get(shape, 1024))
                for lora in methods
                for way in WAYS
            ]
            found = both_counts(given, tasks)
            for lora in methods:
                those = {each["way"]: each for each in found if each["lora"] == lora}
                for way in WAYS:
                    name = f"{shape} {'lora' if lora else 'full'} {way}{', compiled' if compiled else ''}"
                    each = those.get(way, {"error": "no result"})
                    facts = {"shape": shape, "lora": lora, "way": way, "compile": compiled}
                    if "error" in each:
                        report.add("speed", f"{name}: FAILED {each['error']}", **facts, error=each["error"])
                        continue
                    ratio = each["rate"] / those["one"]["rate"] if "rate" in those.get("one", {}) else math.nan
                    told = "" if way == "one" else f" = {ratio:.2f} x one {'ok' if ratio >= BAR['speed'] else 'BELOW THE BAR'}"
                    passes = each["parts"] // each["gpus"]
                    report.add("speed", f"{name:28} {each['rate']:10,.0f} tokens/s{told}, {each['peak_gb']:.1f} GB a card, {passes} passes"
                               f" of {each['tokens'] // each['parts']:,} tokens ({each['seconds']:.0f} s)", **facts, rate=each["rate"],
                               ratio=ratio, peak_gb=each["peak_gb"], passes=passes, seconds=each["seconds"])  # fmt: skip


def kill(given: argparse.Namespace, report: Report) -> None:
    """Kill runs, and go on with them on two GPUs and on one. The kinds of runs go beside each other."""
    shape = "135m" if GPU else "tiny"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_model(shape, given.tokenizer, folder / "model")
        # many processes on one machine: a run that dies takes only itself
        kinds = [tuple(each.split("-")) for each in given.kinds.split(",")]
        threads = [threading.Thread(target=guarded, args=(report, "kill", killed, given, report, folder, model, *kind)) for kind in kinds]
        for each in threads:
            each.start()
        for each in threads:
            each.join()


def killed(given: argparse.Namespace, report: Report, folder: Path, model: Path, method: str, way: str) -> None:
    place = folder / f"{method}-{way}"
    place.mkdir()
    settings = place / "settings.yaml"
    rows = 1200 if GPU else 60
    told = {
        "limit": rows, "batch_size": 16, "logging_steps": 1, "validation": 0.05, "stop_check": 0, "compile": False,
        "save_minutes": 0.003 if method == "lora" else 0.02,  # a whole model's checkpoint takes as long as ten updates
        "batch_tokens": 4096 if GPU else 512, "lora": method == "lora", "parallel": way, "learning_rate": 1e-3,
    }  # fmt: skip
    settings.write_text(json.dumps(told))

    def command(run: Path, gpus: int) -> list[str]:
        model_and_place = ["--model", str(model), "-o", str(run), "--config", str(settings), "--gpus", str(gpus)]
        return [sys.executable, "-P", "-m", "sftkit", "train", "sft", given.chats, *model_and_place]

    def done(run: Path, gpus: int) -> list[float]:
        since = time.monotonic()
        with open(place / f"{run.name}.log", "a") as log:
            code = subprocess.run(command(run, gpus), stderr=log, stdout=log, cwd="/", check=False).returncode
        print(f"kill     {method} {way}: {run.name} on {gpus}, {time.monotonic() - since:.0f} s", flush=True)
        if code:
            raise RuntimeError(f"{method} {way}: {run.name} on {gpus} ended with {code}: {(place / f'{run.name}.log').read_text()[-1500:]}")
        return [line["loss"] for line in read_json_lines(run / "train" / "metrics.jsonl") if "loss" in line]

    whole, run = place / "whole", place / "run"
    with ThreadPoolExecutor() as beside:
        undisturbed = beside.submit(done, whole, 2)
        began, moment = time.monotonic(), rows // 16 // 3
        with open(place / "run.log", "a") as log:
            process = subprocess.Popen(command(run, 2), stderr=log, stdout=log, cwd="/")
        while (newest := newest_checkpoint(run)) < moment:
            if process.poll() is not None or time.monotonic() - began > 240:
                raise RuntimeError(f"{method} {way}: no checkpoint to kill it at: {(place / 'run.log').read_text()[-1500:]}")
            time.sleep(0.02)
        for each in psutil.Process(process.pid).children(recursive=True):
            each.kill()
        process.kill()
        process.wait()
        last = run / "train" / "checkpoints" / f"checkpoint-{newest}"
        sizes = {file.name: file.stat().st_size for file in last.iterdir()}
        shutil.copytree(run, place / "copy")
        gone_on = dict(zip((2, 1), beside.map(done, (run, place / "copy"), (2, 1)), strict=True))
        one_piece = undisturbed.result()
    steps = len(one_piece)
    apart = {gpus: max(abs(a - b) for a, b in zip(one_piece, losses, strict=True)) for gpus, losses in gone_on.items()}
    facts: dict[str, Any] = {"method": method, "way": way, "steps": steps, "killed_at": newest, "apart": apart}
    size = ""
    if method == "lora":
        adapter = (whole / "train" / "adapter" / "adapter_model.safetensors").stat().st_size
        weights = sizes["adapter_model.safetensors"]
        facts |= {"adapter_bytes": adapter, "checkpoint_bytes": weights, "checkpoint_all_bytes": sum(sizes.values())}
        size = f"; adapter {adapter / 1e6:.1f} MB, in a checkpoint {weights / 1e6:.1f} MB ({weights / adapter:.2f} x)"
    else:
        facts |= {"checkpoint_all_bytes": sum(sizes.values())}
    result = read_json(run / "train" / "results.json")
    report.add("kill", f"{shape_name(model)} {method} {way}: killed after step {newest} of {steps}; losses apart from a run in one piece:"
               f" gone on with two {apart[2]:.1e}, with one {apart[1]:.1e}{size}", **facts, result=result)  # fmt: skip


def ends(given: argparse.Namespace, report: Report) -> None:
    """End runs in other ways, beside each other, and go on with them: what was done is kept, and no process stays."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_model("135m" if GPU else "tiny", given.tokenizer, folder / "model")
        settings = folder / "settings.yaml"
        told = {
            "limit": 1200 if GPU else 400, "batch_size": 16, "logging_steps": 1, "validation": 0.05, "stop_check": 0, "compile": GPU,
            "batch_tokens": 4096 if GPU else 512, "parallel": given.parallel, "learning_rate": 1e-3, "save_minutes": 0.05,
        }  # fmt: skip
        settings.write_text(json.dumps(told))

        def command(run: str) -> list[str]:
            place = ["--model", str(model), "-o", str(folder / run), "--config", str(settings), "--gpus", "2"]
            return [sys.executable, "-P", "-m", "sftkit", "train", "sft", given.chats, *place]

        def started(run: str) -> subprocess.Popen[bytes]:
            with open(folder / f"{run}.log", "a") as log:
                return subprocess.Popen(command(run), stderr=log, stdout=log, cwd="/")

        def done(run: str) -> list[float]:
            if code := started(run).wait():
                raise RuntimeError(f"{run} ended with {code}: {(folder / f'{run}.log').read_text()[-1500:]}")
            return losses(run)

        def losses(run: str) -> list[float]:
            place = folder / run / "train" / "metrics.jsonl"
            return [line["loss"] for line in read_json_lines(place) if "loss" in line] if place.exists() else []

        def ended(name: str) -> tuple[str, int, int, float, int, list[float]]:
            process = started(name)
            while len(losses(name)) < 10:
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended by itself: {(folder / f'{name}.log').read_text()[-1500:]}")
                time.sleep(0.02)
            workers = psutil.Process(process.pid).children()
            if name == "ctrl-c":
                process.send_signal(signal.SIGINT)
            else:
                (process if name == "command" else workers[1]).kill()
            seen, began = len(losses(name)), time.monotonic()
            code = process.wait()
            _, alive = psutil.wait_procs(workers, timeout=120)
            seconds = time.monotonic() - began
            assert not alive, f"{name}: processes that stayed"
            return name, seen, newest_checkpoint(folder / name), seconds, code, done(name)

        with ThreadPoolExecutor() as beside:
            whole = beside.submit(done, "whole")
            for name, seen, kept, seconds, code, found in beside.map(ended, ("ctrl-c", "command", "process")):
                apart = max(abs(a - b) for a, b in zip(whole.result(), found, strict=True))
                report.add("ends", f"{name}: after {seen} of {len(found)} updates, exit code {code}, all gone after {seconds:.1f} s, newest"
                           f" checkpoint {kept}; gone on with, losses apart from a run in one piece by at most {apart:.1e}", name=name,
                           seen=seen, kept=kept, seconds=seconds, code=code, apart=apart, steps=len(found))  # fmt: skip


def shape_name(model: Path) -> str:
    return f"{read_json(model / 'config.json')['num_hidden_layers']} layers"


def newest_checkpoint(run: Path) -> int:
    from sftkit.train.checkpoints import last_checkpoint

    found = last_checkpoint(run / "train" / "checkpoints")
    return int(found.name.rpartition("-")[2]) if found else -1


def random_model(shape: str, tokenizer: str, folder: Path) -> Path:
    """Write a model of a shape, with random weights that give different answers to different prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = SHAPES[shape]()
    words = AutoTokenizer.from_pretrained(tokenizer)
    config.eos_token_id, config.bos_token_id, config.pad_token_id = words.eos_token_id, None, None
    config.max_position_embeddings = min(config.max_position_embeddings, 8192)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if GPU else torch.float32)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    del model
    if GPU:
        torch.cuda.empty_cache()
    return folder


# ---------------------------------------------------------------------------------------------- engines


def prompts_of(given: argparse.Namespace, folder: Path) -> Path:
    """Write the first message of each conversation as a prompt."""
    place = folder / "prompts.jsonl"
    first = (each.messages[0] for each in read_examples(given.chats) if each.messages)
    texts = {each["content"]: None for each in first if each["role"] == "user" and isinstance(each["content"], str)}
    place.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in list(texts)[: given.prompts]))
    return place


def distill(given: argparse.Namespace, report: Report) -> None:
    """Measure one replica and two on the same prompts, then kill one of two on the way."""
    from sftkit.curate.config import DistillConfig
    from sftkit.curate.distill import distillation

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, prompts = random_model(given.teacher, given.tokenizer, folder / "model"), prompts_of(given, folder)
        kind = EngineConfig(engine=given.engine, device=None if GPU else "cpu", batch_tokens=16_384 if GPU else 2_048)
        base = DistillConfig(teacher=str(model), k=given.k, max_new_tokens=given.max_new_tokens, engine=kind)
        rates: dict[int, float] = {}
        rows: dict[int, dict[str, str]] = {}
        for count in (1, 2):
            start = time.perf_counter()
            with closing(open_engine(str(model), replace(kind, replicas=count))) as engine:
                engines: Any = engine
                while not all(each and each.ready for each in engines._processes) and time.perf_counter() - start < 240:
                    engines._listen()
                started = time.perf_counter() - start
                for name in ("warm", "measured", *(("killed",) if count == 2 else ())):
                    config = replace(base, seed=1 if name == "warm" else 0, limit=64 if name == "warm" else None)
                    with distillation(prompts, folder / f"{count}-{name}", config) as work_:
                        work_.teacher._engine = engine
                        store = folder / f"{count}-{name}" / "curate" / "samples.sqlite"
                        victim = Victim(engines, store, len(work_.wanted)) if name == "killed" else None
                        made, tokens, seconds = work_.generate(work_.wanted)
                        work_.teacher._engine = None  # it is used again
                        frame, missing = work_.samples(), len(work_.missing())
                    if name == "measured":
                        rates[count], rows[count] = tokens / seconds, dict(frame.select("key", "text").iter_rows())
                        ratio = rates[count] / rates[1]
                        verdict = "" if count == 1 else f" = {ratio:.2f} x one {'ok' if ratio >= BAR['distill'] else 'BELOW THE BAR'}"
                        report.add("distill", f"{count} replica{'s' if count > 1 else ''} of {given.teacher}: {rates[count]:,.0f} tokens/s"
                                   f"{verdict}; {made:,} samples of {tokens / made:.0f} tokens, start {started:.0f} s", replicas=count,
                                   rate=rates[count], ratio=ratio, samples=made, tokens=tokens, seconds=seconds, start=started)  # fmt: skip
                    elif victim:
                        final = dict(frame.select("key", "text").iter_rows())
                        lost = sum(final.get(key) != text for key, text in victim.committed.items())  # fmt: skip
                        report.add("distill", f"one of two killed after {len(victim.committed):,} of {made:,} samples: {missing} missing in"
                                   f" the end, {lost} committed ones lost or changed, {tokens / seconds:,.0f} tokens/s", killed=True,
                                   committed=len(victim.committed), missing=missing, lost=lost, rate=tokens / seconds)  # fmt: skip
        same = rows[1].keys() == rows[2].keys()
        differ = sum(rows[2][key] != text for key, text in rows[1].items() if key in rows[2])
        report.add("distill", f"rows of one and of two replicas: {'the same' if same else 'NOT THE SAME'}, {differ:,} of {len(rows[1]):,}"
                   " with another text (rounding: other rows shared their batches)", same_rows=same, differ=differ)  # fmt: skip


class Victim(threading.Thread):
    """Kills the second engine's process when a third of the samples are committed, after reading what is."""

    def __init__(self, engines: Any, store: Path, total: int) -> None:
        super().__init__(daemon=True)
        self.engines, self.store, self.total = engines, store, total
        self.committed: dict[str, str] = {}
        self.start()

    def run(self) -> None:
        import sqlite3

        while len(self.committed) < self.total / 3:
            time.sleep(0.1)
            with closing(sqlite3.connect(f"file:{self.store}?mode=ro", uri=True, timeout=5)) as connection:
                self.committed = {key.hex(): text for key, text in connection.execute("select key, text from samples")}
        process = psutil.Process(self.engines._processes[1]._popen.pid)
        for each in [*process.children(recursive=True), process]:
            each.send_signal(signal.SIGKILL)


def tasks(given: argparse.Namespace, report: Report) -> None:
    """Ask two tasks' questions of one replica and of two: MMLU's probabilities of choices, where its questions are here."""
    from sftkit.evaluate.task_data import fetch_data, stored

    if given.mmlu:
        fetch_data("mmlu", given.mmlu)
    asked = "gsm8k,mmlu" if stored("mmlu").exists() else "gsm8k,ifeval"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_model("0.5b" if GPU else "tiny", given.tokenizer, folder / "model")
        scores: dict[int, Any] = {}
        for count in (1, 2):
            settings = folder / f"{count}.yaml"
            engine = {"engine": given.engine, "replicas": count, "device": None if GPU else "cpu"}
            settings.write_text(json.dumps({"limit": given.questions, "max_new_tokens": given.max_new_tokens, "engine": engine}))
            names = ["--model", f"m={model}", "--tasks", asked, "-o", str(folder / str(count)), "--config", str(settings)]
            start = time.perf_counter()
            found = subprocess.run(
                [sys.executable, "-P", "-m", "sftkit", "evaluate", "tasks", *names], capture_output=True, text=True, cwd="/", check=False
            )
            seconds = time.perf_counter() - start
            if found.returncode:
                raise RuntimeError(f"evaluate tasks with {count}: {found.stderr[-1500:]}")
            scores[count] = read_json(folder / str(count) / "evaluate" / "results.json")
            report.add("tasks", f"{count} replica{'s' if count > 1 else ''}: {asked}, {given.questions} questions each,"
                       f" {seconds:.0f} s with the start", replicas=count, seconds=seconds)  # fmt: skip
        means = {count: means_of(each["tasks"]) for count, each in scores.items()}
        apart = max(abs(mean - means[2].get(mark, math.inf)) for mark, mean in means[1].items())
        told = f"{len(means[1])} scores, {'of the same' if means[1].keys() == means[2].keys() else 'NOT OF THE SAME'} questions"
        report.add("tasks", f"one replica and two: {told}, apart by at most {100 * apart:.1f} points", scores=scores, apart=apart)


def means_of(tasks: dict[str, Any]) -> dict[tuple[str, str, str, int], float]:
    """Return the scores of results.json, from 0 to 1, by task, row, metric and number of questions."""
    return {
        (task, row, metric["name"], metric["n"]): metric["mean"]
        for task, facts in tasks.items()
        for row, metrics in facts["metrics"].items()
        for metric in metrics
    }


# ---------------------------------------------------------------------------------------------- all


STAGES = {"equal": equal, "speed": speed, "kill": kill, "ends": ends, "distill": distill, "tasks": tasks}


def guarded(report: Report, name: str, stage: Any, *arguments: Any) -> None:
    """Run a stage; tell what it died of."""
    try:
        stage(*arguments)
    except Exception as error:  # noqa: BLE001  told, and the next one begins
        traceback.print_exc()
        report.add(name, f"FAILED {type(error).__name__}: {' '.join(str(error).split())[-600:]}", error=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("chats")
    parser.add_argument("tokenizer")
    parser.add_argument("--only", default=",".join(STAGES))
    parser.add_argument("--shapes", default="0.5b,1.5b")
    parser.add_argument("--step-tokens", type=int, default=65_536, help="of an update, on one GPU")
    parser.add_argument("--layers", default="plain", help="plain, compiled: as they are in `equal` and `speed`")
    parser.add_argument("--teacher", default="1.5b", help="shape of the model that is distilled")
    parser.add_argument("--engine", default="vllm" if GPU else "transformers")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--mmlu", help="file with MMLU's questions, which do not come along")
    parser.add_argument("--methods", default="full,lora", help="whose speed is measured")
    parser.add_argument("--kinds", default="full-fsdp,full-ddp,lora-fsdp,lora-ddp", help="of runs that are killed")
    parser.add_argument("--parallel", default="ddp", help="of runs that are ended")
    parser.add_argument("--out", default="two_gpus.jsonl")
    given = parser.parse_args()
    given.chats, given.tokenizer = str(Path(given.chats).resolve()), str(Path(given.tokenizer).resolve())
    report = Report(Path(given.out).resolve())
    if GPU and torch.cuda.device_count() < 2:
        print(f"this machine has {torch.cuda.device_count()} GPU: two are needed")
    for name in given.only.split(","):
        began = time.perf_counter()
        guarded(report, name, STAGES[name], given, report)
        print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)
    print("\n".join(["", *report.lines]))


if __name__ == "__main__":
    main()
