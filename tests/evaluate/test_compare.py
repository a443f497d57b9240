"""All models answer the same questions, once; what is stored is used exactly as long as nothing that decides it has changed."""

import importlib.metadata
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console
from sftkit.core.chat import load_chat
from sftkit.core.engines.base import EngineConfig
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, resolve_model
from sftkit.core.named_models import find_models
from sftkit.core.run import is_done, read_done
from sftkit.evaluate import compare as compare_module
from sftkit.evaluate.compare import QUESTIONS, Answer, CompareResult, Question, compare
from sftkit.evaluate.config import CompareConfig
from sftkit.evaluate.judge import read_run
from sftkit.evaluate.results import counted, left_out
from sftkit.evaluate.show import show_answers
from sftkit.pipelines.report import write_report

CPU = {"engine": {"engine": "transformers", "dtype": "float32", "device": "cpu"}}


def settings(**changes: Any) -> CompareConfig:
    from sftkit.core.config import load_config

    return load_config(CompareConfig, {"max_new_tokens": 12, **CPU, **changes})


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluate" / "results.json").read_text())


def test_the_default_questions_are_the_courses() -> None:
    assert QUESTIONS == (
        "Give me an 1-sentence introduction of LLM.",
        "Calculate 1+1-1",
        "What's the difference between thread and process?",
    )


def test_the_answers_are_the_models_own_greedy_ones(tmp_path: Path, tiny_model: Path, trained_model: Path) -> None:
    import torch

    result = compare({"base": str(tiny_model), "sft": str(trained_model)}, None, tmp_path / "run", settings())
    for name, folder in (("base", tiny_model), ("sft", trained_model)):
        ref = resolve_model(folder)
        model, chat = load_model(ref, dtype="float32"), load_chat(ref)
        for question, answer in zip(QUESTIONS, result.answers[name], strict=True):
            prompt = chat.prompt([{"role": "user", "content": question}])
            made = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False,
                eos_token_id=list(chat.stop_ids), pad_token_id=chat.pad_id,
            )[0, len(prompt) :].tolist()  # fmt: skip
            stopped = made[-1] in chat.stop_ids
            assert answer.text == chat.decode(made[:-1] if stopped else made)
            assert (answer.stopped, answer.num_tokens) == (stopped, len(made))
    base, sft = result.models
    assert (base.stop_rate, base.truncated_share) == (0.0, 1.0)
    assert sft.stop_rate > 0.5  # it was trained to stop
    assert sft.mean_tokens == sum(each.num_tokens for each in result.answers["sft"]) / 3
    (difference,) = result.differences
    assert (difference.model, difference.baseline, difference.stop_rate) == ("sft", "base", sft.stop_rate)
    assert difference.p_value >= 0.25  # three questions can show nothing, and it says so
    assert difference.detectable is None
    assert "any difference would mostly go unseen" in result.summary()


def test_what_is_written(tmp_path: Path, tiny_model: Path, trained_model: Path) -> None:
    run = tmp_path / "run"
    result = compare({"base": str(tiny_model), "sft": str(trained_model)}, None, run, settings(system="Be brief."))
    table = pl.read_parquet(run / "evaluate" / "answers.parquet")
    assert table["model"].to_list() == ["base"] * 3 + ["sft"] * 3
    assert table["example_id"].to_list() == [each.id for each in result.questions] * 2
    asked = [json.loads(each) for each in table["question"]]
    assert [each[0] for each in asked] == [{"role": "system", "content": "Be brief."}] * 6
    assert [each[1]["content"] for each in asked] == [*QUESTIONS, *QUESTIONS]
    assert table["text"].to_list() == [each.text for name in ("base", "sft") for each in result.answers[name]]
    assert table["key"].n_unique() == 6
    assert table["error"].null_count() == 6
    assert (table["logprob"] < 0).all()
    section = results(run)["compare"]
    assert section == json.loads(json.dumps(result.facts()))
    assert set(section["models"]) == {"base", "sft"}
    assert section["models"]["sft"]["identity"].startswith("sha256:")
    assert section["models"]["sft"]["stop_interval"]["high"] <= 1
    assert read_done(run / "evaluate") == {"compare": {"models": ["base", "sft"], "questions": 3}}


def test_an_unchanged_model_is_not_asked_again(tmp_path: Path, tiny_model: Path, trained_model: Path, watch: Any) -> None:
    models = {"base": str(tiny_model), "sft": str(trained_model)}
    first = compare(models, None, tmp_path / "run", settings())
    assert watch.events == ["open tiny-chat", "close tiny-chat", "open trained", "close trained"]  # never two at once
    assert [each.generated for each in first.models] == [3, 3]
    moved = shutil.copytree(trained_model, tmp_path / "elsewhere")
    again = compare({"base": str(tiny_model), "sft": str(moved)}, None, tmp_path / "run", settings())
    assert len(watch.events) == 4  # nothing was even loaded, though the model lies elsewhere now
    assert [each.generated for each in again.models] == [0, 0]
    assert again.answers == first.answers


def test_new_weights_under_the_same_path_are_asked_anew(tmp_path: Path, tiny_model: Path, trained_model: Path, watch: Any) -> None:
    place = shutil.copytree(tiny_model, tmp_path / "model")
    before = compare({"m": str(place)}, None, tmp_path / "run", settings())
    (place / "model.safetensors").write_bytes((trained_model / "model.safetensors").read_bytes())
    after = compare({"m": str(place)}, None, tmp_path / "run", settings())
    assert after.models[0].generated == 3
    fresh = compare({"m": str(trained_model)}, None, tmp_path / "other", settings())
    assert after.answers == fresh.answers  # no stale hit
    assert all(one.text != other.text for one, other in zip(before.answers["m"], after.answers["m"], strict=True))
    (place / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    assert compare({"m": str(place)}, None, tmp_path / "run", settings()).answers == before.answers
    assert watch.asked == 9  # three runs of three questions; the old weights' answers were still there


def test_another_stop_token_is_another_model(tmp_path: Path, tiny_model: Path) -> None:
    """The tokenizer decides where an answer stops, and no weights, no prompt tell it."""
    place = shutil.copytree(tiny_model, tmp_path / "model")
    compare({"m": str(place)}, None, tmp_path / "run", settings())
    path = place / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<|endoftext|>"}))
    assert compare({"m": str(place)}, None, tmp_path / "run", settings()).models[0].generated == 3


@pytest.mark.parametrize("change", [{"system": "Be brief."}, {"max_new_tokens": 11}])
def test_other_settings_are_other_answers(change: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    compare({"m": str(tiny_model)}, None, tmp_path / "run", settings())
    assert compare({"m": str(tiny_model)}, None, tmp_path / "run", settings(**change)).models[0].generated == 3
    assert compare({"m": str(tiny_model)}, None, tmp_path / "run", settings()).models[0].generated == 0


def test_a_question_counts_for_all_models_or_for_none(tmp_path: Path, tiny_model: Path) -> None:
    short = shutil.copytree(tiny_model, tmp_path / "short")
    path = short / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 60}))
    rows = [{"prompt": "What is a thread?"}, {"prompt": "the sea " * 30}, {"messages": [{"role": "assistant", "content": "hello"}]}]
    questions = write_rows(tmp_path / "q.jsonl", rows)
    result = compare({"long": str(tiny_model), "short": str(short)}, questions, tmp_path / "run", settings())
    assert result.left_out == {"too_long for short": 1, "no_user_turn": 1}
    assert [each.n for each in result.models] == [1, 1]
    assert [each.error for each in result.answers["long"]] == [None, None, "no_user_turn"]
    assert result.answers["long"][1].num_tokens == 12  # it is still there to be read
    assert ">None<" not in write_report(tmp_path / "run").read_text()
    table = pl.read_parquet(tmp_path / "run" / "evaluate" / "answers.parquet").filter(pl.col("error").is_not_null())
    assert table.select("model", "error", "text").rows() == [
        ("long", "no_user_turn", None),
        ("short", "too_long", None),
        ("short", "no_user_turn", None),
    ]
    with pytest.raises(UserError, match=r"q\.jsonl: none of the 3 questions was answered by every model: 2 too_long, 1 no_user_turn"):
        compare({"m": str(tiny_model)}, questions, None, settings(max_new_tokens=500))


def test_questions_of_a_file_lose_their_answers_and_keep_their_system(tmp_path: Path, tiny_model: Path) -> None:
    own = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "What is a process?"}]
    rows = [{"question": "What is a thread?", "answer": "SECRET"}, {"messages": [*own, {"role": "assistant", "content": "SECRET"}]}]
    questions = write_rows(tmp_path / "q.jsonl", rows)
    result = compare({"m": str(tiny_model)}, questions, None, settings(system="Be brief.", limit=2))
    first, second = (each.messages for each in result.questions)
    assert first == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a thread?"}]
    assert second == own
    assert result.folder is None
    assert len(compare({"m": str(tiny_model)}, questions, None, settings(limit=1)).questions) == 1


def test_a_question_that_stands_there_again_counts_once(tmp_path: Path, tiny_model: Path, trained_model: Path) -> None:
    rows = [{"prompt": text, "completion": answer} for text, answer in (("One?", "a"), ("One?", "b"), ("Two?", "a"), ("One?", "a"))]
    result = compare({"a": str(tiny_model), "b": str(trained_model)}, write_rows(tmp_path / "q.jsonl", rows), tmp_path / "run", settings())
    assert (result.models[0].n, result.left_out) == (2, {"repeated": 2})
    page = write_report(tmp_path / "run").read_text()
    assert page.count("One?") == 1
    assert "2 questions answered by every model, greedily, in at most " in page
    assert "; left out for all models: 2 repeated" in page
    _, (first, _) = read_run(tmp_path / "run")
    assert len(first.texts) == 2  # nor is it judged again


def test_a_model_whose_template_changed_since_training_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    place = shutil.copytree(tiny_model, tmp_path / "sft")
    fingerprint = load_chat(resolve_model(place)).fingerprint()
    (place / "sftkit.json").write_text(json.dumps({"template": fingerprint, "parity": []}))
    assert compare({"sft": str(place)}, None, None, settings()).models[0].template == fingerprint
    template = place / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant: \n"))
    with pytest.raises(UserError, match=rf"sft={place}: its chat template.*trained with {fingerprint}.*put the tokenizer") as raised:
        compare({"sft": str(place)}, None, tmp_path / "run", settings())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_the_same_model_twice_is_said_aloud_and_asked_once(
    tmp_path: Path, tiny_model: Path, watch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    result = compare({"a": str(tiny_model), "b": str(tiny_model)}, None, tmp_path / "run", settings())
    assert "a and b are the same model" in caplog.text
    assert watch.asked == 3
    assert result.answers["a"] == result.answers["b"]
    assert result.differences[0].p_value == 1.0


def test_an_interrupted_comparison_is_not_done_and_goes_on(tmp_path: Path, tiny_model: Path, trained_model: Path, watch: Any) -> None:
    run, models = tmp_path / "run", {"base": str(tiny_model), "sft": str(trained_model)}
    compare(models, None, run, settings())
    questions = write_rows(tmp_path / "q.jsonl", [{"prompt": f"Calculate {n}+1"} for n in range(6)])
    watch.interrupt_after = 4
    with pytest.raises(KeyboardInterrupt):
        compare(models, questions, run, settings())
    assert not is_done(run / "evaluate")
    watch.interrupt_after, watch.asked = None, 0
    result = compare(models, questions, run, settings())
    assert [each.generated for each in result.models] == [2, 6]
    assert watch.asked == 8
    assert is_done(run / "evaluate")


def test_without_a_run_folder_nothing_is_kept_and_ctrl_c_says_so(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    seen: list[Path] = []

    def interrupted(model: Any, wanted: Any, identity: Any, store: Any, config: Any) -> int:
        seen.append(store.path.parent)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module, "_generate", interrupted)
    code, _, err = cli("evaluate", "compare", "--model", f"a={tiny_model}")
    assert code == 130
    assert err.endswith("stopped. Nothing is kept without -o RUN.\n")
    assert not seen[0].exists()


def test_models_of_a_server_are_asked_by_messages(tmp_path: Path) -> None:
    asked = []

    class Shouts(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "small"}, {"id": "large"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body)
            text = f"{body['model']}: {body['messages'][-1]['content'].upper()}"
            self.answer(
                {
                    "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                    "usage": {"completion_tokens": 5},
                }
            )

        def answer(self, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Shouts)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    engine = {"engine": {"engine": "openai", "base_url": f"http://127.0.0.1:{server.server_port}/v1"}}
    try:
        config = settings(**engine, system="Be brief.")
        result = compare({"a": "small", "b": "large"}, None, tmp_path / "run", config)
        assert len(asked) == 6
        assert {each["temperature"] for each in asked} == {0}
        assert asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
        again = compare({"a": "small", "b": "large"}, None, tmp_path / "run", config)
        assert len(asked) == 6
        called = {"type": "function", "function": {"name": "look", "parameters": {}}}
        for tools in ([], [called]):  # the same words with other functions are another question
            asked.clear()
            row = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}], "tools": tools}
            (tmp_path / "q.jsonl").write_text(json.dumps(row))
            compare({"a": "small"}, tmp_path / "q.jsonl", tmp_path / "tools", settings(**engine))
            assert [each.get("tools", []) for each in asked] == [tools]
    finally:
        server.shutdown()
        server.server_close()
    assert [each.text for each in result.answers["b"]] == [f"large: {question.upper()}" for question in QUESTIONS]
    assert (result.models[0].template, result.models[0].stop_rate, result.models[0].mean_tokens) == (None, 1.0, 5.0)
    assert again.answers == result.answers


def test_a_row_is_left_out_for_the_first_rule_and_whose_it_was() -> None:
    rows = [
        {"a": None, "b": None},
        {"a": "too_long", "b": "too_long"},
        {"a": None, "b": "too long: 513 tokens do not fit the context of 512"},
        {"a": None, "b": "too long: 600 tokens do not fit the context of 512"},
        {"a": "empty_answer", "b": "too_long"},
    ]
    reasons = left_out(rows)
    assert reasons == [None, "too_long", "too long for b", "too long for b", "empty_answer for a"]
    assert counted(reasons) == {"too long for b": 2, "too_long": 1, "empty_answer for a": 1}
    assert left_out([{"a": "too_long"}]) == ["too_long"]


def test_the_paired_numbers_are_those_of_the_pairs() -> None:
    stopped = {
        "base": [False] * 9 + [True] * 3,
        "sft": [True] * 9 + [True, True, False],
        "other": [False] * 9 + [True] * 3,
    }
    sft, other = compare_module._differences(stopped)
    assert sft.stop_rate == pytest.approx((9 - 1) / 12)
    assert sft.p_value == pytest.approx(2 * 11 / 1024)  # 0 or 1 of 10 fair coins, both sides
    assert sft.p_adjusted == pytest.approx(2 * sft.p_value)
    assert sft.interval.low > 0
    assert (other.stop_rate, other.p_value, other.p_adjusted) == (0.0, 1.0, 1.0)


def shown(result: CompareResult, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_answers(result, console=console)
    return console.export_text(styles=True)


def toy(*answers: Answer) -> CompareResult:
    messages = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "[b]new\x1b[2J"}]
    return CompareResult(
        folder=None, max_new_tokens=9, questions=[Question("1", messages, "q:1")],
        answers={f"m{number}": [answer] for number, answer in enumerate(answers)}, left_out={}, models=[], differences=[],
    )  # fmt: skip


def test_texts_are_shown_and_never_obeyed() -> None:
    result = toy(
        Answer(text="[red]loud[/red] \x1b]0;title\x07 \u202eevil", finish_reason="stop", num_tokens=1),
        Answer(text=" ", finish_reason="length", num_tokens=9),
        Answer(error="too_long"),
    )
    for width in (120, 60):
        text = shown(result, width)
        for expected in ("[b]new\\x1b[2J", "(after 2 earlier messages)", "[red]loud[/red]", "\\x1b]0;title\\x07", "\\u202eevil"):
            assert expected in text, (width, expected)
        for expected in ("stopped after 1 token\x1b", "(empty)", "cut after 9 tokens", "no answer: too_long"):
            assert expected in text, (width, expected)
        assert "\x1b]" not in text
        assert "\u202e" not in text


def test_answers_stand_side_by_side_where_there_is_room() -> None:
    result = toy(Answer(text="left", finish_reason="stop", num_tokens=2), Answer(text="right", finish_reason="stop", num_tokens=2))
    assert any("left" in line and "right" in line for line in shown(result, 100).splitlines())
    assert not any("left" in line and "right" in line for line in shown(result, 50).splitlines())


def test_another_version_of_the_engine_is_asked_anew(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, config = {"base": str(tiny_model)}, CompareConfig(max_new_tokens=4)
    assert [compare(models, None, tmp_path / "run", config).models[0].generated for _ in range(2)] == [3, 0]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    assert compare(models, None, tmp_path / "run", config).models[0].generated == 3


def test_an_engine_that_is_installed_by_another_name_is_asked_all_the_same(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM that was built from source, or for a CPU, has another name, and so no version that could be asked for."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    (model,) = find_models({"base": str(tiny_model)}, EngineConfig(engine="transformers"))
    monkeypatch.setattr("importlib.metadata.version", version)
    assert compare_module.answer_identity(model).endswith("+transformers+auto")
