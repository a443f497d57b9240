"""Batches: nothing depends on them, memory that runs out halves them, and a head that does more is found out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sftkit.core.batches import BatchRunner
from sftkit.core.engines.base import ChoiceRequest, EngineConfig, ScoreRequest, choice_logprobs
from sftkit.core.engines.registry import open_engine
from sftkit.core.engines.transformers_engine import TransformersEngine
from sftkit.core.head import Scorer
from sftkit.core.models import load_model, resolve_model


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return open_engine(str(tiny_model), EngineConfig(engine="transformers", device="cpu", dtype="float32"))  # type: ignore[return-value]


def texts(count: int) -> list[tuple[int, ...]]:
    random = np.random.default_rng(0)
    return [tuple(random.integers(5, 900, size=int(random.integers(3, 60))).tolist()) for _ in range(count)]


def test_batches_are_of_like_length_and_within_the_budget() -> None:
    seen: list[list[int]] = []

    def compute(batch: list[int]) -> list[int]:
        seen.append(batch)
        return batch

    lengths = [5, 90, 40, 41, 300, 7, 42]
    found = list(BatchRunner(100, "cuda").run(lengths, lambda each: each, compute, lambda each, error: -1))
    assert sorted(found) == sorted(lengths)
    assert seen == [[300], [90], [42, 41], [40, 7], [5]]


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    sizes = []

    def compute(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        if sum(batch) > 20 or batch == [13]:
            raise torch.OutOfMemoryError("fake")
        return batch

    runner = BatchRunner(80, "cuda")
    found = list(runner.run([10] * 8 + [13], lambda each: each, compute, lambda each, error: error))  # type: ignore[arg-type,return-value]
    assert found.count(10) == 8  # type: ignore[comparison-overlap]
    assert found.count("out of memory, even alone in its batch") == 1  # type: ignore[comparison-overlap]
    assert max(sizes) == 6
    assert runner.batch_tokens < 80
    assert sizes[-1] <= 2  # what fitted is remembered


def test_a_text_scores_the_same_in_any_batch(engine: TransformersEngine) -> None:
    requests = [ScoreRequest(key=str(number), ids=ids, start=1) for number, ids in enumerate(texts(40))]
    together = {each.key: each.logprobs for each in engine.logprobs(requests)}
    for request in requests:
        (alone,) = engine.logprobs([request])
        assert alone.logprobs == pytest.approx(together[request.key], abs=1e-5)
    assert len(together) == 40


@pytest.mark.parametrize("native", [True, False])
def test_choices_are_those_of_a_plain_forward(engine: TransformersEngine, native: bool) -> None:
    class Plain:
        logprobs = engine.logprobs

    requests = [ChoiceRequest(key=f"k/{number}", ids=ids, choices=(7, 8, 900)) for number, ids in enumerate(texts(12))]
    found = {each.key: each.logprobs for each in choice_logprobs(engine if native else Plain(), requests)}  # type: ignore[arg-type]
    for request in requests:
        with torch.no_grad():
            reference = engine.model(torch.tensor([request.ids])).logits[0, -1].log_softmax(-1)
        assert found[request.key] == pytest.approx(reference[[7, 8, 900]].tolist(), abs=1e-5)


@pytest.mark.parametrize("native", [True, False])
def test_a_choice_that_cannot_be_scored_says_why(engine: TransformersEngine, native: bool) -> None:
    class Plain:
        logprobs = engine.logprobs

    requests = [ChoiceRequest(key="long", ids=(5,) * 600, choices=(7, 8)), ChoiceRequest(key="sound", ids=(5, 6), choices=(7, 8))]
    found = {each.key: each for each in choice_logprobs(engine if native else Plain(), requests)}  # type: ignore[arg-type]
    assert "do not fit the context of 512" in str(found["long"].error)
    assert len(found["sound"].logprobs) == 2


def test_memory_running_out_while_scoring_loses_no_text(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [ScoreRequest(key=str(number), ids=ids, start=2) for number, ids in enumerate(texts(20))]
    expected = {each.key: each.logprobs for each in engine.logprobs(requests)}
    whole = engine._scorer.targets

    def narrow(ids: torch.Tensor, lines: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        if len(ids) > 3:
            raise torch.OutOfMemoryError("fake")
        return whole(ids, lines, places)  # type: ignore[no-any-return]

    monkeypatch.setattr(engine._scorer, "targets", narrow)
    found = {each.key: each.logprobs for each in engine.logprobs(requests)}
    assert found.keys() == expected.keys()
    for key, values in found.items():
        assert values == pytest.approx(expected[key], abs=1e-5)


def test_the_head_is_taken_in_pieces_and_one_that_does_more_is_found_out(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(resolve_model(tiny_model), dtype="float32")
    ids = torch.tensor(texts(1)[0])[None]
    places = torch.arange(ids.shape[1] - 1)
    lines = torch.zeros_like(places)
    with torch.inference_mode():
        whole = Scorer(model).targets(ids, lines, places)
        monkeypatch.setattr("sftkit.core.head.CPU_ELEMENTS", 3 * 1024)
        assert torch.allclose(Scorer(model).targets(ids, lines, places), whole, atol=1e-6)
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda **inputs: _halved(forward(**inputs)))
        expected = (model(input_ids=ids).logits[0, :-1]).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert torch.allclose(Scorer(model).targets(ids, lines, places), expected, atol=1e-5)


def _halved(outputs: object) -> object:
    outputs.logits = outputs.logits / 2  # type: ignore[attr-defined]
    return outputs
