"""The faults of fine-tuning that pass in silence elsewhere: twenty, each seeded; here each comes out right, or is named with its cure.

`docs/silent-faults.md` has the same twenty beside bare TRL; `benchmarks/silent_faults.py` makes that table.
"""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sftkit.core.chat import Chat, load_chat
from sftkit.core.errors import UserError
from sftkit.core.formats import read_examples
from sftkit.core.models import load_model, load_tokenizer, resolve_model
from sftkit.train.account import prepare
from sftkit.train.checkpoints import last_checkpoint
from sftkit.train.config import TrainConfig
from sftkit.train.data import TrainingData
from sftkit.train.final import answer_loss
from sftkit.train.merge import merge
from sftkit.train.packing import Packs
from sftkit.train.sft import TrainResult, train

SYSTEM, USER, ASSISTANT = (
    lambda text, role=role: {"role": role, "content": text} for role in ("system", "user", "assistant")
)  # fmt: skip
TURNS = [SYSTEM("Be brief."), USER("What is 1+1?"), ASSISTANT("The answer is 2.")]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return load_chat(resolve_model(tiny_model))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("sftkit"), "propagate", True)  # a command line run before would keep it from the fixture
    caplog.set_level(logging.WARNING, logger="sftkit")
    return caplog


def config(**settings: object) -> TrainConfig:
    return TrainConfig(**{"validation": 0.0, "dtype": "float32", "stop_check": 0, "learning_rate": 1e-3, **settings})  # type: ignore[arg-type]


def read(tmp_path: Path, chat: Chat, *rows: object, **settings: object) -> TrainingData:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(read_examples(path), chat, config(**settings), context=512, vocabulary=1024)


def learned(data: TrainingData, chat: Chat) -> list[str]:
    return [chat.tokenizer.decode([label for label in row.labels if label != -100]) for row in data.train]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_01_sharegpt_roles_are_mapped_and_unknown_ones_named(tmp_path: Path, chat: Chat) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]}
    one, other = read(tmp_path, chat, shared, {"messages": TURNS}).train
    assert (one.ids, one.mask) == (other.ids, other.mask)
    shared["conversations"][1]["from"] = "hooman"
    with pytest.raises(UserError, match=r"rows\.jsonl:1: conversations\[1\]: unknown role 'hooman': did you mean 'human'"):
        read(tmp_path, chat, shared)


def test_02_a_second_bos_is_named(tmp_path: Path, tiny_model: Path, said: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(resolve_model(tiny_model))
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    once = Chat(tokenizer, name="once")
    (row,) = read(tmp_path, once, {"messages": TURNS}).train
    assert row.ids.count(tokenizer.bos_token_id) == 1
    # written into a row's text, where it stands as a real one
    read(tmp_path, once, {"messages": TURNS}, {"messages": [USER("<|endoftext|>hi"), ASSISTANT("hello")]})
    assert "1 row with special tokens of the template in their text" in said.text
    assert "rows.jsonl:2)" in said.text
    assert "take them out of the text" in said.text
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(UserError, match=r"rows\.jsonl:1 .*begins with two '<\|endoftext\|>' tokens; take one out of the template"):
        read(tmp_path, Chat(tokenizer, name="twice"), {"messages": TURNS})


def test_03_pad_is_never_saved_among_the_stop_ids(tmp_path: Path, tiny_model: Path, chats) -> None:
    start = tmp_path / "start"
    shutil.copytree(tiny_model, start)
    eos = load_chat(resolve_model(tiny_model)).end_of_turn
    tokens = json.loads((start / "tokenizer_config.json").read_text())
    (start / "tokenizer_config.json").write_text(json.dumps({**tokens, "pad_token": tokens["eos_token"]}))
    (start / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos], "pad_token_id": eos}))
    result = train(chats(12), str(start), tmp_path / "run", config())
    saved = json.loads((result.model / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [eos]
    assert saved["pad_token_id"] != eos


def test_04_an_answer_is_never_cut_before_its_end(tmp_path: Path, chat: Chat, said: pytest.LogCaptureFixture) -> None:
    long = [USER("Tell me."), ASSISTANT("The sea is high. " * 60)]
    data = read(tmp_path, chat, {"messages": TURNS}, {"messages": long}, max_length=128)
    assert learned(data, chat) == ["The answer is 2.<|im_end|>"]
    assert "1 row left out as over_max_length" in said.text
    assert "rows.jsonl:2): raise max_length, or give overlong: split" in said.text


def test_05_a_set_that_teaches_nothing_is_refused(tmp_path: Path, chat: Chat) -> None:
    with pytest.raises(
        UserError,
        match=r"none of the 2 rows .*no_assistant_turn 2 .*rows\.jsonl:1, .*rows\.jsonl:2\): nothing in them.*give rows with answers",
    ):
        read(tmp_path, chat, {"messages": TURNS[:2]}, {"prompt": "What is 2+2?"})
    with pytest.raises(UserError, match=r"empty_answer 1 .*rows\.jsonl:1\): fill the answers in"):
        read(tmp_path, chat, {"messages": [USER("hi"), ASSISTANT(" ")]})


def test_06_alpaca_columns_are_read(tmp_path: Path, chat: Chat) -> None:
    row = {"instruction": "Translate.", "input": "hello", "output": "bonjour"}
    (one,) = read(tmp_path, chat, row).train
    assert "Translate.\n\nhello<|im_end|>" in chat.tokenizer.decode(one.ids)
    assert learned(read(tmp_path, chat, row), chat) == ["bonjour<|im_end|>"]


def test_07_a_template_whose_tokens_the_model_does_not_know_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(tiny_model))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|eot_id|>")  # another family's
    rows = [{"messages": TURNS}, {"messages": [*TURNS, USER("and 2+2?"), ASSISTANT("4")]}]
    with pytest.raises(UserError, match=r"no_end_of_turn 2 .*rows\.jsonl:1, .*rows\.jsonl:2\): check the chat template"):
        read(tmp_path, Chat(tokenizer, name="foreign"), *rows)


def test_07_rows_without_an_end_of_turn_are_refused_among_good_ones_below_99_9_percent(
    tmp_path: Path, tiny_model: Path, said: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(resolve_model(tiny_model))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_end|>'", "('' if message['content'] == 'Open' and loop.last else '<|im_end|>')"
    )
    chat = Chat(tokenizer, name="leaky")
    good, bad = {"messages": [USER("a"), ASSISTANT("b")]}, {"messages": [USER("a"), ASSISTANT("Open")]}
    with pytest.raises(
        UserError, match=r"^1 answers do not end with leaky's end-of-turn token \(.*rows\.jsonl:4\); check the chat template"
    ):
        read(tmp_path, chat, *[good] * 3, bad, *[good] * 995)
    data = read(tmp_path, chat, *[good] * 3, bad, *[good] * 996)  # one of a thousand
    assert (data.report.train_rows, data.report.rejected) == (999, {"no_end_of_turn": 1})
    assert "1 row left out as no_end_of_turn" in said.text
    assert "rows.jsonl:4): check the chat template, or train on last answers only (train_on: last)" in said.text
    assert set(learned(data, chat)) == {"b<|im_end|>"}


def test_08_a_pack_never_cuts_a_row(tmp_path: Path, chat: Chat) -> None:
    rows = [{"messages": [USER("Count."), ASSISTANT("1 2 3 " * (1 + n % 9))]} for n in range(40)]
    data = read(tmp_path, chat, *rows)
    packs = Packs(data.train, batch_size=8, batch_tokens=50, seed=0, pad=chat.pad_id)
    targets = [packs[number]["targets"].tolist() for number in range(len(packs))]
    assert sum(each.count(chat.end_of_turn) for each in targets) == 40
    assert sum(map(len, targets)) == data.report.trained_tokens


def test_09_rows_in_a_pack_do_not_see_each_other(tmp_path: Path, tiny_model: Path, chats) -> None:
    path = chats(16)
    data = prepare(read_examples(path), load_chat(resolve_model(tiny_model)), config(), context=512)
    first = train(path, str(tiny_model), tmp_path / "run", config(batch_size=16))  # one update, one pack
    assert losses(first.run)[1] == pytest.approx(answer_loss(load_model(resolve_model(tiny_model)), data.train), abs=1e-5)


def test_10_rows_that_vanish_are_counted_and_named(tmp_path: Path, chat: Chat, said: pytest.LogCaptureFixture) -> None:
    long = {"messages": [USER("Explain the sea please. " * 40), ASSISTANT("No.")]}
    data = read(tmp_path, chat, {"messages": TURNS}, *[long] * 5, max_length=128)
    assert (data.report.rows, data.report.train_rows, data.report.rejected) == (6, 1, {"over_max_length": 5})
    assert "5 rows left out as over_max_length" in said.text
    assert "rows.jsonl:4 and 2 more): raise max_length, or give overlong: split" in said.text
    with pytest.raises(UserError, match=r"none of the 2 rows .*over_max_length 2 .*raise max_length"):
        read(tmp_path, chat, long, long, max_length=128)


def test_11_system_and_user_are_not_learned(tmp_path: Path, chat: Chat) -> None:
    data = read(tmp_path, chat, {"messages": [*TURNS, USER("and 2+2?"), ASSISTANT("4")]})
    assert learned(data, chat) == ["The answer is 2.<|im_end|>4<|im_end|>"]


def test_12_a_16_bit_model_stays_one(tmp_path: Path, tiny_model: Path, chats) -> None:
    start = tmp_path / "half"
    chat = load_chat(resolve_model(tiny_model))
    load_model(resolve_model(tiny_model)).to(torch.bfloat16).save_pretrained(start)
    chat.save(start)
    result = train(chats(12), str(start), tmp_path / "run", config(dtype="auto"))
    assert {each.dtype for each in load_file(result.model / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((result.model / "config.json").read_text())["dtype"] == "bfloat16"


def test_13_accumulated_steps_weigh_each_token_alike(tmp_path: Path, tiny_model: Path, chats) -> None:
    runs = [
        train(chats(16), str(tiny_model), tmp_path / str(tokens), config(batch_size=8, batch_tokens=tokens, logging_steps=1))
        for tokens in (1, 4096)
    ]
    apart, together = (losses(each.run) for each in runs)
    assert list(apart) == [1, 2]
    assert apart == pytest.approx(together, abs=2e-5)


def test_14_the_last_window_counts_its_own_tokens(tmp_path: Path, tiny_model: Path, chats) -> None:
    path = chats(9)
    data = prepare(read_examples(path), load_chat(resolve_model(tiny_model)), config(), context=512)
    still = config(batch_size=8, logging_steps=1, learning_rate=1e-12, batch_tokens=64)
    result = train(path, str(tiny_model), tmp_path / "run", still)
    packs = Packs(data.train, batch_size=8, batch_tokens=64, seed=0, pad=0)
    (last,) = {row for pack in packs.rows()[-packs.parts :] for row in pack}
    alone = answer_loss(load_model(resolve_model(tiny_model)), [data.train[last]])
    assert losses(result.run)[2] == pytest.approx(alone, abs=1e-5)
    assert result.rows == 9


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> TrainResult:
    folder = tmp_path_factory.mktemp("adapted")
    path = folder / "chats.jsonl"
    rows = [{"messages": [USER(f"Calculate {n}+{n}."), ASSISTANT(f"The answer is {2 * n}.")]} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train(path, str(tiny_model), folder / "run", config(lora=True, learning_rate=1e-2))


def test_15_an_adapter_leaves_a_tied_head_alone(adapted: TrainResult, tiny_model: Path) -> None:
    weights = load_file(adapted.run / "train" / "adapter" / "adapter_model.safetensors")
    assert not [name for name in weights if "lm_head" in name or "embed_tokens" in name]
    base, merged = load_model(resolve_model(tiny_model)), load_model(resolve_model(adapted.model))
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(merged.get_input_embeddings().weight, base.get_input_embeddings().weight, rtol=0, atol=0)


def test_15_an_adapter_on_a_tied_head_is_not_merged_into_both(tmp_path: Path, tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    made = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_model(resolve_model(tiny_model)), made).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"says something else \(KL\(adapter ‖ merged\) .*tied head\): use it as it is"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=str(tiny_model))
    assert not (tmp_path / "merged").exists()


def test_16_nothing_is_merged_into_a_quantised_base(adapted: TrainResult, tmp_path: Path, tiny_model: Path, chats) -> None:
    """The base only says that it is quantised, which is all that is looked at; bitsandbytes need not be here to be refused."""
    base = tmp_path / "quantised"
    shutil.copytree(tiny_model, base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**settings, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    plain = tmp_path / "adapter"
    shutil.copytree(adapted.run / "train" / "adapter", plain)
    (plain / "sftkit.json").unlink()  # one that other tools made
    with pytest.raises(UserError, match=r"quantised: is quantised \(bitsandbytes\).*give the unquantised model"):
        merge(plain, tmp_path / "merged", base=str(base))
    with pytest.raises(UserError, match="give the unquantised model"):
        train(chats(12), str(base), tmp_path / "run", config(lora=True))


def test_17_a_part_of_an_adapter_is_not_taken_for_the_whole(adapted: TrainResult, tmp_path: Path) -> None:
    part = tmp_path / "adapter"
    shutil.copytree(adapted.run / "train" / "adapter", part)
    weights = load_file(part / "adapter_model.safetensors")
    save_file({name: each for name, each in weights.items() if "layers.1" in name}, part / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"not whole.*of 28 weights 14 are missing.*layers\.0.*save it from all processes"):
        merge(part, tmp_path / "merged")
    flat = {name: each[:0] if "lora_B" in name else each for name, each in weights.items()}  # what one shard of FSDP may hold
    save_file(flat, part / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"14 have another shape.* is \(0, 16\), expected \(\d+, 16\)\); save it from all processes"):
        merge(part, tmp_path / "merged")


def test_18_a_run_that_goes_on_has_the_order_of_one_in_one_piece(tmp_path: Path, tiny_model: Path, chats) -> None:
    path = chats(40)
    whole = train(path, str(tiny_model), tmp_path / "whole", config(logging_steps=1, epochs=2.0))
    run = tmp_path / "run"
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt, match="hours of max_hours are over at step"):
            train(path, str(tiny_model), run, config(logging_steps=1, epochs=2.0, max_hours=1e-9))
    saved = last_checkpoint(run / "train" / "checkpoints")
    assert saved is not None
    assert saved.name == "checkpoint-3"
    for step in (8, 9):  # cut off while they were written: no whole one is deleted in their favour
        shutil.copytree(saved, saved.with_name(f"checkpoint-{step}"))
        (saved.with_name(f"checkpoint-{step}") / "optimizer.pt").write_bytes(b"")
    with pytest.raises(KeyboardInterrupt, match="hours of max_hours are over at step 4"):
        train(path, str(tiny_model), run, config(logging_steps=1, epochs=2.0, max_hours=1e-9))
    assert sorted(each.name for each in saved.parent.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    train(path, str(tiny_model), run, config(logging_steps=1, epochs=2.0))
    assert losses(run) == losses(whole.run)
    assert len(losses(run)) == 10


def test_19_a_lost_template_is_noticed(adapted: TrainResult, tmp_path: Path, tiny_model: Path, chat: Chat, chats, monkeypatch) -> None:
    assert load_chat(resolve_model(adapted.model)).fingerprint() == chat.fingerprint()
    whole = Chat.save

    def lose(self: Chat, folder: Path) -> None:
        whole(self, folder)
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")

    monkeypatch.setattr(Chat, "save", lose)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"run/train/final: .*the chat template was not saved whole; .*the same command goes on") as error:
        train(chats(12), str(tiny_model), run, config())
    assert f"the checkpoints are in {run / 'train' / 'checkpoints'}" in str(error.value)
    assert not (run / "train" / "done.json").exists()
    monkeypatch.undo()
    assert load_chat(resolve_model(train(chats(12), str(tiny_model), run, config()).model)).fingerprint() == chat.fingerprint()


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": null}]}',
            r"messages\[1\]: the content is null; expected a text: write it, or take the row out",
        ),
        (
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": NaN}]}',
            r"messages\[1\]: the content is null; expected a text: write it, or take the row out",
        ),
        ('{"prompt": "hi", "completion": NaN}', r"completion is null; give its text, or leave the column out"),
        ('{"prompt": NaN, "completion": "hi"}', r"prompt is null; fill it in, or take the row out"),
    ],
)
def test_20_a_text_that_is_no_text_is_named(tmp_path: Path, bad: str, found: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + f"\n{bad}\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: {found}"):
        read_examples(path)
