"""GGUF files: models in one quantised file, unpacked here into plain weights that can be trained and saved."""

import logging
from pathlib import Path
from typing import Any

from .errors import UserError

log = logging.getLogger(__name__)

MAGIC = b"GGUF"


def check_gguf(path: Path) -> None:
    """Raise UserError unless a file begins as a GGUF file does."""
    with open(path, "rb") as file:
        found = file.read(4)
    if found != MAGIC:
        raise UserError(f"{path}: is not a GGUF file (it begins with {found!r}, not {MAGIC!r}); give a model folder or a .gguf file")


def load_unpacked(path: Path, dtype: Any) -> Any:
    """Load the causal language model of a GGUF file with dense weights of a torch dtype."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **_unpack())
    # transformers goes on to take the model for a quantised one, and would neither save nor train it
    model.hf_quantizer = None
    model.is_quantized = False
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    packed = {str(weight.dtype) for weight in model.parameters() if weight.dtype != dtype}
    if packed:
        raise UserError(
            f"{path}: this version of transformers left weights packed ({', '.join(sorted(packed))}); use a model folder instead"
        )
    return model


def _unpack() -> dict[str, Any]:
    """Return what tells transformers to unpack: 5.24 keeps the weights packed where it can, 5.17 always unpacks."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def save_checkpoint(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a checkpoint: bfloat16 safetensors, config and tokenizer with its chat template."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = load_unpacked(gguf, torch.bfloat16)
    tokenizer.model_max_length = model.config.max_position_embeddings  # the file's own limit is lost on the way
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
