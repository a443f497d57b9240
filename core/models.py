"""Model references: what a user may write for a model, where its files are, what identifies it, and how it is loaded."""

import functools
import hashlib
import logging
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .catalogue import CATALOGUE, cache_dir, cached
from .errors import UserError, unknown_name
from .files import file_hash, load_object, read_json, write_json
from .gguf import check_gguf, load_unpacked
from .hub import hub_away, is_for_want_of_it

log = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.npz")
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt")  # what trainers leave beside them
DECISIVE = ("config.json", "generation_config.json", "adapter_config.json")  # settings that change what the weights compute
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
UNQUANTISED = "take the engine vllm, which reads most kinds on a GPU, or the model before it was quantised"
UNREADABLE = (ValueError, LookupError, TypeError, EOFError, OverflowError, struct.error)  # what the libraries raise for damaged files


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model that was found: a folder or .gguf file on disk (`path`), or a model of the Hub (`hub_id`, `revision`)."""

    name: str  # as the user wrote it
    path: Path | None = None
    hub_id: str | None = None
    revision: str | None = None

    def pretrained(self) -> tuple[str, dict[str, Any]]:
        """Return the arguments of `from_pretrained`: the name, and what else it needs."""
        if self.path is None:
            assert self.hub_id
            return self.hub_id, {"revision": self.revision} if self.revision else {}
        if self.path.is_file():
            return str(self.path.parent), {"gguf_file": self.path.name}
        return str(self.path), {}


def resolve_model(name: str | Path, *, revision: str | None = None) -> ModelRef:
    """Find a model: a folder or .gguf file, a training run of ours (its final model), a catalogue name, or a Hub id (`ID@REVISION`).

    Raises UserError for whatever is none of these. Nothing is downloaded here; for a Hub id the Hub is asked whether it is there.
    """
    text = str(name)
    if not text.strip():  # a variable of a shell that is not set would be this folder
        raise UserError("the name of the model is empty; give a folder, a .gguf file, a name of `sftkit models list` or a Hub id")
    path = Path(text).expanduser()
    if path.exists():
        return ModelRef(text, path=_on_disk(path).absolute())  # not resolved: in the Hub's cache a file's real name tells nothing
    if text in CATALOGUE:
        folder = cached(text)
        if folder is None:
            raise UserError(f"model {text} is not here yet: `sftkit models get {text}` fetches it")
        return ModelRef(text, path=folder)
    if text.endswith(".gguf") or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"{text}: no such model folder or file")
    hub_id, _, at = text.partition("@")
    if HUB_ID.fullmatch(hub_id):
        hub_away()  # what loads it then asks in vain no more
        return ModelRef(text, hub_id=hub_id, revision=revision or at or None)
    raise unknown_name("model", text, CATALOGUE, also="a folder, a .gguf file or a Hub id (ORGANISATION/NAME)")


def _on_disk(path: Path) -> Path:
    if path.is_file():
        check_gguf(path)
        return path
    for inner in (path / "train" / "final", path / "final"):
        if (inner / "config.json").exists():
            return inner
    adapter = (path / "adapter_config.json").exists() and all(file.name.startswith("adapter_model") for file in _weights(path))
    if (path / "config.json").exists() and not adapter:
        return path
    if adapter:
        raise UserError(f"{path}: is an adapter, not a whole model; `sftkit train merge {path} -o FOLDER` makes FOLDER one")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _on_disk(files[0])
    if files:
        raise UserError(f"{path}: holds {len(files)} .gguf files; name one of them, as {files[0]}")
    if (path / "train").is_dir():
        raise UserError(f"{path}: this run has no finished model (no train/final); the same `sftkit train sft` command finishes it")
    raise UserError(f"{path}: is not a model folder (no config.json in it)")


def model_identity(ref: ModelRef) -> str:
    """Return what stays the same exactly as long as the model computes the same, wherever its files lie.

    `sha256:…` over the weights and settings on disk (read once per file version: about a second per gigabyte), or
    `hub:ID@COMMIT`. Raises UserError when the Hub cannot be asked for the commit.
    """
    if ref.path is None:
        return f"hub:{ref.hub_id}@{_hub_commit(ref)}"
    if ref.path.is_file():
        return f"sha256:{_remembered_hash(ref.path)}"
    weights = _weights(ref.path)
    if not weights:
        raise UserError(f"{ref.path}: holds no weights (*.safetensors); give a complete model folder")
    whole = hashlib.sha256()
    for file in [*weights, *(ref.path / name for name in DECISIVE)]:
        if file.exists():
            whole.update(f"{file.name}\0{_remembered_hash(file)}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def _weights(folder: Path) -> list[Path]:
    return sorted({file for pattern in WEIGHTS for file in folder.glob(pattern) if file.name not in NO_WEIGHTS})


def _hub_commit(ref: ModelRef) -> str:
    if ref.revision and re.fullmatch(r"[0-9a-f]{40}", ref.revision):
        return ref.revision
    from huggingface_hub import hf_hub_download

    with _hub_errors(ref):
        # the snapshot folder that the file lies in is named after the commit, offline as well
        return Path(hf_hub_download(str(ref.hub_id), "config.json", revision=ref.revision)).parent.name


def _remembered_hash(path: Path) -> str:
    """Return a file's SHA-256, remembered by what tells its version: path, size, time of change, inode."""
    status = path.stat()
    version = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    place = cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    if place.exists():
        try:
            remembered = read_json(place)
            if remembered["version"] == version:
                return str(remembered["sha256"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s: not readable, the file is hashed again", place)
    digest = file_hash(path)
    try:
        write_json(place, {"path": str(path), "version": version, "sha256": digest})
    except OSError as error:
        _tell_unremembered(str(cache_dir()), error.strerror or str(error))
    return digest


@functools.cache
def _tell_unremembered(place: str, reason: str) -> None:
    log.warning("%s: cannot be written (%s): hashes of models are made anew each time; SFTKIT_CACHE names another place", place, reason)


def load_tokenizer(ref: ModelRef) -> Any:
    """Load a model's tokenizer as its files have it; `core.chat.load_chat` applies the policy. Raises UserError without one."""
    from transformers import AutoTokenizer

    if ref.path is not None and ref.path.is_dir():
        known = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
        if not any((ref.path / file).exists() for file in known):
            raise UserError(f"{ref.path}: has no tokenizer (no tokenizer.json); copy the base model's tokenizer files into it")
    name, arguments = ref.pretrained()
    with _hub_errors(ref):
        try:
            return AutoTokenizer.from_pretrained(name, **arguments)
        except UNREADABLE as error:
            raise UserError(f"{ref.name}: its tokenizer cannot be read: {_one_line(error)}") from error


def load_settings(ref: ModelRef) -> Any:
    """Load a model's config. Raises UserError when it cannot be read."""
    from transformers import AutoConfig

    name, arguments = ref.pretrained()
    with _hub_errors(ref):
        try:
            return AutoConfig.from_pretrained(name, **arguments)
        except (*UNREADABLE, AttributeError) as error:  # the latter of a setting that should hold others and does not
            raise UserError(f"{ref.name}: its config cannot be read: {_one_line(error)}") from error


def quantisation(ref: ModelRef, settings: Any = None) -> str | None:
    """Return how a model's weights are quantised, as its config names it (awq, gptq, bitsandbytes); None where they are not.

    `settings` are those of `load_settings`, from one who has read them.
    """
    if ref.path is not None and ref.path.is_file():
        return None  # a GGUF file is unpacked
    found = getattr(load_settings(ref) if settings is None else settings, "quantization_config", None)
    if found is None:
        return None
    kind = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(kind, "value", kind) or "in a way that it does not name")


def cast(model: Any, dtype: Any) -> Any:
    """Turn what a model saves into another torch dtype, in place; return it.

    `model.to` would round the frequencies of rotary positions as well, which are no weights and float32 in every model: in bfloat16
    they misplace tokens that are far apart.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def load_model(ref: ModelRef, *, dtype: str = "auto", device: str | None = None, classifier: bool = False) -> Any:
    """Load a causal language model, in eval mode. A GGUF file is unpacked into plain weights that can be trained and saved.

    `dtype` auto takes the checkpoint's own (bfloat16 for GGUF). With `classifier` it is a sequence classification model. One whose
    weights are quantised can be used and not moved: it needs the device. Raises UserError for damaged or incomplete files, for
    weights quantised in a way that cannot be read here, and for a classifier whose head the files do not hold.
    """
    import safetensors
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.quantizers import AutoHfQuantizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # loading takes seconds; core.progress talks where it takes longer

    name, arguments = ref.pretrained()
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    kind = quantisation(ref)
    if kind is not None:
        try:
            known = AutoHfQuantizer.supports_quant_method(load_settings(ref).quantization_config)
        except ValueError:  # it does not say how
            known = False
        if not known:
            raise UserError(f"{ref.name}: its weights are quantised ({kind}), which transformers cannot read; {UNQUANTISED}")
        arguments["device_map"] = {"": device or "cpu"}
    with _hub_errors(ref):
        try:
            if ref.path is not None and ref.path.is_file():
                model = load_unpacked(ref.path, torch.bfloat16 if dtype == "auto" else wanted)
            elif classifier:
                model, told = AutoModelForSequenceClassification.from_pretrained(name, dtype=wanted, output_loading_info=True, **arguments)
                if told["missing_keys"]:
                    missing = sorted(told["missing_keys"])[0]
                    raise UserError(f"{ref.name}: is no classification model: its files hold no {missing}; give a reward model")
            else:
                model = AutoModelForCausalLM.from_pretrained(name, dtype=wanted, **arguments)
        except (*UNREADABLE, RuntimeError, safetensors.SafetensorError) as error:
            raise UserError(f"{ref.name}: cannot be loaded: {_one_line(error)}") from error
        except ImportError as error:
            if kind is None:
                raise
            raise UserError(f"{ref.name}: its weights are quantised ({kind}): {_one_line(error)}; or {UNQUANTISED}") from error
    return (model.to(device) if device and kind is None else model).eval()


def context_length(settings: Any) -> int | None:
    """Return the most tokens (prompt and answer) a model's config allows; None where it does not say."""
    text = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@contextmanager
def _hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turn what a missing file or an unreachable Hub raises into one line."""
    try:
        yield
    except OSError as error:
        if ref.path is not None:
            raise UserError(f"{ref.path}: cannot be read: {_one_line(error)}") from error
        cure = "check the name, `--revision`, the network and (for a gated model) HF_TOKEN, or give a folder"
        away = hub_away()
        told = away if away and is_for_want_of_it(error) else _one_line(error)
        alias = str(ref.hub_id).rpartition("/")[2].lower()
        if alias in CATALOGUE:
            cure = f"`sftkit models list` has it as a package, by the name {alias}; else {cure}"
        raise UserError(f"model {ref.name}: not found on the Hub, nor in its cache ({told}); {cure}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def final_facts(ref: ModelRef) -> dict[str, Any]:
    """Return what training wrote beside a model (`sftkit.json`), or nothing. Raises UserError where that is damaged."""
    return {} if ref.path is None else load_object(ref.path / "sftkit.json")
