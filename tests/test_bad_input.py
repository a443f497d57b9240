"""What a user gets wrong is answered by one line with file, row and cure, exit code 1, and nothing is lost."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import polars as pl
import pytest
from sftkit.core.run import Run

Cli = Callable[..., tuple[int, str, str]]


def prompts(path: Path, count: int = 3) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(count)))
    return path


GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}

FILES = {
    "empty.jsonl": ("", ["empty"]),
    "broken.jsonl": (json.dumps(GOOD) + '\n{"messages": [\n', ["broken.jsonl", "2"]),
    "no_messages.jsonl": (json.dumps(GOOD) + '\n{"colour": "red"}\n', ["no_messages.jsonl", "2", "colour"]),
    "role.jsonl": (json.dumps({"messages": [{"role": "wizard", "content": "hi"}]}) + "\n", ["role.jsonl", "1", "wizard", "user"]),
    "nothing.jsonl": (None, ["nothing.jsonl"]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["distill", "import", "build", "sft", "loss"])
def test_a_faulty_data_file(name: str, command: str, tmp_path: Path, tiny_model: Path, cli: Cli) -> None:
    text, words = FILES[name]
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    out = tmp_path / "run"
    arguments = {
        "distill": ("curate", "distill", path, "-o", out, "--teacher", tiny_model),
        "import": ("curate", "import", path, "-o", out),
        "build": ("curate", "build", path, "-o", out),
        "sft": ("train", "sft", path, "--model", tiny_model, "-o", out),
        "loss": ("evaluate", "loss", path, "--model", f"a={tiny_model}", "-o", out),
    }[command]
    code, _, err = cli(*arguments)
    assert code == 1, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line
    assert "Traceback" not in err


def test_a_missing_model_folder(tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("curate", "distill", prompts(tmp_path / "p.jsonl"), "-o", tmp_path / "run", "--teacher", tmp_path / "no" / "model")
    assert code == 1
    assert "no/model" in err


def test_a_name_that_is_no_model(tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("curate", "distill", prompts(tmp_path / "p.jsonl"), "-o", tmp_path / "run", "--teacher", "smollm2-135m-instrukt")
    assert code == 1
    assert "smollm2-135m-instruct" in err


def test_a_gguf_that_is_not_one(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model at all")
    code, _, err = cli("curate", "distill", prompts(tmp_path / "p.jsonl"), "-o", tmp_path / "run", "--teacher", tmp_path / "model.gguf")
    assert code == 1
    assert "GGUF" in err.splitlines()[-1]


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, tiny_model: Path, cli: Cli) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    code, _, err = cli("curate", "distill", prompts(tmp_path / "p.jsonl"), "-o", tmp_path / "run", "--teacher", folder)
    assert code == 1
    assert "tokenizer" in err.splitlines()[-1]


def test_a_prompt_longer_than_the_context_is_a_named_rejection(tmp_path: Path, tiny_model: Path, cli: Cli) -> None:
    path = prompts(tmp_path / "p.jsonl")
    path.write_text(path.read_text() + json.dumps({"prompt": "word " * 2000}) + "\n")
    code, _, err = cli("curate", "distill", path, "-o", tmp_path / "run", "--teacher", tiny_model, "--max-new-tokens", 4)
    assert code == 0, err
    import polars as pl

    ledger = pl.read_parquet(tmp_path / "run" / "ledger.parquet").filter(pl.col("stage") == "prompts")
    assert sorted(ledger["action"].to_list()) == ["kept"] * 3 + ["rejected"]
    assert ledger.filter(pl.col("action") == "rejected")["rule"].item() == "prompt_too_long"


def test_an_output_folder_of_another_run(tmp_path: Path, tiny_model: Path, cli: Cli) -> None:
    path, run = prompts(tmp_path / "p.jsonl"), tmp_path / "run"
    assert cli("curate", "distill", path, "-o", run, "--teacher", tiny_model, "--max-new-tokens", 4)[0] == 0
    before = (run / "config.yaml").read_text()
    code, _, err = cli("curate", "distill", path, "-o", run, "--teacher", tiny_model, "--max-new-tokens", 5)
    assert code == 1
    assert "max_new_tokens was 4, now 5" in err
    assert (run / "config.yaml").read_text() == before

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    code, _, err = cli("curate", "distill", path, "-o", tmp_path / "photos", "--teacher", tiny_model)
    assert code == 1
    assert "not a run of sftkit" in err
    assert [each.name for each in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_an_unknown_config_key_names_the_nearest(tmp_path: Path, tiny_model: Path, cli: Cli) -> None:
    config = tmp_path / "build.yaml"
    config.write_text("dedupe:\n  exact: true\n")
    code, _, err = cli("curate", "build", prompts(tmp_path / "p.jsonl"), "-o", tmp_path / "run", "--config", config)
    assert code == 1
    assert "build.yaml" in err
    assert "did you mean 'dedup'" in err


def test_a_teacher_that_cannot_be_reached(tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli(
        "curate", "distill", prompts(tmp_path / "p.jsonl"), "-o", tmp_path / "run",
        "--teacher", "m", "--engine", "openai", "--base-url", "http://127.0.0.1:9/v1",
    )  # fmt: skip
    assert code == 1
    assert "127.0.0.1:9" in err.splitlines()[-1]


def test_a_server_that_answers_401(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            body = b'{"error": {"message": "bad key"}}'
            self.send_response(401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    try:
        code, out, err = cli(
            "curate", "distill", prompts(tmp_path / "p.jsonl"), "-o", tmp_path / "run",
            "--teacher", "m", "--engine", "openai", "--base-url", f"http://127.0.0.1:{server.server_port}/v1",
        )  # fmt: skip
    finally:
        server.shutdown()
    assert code == 1
    assert "401" in err.splitlines()[-1]
    assert "OPENAI_API_KEY" in err.splitlines()[-1]
    assert "sk-very-secret" not in out + err
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"sk-very-secret" not in path.read_bytes(), path


def test_a_full_disk_keeps_what_was_committed(tmp_path: Path, tiny_model: Path) -> None:
    """The file size limit of the process stands for a full disk: writing past it fails in the same way."""
    path, run = prompts(tmp_path / "p.jsonl", 400), tmp_path / "run"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY));"
        "from sftkit.cli import main; main()"
    )
    arguments = ["curate", "distill", path, "-o", run, "--teacher", tiny_model, "--max-new-tokens", "64", "-k", "2"]
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    again = subprocess.run([sys.executable, "-m", "sftkit", *map(str, arguments)], capture_output=True, text=True, cwd="/")
    assert again.returncode == 0, again.stderr
    assert Run.open(run).ledger.read().filter(pl.col("stage") == "distill").height == 800


def test_ctrl_c_says_how_to_go_on_and_loses_nothing(tmp_path: Path, tiny_model: Path) -> None:
    import sqlite3

    path, run = prompts(tmp_path / "p.jsonl", 300), tmp_path / "run"
    arguments = ["curate", "distill", path, "-o", run, "--teacher", tiny_model, "--max-new-tokens", "100", "-k", "4"]
    command = [sys.executable, "-m", "sftkit", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs are started with it ignored
    )  # fmt: skip
    store = run / "curate" / "samples.sqlite"
    deadline = time.monotonic() + 90

    def stored() -> int:
        if not store.exists():
            return 0
        try:
            with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
                return int(connection.execute("select count(*) from samples").fetchone()[0])
        except sqlite3.OperationalError:
            return 0

    while stored() == 0 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "goes on from here" in err
    assert "Traceback" not in err
    kept = stored()
    assert 0 < kept < 1200
