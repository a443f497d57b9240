"""The embedded engine: each row as if it were alone, streamed as it finishes, faults as data."""

import inspect
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sftkit.core.engines import loading, registry, transformers_engine
from sftkit.core.engines.base import Completion, EngineConfig, Request, Sampling, ScoreRequest
from sftkit.core.engines.loading import choose, settle
from sftkit.core.engines.registry import open_engine
from sftkit.core.engines.stops import StopTexts
from sftkit.core.engines.transformers_engine import TransformersEngine, cache_bytes, row_bytes, sample, stored_bytes
from sftkit.core.errors import UserError
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Qwen2Config, RwkvConfig, RwkvForCausalLM

PROMPTS = ["hi", "What is the difference between a thread and a process?", "Calculate 1+1-1", "你好", "a b c d e f g h i j k l m n o p"]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return open_engine(str(tiny_model), EngineConfig(engine="transformers", device="cpu"))  # type: ignore[return-value]


def requests(engine: TransformersEngine, sampling: Sampling, copies: int = 1) -> list[Request]:
    assert engine.chat
    found = []
    for number, prompt in enumerate(PROMPTS * copies):
        messages = [{"role": "user", "content": prompt}]
        ids = tuple(engine.chat.prompt(messages))
        found.append(Request(key=str(number), prompt_ids=ids, messages=messages, sampling=sampling, seed=1000 + number))
    return found


def answers(engine: TransformersEngine, wanted: list[Request]) -> dict[str, Completion]:
    return {each.key: each for each in engine.generate(wanted)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_batch(engine: TransformersEngine, temperature: float) -> None:
    wanted = requests(engine, Sampling(temperature=temperature, top_p=0.9, max_new_tokens=40), copies=4)
    together = answers(engine, wanted)
    alone = {each.key: next(iter(engine.generate([each]))) for each in wanted}
    assert {key: each.token_ids for key, each in together.items()} == {key: each.token_ids for key, each in alone.items()}
    for key, each in together.items():
        assert each.logprob == pytest.approx(alone[key].logprob, abs=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1"])
def test_nor_where_layers_keep_a_state_and_no_keys(engine: TransformersEngine, kind: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = (
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
        if kind == "falcon_h1"
        else {}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=1024, head_dim=8, **small, **own)).eval()
    assert engine.chat
    hybrid = TransformersEngine(model, engine.chat, identity="", batch_tokens=16_384)
    wanted = [
        replace(each, sampling=Sampling(temperature=0, max_new_tokens=3 + 2 * number))  # so that rows leave their batch one by one
        for number, each in enumerate(requests(engine, Sampling()))
    ]
    alone = {each.key: next(iter(hybrid.generate([each]))).token_ids for each in wanted}
    assert {key: each.token_ids for key, each in answers(hybrid, wanted).items()} == alone


def test_greedy_equals_generate_of_transformers(engine: TransformersEngine) -> None:
    assert engine.chat
    wanted = requests(engine, Sampling(temperature=0, max_new_tokens=40))
    for key, found in answers(engine, wanted).items():
        ids = torch.tensor([wanted[int(key)].prompt_ids])
        reference = engine.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, eos_token_id=list(engine.chat.stop_ids), pad_token_id=engine.chat.pad_id
        )  # fmt: skip
        assert list(found.token_ids) == reference[0, ids.shape[1] :].tolist()


def test_the_mean_logprob_is_the_models_own(engine: TransformersEngine) -> None:
    wanted = requests(engine, Sampling(temperature=0.7, top_p=0.8, max_new_tokens=20))
    found = answers(engine, wanted)
    scored = {
        each.key: each
        for each in engine.logprobs(
            ScoreRequest(key=request.key, ids=(*request.prompt_ids, *found[request.key].token_ids), start=len(request.prompt_ids))
            for request in wanted
        )
    }
    for key, completion in found.items():
        assert completion.logprob == pytest.approx(np.mean(scored[key].logprobs), abs=1e-4)


def test_logprobs_equal_a_plain_forward(engine: TransformersEngine) -> None:
    texts = [tuple(np.random.default_rng(n).integers(5, 400, size=5 + 7 * n).tolist()) for n in range(12)]
    found = {
        each.key: each.logprobs
        for each in engine.logprobs(ScoreRequest(key=str(n), ids=ids, start=1 + n % 3) for n, ids in enumerate(texts))
    }
    for number, ids in enumerate(texts):
        with torch.no_grad():
            reference = engine.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = 1 + number % 3
        expected = [float(reference[position - 1, ids[position]]) for position in range(start, len(ids))]
        assert found[str(number)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (1.5, 0.9)])
def test_samples_follow_the_distribution(temperature: float, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 600)
    logits[0, :20] += 4
    exact = (logits / temperature).softmax(-1)[0].double()
    order = exact.argsort(descending=True)
    cumulative = exact[order].cumsum(0)
    outside = order[(cumulative - exact[order]) >= top_p]
    exact[outside] = 0
    exact /= exact.sum()
    draws = 40_000
    numbers = torch.rand(draws)
    chosen = sample((logits / temperature).expand(draws, -1), torch.full((draws,), top_p), numbers)
    counts = torch.bincount(chosen, minlength=600).double() / draws
    assert counts[outside].sum() == 0
    distance = 0.5 * (counts - exact).abs().sum()
    assert distance < 0.5 * (2 / np.pi * exact / draws).sqrt().sum() * 1.3  # the expected distance of a multinomial sample, and some


def test_seeds_decide(engine: TransformersEngine) -> None:
    (first, *_) = requests(engine, Sampling(temperature=1.0, top_p=1.0, max_new_tokens=30))
    seen = Counter(next(iter(engine.generate([replace(first, seed=seed)]))).text for seed in (1, 1, 2, 3))
    assert sorted(seen.values()) == [1, 1, 2]


def test_stop_tokens_are_counted_and_not_in_the_text(engine: TransformersEngine) -> None:
    assert engine.chat
    wanted = requests(engine, Sampling(temperature=1.5, top_p=1.0, max_new_tokens=200), copies=10)
    reasons = Counter()
    for found in engine.generate(wanted):
        reasons[found.finish_reason] += 1
        assert "<|im_end|>" not in found.text
        assert found.finish_reason != "error"
        if found.finish_reason == "stop":
            assert found.token_ids[-1] in engine.chat.stop_ids
            assert not set(found.token_ids[:-1]) & set(engine.chat.stop_ids)
        else:
            assert found.num_tokens == 200
    assert reasons["stop"] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_ends_before_the_first_of_its_stop_texts_and_is_otherwise_the_same(
    engine: TransformersEngine, temperature: float
) -> None:
    assert engine.chat
    plain = Sampling(temperature=temperature, top_p=1.0, max_new_tokens=60)
    whole = answers(engine, requests(engine, plain, copies=2))
    texts = sorted(each.text for each in whole.values())
    stops = (texts[0][10:13], texts[-1][20:22], "never in any of these")
    cut = answers(engine, requests(engine, replace(plain, stop=stops), copies=2))
    ended = 0
    for key, each in cut.items():
        before = whole[key]
        places = [before.text.find(stop) for stop in stops if stop in before.text]
        if not places:
            assert each.logprob == pytest.approx(before.logprob, abs=1e-5)  # other rows share its batch: rounding
            assert replace(each, logprob=before.logprob) == before
            continue
        ended += 1
        assert (each.text, each.finish_reason) == (before.text[: min(places)], "stop")
        assert before.token_ids[: each.num_tokens] == each.token_ids  # not a token more than completes the stop
        assert not any(stop in engine.chat.decode(each.token_ids[:-1]) for stop in stops)
    assert ended >= 2


def test_a_stop_text_over_several_tokens_and_in_parts_of_characters_is_found() -> None:
    pieces = {1: "a\n", 2: "\nQuest", 3: "ion", 4: ":", 5: " x", 6: "\ufffd", 7: "\ufffd"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(pieces[each] for each in ids).replace("\ufffd\ufffd", "é")

    stops = StopTexts(decode)
    assert [stops.ended(ids, ("\nQuestion:",)) for ids in ([1], [1, 2], [1, 2, 3])] == [None, None, None]
    assert stops.ended([1, 2, 3, 4], ("\nQuestion:",)) == "a\n"
    assert stops.ended([4, 5], ("\nQuestion:",)) is None
    assert (stops.ended([5, 6], ("xé",)), stops.ended([5, 6, 7], ("xé",))) == (None, " ")


def test_rows_are_given_as_they_finish(engine: TransformersEngine) -> None:
    short, *others = requests(engine, Sampling(temperature=0, max_new_tokens=100))
    wanted = [*others, replace(short, sampling=Sampling(temperature=0, max_new_tokens=2))]
    assert next(iter(engine.generate(wanted))).key == short.key


def test_a_row_that_cannot_run_does_not_stop_the_others(engine: TransformersEngine) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=8)
    sound = requests(engine, sampling)
    long = Request(key="long", prompt_ids=tuple([5] * 600), messages=[], sampling=sampling, seed=1)
    empty = Request(key="empty", prompt_ids=(), messages=[], sampling=sampling, seed=1)
    found = answers(engine, [*sound, long, empty])
    assert found["long"].error is not None
    assert found["long"].error.startswith("prompt too long: 600 tokens")
    assert found["empty"].error == "the prompt has no tokens"
    assert all(found[each.key].error is None for each in sound)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_prompt_with_infinite_logits_fails_alone(engine: TransformersEngine, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = requests(engine, Sampling(temperature=temperature, max_new_tokens=4))
    forward = engine.model.forward
    poison = len(max(wanted, key=lambda each: len(each.prompt_ids)).prompt_ids)

    def broken(*arguments: object, **named: object) -> object:
        result = forward(*arguments, **named)
        mask = named["attention_mask"]
        result.logits[mask.sum(1) >= poison] = float("nan")
        return result

    monkeypatch.setattr(engine.model, "forward", broken)
    found = answers(engine, wanted)
    failed = [each for each in found.values() if each.error]
    assert len(failed) == 1
    assert "no finite probability" in str(failed[0].error)


def test_out_of_memory_halves_the_batch(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = requests(engine, Sampling(temperature=0, max_new_tokens=4), copies=2)
    expected = {key: each.text for key, each in answers(engine, wanted).items()}
    forward = engine.model.forward

    def small(*arguments: object, **named: object) -> object:
        if named["input_ids"].shape[0] > 3:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("out of memory")
        return forward(*arguments, **named)

    monkeypatch.setattr(engine.model, "forward", small)
    assert {key: each.text for key, each in answers(engine, wanted).items()} == expected


def test_auto_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(EngineConfig(base_url="http://localhost:1/v1")) == "openai"
    assert choose(EngineConfig(engine="vllm")) == "vllm"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose(EngineConfig()) == "transformers"


def test_for_few_answers_no_engine_is_started_that_takes_longer_than_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose(EngineConfig()) == choose(EngineConfig(device="cuda")) == "vllm"
    assert choose(EngineConfig(device="cpu")) == settle(EngineConfig(device="cpu"), 9999, 9999).engine == "transformers"
    assert settle(EngineConfig(), 256, 512).engine == "transformers"
    assert settle(EngineConfig(), 257, 512).engine == settle(EngineConfig(), 256, 513).engine == "vllm"
    assert settle(EngineConfig(), 3, 100, quantised=True).engine == "vllm"
    for asked in ({"tensor_parallel_size": 2}, {"max_num_seqs": 8}, {"executor": "ray"}, {"engine": "vllm"}):
        assert settle(EngineConfig(**asked), 3, 100).engine == "vllm"
    assert settle(EngineConfig(base_url="http://localhost:1/v1"), 3, 100).engine == "openai"


def test_vllm_runs_on_the_device_that_was_named_or_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[EngineConfig] = []
    monkeypatch.setattr(registry, "open_replicas", lambda module, model, config, **named: opened.append(config))
    registry.open_engine("m", EngineConfig(engine="vllm", device="cuda:1"))
    assert (opened[0].replicas, opened[0].device) == (1, "cuda:1")  # in a process that sees this card alone
    monkeypatch.setattr(registry, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(UserError, match=r"^device cpu: vLLM runs on this machine's GPU; take the engine transformers"):
        registry.open_engine("m", EngineConfig(engine="vllm", device="cpu"))


def test_what_fits_is_reckoned_from_what_is_free(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.chat
    assert engine._fitting(600) == 512  # on a CPU it is not asked
    monkeypatch.setattr(torch, "tensor", lambda values, device: torch.zeros(len(values)))  # there is no such card
    monkeypatch.setattr(type(engine.model), "device", torch.device("cuda:0"))
    alone, shared = (
        TransformersEngine(engine.model, engine.chat, identity="", batch_tokens=16_384, together=together) for together in (False, True)
    )
    kept = 1000, 10
    monkeypatch.setattr(transformers_engine, "cache_bytes", lambda model, argument: kept)
    row = row_bytes(engine.model.config, kept, 600, engine.model.dtype.itemsize)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * row, 1000 * row))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 * row)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 92 * row)
    assert alone._fitting(600) == 10  # half of what is free and of what the process holds and does not use
    assert alone._batch_tokens == 16 * 16_384
    assert TransformersEngine(engine.model, engine.chat, identity="", batch_tokens=1000)._batch_tokens == 1000  # what is given is meant
    assert shared._fitting(600) == 512  # another process of the training has other memory free, and must take the same steps
    assert shared._batch_tokens == 16_384


@pytest.mark.parametrize("kind", ["gemma3", "gemma3n", "gemma4", "qwen3_next", "falcon_h1", "mamba", "gpt2", "deepseek_v3", "llava"])
def test_what_an_answer_takes_is_known_of_every_kind_of_model(kind: str) -> None:
    settings = AutoConfig.for_model(kind)  # layers of several sizes, a list of widths, texts beside pictures, no attention at all
    short, long = (row_bytes(settings, (100, 7), tokens, 2) for tokens in (100, 1000))
    assert 0 < short < long
    assert type(long) is int


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
KINDS: dict[str, dict[str, int]] = {
    "qwen2": {"num_key_value_heads": 2},
    "lfm2": {"num_key_value_heads": 2},  # layers that keep a few tokens only
    "mamba": {"state_size": 8},
    "falcon_h1": {
        "num_key_value_heads": 2,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "qwen3_next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v3": {
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "head_dim": 4},
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_cache_keeps_is_what_it_stores(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **KINDS[kind])).eval()
    argument = next(each for each in ("cache", "past_key_values") if each in inspect.signature(type(model).forward).parameters)
    grows, stays = cache_bytes(model, argument)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.ones(3, 100, dtype=torch.long), use_cache=True, **{argument: cache})
    assert 3 * (100 * grows + stays) == stored_bytes(cache)
    assert row_bytes(model.config, (grows, stays), 100, 4) > stored_bytes(cache) // 3


def test_a_batch_on_a_gpu_is_what_fits_its_free_memory(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2)
    cache = 2 * 28 * 2 * 128 * 2 * 600
    assert 4 * cache < row_bytes(settings, (cache // 600, 0), 600, 2) < 8 * cache  # a prompt of 600 tokens and one more
    sizes = []
    monkeypatch.setattr(engine, "_run", lambda batch: sizes.append(len(batch)) or iter(()))
    wanted = requests(engine, Sampling(temperature=0, max_new_tokens=4), copies=4)
    monkeypatch.setattr(engine, "_batch_tokens", 1 << 20)
    for fitting in (8, 1 << 20, 0):  # one at least
        sizes.clear()
        monkeypatch.setattr(engine, "_fitting", lambda longest, most=fitting: most)
        list(engine.generate(wanted))
        assert sizes[0] == min(len(wanted), max(1, fitting))
        assert sum(sizes) == len(wanted)


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16])
def test_half_precision_is_of_the_weights_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: torch.dtype
) -> None:
    """The frequencies of rotary positions in bfloat16 would misplace tokens that are far apart."""
    shutil.copytree(tiny_model, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=own).save_pretrained(tmp_path / "half")
    monkeypatch.setattr(transformers_engine, "half_precision", lambda device: torch.bfloat16)
    found = open_engine(str(tmp_path / "half"), EngineConfig(engine="transformers", device="cpu"))
    assert {each.dtype for each in found.model.parameters()} == {torch.bfloat16}  # type: ignore[attr-defined]
    assert {each.dtype for each in found.model.buffers()} == {torch.float32}  # type: ignore[attr-defined]
    assert answers(found, requests(found, Sampling(temperature=0, max_new_tokens=4)))  # type: ignore[arg-type]


def test_a_device_that_is_not_there(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no usable GPU"):
        open_engine(str(tiny_model), EngineConfig(engine="transformers", device="cuda"))


def test_a_model_without_a_cache_is_refused_for_answers(engine: TransformersEngine) -> None:
    size = {"vocab_size": len(engine.chat.tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    model = RwkvForCausalLM(RwkvConfig(**size))
    other = TransformersEngine(model.eval(), engine.chat, identity="rwkv", batch_tokens=256)
    with pytest.raises(UserError, match=r"RwkvForCausalLM: takes no cache of what it has read"):
        next(other.generate(requests(engine, Sampling(temperature=0, max_new_tokens=2))))
    assert np.isfinite(next(other.logprobs([ScoreRequest(key="k", ids=(1, 2, 3), start=1)])).logprobs).all()
