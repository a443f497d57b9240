"""The vLLM engine, for real on a CPU: it answers as the transformers engine does, streams, and fails row by row."""

import importlib.util
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sftkit.core.chat import load_chat
from sftkit.core.engines.base import (
    NOT_FINITE,
    ChoiceRequest,
    Completion,
    Engine,
    EngineConfig,
    Request,
    Sampling,
    ScoreRequest,
    choice_logprobs,
)
from sftkit.core.engines.loading import choose
from sftkit.core.engines.registry import open_engine
from sftkit.core.errors import UserError
from sftkit.core.models import resolve_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MAX_NUM_SEQS = 4  # as in conftest.py
GREEDY = Sampling(temperature=0, max_new_tokens=24)
PROMPTS = [
    "hi",
    "What is the difference between a thread and a process?",
    "Calculate 1+1-1",
    "你好",
    *(f"Tell me about the number {number}, please." for number in range(8)),
]


def requests(engine: Engine, sampling: Sampling, prompts: list[str] = PROMPTS) -> list[Request]:
    assert engine.chat
    found = []
    for number, prompt in enumerate(prompts):
        messages = [{"role": "user", "content": prompt}]
        ids = tuple(engine.chat.prompt(messages))
        found.append(Request(key=str(number), prompt_ids=ids, messages=messages, sampling=sampling, seed=2**62 + number))
    return found


def answers(engine: Engine, wanted: list[Request]) -> dict[str, Completion]:
    found = {each.key: each for each in engine.generate(wanted)}
    assert set(found) == {each.key for each in wanted}
    return found


def scores(engine: Engine, wanted: list[Request], found: dict[str, Completion]) -> dict[str, tuple[float, ...]]:
    texts = [ScoreRequest(key=each.key, ids=(*each.prompt_ids, *found[each.key].token_ids), start=len(each.prompt_ids)) for each in wanted]
    return {each.key: each.logprobs for each in engine.logprobs(texts)}


def test_what_it_is(vllm_engine: Engine, reference: Engine) -> None:
    assert vllm_engine.identity == reference.identity  # so samples of one are samples of the other
    assert vllm_engine.context_length == 512
    assert vllm_engine.chat
    assert reference.chat
    assert vllm_engine.chat.fingerprint() == reference.chat.fingerprint()


def test_greedy_answers_are_those_of_transformers(vllm_engine: Engine, reference: Engine) -> None:
    wanted = requests(vllm_engine, GREEDY)
    found, expected = answers(vllm_engine, wanted), answers(reference, wanted)
    same = [key for key in found if found[key].token_ids == expected[key].token_ids]
    assert len(same) >= 0.75 * len(wanted)  # rounding may turn one of two equally probable tokens, and all after it
    for key in same:
        assert found[key].text == expected[key].text
        assert (found[key].finish_reason, found[key].num_tokens) == (expected[key].finish_reason, expected[key].num_tokens)
        assert found[key].logprob == pytest.approx(expected[key].logprob, abs=1e-3)


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, *(Sampling(temperature=0.7, top_p=0.8, max_new_tokens=tokens) for tokens in (20, 300))],  # 300: several blocks of the cache
    ids=["greedy", "sampled", "long"],
)
def test_the_mean_logprob_is_the_models_own(vllm_engine: Engine, reference: Engine, sampling: Sampling) -> None:
    wanted = requests(vllm_engine, sampling)
    found = answers(vllm_engine, wanted)
    for key, logprobs in scores(reference, wanted, found).items():
        assert found[key].logprob == pytest.approx(np.mean(logprobs), abs=1e-3)


def test_scores_are_those_of_transformers(vllm_engine: Engine, reference: Engine) -> None:
    texts = [tuple(np.random.default_rng(n).integers(5, 400, size=5 + 7 * n).tolist()) for n in range(12)]
    wanted = [ScoreRequest(key=str(n), ids=ids, start=1 + n % 3) for n, ids in enumerate(texts)]
    found = {each.key: each for each in vllm_engine.logprobs(wanted)}
    for expected in reference.logprobs(wanted):
        assert found[expected.key].error is None
        assert found[expected.key].logprobs == pytest.approx(expected.logprobs, abs=1e-3)


def test_choices_are_those_of_transformers(vllm_engine: Engine, reference: Engine) -> None:
    draw = np.random.default_rng(0)
    wanted = [
        ChoiceRequest(key=str(n), ids=tuple(draw.integers(5, 400, size=5 + 7 * n).tolist()), choices=(5 + n, 9, 0, 17, 30)[: 2 + n % 4])
        for n in range(12)
    ]
    found = {each.key: each for each in choice_logprobs(vllm_engine, wanted)}
    for expected in choice_logprobs(reference, wanted):
        assert found[expected.key].error is None
        assert found[expected.key].logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    broken = [ChoiceRequest(key="long", ids=(5,) * 512, choices=(5,)), ChoiceRequest(key="none", ids=(5,), choices=())]
    told = {each.key: str(each.error) for each in choice_logprobs(vllm_engine, broken)}
    assert told["long"].startswith("too long: 512 tokens and one more")
    assert told["none"].startswith("nothing to choose")


def test_an_answer_ends_before_its_stop_texts_as_with_transformers(vllm_engine: Engine, reference: Engine) -> None:
    whole = answers(reference, requests(reference, GREEDY))
    letters = Counter(letter for each in whole.values() for letter in each.text if letter.isascii() and letter.isalnum())
    stops = tuple(letter for letter, _ in letters.most_common(3))  # no part of a character, which vLLM waits for the rest of
    wanted = requests(vllm_engine, replace(GREEDY, stop=(*stops, "never in any of these")))
    found, expected = answers(vllm_engine, wanted), answers(reference, wanted)
    same = [key for key in found if found[key].token_ids == expected[key].token_ids]
    assert len(same) >= 0.75 * len(wanted)
    assert sum(found[key].num_tokens < whole[key].num_tokens for key in same) >= 2
    for key in same:
        assert (found[key].text, found[key].finish_reason) == (expected[key].text, expected[key].finish_reason)
        assert found[key].logprob == pytest.approx(expected[key].logprob, abs=1e-3)


def test_a_schema_shapes_the_answer_and_ends_it(vllm_engine: Engine) -> None:
    colour, number = {"enum": ["red", "blue"]}, {"enum": [1, 2]}
    schema = {"type": "object", "properties": {"colour": colour, "number": number}, "required": ["colour", "number"]}
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=200, json_schema=json.dumps({**schema, "additionalProperties": False}))
    found = answers(vllm_engine, requests(vllm_engine, sampling))
    for each in found.values():
        assert each.finish_reason == "stop", each
        assert json.loads(each.text)["colour"] in ("red", "blue")
        assert set(json.loads(each.text)) == {"colour", "number"}
        assert each.num_tokens == len(each.token_ids) < 200


def test_the_reason_of_a_failed_start_is_told(tiny_for_vllm: Path) -> None:
    config = EngineConfig(engine="vllm", dtype="float32", kv_cache_gib=1e-5, max_num_seqs=2, enforce_eager=True)
    with pytest.raises(UserError, match=r"vLLM cannot start with it \(ValueError: .*not enough GPU memory"):
        open_engine(str(tiny_for_vllm), config)


def test_texts_that_cannot_be_scored_fail_alone(vllm_engine: Engine) -> None:
    texts = {"sound": tuple(range(5, 20)), "longest": tuple([5] * 511), "too long": tuple([5] * 512), "short": (5,), "unknown": (5, 10**6)}
    found = {each.key: each for each in vllm_engine.logprobs(ScoreRequest(key=key, ids=ids, start=1) for key, ids in texts.items())}
    assert [len(found[key].logprobs) for key in ("sound", "longest")] == [14, 510]
    assert found["too long"].error == "too long: 512 tokens do not fit the context of 512 with room for another"
    assert found["short"].error == "nothing to score: 1 tokens, scored from token 1"
    assert "out of vocabulary" in str(found["unknown"].error)


def test_requests_that_cannot_run_fail_alone(vllm_engine: Engine) -> None:
    sound = requests(vllm_engine, GREEDY)
    broken = {"long": tuple([5] * 489), "empty": (), "unknown": (5, 10**6)}
    wanted = [*sound, *(Request(key=key, prompt_ids=ids, messages=[], sampling=GREEDY, seed=1) for key, ids in broken.items())]
    found = answers(vllm_engine, wanted)
    assert found["long"].error == "prompt too long: 489 tokens and 24 new ones do not fit the context of 512"
    assert found["empty"].error == "the prompt has no tokens"
    assert "out of vocabulary" in str(found["unknown"].error)
    assert all(found[each.key].error is None for each in sound)


def test_the_longest_that_fits(vllm_engine: Engine) -> None:
    wanted = Request(key="a", prompt_ids=tuple([5] * 488), messages=[], sampling=GREEDY, seed=1)
    found = answers(vllm_engine, [wanted])["a"]
    assert found.finish_reason == "stop" or found.num_tokens == 24


def test_prompts_of_more_tokens_than_a_step_takes_are_answered_by_their_seeds(vllm_engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)
    wanted = [
        Request(key=str(number), prompt_ids=tuple([5 + number] * 400), messages=[], sampling=sampling, seed=number) for number in range(4)
    ]
    together = answers(vllm_engine, wanted)
    assert not [each.error for each in together.values() if each.error]
    alone = {each.key: answers(vllm_engine, [each])[each.key] for each in wanted}
    assert {key: each.token_ids for key, each in alone.items()} == {key: each.token_ids for key, each in together.items()}


def test_stop_tokens_are_counted_and_not_in_the_text(vllm_engine: Engine) -> None:
    assert vllm_engine.chat
    wanted = requests(vllm_engine, Sampling(temperature=1.5, top_p=1.0, max_new_tokens=100), PROMPTS * 4)
    reasons: Counter[str] = Counter()
    for found in vllm_engine.generate(wanted):
        reasons[found.finish_reason] += 1
        assert "<|im_end|>" not in found.text
        if found.finish_reason == "stop":
            assert found.token_ids[-1] in vllm_engine.chat.stop_ids
            assert not set(found.token_ids[:-1]) & set(vllm_engine.chat.stop_ids)
            assert found.text == vllm_engine.chat.decode(found.token_ids[:-1])
        else:
            assert (found.finish_reason, found.num_tokens) == ("length", 100)
    assert reasons["stop"] > 0


def test_seeds_decide(vllm_engine: Engine) -> None:
    (first,) = requests(vllm_engine, Sampling(temperature=1.0, top_p=1.0, max_new_tokens=30), ["hi"])
    copies = [replace(first, key=str(number), seed=seed) for number, seed in enumerate((1, 1, 2**63 - 1, 3))]
    together = answers(vllm_engine, copies)
    assert sorted(Counter(each.text for each in together.values()).values()) == [1, 1, 2]
    alone = {each.key: answers(vllm_engine, [each])[each.key] for each in copies}
    assert {key: each.text for key, each in alone.items()} == {key: each.text for key, each in together.items()}


def test_answers_come_while_requests_are_taken(vllm_engine: Engine) -> None:
    """Never all at once: no more are taken than are in flight and in the look-ahead, and a short answer overtakes."""
    wanted = requests(vllm_engine, Sampling(temperature=0, max_new_tokens=60), PROMPTS * 5)
    wanted[3] = replace(wanted[3], sampling=Sampling(temperature=0, max_new_tokens=1))
    taken = 0

    def source() -> Iterator[Request]:
        nonlocal taken
        for number, each in enumerate(wanted):
            taken += 1
            yield replace(each, key=str(number))

    seen: list[str] = []
    for completion in vllm_engine.generate(source()):
        seen.append(completion.key)
        assert taken <= len(seen) + 4 * MAX_NUM_SEQS
        if len(seen) == 1:
            assert taken < len(wanted)
    assert sorted(seen, key=int) == [str(number) for number in range(len(wanted))]
    assert seen.index("3") < 2 * MAX_NUM_SEQS


def test_a_run_that_is_left_early_leaves_nothing_behind(vllm_engine: Engine) -> None:
    stream = vllm_engine.generate(requests(vllm_engine, Sampling(temperature=0, max_new_tokens=100), PROMPTS * 3))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert vllm_engine._engine.get_num_unfinished_requests() == 0  # type: ignore[attr-defined]
    wanted = requests(vllm_engine, Sampling(temperature=0, max_new_tokens=3))
    assert all(each.num_tokens <= 3 for each in answers(vllm_engine, wanted).values())


def test_a_fault_of_the_source_is_the_callers(vllm_engine: Engine) -> None:
    def source() -> Iterator[Request]:
        yield from requests(vllm_engine, GREEDY)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(vllm_engine.generate(source()))
    assert vllm_engine._engine.get_num_unfinished_requests() == 0  # type: ignore[attr-defined]


def test_settings_that_vllm_does_not_take(vllm_engine: Engine) -> None:
    with pytest.raises(UserError, match=r"vLLM does not take these settings: temperature must be in \[0, 2\]"):
        answers(vllm_engine, requests(vllm_engine, Sampling(temperature=3.0)))


def test_an_answer_without_a_finite_probability_fails(vllm_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM goes on sampling where the logits are NaN: the log-probabilities are what tells."""
    wanted = requests(vllm_engine, GREEDY)
    step = vllm_engine._engine.step  # type: ignore[attr-defined]

    def broken() -> list[Any]:
        outputs = step()
        for each in outputs:
            if len(each.prompt_token_ids) == len(wanted[1].prompt_ids):
                each.outputs[0].cumulative_logprob = float("nan")
        return outputs

    monkeypatch.setattr(vllm_engine._engine, "step", broken)  # type: ignore[attr-defined]
    found = answers(vllm_engine, wanted)
    assert found["1"].error == "the model gave no finite probability for one of its tokens"
    assert found["0"].error is None


def test_log_probabilities_are_told_where_they_are_wanted(vllm_engine: Engine) -> None:
    """Among answers of which they are not: a step has them of all its sequences, and the text is the same."""
    wanted = requests(vllm_engine, Sampling(temperature=0.8, max_new_tokens=12))
    told = answers(vllm_engine, wanted)
    mixed = answers(vllm_engine, [replace(each, logprob=number % 2 == 0) for number, each in enumerate(wanted)])
    for number, each in enumerate(wanted):
        assert mixed[each.key].error is None
        assert mixed[each.key].text == told[each.key].text
        expected = None if number % 2 else pytest.approx(told[each.key].logprob, abs=1e-4)
        assert mixed[each.key].logprob == expected
    stopped = replace(GREEDY, stop=("qqqqq",))  # is looked at with each token
    found = answers(vllm_engine, [replace(each, sampling=stopped, logprob=False) for each in wanted])
    assert all(each.error is None and each.logprob is None for each in found.values())


def test_logits_that_are_not_numbers_fail_their_answer_without_log_probabilities(tiny_for_vllm: Path, tmp_path: Path) -> None:
    """vLLM counts them where it samples."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "poisoned"
    shutil.copytree(tiny_for_vllm, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_for_vllm, dtype=torch.float32)
    tokenizer = load_chat(resolve_model(str(folder))).tokenizer
    (poison,) = tokenizer("~", add_special_tokens=False)["input_ids"]
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[poison] = 0.0  # never the most probable one: it is in no answer
        model.model.embed_tokens.weight[poison] = float("nan")
    model.save_pretrained(folder)
    engine = open_engine(str(folder), EngineConfig(engine="vllm", dtype="float32", max_num_seqs=MAX_NUM_SEQS, enforce_eager=True))
    with closing(engine):
        ways = (GREEDY, replace(GREEDY, stop=("qqqqq",)), replace(GREEDY, max_new_tokens=1))
        for sampling in ways:  # before any other, which leaves its numbers in the cache
            sound = [replace(each, logprob=False) for each in requests(engine, sampling, PROMPTS[:4])]
            assert not any(poison in each.prompt_ids for each in sound)
            assert all(each.error is None for each in answers(engine, sound).values())
        for sampling, logprob in product(ways, (False, True)):
            (wanted,) = requests(engine, sampling, ["one ~ in the middle"])
            assert poison in wanted.prompt_ids
            (found,) = engine.generate([replace(wanted, logprob=logprob)])
            assert found.error == f"{NOT_FINITE} for one of its tokens"


def test_auto_means_vllm_only_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert importlib.util.find_spec("vllm")
    assert choose(EngineConfig()) == ("vllm" if torch.cuda.is_available() else "transformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose(EngineConfig()) == "vllm"


def test_a_gguf_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    before = threading.active_count()
    with pytest.raises(UserError, match=r"vLLM runs model folders, not \.gguf files"):
        open_engine(str(path), EngineConfig(engine="vllm"))
    assert threading.active_count() == before
