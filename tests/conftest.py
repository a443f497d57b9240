"""Models and data for the tests: tiny checkpoints made on the spot, two real small ones, and the shared data where it lies."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sftkit.cli import sftkit
from sftkit.core.cli import run_command_line

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent

CORPUS = [
    "What is the difference between a thread and a process? A thread shares memory, a process does not.",
    "Calculate 1+1-1. The answer is 1. 2 3 4 5 6 7 8 9 10 #### 42",
    "Write a short poem about the sea: the waves are high, the wind is low, and all the little boats must go.",
    "Translate the sentence into Chinese: 你好，世界。 這是一個測試。",
    "user assistant system tool function answer question please explain the model in one sentence",
] * 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_model(folder: Path, *, specials: list[str], eos: str, pad: str | None, template: str | None, seed: int = 0) -> Path:
    """Write a random-weight two-layer Llama with its own byte-level BPE tokenizer: a forward takes milliseconds."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=pad, additional_special_tokens=specials)
    tokenizer.model_max_length = 512
    if template:
        tokenizer.chat_template = template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(eos),
        pad_token_id=None if pad is None else tokenizer.convert_tokens_to_ids(pad),
        initializer_range=0.1,  # so that greedy answers differ from prompt to prompt
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model: ChatML template, eos `<|im_end|>`, pad `<|pad|>`, context 512."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    specials = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<|endoftext|>"]
    return make_tiny_model(folder, specials=specials, eos="<|im_end|>", pad="<|pad|>", template=CHATML)


@pytest.fixture(scope="session")
def tiny_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model: no template, no pad token, eos `<|endoftext|>`, one reserved special token."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    return make_tiny_model(folder, specials=["<|endoftext|>", "<|reserved_0|>"], eos="<|endoftext|>", pad=None, template=None)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, fetched once through the catalogue into the user's cache."""
    from sftkit.core.catalogue import fetch

    return fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The embedder all-MiniLM-L6-v2, fetched once through the catalogue."""
    from sftkit.core.catalogue import fetch

    return fetch("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets that tests of real numbers read; they are skipped where it is absent."""
    folder = Path(os.environ.get("SFTKIT_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no shared data: set SFTKIT_SHARED_DATA")
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; return exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sftkit", *map(str, arguments)])
        code = 0
        try:
            run_command_line(sftkit)
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(scope="session", autouse=True)
def reload_apart() -> Iterator[Callable[..., Any]]:
    """Have saved models loaded again in this process, which takes milliseconds and not seconds; return what a training calls."""
    from sftkit.train import reloaded

    apart = reloaded.reload_apart
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reloaded, "reload_apart", reloaded.reload)
        yield apart


@pytest.fixture
def loads_apart(reload_apart: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have saved models loaded again in a process of its own, as outside of tests."""
    monkeypatch.setattr("sftkit.train.reloaded.reload_apart", reload_apart)


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """Give the log back as it was before the test: a command sets its level, and a later test would hear more than it asked for."""
    logger = logging.getLogger("sftkit")
    before = logger.handlers, logger.propagate
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers, logger.propagate = before
    logger.setLevel(logging.NOTSET)
