"""Seconds and memory of deduplication, each beside its peers in the same run: exact, near duplicates (datasketch, text-dedup), by meaning.

    python benchmarks/dedup.py exact [ROWS]                          1,000,000 rows of 100 tokens
    python benchmarks/dedup.py minhash FILE|DOCUMENTS [PEERS]        a data file, or that many documents with known near duplicates
    python benchmarks/dedup.py semantic [ROWS] [PEERS]               100,000 × 384 embeddings, a fifth of them near another

PEERS is the Python of an environment with datasketch, text-dedup and semhash (`pip install datasketch text-dedup semhash`); one that is
not installed is skipped, and so it says. Without PEERS ours runs alone. text-dedup reads and writes a data set, which is part of its
seconds. Whichever row of a true group is left is right: it keeps another than the others do.
Every measurement is a process of its own, so that its peak of memory is its own.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

THRESHOLD = 0.8


def documents(number: int) -> tuple[list[str], list[int]]:
    """Return documents of 20 to 220 words from a Zipf-like vocabulary, a tenth of them edits of another: its number, or -1."""
    draw = random.Random(0)
    vocabulary = [f"{draw.choice('bcdfglmnprst')}{draw.choice('aeiou')}{draw.randrange(10**5):x}" for _ in range(50_000)]
    weights = [1 / (place + 10) for place in range(len(vocabulary))]
    pool = draw.choices(vocabulary, weights, k=2_000_000)
    texts: list[list[str]] = []
    sources: list[int] = []
    for _ in range(number):
        source = draw.randrange(len(texts)) if texts and draw.random() < 0.1 else -1
        if source >= 0 and sources[source] >= 0:
            source = -1
        if source < 0:
            start, size = draw.randrange(len(pool) - 300), draw.randrange(20, 220)
            words = [*pool[start : start + size]]
            draw.shuffle(words)
        else:
            words = list(texts[source])
            for _ in range(draw.randrange(0, 1 + len(words) // 40)):
                words[draw.randrange(len(words))] = draw.choice(vocabulary)
        texts.append(words)
        sources.append(source)
    return [" ".join(words) for words in texts], sources


def shingles(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[place : place + 5]) for place in range(max(len(words) - 4, 1))}


def minhash_ours(texts: list[str]) -> list[int]:
    from sftkit.curate.minhash import near_duplicates, shingle_sets

    witness, _ = near_duplicates(shingle_sets(texts), THRESHOLD, range(len(texts)))
    return (witness >= 0).nonzero()[0].tolist()


def minhash_lsh(texts: list[str]) -> list[int]:
    from sftkit.curate.minhash import band_keys, near_duplicates, shingle_sets

    sets = shingle_sets(texts)
    witness, _ = near_duplicates(sets, THRESHOLD, range(len(texts)), keys=band_keys(sets))
    return (witness >= 0).nonzero()[0].tolist()


def minhash_datasketch(texts: list[str]) -> list[int]:
    from datasketch import MinHash, MinHashLSH

    index, removed = MinHashLSH(threshold=THRESHOLD, num_perm=128), []
    for row, text in enumerate(texts):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([each.encode() for each in shingles(text)])
        if index.query(sketch):
            removed.append(row)
        else:
            index.insert(row, sketch)
    return removed


def minhash_text_dedup(texts: list[str]) -> list[int]:
    global began
    from datasets import Dataset, disable_progress_bars, load_from_disk
    from text_dedup import minhash

    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        Dataset.from_dict({"text": texts, "row": list(range(len(texts)))}).save_to_disk(f"{folder}/given")
        began = time.perf_counter()
        options = {"path": f"{folder}/given", "output": f"{folder}/made", "column": "text", "threshold": THRESHOLD}
        options |= {"ngram": 5, "min_length": 0, "num_perm": 128, "num_proc": 2, "batch_size": 10_000}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        minhash.main([*arguments, "--local"], standalone_mode=False)
        kept = set(load_from_disk(f"{folder}/made")["row"])
    return [row for row in range(len(texts)) if row not in kept]


def embeddings(number: int) -> Any:
    import numpy as np

    draw = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.arange(384) / 20)  # directions of falling weight, as embedders have
    vectors = draw.normal(size=(number, 384)) * scale
    copies = draw.permutation(number)[: number // 5]
    vectors[copies] = vectors[draw.integers(number, size=len(copies))] + 0.2 * draw.normal(size=(len(copies), 384)) * scale
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def semantic_ours(vectors: Any) -> list[int]:
    from sftkit.curate.cover import cover

    witness, _ = cover(vectors, 0.95, range(len(vectors)))
    return (witness >= 0).nonzero()[0].tolist()


def semantic_semhash(vectors: Any) -> list[int]:
    from semhash import SemHash

    class Nothing:
        def encode(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("the embeddings are given")

    records = [str(row) for row in range(len(vectors))]
    result = SemHash.from_embeddings(vectors, records, model=Nothing()).self_deduplicate(threshold=0.95)
    kept = set(map(int, result.selected))
    return [row for row in range(len(vectors)) if row not in kept]


def exact_ours(rows: int) -> list[int]:
    """Return the rows removed from prompts and answers of 100 tokens, about 75 words, a tenth of them copies in another case."""
    import numpy as np
    import polars as pl
    from sftkit.curate.dedup import exact_witnesses

    draw = random.Random(0)
    vocabulary = [f"{draw.randrange(16**5):x}" for _ in range(30_000)]
    texts: list[tuple[str, str]] = []
    for row in range(rows):
        if row % 10 == 9:
            texts.append((texts[row // 2][0].upper(), texts[row // 2][1]))
        else:
            words = draw.choices(vocabulary, k=75)
            texts.append((" ".join(words[:25]), " ".join(words[25:])))
    table = pl.DataFrame(texts, schema=["prompt", "response"], orient="row")
    del texts
    global began
    began = time.perf_counter()
    return np.flatnonzero(exact_witnesses(table, "pair", np.arange(rows)) >= 0).tolist()


began = 0.0
WAYS = {name: value for name, value in globals().items() if name.split("_")[0] in ("minhash", "semantic", "exact") and callable(value)}


def child(way: str, data: str) -> None:
    global began
    if way == "exact_ours":
        given: Any = int(data)
    elif way.startswith("semantic"):
        import numpy as np

        given = np.load(data)
    else:
        given = json.loads(Path(data).read_text())
    if way != "exact_ours":
        WAYS[way](given[:200])  # imports and first calls are no part of what is measured
    began = time.perf_counter()
    removed = WAYS[way](given)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": round(seconds, 2), "peak_gib": round(peak, 2), "removed": removed}))


def measure(python: str, way: str, data: str, groups: dict[int, int] | None = None) -> None:
    """Run and print a way. `groups` has the first row of its group for every row of a true one: whichever of a group is left is right."""
    result = subprocess.run([python, __file__, "--child", way, data], capture_output=True, text=True, check=False)
    if result.returncode:
        why = result.stderr.strip().splitlines()[-1]
        print(f"{way}: {'skipped, not installed' if why.startswith('ModuleNotFoundError') else why}", flush=True)
        return
    told = json.loads(result.stdout.splitlines()[-1])
    removed = set(told["removed"])
    line = f"{way}: {told['seconds']} s, peak {told['peak_gib']} GiB, {len(removed):,} removed"
    if groups is not None:
        sizes = Counter(groups.values())
        right = sum(min(count, sizes[first] - 1) for first, count in Counter(groups[row] for row in removed if row in groups).items())
        true = len(groups) - len(sizes)
        precision, recall = right / max(len(removed), 1), right / max(true, 1)
        line += f", precision {precision:.4f}, recall {recall:.4f}, F1 {2 * right / max(len(removed) + true, 1):.4f}"
    print(line, flush=True)


def main() -> None:
    task, size, peers = sys.argv[1], (sys.argv[2:] or [""])[0], (sys.argv[3:] or [""])[0]
    with tempfile.TemporaryDirectory() as folder:
        if task == "exact":
            measure(sys.executable, "exact_ours", size or "1000000")
        elif task == "semantic":
            import numpy as np

            np.save(f"{folder}/vectors.npy", embeddings(int(size or 100_000)))
            measure(sys.executable, "semantic_ours", f"{folder}/vectors.npy")
            if peers:
                measure(peers, "semantic_semhash", f"{folder}/vectors.npy")
        else:
            groups = None
            if size.isdigit():
                texts, sources = documents(int(size))
                sets = {row: shingles(texts[row]) for pair in enumerate(sources) if pair[1] >= 0 for row in pair}
                like = [(row, source) for row, source in enumerate(sources) if source >= 0]
                like = [pair for pair in like if len(sets[pair[0]] & sets[pair[1]]) >= THRESHOLD * len(sets[pair[0]] | sets[pair[1]])]
                groups = {row: source for pair in like for row, source in (pair, (pair[1], pair[1]))}
            else:
                from sftkit.core.formats import read_examples

                texts = ["\n".join(str(message["content"]) for message in example.messages) for example in read_examples(size)]
            Path(f"{folder}/texts.json").write_text(json.dumps(texts))
            measure(sys.executable, "minhash_ours", f"{folder}/texts.json", groups)
            measure(sys.executable, "minhash_lsh", f"{folder}/texts.json", groups)
            if peers:
                measure(peers, "minhash_datasketch", f"{folder}/texts.json", groups)
                measure(peers, "minhash_text_dedup", f"{folder}/texts.json", groups)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*sys.argv[2:])
    else:
        main()
