"""Seconds for the IFD of all rows of a data set, in both definitions, against a plain loop of padded batches with transformers.

    python benchmarks/score_models.py --data FILE [--model MODEL] [--rows N] [--plain-rows 3000] [--small] [--out FILE]

Without --model the weights are random, in the shape of Qwen2.5-0.5B (24 layers, 896 wide, 151,936 tokens; --small: 4 layers, 256 wide,
32,000 tokens) with a tokenizer trained on the data: the time does not depend on what the weights are. FILE is a data file in any
format; the figures in docs/curation.md are of 18,669 rows of Alpaca. Both compute in 16 bits on a GPU, in float32 on a CPU, and from
the same token ids. The plain loop takes the first PLAIN-ROWS rows as they come, 32 a batch, pads them to the longest and takes the
loss from the whole logits in float32; it is compared by the row. A line of JSON per measurement goes to FILE of --out at once.
The bar: on one H200 at most 60 s with a 0.5B model, loading and rendering included.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import torch
from sftkit.core.engines.base import EngineConfig
from sftkit.core.hardware import half_precision, pick_device
from sftkit.core.models import load_model, resolve_model
from sftkit.core.named_models import find_models
from sftkit.core.run import Run
from sftkit.curate.config import ImportConfig, ScoreConfig
from sftkit.curate.intake import take_in
from sftkit.curate.model_scores import read_alone, read_answer
from sftkit.curate.rows import load_rows
from sftkit.curate.score import score
from sftkit.curate.scorers import Candidate

BATCH = 32
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def random_model(folder: Path, texts: list[str], *, small: bool) -> Path:
    """Write a model of random weights, and a byte-level BPE of at most 32,000 tokens trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    hidden, inner, layers, heads = (256, 704, 4, 4) if small else (896, 4864, 24, 14)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32_000 if small else 151_936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def ours(run: Run, settings: dict[str, Any]) -> tuple[float, dict[str, list[float | None]]]:
    """Return seconds, and both columns in the order of the rows."""
    start = time.perf_counter()
    found = score(run, ScoreConfig(scorers={"ifd": settings, "ifd_ppl": settings}))
    return time.perf_counter() - start, {name: frame["value"].to_list() for name, frame in found.items()}


@torch.inference_mode()
def plain_loss(model: Any, rows: list[tuple[list[int], list[bool]]], pad_id: int) -> list[float]:
    """Return each row's mean loss over its masked tokens: padded batches in the order of the rows, whole logits in float32."""
    losses = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids, _ in batch], device=model.device)
        kept = torch.tensor([[*mask, *[False] * (longest - len(mask))] for _, mask in batch], device=model.device)
        present = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch], device=model.device)
        logits = model(input_ids=ids, attention_mask=present, use_cache=False).logits[:, :-1].float()
        targets = ids[:, 1:].masked_fill(~kept[:, 1:], -100)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
        losses += (loss.sum(1) / kept[:, 1:].sum(1)).tolist()
    return losses


def plain(model_path: str, rows: pl.DataFrame, dtype: str, device: str) -> tuple[float, dict[int, tuple[float, float]]]:
    """Return seconds, loading and rendering included, and both values by row of those that have any."""
    start = time.perf_counter()
    (named,) = find_models({"plain": model_path}, EngineConfig(engine="transformers", dtype=dtype, device=device))
    assert named.chat
    model = load_model(resolve_model(model_path), dtype=dtype, device=device)
    given, alone, places = [], [], []
    for place, (prompt, response, messages) in enumerate(rows.select("prompt", "response", "messages").iter_rows()):
        if not (response or "").strip():
            continue
        reading = read_answer(named, Candidate(prompt, response, None, {}, None, None, messages))
        if reading.error:
            continue
        bare = read_alone(named, reading)
        places.append(place)
        for side, each in ((given, reading), (alone, bare)):
            ends = iter(each.ends)
            side.append((list(each.ids), [masked and not next(ends) for masked in each.mask]))
    first, second = (plain_loss(model, side, named.chat.pad_id) for side in (given, alone))
    values = {place: (one / two, float(torch.tensor(one - two).exp())) for place, one, two in zip(places, first, second, strict=True)}
    return time.perf_counter() - start, values


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--data", metavar="FILE", required=True)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--batch-tokens", type=int, default=EngineConfig.batch_tokens)
    parser.add_argument("--plain-rows", type=int, default=3000)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = pick_device()
    dtype = "float32" if device == "cpu" else str(half_precision(device)).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as temporary, Run.create(Path(temporary) / "run") as run:
        take_in(given.data, run, ImportConfig(limit=given.rows))
        rows = load_rows(run, all=True)
        texts = [each["content"] for messages in rows["messages"].head(4000) for each in json.loads(messages)]
        model = given.model or str(random_model(Path(temporary) / "model", texts, small=given.small))
        settings = {"model": model, "dtype": dtype, "device": device, "batch_tokens": given.batch_tokens}
        name = torch.cuda.get_device_name() if device != "cpu" else f"{torch.get_num_threads()} threads"
        print(f"{len(rows):,} rows, {given.model or 'random weights'}, {dtype}, {name}", flush=True)

        def tell(what: str, seconds: float, **facts: Any) -> None:
            peak = None if device == "cpu" else round(torch.cuda.max_memory_allocated() / 1e9, 1)
            line = {"what": what, "device": name, "dtype": dtype, "seconds": round(seconds, 1), "gpu_gb": peak, **facts}
            print(json.dumps(line), flush=True)
            if given.out:
                with open(given.out, "a") as file:
                    file.write(json.dumps(line) + "\n")
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()

        seconds, found = ours(run, settings)
        tell("ifd and ifd_ppl", seconds, rows=len(rows), have_a_value=sum(each is not None for each in found["ifd"]))
        again, _ = ours(run, settings)
        tell("once more", again, rows=len(rows))
        few = rows.head(given.plain_rows)
        slow, values = plain(model, few, dtype, device)
        times = (slow / len(few)) / (seconds / len(rows))
        apart = {
            f"{column}_apart": max(abs((found[column][place] or 0.0) - both[number]) for place, both in values.items())
            for number, column in enumerate(("ifd", "ifd_ppl"))
        }
        tell("plain loop", slow, rows=len(few), times_ours_per_row=round(times, 2), **apart)


if __name__ == "__main__":
    main()
