"""Twenty faults of fine-tuning, each seeded into bare TRL for real and into sftkit: who errs, who warns, who says nothing.

    python benchmarks/silent_faults.py [--write docs/silent-faults.md]

TRL runs as its documentation has it (a model by name, SFTConfig's defaults but for the fault's own setting), a few steps on a model of
two layers; what it does is read from the rows it trains on, its losses and the files it saves, and from its warnings. The column of
sftkit says what tests/train/test_faults.py asserts, and that the tests passed in the same run. A minute or two on two CPU cores.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback
from trl import SFTConfig, SFTTrainer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from conftest import CHATML, make_tiny_model  # noqa: E402

Verdict = tuple[str, str]  # right, silent, warning or error; and what was seen
SYSTEM = {"role": "system", "content": "Be brief."}


def chat(question: str, answer: str | None) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Seeds:
    """The faults, one method each, in the order of the table. Each returns what bare TRL does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        specials = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<|endoftext|>"]
        self.model = make_tiny_model(folder / "tiny", specials=specials, eos="<|im_end|>", pad="<|pad|>", template=CHATML)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.made = 0

    def bare(
        self, rows: list[dict[str, Any]], *, model: Any = None, tokenizer: Any = None, peft: Any = None, **settings: Any
    ) -> SFTTrainer:
        """Make TRL's trainer as its documentation does."""
        self.made += 1
        told = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "bf16": False, **settings}
        trainer = SFTTrainer(
            model=str(model or self.model),
            args=SFTConfig(output_dir=str(self.folder / str(self.made)), **told),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def batch(self, trainer: SFTTrainer) -> dict[str, torch.Tensor]:
        return next(iter(trainer.get_train_dataloader()))

    def learned(self, trainer: SFTTrainer) -> str:
        """Return the text of all tokens of the first batch that are trained on."""
        labels = self.batch(trainer)["labels"]
        return str(self.tokenizer.decode(labels[labels != -100]))

    def losses(self, trainer: SFTTrainer) -> list[float]:
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    def f01_roles(self) -> Verdict:
        row = {"conversations": [{"from": "human", "value": "What is 1+1?"}, {"from": "gpt", "value": "2"}]}
        text = self.learned(self.bare([row] * 8))
        return ("silent", "trains on `<|im_start|>human` and `gpt`") if "human" in text else ("right", "roles are mapped")

    def f02_bos(self) -> Verdict:
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
        ids = self.batch(self.bare([{"messages": chat("hi", "hello")}] * 8, tokenizer=tokenizer))["input_ids"][0].tolist()
        twice = ids.count(tokenizer.bos_token_id) == 2
        return ("silent", "trains on both") if twice else ("right", "one is taken out")

    def f03_pad(self) -> Verdict:
        start = self.folder / "pad"
        shutil.copytree(self.model, start)
        tokens = json.loads((start / "tokenizer_config.json").read_text())
        (start / "tokenizer_config.json").write_text(json.dumps({**tokens, "pad_token": "<|im_end|>"}))
        (start / "generation_config.json").write_text(json.dumps({"eos_token_id": [self.end], "pad_token_id": self.end}))
        trainer = self.bare([{"messages": chat("hi", "hello")}] * 8, model=start)
        trainer.train()
        trainer.save_model(self.folder / "pad-saved")
        saved = json.loads((self.folder / "pad-saved" / "generation_config.json").read_text())
        eos = saved["eos_token_id"] if isinstance(saved["eos_token_id"], list) else [saved["eos_token_id"]]
        inside = saved.get("pad_token_id", trainer.processing_class.pad_token_id) in eos
        return ("silent", f"saves pad {saved.get('pad_token_id')} among eos {eos}") if inside else ("right", "pad is no eos id")

    def f04_cut(self) -> Verdict:
        trainer = self.bare([{"messages": chat("Tell me.", "The sea is high. " * 60)}] * 8, max_length=128)
        cut = self.batch(trainer)["input_ids"][0].tolist().count(self.end) < 2
        return ("silent", "the answer is cut at max_length, its end is never learned") if cut else ("right", "kept whole")

    def f05_nothing(self) -> Verdict:
        rows = [{"prompt": chat("Explain the sea please. " * 40, "")[:1], "completion": chat("", "No.")[1:]}] * 8
        trainer = self.bare(rows, max_length=64)
        trainer.train()
        return "silent", f"{len(trainer.train_dataset)} of 8 rows are left, loss {self.losses(trainer)}"

    def f06_alpaca(self) -> Verdict:
        self.bare([{"instruction": "Translate.", "input": "hello", "output": "bonjour"}] * 8)
        return "right", "columns are read"

    def f07_template(self) -> Verdict:
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|eot_id|>")
        ids = self.batch(self.bare([{"messages": chat("hi", "hello")}] * 8, tokenizer=tokenizer))["input_ids"]
        ended = bool((ids == self.end).any())
        return ("right", "an end is added") if ended else ("silent", "no row has an end of turn that the model knows")

    def f08_overflow(self) -> Verdict:
        rows = [{"messages": chat("Count.", "1 2 3 4 5 " * (4 + n % 9))} for n in range(40)]
        trainer = self.bare(rows, packing=True, max_length=64)
        ends = sum(row["input_ids"].count(self.end) for row in trainer.train_dataset)
        return ("silent", f"{80 - ends} of 80 ends of turn are lost") if ends < 80 else ("right", "all ends are kept")

    def f09_neighbours(self) -> Verdict:
        rows = [{"messages": chat(f"Calculate {n}+{n}.", f"The answer is {2 * n}.")} for n in range(16)]
        losses = []
        for told in ({"packing": True, "max_length": 512}, {"packing": False}):
            trainer = self.bare(rows, per_device_train_batch_size=16, **told)
            trainer.train()
            losses += self.losses(trainer)
        same = abs(losses[0] - losses[1]) < 2e-4
        return ("right" if same else "silent"), f"loss {losses[0]:.4f} packed, {losses[1]:.4f} in rows of their own"

    def f10_vanish(self) -> Verdict:
        long = {"prompt": chat("Explain the sea please. " * 40, "")[:1], "completion": chat("", "No.")[1:]}
        short = {"prompt": chat("hi", "")[:1], "completion": chat("", "hello")[1:]}
        trainer = self.bare([short, *[long] * 5], max_length=64)
        left = len(trainer.train_dataset)
        whole = sum(bool((torch.tensor(row.get("labels", row["input_ids"])) != -100).any()) for row in trainer.train_dataset)
        return ("silent", f"{left} of 6 rows are left") if left < 6 else ("silent", f"6 rows, {whole} with something to learn")

    def f11_system_user(self) -> Verdict:
        text = self.learned(self.bare([{"messages": [SYSTEM, *chat("What is 1+1?", "2")]}] * 8))
        return ("silent", "trains on system and user") if "Be brief." in text and "What" in text else ("right", "the answers alone")

    def f12_float32(self) -> Verdict:
        half = self.folder / "half"
        AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.bfloat16).save_pretrained(half)
        self.tokenizer.save_pretrained(half)
        trainer = self.bare([{"messages": chat("hi", "hello")}] * 8, model=half)
        trainer.save_model(self.folder / "half-saved")
        dtype = json.loads((self.folder / "half-saved" / "config.json").read_text())["dtype"]
        return ("silent", "a bfloat16 model is loaded and saved as float32") if dtype == "float32" else ("right", f"stays {dtype}")

    def f13_accumulation(self) -> Verdict:
        rows = [{"messages": chat("Count.", "1 2 3 " * (1 + 3 * n))} for n in range(8)]
        weights = []
        for size in (8, 1):
            trainer = self.bare(rows, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, learning_rate=1e-3)
            trainer.train()
            weights.append((self.losses(trainer)[0], trainer.state.log_history[0]["grad_norm"]))
        (one, norm), (other, other_norm) = weights
        same = abs(one - other) < 1e-3 and abs(norm - other_norm) < 1e-3 * norm
        seen = f"loss {one:.4f} and {other:.4f}, gradient {norm:.4f} and {other_norm:.4f}, in one batch and in eight"
        return ("right" if same else "silent"), seen

    def f14_window(self) -> Verdict:
        rows = [{"messages": chat("Count.", "1 2 3 " * (1 + 3 * n))} for n in range(9)]
        told = {"num_train_epochs": 1, "max_steps": -1, "learning_rate": 1e-12, "seed": 0}
        found = []
        for size, steps in ((8, 1), (1, 8)):
            trainer = self.bare(rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **told)
            trainer.train()
            found.append(self.losses(trainer)[-1])
        same = abs(found[0] - found[1]) < 1e-3
        return ("right" if same else "silent"), f"loss of the last step {found[0]:.4f} as a batch, {found[1]:.4f} accumulated"

    def f15_tied_head(self) -> Verdict:
        from peft import LoraConfig

        made = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
        trainer = self.bare([{"messages": chat("hi", "hello")}] * 8, peft=made)
        trainer.train()
        return "silent", "trains an adapter on a tied head"

    def f16_quantised(self) -> Verdict:
        from peft import LoraConfig, get_peft_model

        if importlib.util.find_spec("bitsandbytes") is None:
            return "not run", "needs bitsandbytes"
        torch.manual_seed(0)
        packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(self.model, quantization_config=packed, device_map={"": "cpu"}, dtype=torch.float32)
        made = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(base, made).eval()
        ids = torch.arange(4, 68)[None]
        with torch.no_grad():
            apart = model(input_ids=ids).logits.log_softmax(-1)
            merged = model.merge_and_unload()(input_ids=ids).logits.log_softmax(-1)
        kl = float((apart.exp() * (apart - merged)).sum(-1).mean())
        return "silent", f"merges and packs anew: KL(adapter ‖ merged) {kl:.1e} nats a token, 1e-3 is much"

    def f17_shard(self) -> Verdict:
        from peft import LoraConfig, PeftModel, get_peft_model
        from safetensors.torch import load_file, save_file

        made = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(self.model), made).save_pretrained(self.folder / "adapter")
        weights = load_file(self.folder / "adapter" / "adapter_model.safetensors")
        save_file(
            {name: each for name, each in weights.items() if "layers.1" in name}, self.folder / "adapter" / "adapter_model.safetensors"
        )
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.model), self.folder / "adapter").merge_and_unload()
        return "silent", "half of the adapter is merged"

    def f18_order(self) -> Verdict:
        rows = [{"messages": chat(f"Calculate {n}+{n}.", f"The answer is {2 * n}.")} for n in range(32)]
        told = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 3, "seed": 0}
        whole = self.bare(rows, **told)
        whole.train()
        again = self.bare(rows, **told)
        again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
        apart = max(abs(a - b) for a, b in zip(self.losses(whole)[-5:], self.losses(again)[-5:], strict=True))
        return ("right" if apart < 1e-3 else "silent"), f"losses after resuming differ by {apart:.0e}"

    def f19_template_saved(self) -> Verdict:
        trainer = self.bare([{"messages": chat("hi", "hello")}] * 8)
        trainer.save_model(self.folder / "saved")
        shutil.rmtree(self.folder / "lost", ignore_errors=True)
        kept = AutoTokenizer.from_pretrained(self.folder / "saved").chat_template == CHATML
        return ("right", "the template is saved; nothing looks whether it still renders the same") if kept else ("silent", "lost")

    def f20_null(self) -> Verdict:
        rows = [{"messages": chat("hi", "hello")}] * 7 + [{"messages": chat("hi", None)}]
        trainer = self.bare(rows)
        text = self.tokenizer.decode(trainer.train_dataset[7]["input_ids"])
        return "silent", f"trains on {text[-28:]!r}"


FAULTS = [  # what is seeded, and what tests/train/test_faults.py holds sftkit to
    ("ShareGPT roles `human` and `gpt`", "right: mapped; an unknown role is an error with its row and the nearest name"),
    ("two BOS tokens", "error: names the token and the cure; one in a row's text is a warning with its row"),
    ("pad among the eos ids", "right: another token pads, and is not among the saved stop ids"),
    ("an answer longer than max_length", "right: never cut; left out with a warning that names the row, or cut between turns"),
    ("nothing to learn in any row", "error: names rule, rows and cure"),
    ("Alpaca columns", "right: read"),
    ("a template of another family", "error: answers without an end of turn, with their rows and the cure"),
    ("rows that do not fit a pack", "right: a row is never cut"),
    ("rows of a pack see each other", "right: the loss is that of each row alone, to 1e-5"),
    ("rows that vanish", "warning: how many, which, and the cure; the ledger has each"),
    ("loss on system and user", "right: on the assistant's tokens alone"),
    ("a 16-bit model becomes float32", "right: saved in its own format"),
    ("accumulation weighs batches, not tokens", "right: the same to 2e-5"),
    ("the last window is not full", "right: it counts its own tokens"),
    ("LoRA on a tied head", "right: never trained; a foreign one is not merged, with its KL"),
    ("merge into a quantised base", "error: before training and before merging"),
    ("an adapter saved from one shard", "error: how many weights are missing or bent, and which"),
    ("a resumed run changes the order", "right: the losses of a run in one piece, to the last digit"),
    ("the template is lost on save", "error: the saved model is loaded and held against the trained one"),
    ("null or NaN where a text should be", "error: file, row, column and cure"),
]


def run_bare(seed: Callable[[], Verdict]) -> Verdict:
    """Run one fault in bare TRL: an exception is an error; a warning counts if it was given."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("trl", "transformers", "peft", "accelerate")]
    for each in loggers:
        each.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            verdict, seen = seed()
    except Exception as error:  # noqa: BLE001  whatever it raises is the finding
        return "error", f"{type(error).__name__}: {' '.join(str(error).replace(chr(96), '').split())[:110]}"
    finally:
        for each in loggers:
            each.removeHandler(handler)
    said = [each for each in [*heard, *(str(one.message) for one in caught)] if any(word in each.lower() for word in TELLING)]
    if verdict == "silent" and said:
        return "warning", f"{seen} (says: {' '.join(said[0].split())[:90]})"
    return verdict, seen


TELLING = ("missing", "truncat", "dropp", "longer than", "bos", "tied", "no valid", "nan", "role", "rounding")  # what one would say


def run_sftkit() -> dict[int, bool]:
    """Run the tests of the faults; return for each number whether all its tests passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "tests/train/test_faults.py"], cwd=ROOT, check=False)
        passed: dict[int, bool] = {}
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            number = int(case.attrib["name"].split("_")[1])
            passed[number] = passed.get(number, True) and not any(child.tag in ("failure", "error", "skipped") for child in case)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = Seeds(Path(folder))
        found = [run_bare(getattr(seeds, name)) for name in sorted(vars(Seeds)) if name.startswith("f")]
    passed = run_sftkit()
    lines = ["| | fault | bare TRL | sftkit |", "|---:|---|---|---|"]
    for number, ((fault, ours), (verdict, seen)) in enumerate(zip(FAULTS, found, strict=True), start=1):
        cells = [fault, f"**{verdict}**: {seen}", ours if passed.get(number) else f"TEST FAILED ({ours})"]
        lines.append(f"| {number} | {' | '.join(each.replace('|', chr(92) + '|') for each in cells)} |")
    counts = ", ".join(
        f"{sum(verdict == each for verdict, _ in found)} {each}" for each in ("right", "error", "warning", "silent", "not run")
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "transformers", "peft", "torch"))
    text = f"""# Silent faults

Twenty faults of supervised fine-tuning, each seeded into bare TRL and into sftkit, on a model of two layers. *Silent* means that
training went on and nothing was said; *right*, that there is no fault. Bare TRL:
{counts}. sftkit: {sum(passed.values())} of {len(FAULTS)} as written.

Made by `python benchmarks/silent_faults.py --write docs/silent-faults.md`, which runs both, with
{versions}. What the column of sftkit says is asserted in `tests/train/test_faults.py`.

{chr(10).join(lines)}
"""
    print(text)
    if arguments.write:
        arguments.write.parent.mkdir(exist_ok=True)
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
