"""What full fine-tuning learns with bfloat16 weights: rounded to the nearest number, rounded at random, and in float32.

    python benchmarks/bfloat16_weights.py CHATS MODEL [--updates 40] [--rate 2e-5] [--batch-size 8]

Each run learns from the same rows in the same order; the loss on held-out rows is told before and after, with the seconds of a run and, on
a GPU, its peak memory. "nearest" is PyTorch's AdamW on bfloat16 weights, which is what other trainers take.

With --by-heart four rows are learned in six updates by a plain loop instead, float32 weights with products in float32, too: what the
optimizers do, without what products in bfloat16 do to float32 weights.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from sftkit.core.chat import load_chat
from sftkit.core.files import read_json
from sftkit.core.formats import read_examples
from sftkit.core.models import load_model, resolve_model
from sftkit.train.account import prepare
from sftkit.train.config import TrainConfig
from sftkit.train.rounding import RoundedAdamW
from sftkit.train.sft import train
from sftkit.train.trainer import Trainer
from trl import SFTTrainer

KINDS = {"float32": "auto", "nearest": "bfloat16", "at random": "bfloat16"}


def measured(given: argparse.Namespace, kind: str) -> dict[str, object]:
    config = TrainConfig(
        dtype=KINDS[kind], limit=round(given.updates * given.batch_size / 0.9), validation=0.1, batch_size=given.batch_size,
        learning_rate=given.rate, stop_check=0, max_length=given.max_length,
    )  # fmt: skip
    plain = mock.patch.object(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(SFTTrainer.get_optimizer_cls_and_kwargs))
    began = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, plain if kind == "nearest" else nullcontext():
        before, after = train(given.chats, given.model, Path(folder) / "run", config).validation
        steps = read_json(Path(folder) / "run" / "train" / "results.json")["steps"]
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    seconds = time.perf_counter() - began
    return {"kind": kind, "updates": steps, "before": before, "after": after, "seconds": round(seconds, 1), "peak_gb": peak}


def by_heart(given: argparse.Namespace, kind: str) -> list[float]:
    """Return the loss of four rows before each of six updates."""
    ref = resolve_model(given.model)
    chat = load_chat(ref)
    rows = prepare(list(islice(read_examples(given.chats), 30)), chat, TrainConfig(validation=0, max_length=120), context=8192).train[:4]
    model = load_model(ref, dtype=KINDS[kind].replace("auto", "float32")).train()
    optimizer = (RoundedAdamW if kind == "at random" else torch.optim.AdamW)(model.parameters(), lr=given.rate, weight_decay=0.0)
    losses = []
    for _ in range(6):
        terms = []
        for row in rows:
            ids = torch.tensor(row.tokens, dtype=torch.long)
            logs = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
            terms.append(-logs.gather(1, ids[1:, None])[torch.tensor(row.trained)[1:], 0])
        loss = torch.cat(terms).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(round(loss.item(), 4))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("chats")
    parser.add_argument("model")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--out", default="bfloat16_weights.jsonl")
    parser.add_argument("--by-heart", action="store_true")
    given = parser.parse_args()
    if given.by_heart:
        print("\n".join(f"{kind:10} {by_heart(given, kind)}" for kind in KINDS))
        return
    lines = []
    for kind in KINDS:
        found = measured(given, kind)
        with open(given.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"model": given.model, "rate": given.rate, **found}) + "\n")
        lines.append(
            f"{kind:10} {found['updates']} updates at {given.rate:g}: held-out loss {found['before']:.4f} -> {found['after']:.4f}"
            f" ({found['after'] - found['before']:+.4f}), {found['seconds']} s"
        )
        print(lines[-1], file=sys.stderr)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
