"""QLoRA: the base in 4 bits, an adapter that learns on it, and a final model merged into the base as it was."""

import json

import pytest
import torch
from sftkit.core.chat import load_chat
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, resolve_model
from sftkit.train.config import TrainConfig
from sftkit.train.local import load_start
from sftkit.train.sft import train

SETTINGS = {"learning_rate": 1e-2, "epochs": 3.0, "validation": 0.1, "dtype": "float32", "stop_check": 0}


def test_without_bitsandbytes_its_pip_line_is_told(tmp_path, tiny_model, chats) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"bitsandbytes is not installed: pip install 'sftkit\[quant\]'"):
            train(chats(20), str(tiny_model), tmp_path / "run", TrainConfig(**SETTINGS, qlora=True))
    else:
        pytest.skip("bitsandbytes is installed")


def test_the_base_is_in_4_bits_and_the_result_is_merged_into_it_whole(tmp_path, tiny_model, chats, caplog) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'sftkit[quant]'")
    settings = TrainConfig(**SETTINGS, qlora=True)
    model, half = load_start(resolve_model(tiny_model), settings, torch.float32, "cpu")
    layers = [each for each in model.modules() if isinstance(each, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert {each.weight.dtype for each in layers} == {torch.uint8}
    assert half is None

    caplog.set_level("INFO")
    result = train(chats(60), str(tiny_model), tmp_path / "run", settings)
    assert result.validation is not None
    assert result.validation[1] < result.validation[0] - 1
    assert "on the base in 4 bits the loss on 6 rows is" in caplog.text
    assert "quantization_config" not in json.loads((result.model / "config.json").read_text())
    from peft import PeftModel

    ids = torch.tensor([load_chat(resolve_model(tiny_model)).prompt([{"role": "user", "content": "hi"}])])
    with torch.no_grad():
        apart = PeftModel.from_pretrained(load_model(resolve_model(tiny_model)), result.run / "train" / "adapter").eval()(ids).logits
        merged = load_model(resolve_model(result.run))(ids).logits
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-4)


def test_float16_trains_the_adapter_in_float32(tmp_path, tiny_model) -> None:
    """As on a card without bfloat16: what TRL makes of the adapter of a base in 4 bits, such a card does not compute in."""
    pytest.importorskip("bitsandbytes", reason="pip install 'sftkit[quant]'")
    from contextlib import closing

    from sftkit.train.adapters import adapter_config
    from sftkit.train.data import Row
    from sftkit.train.trainer import make_trainer
    from sftkit.train.watch import Watch

    settings = TrainConfig(**SETTINGS, qlora=True)
    ref = resolve_model(tiny_model)
    model, _ = load_start(ref, settings, torch.float16, "cpu")
    rows = [Row((str(n), None), list(range(4, 40)), [n > 10 for n in range(36)]) for n in range(8)]
    with closing(Watch(tmp_path / "metrics.jsonl", load_chat(ref), save_minutes=60)) as watch:
        trainer = make_trainer(
            model, load_chat(ref), rows, [], settings, checkpoints=tmp_path / "a" / "b" / "c", device="cpu", half=torch.float16,
            batch_tokens=512, watch=watch, peft_config=adapter_config(settings),
        )  # fmt: skip
    assert {each.dtype for each in trainer.model.parameters() if each.requires_grad} == {torch.float32}
