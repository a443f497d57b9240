"""A trained model as one GGUF file, for llama.cpp and what is built on it; loaded again and held against the model it was made from."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.chat import load_chat
from ..core.errors import UserError
from ..core.gguf import load_unpacked
from ..core.models import ModelRef, load_model, resolve_model
from .disk import make_place_for, room_on_disk

log = logging.getLogger(__name__)

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type: its name in the gguf package
FORMATS = {"f16": np.float16, "f32": np.float32}
TOLERANCE = {"f16": 0.02, "f32": 1e-4}  # of the logits, as a share of their spread
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of tokens
CHECKED = "Explain in two sentences why 1234.5 metres aren't 12 km, über alles:\n\n  好的。 "


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export made."""

    file: Path
    format: str
    off: float  # the largest difference of a logit, as a share of their spread

    def summary(self) -> str:
        """Write it for people."""
        size = self.file.stat().st_size / 1e6
        return f"written: {self.file} ({self.format}, {size:,.0f} MB; loaded again, its logits are off by {self.off:.1e} of their spread)"


def export_gguf(model: str | Path, file: Path, *, format: str = "f16", revision: str | None = None) -> ExportResult:
    """Write a model (a folder, or the run that trained it) as a GGUF file, and compare it with the model.

    Raises UserError for an architecture or a tokenizer that is not known here, for a file that is there, and where the file, loaded
    again by transformers, gives other tokens or other logits.
    """
    if file.suffix != ".gguf":
        raise UserError(f"{file}: give a name that ends with .gguf, by which such files are known")
    if file.exists():
        raise UserError(f"{file}: is there already; give a new name")
    ref = resolve_model(model, revision=revision)
    make_place_for(file)
    whole = load_model(ref, dtype="float32")
    kind = whole.config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{ref.name}: is a {kind} model; GGUF is written for {', '.join(ARCHITECTURES)}; llama.cpp's own converter knows more"
        )
    chat = load_chat(ref)
    pre = _pre_tokenizer(chat.tokenizer, ref)
    scratch = file.with_name(f".{file.name}.tmp.gguf")
    try:
        with room_on_disk(file, then="nothing is left of it"):
            _write(scratch, whole, chat, pre, format, ref)
        off = _compare(scratch, whole, chat)
        if not off <= TOLERANCE[format]:
            raise UserError(f"{file}: loaded again, its logits are off by {off:.2g} of their spread, allowed {TOLERANCE[format]:g}")
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)
    return ExportResult(file=file, format=format, off=off)


def _write(place: Path, model: Any, chat: Any, pre: str, format: str, ref: ModelRef) -> None:
    import gguf

    config, tokenizer = model.config, chat.tokenizer
    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    writer = gguf.GGUFWriter(place, gguf.MODEL_ARCH_NAMES[architecture])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(ref.name).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope(config, ref))
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(1 if format == "f16" else 0)
    tokens, kinds = zip(*_tokens(tokenizer, config.vocab_size), strict=True)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(kinds))
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_eos_token_id(chat.end_of_turn)
    writer.add_pad_token_id(chat.pad_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(False)  # the chat template writes it where it belongs
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = weight.float().cpu().numpy()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = _interleaved(values, heads)
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UserError(f"{ref.name}: its weight {name} has no place in GGUF's {config.model_type}; llama.cpp's converter may know it")
        writer.add_tensor(known, values.astype(FORMATS[format]) if values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope(config: Any, ref: ModelRef) -> float:
    """Return the base of the rotary positions. Raises UserError for scaled ones, which are not written here."""
    told = getattr(config, "rope_parameters", None) or {}
    if told.get("rope_type", "default") != "default":
        raise UserError(
            f"{ref.name}: scales its rotary positions ({told['rope_type']}), which is not written here; use llama.cpp's converter"
        )
    return float(told.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)


def _interleaved(weight: Any, heads: int) -> Any:
    """Order the rows of a query or key matrix as llama.cpp rotates them: pairs side by side instead of half a head apart."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def _tokens(tokenizer: Any, size: int) -> Iterator[tuple[str, int]]:
    """Yield each token and its kind, in order of their numbers; rows of the embedding that no token has are filled."""
    added = tokenizer.added_tokens_decoder
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    for number in range(size):
        if number in added:
            yield added[number].content, CONTROL if added[number].special else USER_DEFINED
        else:
            yield known.get(number, f"[PAD{number}]"), NORMAL if number in known else 5  # unused


def _pre_tokenizer(tokenizer: Any, ref: ModelRef) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer cuts a text into words. Raises UserError for one that is not known here."""
    if tokenizer.is_fast:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        cut = json.dumps(settings.get("pre_tokenizer"))
        if settings["model"]["type"] == "BPE" and '"ByteLevel"' in cut:
            if "{1,3}" in cut:
                return "llama-bpe"
            if "(?i:" in cut:
                return "qwen2"
            if '"Digits"' in cut:
                return "smollm"
            if '"Split"' not in cut:
                return "gpt-2"
    raise UserError(f"{ref.name}: its tokenizer is not one that GGUF is written for here (byte-level BPE); use llama.cpp's converter")


def _compare(file: Path, model: Any, chat: Any) -> float:
    """Return the largest difference of a logit between a model and its file, as a share of the logits' standard deviation."""
    import torch
    from transformers import AutoTokenizer

    ids = chat.prompt([{"role": "user", "content": CHECKED}])
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if read(CHECKED, add_special_tokens=False)["input_ids"] != chat.tokenizer(CHECKED, add_special_tokens=False)["input_ids"]:
        log.warning("%s: transformers reads another tokenizer from the file than the model's; check it with llama.cpp", file.name)
    try:
        again = load_unpacked(file, torch.float32)
    except RuntimeError as error:  # transformers guesses what it does not read, as Qwen3's width of a head
        raise UserError(
            f"{chat.name}: transformers does not read back what was written (it guesses what it does not read, as Qwen3's width of a"
            " head), so that it cannot be checked; nothing is left of it; llama.cpp's own converter knows more"
        ) from error
    with torch.no_grad():
        one, other = (each.eval()(input_ids=torch.tensor([ids])).logits.float() for each in (model, again))
    return float((one - other).abs().max() / one.std())
