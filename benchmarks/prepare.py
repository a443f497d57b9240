"""How long preparation takes: many chats rendered, masked and packed, the first time and from the cache.

    python benchmarks/prepare.py DATA... --model MODEL [--chats 100000] [--tokens 500]

Chats are put together from the exchanges of the data files, several in a row up to about so many tokens each, the same for a seed.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from sftkit.core.chat import load_chat
from sftkit.core.formats import read_examples
from sftkit.core.models import resolve_model
from sftkit.train.config import TrainConfig
from sftkit.train.packing import Packs
from sftkit.train.prepared import load_rows

CHARACTERS = 4.4  # a token


def write_chats(place: Path, sources: list[str], count: int, tokens: int) -> None:
    """Write chats of about so many tokens, made of exchanges of the sources."""
    exchanges = [list(each.messages[-2:]) for source in sources for each in read_examples(source) if len(each.messages) >= 2]
    draw = random.Random(0)
    with open(place, "w", encoding="utf-8") as file:
        for number in range(count):
            turns: list[dict[str, object]] = []
            size, wanted = 0.0, tokens * CHARACTERS * draw.uniform(0.5, 1.5)
            while size < wanted:
                chosen = draw.choice(exchanges)
                turns += [{"role": message["role"], "content": message["content"]} for message in chosen]
                size += sum(len(str(message["content"])) for message in chosen)
            turns[0] = {**turns[0], "content": f"({number}) {turns[0]['content']}"}
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def processor_seconds() -> float:
    """Return what this process and those it waited for have computed so far: it does not grow where others use the machine too."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="+")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--chats", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=500)
    arguments = parser.parse_args()
    chat = load_chat(resolve_model(arguments.model))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "chats.jsonl"
        write_chats(place, arguments.data, arguments.chats, arguments.tokens)
        print(f"{arguments.chats:,} chats, {place.stat().st_size / 1e6:.0f} MB", flush=True)
        config = TrainConfig(validation=0.01, batch_size=64)
        for name in ("first time", "second time"):
            start, worked = time.perf_counter(), processor_seconds()
            made = load_rows(str(place), chat, config, context=8192, cache=Path(folder) / "cache")
            prepared = time.perf_counter() - start
            packs = Packs(made.train, batch_size=64, batch_tokens=32_768, seed=0, pad=chat.pad_id)
            seconds = time.perf_counter() - start
            tokens, worked = made.report.tokens, processor_seconds() - worked
            print(
                f"{name}: {seconds:.1f} s ({prepared:.1f} s without packing), {made.report.train_rows:,} rows, {tokens:,} tokens,"
                f" {len(packs):,} packs, {tokens / seconds:,.0f} tokens/s; {worked:.1f} processor seconds",
                flush=True,
            )


if __name__ == "__main__":
    main()
