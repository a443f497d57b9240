"""The report of a run: one HTML file without network, made from the files of the run alone; whatever came from data is escaped."""

import html
import json
import math
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..core.errors import UserError
from ..core.files import read_json, read_json_lines, read_parquet, write_text
from ..core.progress import duration
from ..core.run import Run, is_done, read_done
from ..core.statistics import Interval
from ..core.text import counted, visible
from ..curate.card import funnel
from ..evaluate.marks import ALPHA, Comparison, against_both
from ..evaluate.results import told as told_reasons
from .ablation import read_ablation, told

STYLE = """
:root{--ink:#1c2127;--soft:#5d6772;--line:#d9dee4;--paper:#fff;--panel:#f5f7f9;--accent:#1f6feb;--good:#13795b;--warn:#9a5b00}
@media(prefers-color-scheme:dark){:root{--ink:#e2e6eb;--soft:#98a2ae;--line:#343b44;--paper:#14171b;--panel:#1b2026;--accent:#6ea8ff;
--good:#5cd0a9;--warn:#f0b45a}}
*{box-sizing:border-box}body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:68rem;
margin:2.5rem auto;padding:0 1.2rem}h1{font-size:1.6rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.4rem 0 .6rem}
p.about,.soft,figcaption{color:var(--soft)}ul.findings{padding:.9rem 1.2rem .9rem 2.2rem;background:var(--panel);border-radius:8px}
ul.findings li{margin:.25rem 0}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th{text-align:left;font-weight:600;color:var(--soft);font-size:.85rem}th,td{padding:.35rem .9rem .35rem 0;
border-bottom:1px solid var(--line);vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.answers{display:grid;gap:.8rem;margin:.5rem 0 1.6rem}@media(min-width:50rem){.answers{grid-template-columns:repeat(var(--models),1fr)}}
.answer{border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem;min-width:0}.answer h4{margin:0 0 .3rem;font-size:.85rem;
color:var(--soft);font-weight:600}.text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.92rem}
.question{white-space:pre-wrap;overflow-wrap:anywhere;font-weight:600;border-left:3px solid var(--accent);padding-left:.7rem}
.question .soft{font-weight:400}.cut{color:var(--warn)}.stop{color:var(--good)}
svg{max-width:100%;height:auto}pre{background:var(--panel);padding:.8rem;border-radius:8px;overflow-x:auto;font-size:.85rem}
figure{margin:1rem 0}a{color:var(--accent)}footer{margin:3rem 0 1rem;color:var(--soft);font-size:.85rem}
"""

SAMPLED = 4  # evaluations whose answers stand side by side


def write_report(path: Path) -> Path:
    """Write `report.html` of a run folder from what stands in it; return its path. Parts that were not run are left out.

    Raises UserError for a folder that is no run, or that holds nothing to report yet.
    """
    run = Run.open(path)
    losses = _losses(path, "loss", "Held-out loss") + _losses(path, "text_loss", "Loss on plain texts")
    measured = [_ablation(path), losses, _tasks(path), _judgements(path), _answers(path)]
    parts = [_findings(path), *measured, _training(path), _curation(run), _how(run)]
    if not any(parts[:-1]):
        raise UserError(f"{path}: holds nothing to report yet: no data set, no model, no evaluation")
    recipe = run.config().get("recipe", {})
    name = recipe.get("name") or path.name
    about = f"<p class=about>{_text(recipe['about'])}</p>" if recipe.get("about") else ""
    target = path / "report.html"
    write_text(
        target,
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{_text(name)}</title><style>{STYLE}</style><h1>{_text(name)}</h1>{about}{''.join(parts)}"
        f"<footer>Made by sftkit {__version__} from the files of this run. Text of models and data is shown as it is.</footer>\n",
    )
    return target


def headline(path: Path) -> list[str]:
    """Return what came out, in sentences: the held-out loss before and after with its interval, tasks, the stop rate, the data set."""
    facts = read_ablation(path)
    found = [told(each) for each in facts["contrasts"]] if facts else []
    results = _results(path)
    if "loss" in results:
        models, differences = results["loss"]["models"], results["loss"]["differences"]
        found += [_told_loss(models, each) for each in differences if each["model"] == "sft"]
        if {"base", "sft", "teacher"} <= models.keys() and all(each["loss"] for each in differences):
            base, sft, teacher = (models[name]["loss"]["value"] for name in ("base", "sft", "teacher"))
            gap = next(each for each in differences if each["model"] == "teacher")
            if base > teacher and gap["shown"]:
                found.append(f"that is {(base - sft) / (base - teacher):.0%} of the way to the teacher's own loss, {teacher:.2f}")
    for name, task in results.get("tasks", {}).items():
        found += [f"{name}: {each}" for each in _changes(task) if each.startswith(("sft ", "sft:"))]
    if "compare" in results:
        models = results["compare"]["models"]
        rates = [f"{name} {round(each['stop_rate'] * each['n'])} of {each['n']}" for name, each in models.items()]
        found.append(f"answers that end by themselves within {results['compare']['max_new_tokens']} tokens: {', '.join(rates)}")
    found += _begun_again(path, results)
    plan = path / "train" / "plan.json"
    if plan.exists():
        facts = read_json(plan)
        found.append(
            f"trained on {counted(facts['train_rows'], 'row')}, {facts['trained_tokens']:,} of their {facts['tokens']:,} tokens are answers"
            f" and count, each up to its {facts['end_of_turn']}"
        )
    return found


def _begun_again(path: Path, results: dict[str, Any]) -> list[str]:
    """Name the evaluations whose numbers are those of a former command, for one with other settings has not come to its end."""
    folder = path / "evaluate"
    done = read_done(folder) if is_done(folder) else {}
    names = {"text_loss": "loss --text"}
    told = "was begun again and has not ended: its numbers here are those of the time before, the same command goes on"
    return [f"evaluate {names.get(each, each)} {told}" for each in results if each not in done]


def _told_loss(models: dict[str, Any], difference: dict[str, Any]) -> str:
    name = "loss" if difference["loss"] else "bits_per_byte"
    before, after = (models[each][name]["value"] for each in (difference["baseline"], difference["model"]))
    change, interval = difference[name]["value"], difference[name]["interval"]
    told = f"held-out {name.replace('_', ' ')}: {before:.2f} before, {after:.2f} after, a change of {change:+.2f}"
    if interval is None:
        return f"{told}; one prompt alone gives no interval"
    verdict = ("it is better" if change < 0 else "it is worse") if difference["shown"] else "none is shown"
    if not difference["shown"] and Interval(**interval).excludes(0.0):
        verdict = "the interval leaves zero out and the test does not agree, none is shown"
    return f"{told} (95 % {interval['low']:+.2f} to {interval['high']:+.2f}): {verdict}".replace("-", "−").replace("held−out", "held-out")


def _results(path: Path) -> dict[str, Any]:
    file = path / "evaluate" / "results.json"
    return dict(read_json(file)) if file.exists() else {}


def _findings(path: Path) -> str:
    found = headline(path)
    return f"<ul class=findings>{''.join(f'<li>{_text(each)}' for each in found)}</ul>" if found else ""


def _ablation(path: Path) -> str:
    facts = read_ablation(path)
    if facts is None:
        return ""
    rows = []
    for arm in facts["arms"]:
        mean = [f"{sum(arm[key]) / len(arm[key]):{form}}" for key, form in (("trained_tokens", ",.0f"), ("losses", ".3f"))]
        seeds = ", ".join(f"{value:.3f}" for value in arm["losses"])
        rows.append([arm["name"], f"{arm['rows']:,}", mean[0], f"{arm['epochs']:.2f}", mean[1], seeds])
    head = ["trained on", "rows", "tokens seen", "epochs", "held-out loss", "by seed"]
    size = f"{counted(facts['rows'], 'row')} of {counted(facts['prompts'], 'prompt')}"
    note = f"Measured on {size}; before training the loss is {facts['base_loss']:.3f}."
    return f"<h2>Did the selection pay?</h2>{_table(head, rows, first=1)}<p class=soft>{_text(note)}</p>"


def _losses(path: Path, section: str, title: str) -> str:
    results = _results(path).get(section)
    if not results:
        return ""
    head = ["model", "loss", "95 %", "bits per byte", "of the text", "of the end of turn"]
    rows = []
    for name, each in results["models"].items():
        numbers = [f"{each[key]['value']:.3f}" for key in ("loss", "bits_per_byte")]
        ends = [f"{each[key]:.3f}" if each[key] is not None else "none" for key in ("text_loss", "end_loss")]
        rows.append([name, numbers[0], _span(each["loss"]["interval"]), numbers[1], *ends])
    left = ", ".join(f"{count:,} {reason}" for reason, count in results["left_out"].items())
    plain = section == "text_loss"
    rows_of = ("piece", "text", "scored as they stand") if plain else ("held-out row", "prompt", "in no training set")
    size = f"{counted(results['used'], rows_of[0])} of {counted(results['prompts'], rows_of[1])}, {rows_of[2]}"
    texts, prompts = ("texts", "texts") if plain else ("answers", "prompts")
    note = (
        f"{size}; the same for every model"
        f"{f'; left out for all: {left}' if left else ''}. Loss is the mean of −ln p over the tokens of the {texts};"
        f" the intervals come from drawing whole {prompts} anew."
    )
    parts = "".join(_losses_of_parts(results, kind) for kind in ("source", "turn"))
    return f"<h2>{title}</h2>{_interval_chart(results['models'])}{_table(head, rows, first=1)}<p class=soft>{_text(note)}</p>{parts}"


def _losses_of_parts(results: dict[str, Any], kind: str) -> str:
    """Return a table of the loss of each source or turn, and of the differences in it; nothing where there is one alone."""
    models = {name: each.get(f"by_{kind}") or {} for name, each in results["models"].items()}
    names = list(next(iter(models.values())))
    if not names:
        return ""
    rows = [[name, *(f"{each[part]['value']:.3f}" for part in names)] for name, each in models.items()]
    for each in results["differences"]:
        unit = "" if each["loss"] else ", bits per byte"
        changes = [each[f"by_{kind}"][part] for part in names]
        told = [f"{change['value']:+.3f}" + (f" ({_span(change['interval'])})" if change["interval"] else "") for change in changes]
        rows.append([f"{each['model']} − {each['baseline']}{unit}", *(text.replace("-", "−") for text in told)])
    return f"<h3>by {kind}</h3>{_table(['model', *names], rows, first=1)}"


def _tasks(path: Path) -> str:
    parts = []
    for name, task in _results(path).get("tasks", {}).items():
        rows = []
        for model, metrics in task["metrics"].items():
            for each in metrics:
                span, clean = each["interval"], each["clean"]
                told = "" if span is None else f"{span['low']:.1%} to {span['high']:.1%}"
                apart = "" if clean is None else f"{clean['value']:.1%} of {each['clean_n']:,}"
                numbers = [f"{each['mean']:.1%}", told, f"{each['n']:,}", f"{each['not_found']:.1%}", apart]
                rows.append([model, task["asked"][model], each["name"], *numbers])
        head = ["model", "asked", "metric", "score", "95 %", "questions", "no answer found", "without what was trained on"]
        draws = [_of_samples(each) for metrics in task["metrics"].values() for each in metrics]
        if any(draws):
            head, rows = [*head, "of several samples"], [[*row, told] for row, told in zip(rows, draws, strict=True)]
        changes = "".join(f"<li>{_text(each)}" for each in _changes(task))
        parts.append(f"<h3>{_text(name)}</h3>{_table(head, rows, first=3)}{_health(task['health'])}<ul class=soft>{changes}</ul>")
    return f"<h2>Tasks</h2>{''.join(parts)}" if parts else ""


def _of_samples(metric: dict[str, Any]) -> str:
    """Return a metric's pass@k and majority with their intervals; nothing where each question was answered once."""
    found = {f"pass@{k}": each for k, each in metric["pass_at"].items()} | ({"maj": metric["majority"]} if metric["majority"] else {})
    return ", ".join(
        f"{name} {each['value']:.1%}" + (f" ({_share_span(each['interval'])})" if each["interval"] else "") for name, each in found.items()
    )


def _health(models: dict[str, Any]) -> str:
    """Return a table of what the answers are like, of models that wrote some."""
    names = ("stop_rate", "truncated", "repetitive", "empty", "other_language")
    rows = []
    for model, each in models.items():
        if each:
            shares = ["–" if each[name] is None else f"{each[name]:.1%}" for name in names]
            rows.append([model, *shares, f"{each['mean_tokens']:.1f}"])
    head = ["answers", "stopped", "cut", "repetitive", "empty", "other language", "mean tokens"]
    return _table(head, rows, first=1) if rows else ""


def _changes(task: dict[str, Any]) -> list[str]:
    """Return how each model differs from the first, in sentences, and what is missing."""
    spans = [each["interval"] and Interval(**each["interval"]) for each in task["comparisons"]]
    compared = [Comparison(**{**each, "interval": span}) for each, span in zip(task["comparisons"], spans, strict=True)]
    missing = [f"{name} answered no question and is left out: {reasons}" for name, reasons in task["unasked"].items()]
    if task["left_out"]:
        missing.append(f"questions left out for all models: {told_reasons(task['left_out'])}")
    return [*missing, *(each.told() for each in compared), *against_both(compared)]


def _judgements(path: Path) -> str:
    """Return what a judge preferred, and what it is worth; nothing where nobody judged."""
    facts = _results(path).get("judge")
    if not facts:
        return ""
    rows, notes = [], list(facts["warnings"])
    for each in facts["comparisons"]:
        numbers = each["numbers"]
        rates = [told for key in ("rate", "controlled") for told in (f"{numbers[key]['value']:.1%}", _share_span(numbers[key]["interval"]))]
        counts = [f"{numbers[key]:,}" for key in ("wins", "ties", "losses")]
        flips = f"{numbers['flips'] / numbers['n']:.0%}"
        rows.append([each["model"], each["baseline"], *rates, *counts, flips, f"{each['p_adjusted']:.2g}"])
        if each["p_adjusted"] > ALPHA:
            notes.append(f"{each['model']} against {each['baseline']}: not significant")
        if each["left_out"]:
            notes.append(f"{each['model']}: left out: {told_reasons(each['left_out'])}")
    head = ["model", "against", "win rate", "95 %", "at equal length", "95 %", "won", "tied", "lost", "flips", "p"]
    worth = [
        [each["name"], f"{each['n']:,}", f"{each['accuracy']:.1%}", _share_span(each["interval"]), f"{each['both']:.0%}"]
        for each in facts["agreements"]
    ]
    pairs = _table(["labelled pairs", "n", "right", "95 %", "right in both orders"], worth, first=1) if worth else ""
    about = f"<p class=soft>Judged by {_text(facts['judge'])}, each pair in both orders; a flip is a tie.</p>"
    said = f"<ul class=soft>{''.join(f'<li>{_text(each)}' for each in notes)}</ul>" if notes else ""
    return f"<h2>Judged in pairs</h2>{_table(head, rows, first=2)}{about}{said}{pairs}"


def _interval_chart(models: dict[str, Any]) -> str:
    spans = {name: each["loss"] for name, each in models.items() if each["loss"]["interval"]}
    if not spans:
        return ""
    high = max(each["interval"]["high"] for each in spans.values())
    width, left, row = 640, 110, 34
    scale = (width - left - 60) / high
    bars = []
    for place, (name, each) in enumerate(spans.items()):
        y = place * row + 18
        low, top, value = (left + scale * number for number in (each["interval"]["low"], each["interval"]["high"], each["value"]))
        bars.append(
            f"<text x={left - 10} y={y + 5} text-anchor=end>{_text(name)}</text><rect x={left} y={y - 8} width={value - left:.1f} height=16"
            f" fill='var(--accent)' opacity=.28 /><path d='M{low:.1f} {y}H{top:.1f}M{low:.1f} {y - 5}v10M{top:.1f} {y - 5}v10'"
            f" stroke='var(--accent)' stroke-width=2 /><text x={top + 8:.1f} y={y + 5}>{each['value']:.2f}</text>"
        )
    height = len(spans) * row + 6
    return (
        f"<figure><svg viewBox='0 0 {width} {height}' width={width} height={height} role=img aria-label='loss of each model'"
        f" font-size=14 fill='currentColor'>{''.join(bars)}</svg><figcaption>Loss with its 95 % interval: lower is better."
        "</figcaption></figure>"
    )


def _answers(path: Path) -> str:
    results, file = _results(path).get("compare"), path / "evaluate" / "answers.parquet"
    if not results or not file.exists():
        return ""
    head = ["model", "ends by itself", "95 %", "cut", "empty", "mean tokens"]
    rows = []
    for name, each in results["models"].items():
        shares = [f"{each[key]:.0%}" for key in ("stop_rate", "truncated_share", "empty_share")]
        span = each["stop_interval"]
        rows.append([name, shares[0], f"{span['low']:.0%} to {span['high']:.0%}", *shares[1:], f"{each['mean_tokens']:.1f}"])
    left = f"; left out for all models: {told_reasons(results['left_out'])}" if results["left_out"] else ""
    counts = counted(next(iter(results["models"].values()))["n"], "question")
    note = f"{counts} answered by every model, greedily, in at most {results['max_new_tokens']} tokens{left}"
    answers = read_parquet(file)
    articles = []
    for _, group in answers.group_by("example_id", maintain_order=True):
        if group["error"][0] == "repeated":  # it stands there already
            continue
        turns = [
            f"<span{' class=soft' if each.get('role') == 'system' else ''}>{_text(each.get('content') or '')}</span>"
            for each in json.loads(group["question"][0])
        ]
        cells = [_answer(each) for each in group.iter_rows(named=True)]
        grid = f"<div class=answers style='--models:{len(cells)}'>{''.join(cells)}</div>"
        articles.append(f"<p class=question>{'<br>'.join(turns)}</p>{grid}")
    return f"<h2>The same questions to each model</h2>{_table(head, rows, first=1)}<p class=soft>{_text(note)}</p>{''.join(articles)}"


def _answer(row: dict[str, Any]) -> str:
    if row["error"]:
        mark = f"<span class=cut>{_text(row['error'])}</span>"
    elif row["finish_reason"] == "stop":
        mark = f"<span class=stop>ended by itself after {row['num_tokens']} tokens</span>"
    else:
        mark = f"<span class=cut>cut at {row['num_tokens']} tokens</span>"
    return f"<div class=answer><h4>{_text(row['model'])} · {mark}</h4><div class=text>{_text(row['text'] or '')}</div></div>"


def _training(path: Path) -> str:
    metrics, results = path / "train" / "metrics.jsonl", path / "train" / "results.json"
    if not results.exists():
        return ""
    facts, lines = read_json(results), read_json_lines(metrics)
    rate = f"{facts['tokens'] / facts['seconds']:,.0f} tokens/s" if facts["seconds"] else ""
    size = f"{counted(facts['rows'], 'row')}, {counted(facts['steps'], 'step')}, {facts['tokens']:,} tokens"
    told = f"{size} in {duration(facts['seconds'])} ({rate})"
    link = "<a href='train/preview.html'>What is trained on, token by token</a>" if (path / "train" / "preview.html").exists() else ""
    points = {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in ("loss", "eval_loss")}
    return f"<h2>Training</h2>{_curve(points)}<p>{_text(told)}. {link}</p>{_samples(path / 'train' / 'samples.jsonl')}"


def _samples(file: Path) -> str:
    """Return what the model in training answered to the same prompts, at a few of its evaluations side by side."""
    lines = read_json_lines(file)
    steps = sorted({line["step"] for line in lines})
    if not steps:
        return ""
    shown = sorted({steps[round(number * (len(steps) - 1) / (SAMPLED - 1))] for number in range(SAMPLED)})
    cells: dict[tuple[str, str], list[str]] = {}
    for line in sorted((line for line in lines if line["step"] in shown), key=lambda line: line["step"]):
        ended = line.get("finish_reason") == "stop"
        mark = f"<span class={'stop' if ended else 'cut'}>{'ended by itself' if ended else _text(line.get('error') or 'cut')}</span>"
        answer = f"<div class=text>{_text(line.get('answer') or '')}</div>"
        head = f"<h4>step {line['step']:,} · {mark}</h4>"
        cells.setdefault((line["source"], line["prompt"]), []).append(f"<div class=answer>{head}{answer}</div>")
    told = f"Greedy answers at {len(shown)} of {len(steps)} evaluations; train/samples.jsonl of the run has all."
    parts = [
        f"<p class=question>{_text(prompt)}</p><div class=answers style='--models:{len(each)}'>{''.join(each)}</div>"
        for (_, prompt), each in cells.items()
    ]
    return f"<h3>The same prompts during training</h3><p class=soft>{told}</p>{''.join(parts)}"


def _curve(points: dict[str, list[tuple[float, float]]]) -> str:
    values = [value for line in points.values() for _, value in line]
    if len(points["loss"]) < 2:
        return ""
    low, high, last = min(values), max(values), max(step for step, _ in points["loss"])
    width, height, left, foot = 640, 200, 44, 24
    spread = (high - low) or 1.0

    def place(step: float, value: float) -> str:
        x = left + (width - left - 10) * step / last
        return f"{x:.1f},{10 + (height - foot - 20) * (1 - (value - low) / spread):.1f}"

    lines = []
    for name, colour in (("loss", "var(--accent)"), ("eval_loss", "var(--good)")):
        if points[name]:
            path = " ".join(place(*each) for each in points[name])
            lines.append(f"<polyline points='{path}' fill=none stroke='{colour}' stroke-width=2 />")
    labels = f"<text x=0 y=16>{high:.2f}</text><text x=0 y={height - foot - 6}>{low:.2f}</text><text x={width - 10} y={height - 4}"
    labels += f" text-anchor=end>step {math.ceil(last)}</text>"
    second = ", on the validation rows (green)" if points["eval_loss"] else ""
    return (
        f"<figure><svg viewBox='0 0 {width} {height}' width={width} height={height} role=img aria-label='training loss'"
        f" font-size=13 fill='currentColor'>{''.join(lines)}{labels}</svg>"
        f"<figcaption>Loss on the rows that are trained on{second}.</figcaption></figure>"
    )


def _curation(run: Run) -> str:
    stages = funnel(run)
    if not stages:
        return ""
    rows = []
    for stage, num_input, kept, rules in stages:
        rows.append([stage, f"{num_input:,}", f"{kept:,}", ", ".join(f"{rule} {count:,}" for rule, count in rules.items())])
    note = f"Every row is accounted for: `sftkit curate why ID {run.path}` says what each step decided on it, by which rule, and which row"
    return (
        f"<h2>Where the rows went</h2>{_table(['stage', 'input', 'kept', 'removed, by rule'], rows, first=1, last=3)}"
        f"<p class=soft>{_text(note)} stands for it.</p>"
    )


def _how(run: Run) -> str:
    times = run.path / "times.json"
    told = ""
    if times.exists():
        told = "<p>" + _text(", ".join(f"{step} {duration(seconds)}" for step, seconds in read_json(times).items())) + "</p>"
    versions = ", ".join(f"{name} {version}" for name, version in read_json(run.path / "versions.json").items() if version)
    settings = yaml.safe_dump(run.config(), sort_keys=False, allow_unicode=True)
    return (
        f"<h2>How it was made</h2>{told}<p class=soft>{_text(versions)}</p><details><summary>All settings</summary>"
        f"<pre>{_text(settings)}</pre></details>"
    )


def _table(head: list[str], rows: list[list[str]], *, first: int, last: int | None = None) -> str:
    """Return a table whose columns from `first` to before `last` are numbers."""

    def row(cells: list[str], tag: str) -> str:
        marks = [" class=n" if first <= place < (last or len(cells)) else "" for place in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{mark}>{_text(cell)}" for cell, mark in zip(cells, marks, strict=True))

    return f"<div class=scroll><table>{row(head, 'th')}{''.join(row(each, 'td') for each in rows)}</table></div>"


def _span(interval: dict[str, float] | None) -> str:
    return "" if interval is None else f"{interval['low']:.3f} to {interval['high']:.3f}"


def _share_span(interval: dict[str, float] | None) -> str:
    return "one pair" if interval is None else f"{interval['low']:.0%} to {interval['high']:.0%}"


def _text(text: object) -> str:
    return html.escape(visible(str(text)))
