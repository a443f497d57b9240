"""Packs: every row once, the same updates however they are split, and losses that are those of each row alone."""

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sftkit.core.chat import load_chat
from sftkit.core.files import read_json_lines, write_json_lines
from sftkit.core.models import load_model, resolve_model
from sftkit.train.attention import packed_attention, use_own_attention, use_packed_attention
from sftkit.train.compiling import can_compile
from sftkit.train.config import TrainConfig
from sftkit.train.data import Row
from sftkit.train.head import LinearCrossEntropy, _losses, _losses_in_place, loss_sum, piece_rows
from sftkit.train.packing import Packs
from sftkit.train.trainer import compile_layers, keeps_rows_apart, learn_from_packs, make_trainer
from sftkit.train.watch import Watch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

RANDOM = np.random.default_rng(0)


def row(length: int, name: int = 0) -> Row:
    mask = [place >= length // 3 for place in range(length)]
    return Row((str(name), None), RANDOM.integers(4, 900, length).tolist(), mask)


ROWS = [row((number * 37) % 101 + 2, number) for number in range(203)]


def packs(rows: list[Row] = ROWS, **settings: object) -> Packs:
    return Packs(rows, **{"batch_size": 16, "batch_tokens": 512, "seed": 3, "pad": 1, **settings})  # type: ignore[arg-type]


def updates(made: Packs) -> list[set[int]]:
    parts = [set(pack) for pack in made.rows()]
    return [set().union(*parts[start : start + made.parts]) for start in range(0, len(parts), made.parts)]


def test_every_row_comes_once_in_updates_of_seed_and_epoch() -> None:
    made = packs(epochs=2)
    first = [list(pack) for pack in made.rows()]
    assert sorted(place for pack in first for place in pack) == list(range(203))
    assert [len(each) for each in updates(made)] == [16] * 12 + [11]
    made.set_epoch(1)
    assert sorted(place for pack in made.rows() for place in pack) == list(range(203))
    assert made.rows() != first
    made.set_epoch(0)
    assert made.rows() == first == packs(epochs=2).rows()
    assert packs(seed=4).rows() != first


def test_updates_are_nearly_of_one_size() -> None:
    sizes = [sum(len(ROWS[place].ids) for place in update) for update in updates(packs())][:-1]
    assert max(sizes) - min(sizes) < 0.02 * max(sizes)


@pytest.mark.parametrize("tokens", [1, 150, 512, 10_000])
def test_the_memory_decides_the_forward_passes_and_not_the_updates(tokens: int) -> None:
    made = packs(batch_tokens=tokens)
    assert updates(made) == updates(packs())
    sizes = [sum(len(ROWS[place].ids) for place in pack) for pack in made.rows()]
    assert max(sizes) <= max(tokens, 102)
    assert max(sizes[: made.parts]) == max(sizes) or tokens < 10_000
    assert packs(batch_tokens=tokens, workers=2).parts % 2 == 0


def test_a_pack_is_its_rows_end_to_end() -> None:
    made = packs()
    batch, places = made[5], made.rows()[5]
    ids = [token for place in places for token in ROWS[place].ids]
    assert batch["input_ids"].tolist() == [ids]
    assert batch["position_ids"].tolist() == [[step for place in places for step in range(len(ROWS[place].ids))]]
    assert batch["cu_seq_lens_q"].tolist() == np.cumsum([0] + [len(ROWS[place].ids) for place in places]).tolist()
    wanted = [token for place in places for token, learned in zip(ROWS[place].ids, ROWS[place].mask, strict=True) if learned]
    assert batch["targets"].tolist() == wanted
    assert [ids[at + 1] for at in batch["score_at"].tolist()] == wanted
    assert (batch["num_tokens"], batch["num_targets"]) == (len(ids), len(wanted))


def test_static_packs_all_have_the_same_shapes_and_the_same_content() -> None:
    made, plain = packs(), packs()
    made.pad_to(made.largest_shape())
    shapes = {tuple((name, tuple(value.shape)) for name, value in made[n].items() if hasattr(value, "shape")) for n in range(len(made))}
    assert len(shapes) == 1
    assert len({made[n]["max_length_q"] for n in range(len(made))}) == 1
    for n in range(len(made)):
        batch, other = made[n], plain[n]
        size = other["num_tokens"]
        assert batch["input_ids"][0, :size].tolist() == other["input_ids"][0].tolist()
        assert set(batch["input_ids"][0, size:].tolist()) <= {1}
        assert batch["targets"][: other["num_targets"]].tolist() == other["targets"].tolist()
        assert set(batch["targets"][other["num_targets"] :].tolist()) <= {-100}
        bounds = batch["cu_seq_lens_q"].tolist()
        assert bounds == sorted(bounds)
        assert bounds[-1] == batch["input_ids"].shape[1]
        assert max(np.diff(bounds)) <= made.longest


@pytest.mark.parametrize("static", [False, True])
def test_the_loss_of_a_pack_is_that_of_its_rows_alone(tiny_model, static: bool) -> None:
    rows = [row(length) for length in (5, 60, 2, 33, 90, 17)]
    model = load_model(resolve_model(tiny_model), dtype="float32")
    alone = 0.0
    grads: dict[str, torch.Tensor] = {}
    for each in rows:
        ids = torch.tensor([each.ids])
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(each.labels[1:]), ignore_index=-100, reduction="sum")
        loss.backward()
        alone += float(loss.detach())
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    use_packed_attention(model)
    made = packs(rows, batch_size=6, batch_tokens=4096)
    if static:
        made.pad_to(made.largest_shape())
    batch = made[0]
    together = loss_sum(model, batch)
    together.backward()
    assert float(together.detach()) == pytest.approx(alone, rel=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, grads[name], rtol=2e-4, atol=2e-4)
    use_own_attention(model)


def test_a_row_does_not_see_its_neighbours(tiny_model) -> None:
    model = load_model(resolve_model(tiny_model), dtype="float32")
    use_packed_attention(model)
    first, second, other = row(40), row(30), row(40)
    losses = []
    for neighbour in (first, other):
        batch = packs([neighbour, second], batch_size=2)[0]
        kept = {**batch, "targets": batch["targets"].clone()}
        begin = batch["cu_seq_lens_q"].tolist()[1]
        kept["targets"][batch["score_at"] < begin] = -100
        losses.append(float(loss_sum(model, kept).detach()))
    assert losses[0] == losses[1]


class NoSquare(TorchDispatchMode):
    """Fails as soon as a tensor is made that has two dimensions of at least so many tokens, on the way back, too."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.tensors = tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.tensors += 1
                assert sum(size >= self.tokens for size in each.shape) < 2, f"{func} made {list(each.shape)}"
        return out


@pytest.mark.parametrize("static", [False, True])
def test_no_tensor_of_a_pack_is_as_wide_and_as_high_as_the_pack_is_long(tiny_model: Path, static: bool) -> None:
    rows = [row(length) for length in [*range(11, 55), 45, 60]]
    made = packs(rows, batch_size=len(rows), batch_tokens=4096)
    if static:
        made.pad_to(made.largest_shape())
    (batch,) = [made[number] for number in range(len(made))]
    tokens = batch["num_tokens"]
    model = load_model(resolve_model(tiny_model), dtype="float32")
    assert tokens > max(model.config.vocab_size, *(size for weight in model.parameters() for size in weight.shape))
    own = {name: batch[name] for name in ("input_ids", "position_ids")}
    with NoSquare(tokens), pytest.raises(AssertionError, match=rf"made \[1, 1, {len(own['input_ids'][0])}, "):
        model(**own, use_cache=False)  # what TRL's packs do without a kernel for variable lengths: a mask
    use_packed_attention(model)
    with NoSquare(tokens) as seen:
        forward = loss_sum(model, batch)
        before = seen.tensors
        forward.backward()
    assert before > 100
    assert seen.tensors > before + 100
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize(("softcap", "scale", "bias"), [(0.0, 1.0, False), (5.0, 1.0, False), (0.0, 0.25, True)])
def test_the_head_equals_cross_entropy_of_all_logits(softcap: float, scale: float, bias: bool, monkeypatch) -> None:
    monkeypatch.setattr("sftkit.train.head.ELEMENTS", 257 * 301)
    torch.manual_seed(0)
    hidden, weight = torch.randn(1000, 32, requires_grad=True), torch.randn(301, 32, requires_grad=True)
    offset = torch.randn(301, requires_grad=True) if bias else None
    targets = torch.randint(0, 301, (1000,))
    targets[::7] = -100
    logits = (hidden @ weight.T + (offset if offset is not None else 0)) * scale
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    inputs = [each for each in (hidden, weight, offset) if each is not None]
    wanted = torch.autograd.grad(expected / 7, inputs)
    found = LinearCrossEntropy.apply(hidden, weight, offset, targets, softcap, scale)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for one, other in zip(torch.autograd.grad(found / 7, inputs), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_pieces_are_larger_where_each_is_added_to_a_gradient_and_no_larger_than_pays(monkeypatch) -> None:
    assert piece_rows(150_000, 900, adds_up=False) == 894
    assert piece_rows(150_000, 900, adds_up=True) == 3576
    assert piece_rows(50_000, 64, adds_up=True) == piece_rows(50_000, 64, adds_up=False)
    monkeypatch.setattr("sftkit.train.head.ELEMENTS", 257 * 20)
    torch.manual_seed(0)
    hidden, weight = torch.randn(1000, 64, requires_grad=True), torch.randn(257, 64, requires_grad=True)
    targets = torch.randint(0, 257, (1000,))
    found = [torch.autograd.grad(LinearCrossEntropy.apply(hidden, weight, None, targets, 0.0, 1.0, compiled), [hidden, weight])
             for compiled in (False, True)]  # fmt: skip
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_in_place_the_gradient_stands_where_the_logits_stood() -> None:
    logits, targets = torch.randn(10, 20).bfloat16(), torch.randint(0, 20, (10,))
    loss, grad = _losses(logits, targets, 5.0, 1.0)
    assert torch.equal(_losses_in_place(logits, targets, 5.0, 1.0), loss)
    assert torch.equal(logits, grad)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(10, 8, requires_grad=True), torch.randn(20, 8)
    LinearCrossEntropy.apply(hidden, weight, None, torch.randint(0, 20, (10,)), 0.0, 1.0).backward()
    assert hidden.grad is not None
    assert weight.grad is None


class Leaky(torch.nn.Module):
    """Carries a running mean from token to token, as a state-space model would, over the borders of rows."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config = model.model, model.config

    def forward(self, **inputs: torch.Tensor):
        out = self.inner(**inputs)
        count = torch.arange(1, out.last_hidden_state.shape[1] + 1)[None, :, None]
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.cumsum(1) / count
        return out


def test_a_model_that_leaks_between_rows_is_trained_row_by_row(tiny_model, tmp_path, chats, monkeypatch, caplog) -> None:
    from sftkit.core.chat import load_chat
    from sftkit.train import trainer as module

    chat = load_chat(resolve_model(tiny_model))
    model = load_model(resolve_model(tiny_model), dtype="float32")
    assert keeps_rows_apart(model, ROWS[:40], chat)
    assert model.config._attn_implementation == "sdpa"
    model.model = Leaky(model)
    assert not keeps_rows_apart(model, ROWS[:40], chat)
    assert "does not keep rows apart" in caplog.text

    from sftkit.train.config import TrainConfig
    from sftkit.train.sft import train

    settings = {"epochs": 1.0, "validation": 0.1, "dtype": "float32", "learning_rate": 1e-3, "logging_steps": 1, "stop_check": 0}
    packed = train(chats(40), str(tiny_model), tmp_path / "packed", TrainConfig(**settings))
    monkeypatch.setattr(module, "keeps_rows_apart", lambda *_: False)
    alone = train(chats(40), str(tiny_model), tmp_path / "alone", TrainConfig(**settings))
    assert alone.validation == pytest.approx(packed.validation, abs=1e-4)


def test_rows_alone_leave_autocast_as_it_was(tiny_model: Path) -> None:
    model = load_model(resolve_model(tiny_model), dtype="float32")
    learn_from_packs(model)
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # as accelerate prepares a model
    model(packed=packs(ROWS[:3], alone=True)[0])
    assert not torch.is_autocast_enabled("cpu")


SMALL = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
         "num_key_value_heads": 1, "initializer_range": 0.1}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "shape", "apart"),
    [
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}, True),
        ("gemma3_text", {"sliding_window": 8}, True),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),  # a convolution over three tokens
        ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}, False),
        (
            "gpt_oss",
            {"num_local_experts": 2, "num_experts_per_tok": 1, "initializer_range": 0.02},
            False,
        ),  # sinks, which no kernel here knows
    ],
)
def test_what_differs_token_by_token_is_found_where_sums_agree(kind: str, shape: dict, apart: bool, tiny_model: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **shape}))
    assert keeps_rows_apart(model, ROWS[:40], load_chat(resolve_model(tiny_model))) is apart


@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ["model.layers.0", "model.layers.1", "model.norm"]), ("gpt2", ["transformer.h.0", "transformer.h.1", "transformer.ln_f"])],
)
def test_layers_and_the_norm_after_them_are_compiled_whatever_they_are_called(kind: str, names: list[str]) -> None:
    config = AutoConfig.for_model(kind, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    compile_layers(model)
    assert [name for name, module in model.named_modules() if module._compiled_call_impl is not None] == names


def test_every_run_of_a_process_is_compiled_for_its_own_shape(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps eight forms of a piece of code, one here, and compiles no more after that: a sweep of runs went on without."""
    counter = CompileCounter()

    def compiled(model: torch.nn.Module) -> None:
        for layer in model.model.layers:
            layer.compile(dynamic=False, backend=counter)

    monkeypatch.setattr("sftkit.train.trainer.compile_layers", compiled)
    ref, found = resolve_model(tiny_model), []
    chat = load_chat(ref)
    for tokens in (256, 512):
        config = TrainConfig(batch_size=16, compile=True)
        with closing(Watch(tmp_path / str(tokens) / "metrics.jsonl", chat, save_minutes=60)) as watch:
            trainer = make_trainer(
                load_model(ref), chat, ROWS[:16], [], config, checkpoints=tmp_path / "a" / "b" / "c", device="cpu", half=None,
                batch_tokens=tokens, watch=watch,
            )  # fmt: skip
            before = counter.frame_count
            with torch._dynamo.config.patch(recompile_limit=1):
                trainer.train()
        found.append(counter.frame_count - before)
    assert found == [2, 2]  # before attention and after it, which goes row by row here


def test_what_is_held_out_does_not_widen_the_passes_that_train(tiny_model: Path, tmp_path: Path) -> None:
    """All passes of compiled code have one shape; many held-out rows at once had made each pass of a small update as large as allowed."""
    ref = resolve_model(tiny_model)
    chat, lengths = load_chat(ref), []
    for heldout in ([], ROWS[:16] * 8):
        with closing(Watch(tmp_path / str(len(heldout)) / "metrics.jsonl", chat, save_minutes=60)) as watch:
            trainer = make_trainer(
                load_model(ref), chat, ROWS[:16], heldout, TrainConfig(batch_size=2, compile=True), checkpoints=tmp_path / "a" / "b" / "c",
                device="cpu", half=None, batch_tokens=8192, watch=watch,
            )  # fmt: skip
        lengths.append(trainer.packs[0]["input_ids"].shape[1])
    assert trainer.validation[0]["input_ids"].shape[1] == lengths[1] <= lengths[0] + 128
    assert len(trainer.validation) > 1


@pytest.mark.parametrize("wanted", [None, True])
def test_where_code_cannot_be_compiled_a_run_goes_on_without(
    tiny_model: Path, tmp_path: Path, wanted: bool | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("sftkit.train.compiling.torch", SimpleNamespace(**{**vars(torch), "compile": fail}))
    can_compile.cache_clear()
    ref = resolve_model(tiny_model)
    chat = load_chat(ref)
    watch = Watch(tmp_path / "metrics.jsonl", chat, save_minutes=60)
    trainer = make_trainer(
        load_model(ref), chat, ROWS[:64], [], TrainConfig(batch_size=4, epochs=20, compile=wanted), checkpoints=tmp_path / "a" / "b" / "c",
        device="cuda", half=None, batch_tokens=512, watch=watch,
    )  # fmt: skip
    compiled = any(each._compiled_call_impl is not None for each in trainer.model.modules())
    assert compiled is trainer.records is bool(wanted)  # who asks for it is told what is missing
    assert ("Failed to find C compiler" in caplog.text) is not compiled
    can_compile.cache_clear()


def test_nothing_is_compiled_for_the_lengths_of_rows() -> None:
    counter = CompileCounter()

    def layer(query: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        return packed_attention(None, query * 2, query, query, cu_seq_lens_q=bounds)[0] * 3

    compiled, query = torch.compile(layer, backend=counter, dynamic=False), torch.randn(1, 2, 12, 4)
    for places in ([0, 5, 12], [0, 3, 12], [0, 7, 12]):
        bounds = torch.tensor(places)
        torch.testing.assert_close(compiled(query, bounds), layer(query, bounds))
        assert counter.frame_count == 2


def test_alone_each_row_is_a_pack_of_the_same_updates() -> None:
    made = packs(alone=True)
    assert all(len(pack) <= 1 for pack in made.rows())
    assert updates(made) == updates(packs())
    assert made[0]["alone"]


def test_a_line_tells_the_rate_the_share_of_what_the_card_reached_and_that_of_its_data_sheet(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", logger="sftkit")
    watch = Watch(tmp_path / "metrics.jsonl", SimpleNamespace(), save_minutes=60, peak=800e12, rated=1000e12)
    watch.token_flops, watch._seconds = 1e9, 2.0
    state = SimpleNamespace(global_step=5, epoch=1.0, max_steps=9, is_world_process_zero=True)
    watch.on_log(SimpleNamespace(fp16=False), state, None, {"loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0, "num_tokens": 800_000})
    (line,) = read_json_lines(tmp_path / "metrics.jsonl")
    assert (line["tokens_per_second"], line["peak_share"], line["mfu"]) == (400_000, 0.5, 0.4)
    assert "400,000 tokens/s, 50% of the 800 TFLOP/s that this card reached, MFU 40%" in caplog.text


@pytest.mark.parametrize(("epoch", "late", "wanted"), [(1.5, True, False), (1.5, False, True), (2.0, True, True)])
def test_a_run_that_stops_within_an_epoch_does_not_evaluate_first(tmp_path: Path, epoch: float, late: bool, wanted: bool) -> None:
    watch = Watch(tmp_path / "metrics.jsonl", SimpleNamespace(), save_minutes=60)
    watch.late, control = late, SimpleNamespace(should_evaluate=True)
    watch.on_epoch_end(None, SimpleNamespace(epoch=epoch), control)
    assert control.should_evaluate is wanted


@pytest.mark.parametrize(
    ("step", "strategy", "written", "wanted"),
    [
        (0, "epoch", [], True),
        (3, "epoch", [0], False),  # within the first epoch: it would stand in the curve of no run in one piece
        (4, "epoch", [0], True),  # the checkpoint of an epoch's end is written before the evaluation there
        (4, "epoch", [0, 4], False),
        (6, "epoch", [0, 4], True),  # the last step, within the second epoch
        (4, "steps", [0, 2], False),
        (4, "no", [], False),
    ],
)
def test_a_run_that_goes_on_evaluates_first_only_what_was_not(
    tmp_path: Path, step: int, strategy: str, written: list[int], wanted: bool
) -> None:
    lines = [{"step": each, "eval_loss": 1.0} for each in written] + [{"step": 5, "eval_loss": 1.0}]  # 5: after the checkpoint
    write_json_lines(tmp_path / "metrics.jsonl", lines if step != 6 else lines[:-1])
    arguments = SimpleNamespace(eval_on_start=strategy != "no", eval_strategy=strategy)
    state = SimpleNamespace(global_step=step, max_steps=6, epoch=step / 4, is_world_process_zero=True)
    with closing(Watch(tmp_path / "metrics.jsonl", SimpleNamespace(configure=lambda _: None), save_minutes=60)) as watch:
        watch.on_train_begin(arguments, state, None)
    assert arguments.eval_on_start is wanted


def test_gradients_are_unscaled_before_their_norm_is_told_clipped_or_not(tiny_model: Path, tmp_path: Path) -> None:
    """In float16 they stand scaled up, and the norm in metrics.jsonl was 65,536 times what it is where max_grad_norm is 0."""
    ref, found = resolve_model(tiny_model), []
    chat = load_chat(ref)
    for most in (0.0, 1e9):
        config = TrainConfig(batch_size=8, logging_steps=1, max_grad_norm=most)
        with closing(Watch(tmp_path / str(most) / "metrics.jsonl", chat, save_minutes=60)) as watch:
            trainer = make_trainer(
                load_model(ref), chat, ROWS[:16], [], config, checkpoints=tmp_path / "a" / "b" / "c", device="cpu", half=None,
                batch_tokens=4096, watch=watch,
            )  # fmt: skip

            def unscale(trainer: Any = trainer) -> None:
                torch._foreach_mul_([each.grad for each in trainer.learned()], 1 / 1024)

            trainer.accelerator.backward = lambda loss, **_: (loss * 1024).backward()
            trainer.accelerator.unscale_gradients = unscale
            trainer.train()
        found.append([(line["loss"], line["grad_norm"]) for line in read_json_lines(watch.metrics) if "loss" in line])
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_losses_are_those_of_trls_own_trainer(tmp_path: Path, tiny_model: Path) -> None:
    """The same updates of the same weights: packed, in several forward passes, here; padded, in one, there."""
    settings = TrainConfig(
        batch_size=8, batch_tokens=300, validation=0.0, learning_rate=3e-3, schedule="constant", warmup=0.0, logging_steps=1
    )
    ref = resolve_model(tiny_model)
    chat, few = load_chat(ref), [Row(each.key, [4 + token % 20 for token in each.ids], each.mask) for each in ROWS[:92]]
    with closing(Watch(tmp_path / "metrics.jsonl", chat, save_minutes=60)) as watch:
        ours = make_trainer(
            load_model(ref), chat, few, [], settings, checkpoints=tmp_path / "a" / "b" / "c", device="cpu", half=None, batch_tokens=300,
            watch=watch,
        )  # fmt: skip
        ours.train()
    order = [few[place] for number in range(12) for place in ours.update(number)]
    data = Dataset.from_dict({"input_ids": [each.ids for each in order], "labels": [each.labels for each in order]})
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, num_train_epochs=1, per_device_train_batch_size=8, max_length=None,
        learning_rate=3e-3, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        train_sampling_strategy="sequential", gradient_checkpointing=False,
    )  # fmt: skip
    theirs = SFTTrainer(model=load_model(ref), args=arguments, train_dataset=data, processing_class=chat.tokenizer)
    theirs.train()
    losses = [[line["loss"] for line in each.state.log_history if "loss" in line] for each in (ours, theirs)]
    assert len(losses[0]) == 12
    assert ours.packs.parts > 1
    assert losses[0][-2] < losses[0][0] - 1  # it learns, so that a wrong gradient would be seen in what follows
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
