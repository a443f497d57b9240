"""An adapter and its base made one model: in float32, into weights that no one has rounded, and only if both then say the same."""

import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.chat import Chat, load_chat
from ..core.errors import UserError
from ..core.files import load_object, write_json
from ..core.models import ModelRef, cast, final_facts, load_model, load_settings, model_identity, quantisation, resolve_model
from .disk import make_place_for, room_on_disk

log = logging.getLogger(__name__)

MOST_KL = 1e-3  # nats a token, KL(adapter ‖ merged)
PROMPTS, POSITIONS = 32, 8  # what the two are held against each other on: the last positions of so many prompts
PROMPT_TOKENS = 64
PROBES = [
    f"{ask} {topic}."
    for ask in ("Explain in two sentences", "Write a short story about", "List three facts about", "Translate into French: I like")
    for topic in ("the sea", "prime numbers", "a red bicycle", "photosynthesis", "the Roman Empire", "good bread", "sorting", "winter")
]


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merge made."""

    model: Path
    kl: float
    prompts: int
    dtype: str

    def summary(self) -> str:
        """Write it for people."""
        return f"model: {self.model} ({self.dtype}; KL(adapter ‖ merged) {self.kl:.1e} nats a token on {self.prompts} prompts)"


def merge(adapter: str | Path, out: Path, *, base: str | None = None, dtype: str | None = None, revision: str | None = None) -> MergeResult:
    """Merge an adapter (a folder, or the run that trained it) into its base, and save the model as the folder `out`.

    The base is the one that the adapter names, unless told. `dtype` is the base's own unless told. Raises UserError for an adapter
    that is not whole or not of this base, for a quantised base, and when the merged model says something else than the two apart.
    """
    folder = find_adapter(Path(adapter))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; give a new folder")
    make_place_for(out)
    ref = find_base(folder, base, revision)
    chat = load_chat(ref)
    model = load_adapter(load_base(ref), folder)
    own = torch.bfloat16 if ref.path is not None and ref.path.is_file() else load_settings(ref).dtype or torch.float32
    wanted = getattr(torch, dtype) if dtype else own
    probes = [chat.prompt([{"role": "user", "content": text}]) for text in PROBES]
    whole, kl, learned = merge_adapter(model, probes, wanted)
    name = str(wanted).removeprefix("torch.")
    if not kl <= MOST_KL:
        tied = "the adapter changes a weight that stands in two places (a tied head): use it as it is, or train it again on other layers"
        mend = "give --dtype float32" if wanted != torch.float32 else tied
        raise UserError(
            f"{folder}: merged in {name} it says something else (KL(adapter ‖ merged) {kl:.2g} nats a token, allowed {MOST_KL:g}; the"
            f" adapter is {learned:.2g} from its base); {mend}"
        )
    facts = {
        "base": ref.name,
        "identity": model_identity(ref),
        "template": chat.fingerprint(),
        "merged": {"adapter": str(folder), "kl": kl, "learned": learned},
    }
    with room_on_disk(out, then="nothing is left of it"):
        save_model(whole, chat, out, facts)
    return MergeResult(model=out, kl=kl, prompts=len(probes), dtype=name)


def find_adapter(path: Path) -> Path:
    """Return the folder of an adapter, given it or its run. Raises UserError where there is none."""
    if not path.exists():
        raise UserError(f"{path}: no such folder; give an adapter, or the run that trained it")
    for folder in (path / "train" / "adapter", path / "adapter", path):
        if (folder / "adapter_config.json").exists():
            if not any((folder / name).exists() for name in ("adapter_model.safetensors", "adapter_model.bin")):
                raise UserError(f"{folder}: holds no weights (adapter_model.safetensors); copy the adapter again")
            return folder
    if (path / "train" / "final").exists():
        raise UserError(f"{path}: this run trained the whole model, there is nothing to merge: its model is {path / 'train' / 'final'}")
    raise UserError(f"{path}: is no adapter (no adapter_config.json in it)")


def find_base(adapter: Path, base: str | None, revision: str | None = None) -> ModelRef:
    """Return the model that an adapter belongs to. Raises UserError for one that is not here, or not the one it was trained on."""
    settings = load_object(adapter / "adapter_config.json")
    named = str(settings.get("base_model_name_or_path") or "")
    if base is None and not named:
        raise UserError(f"{adapter}: does not say which model it was trained on; give it with --base")
    try:
        ref = resolve_model(base or named, revision=revision or (None if base else settings.get("revision")))
    except UserError as error:
        raise UserError(f"{error}" if base else f"{adapter}: was trained on {named}, which is not here ({error}); give --base") from None
    trained_on = final_facts(ModelRef(str(adapter), path=adapter)).get("identity")
    if trained_on is not None and trained_on != model_identity(ref):
        raise UserError(f"{adapter}: was trained on {named}, and {ref.name} has other weights; give that one with --base")
    if trained_on is None and named and Path(named).name != Path(ref.name).name:
        log.warning("%s: names %s as its base; it is merged into %s as told, if the shapes fit", adapter, named, ref.name)
    return ref


def load_base(ref: ModelRef) -> Any:
    """Load the model to merge into, in float32. Raises UserError for one whose files are quantised."""
    refuse_quantised(ref)
    return load_model(ref, dtype="float32")


def refuse_quantised(ref: ModelRef) -> None:
    """Raise UserError for a model whose weights were rounded to a few bits: a merged adapter, or a step, would be lost in the rounding."""
    kind = quantisation(ref)
    if kind is not None:
        raise UserError(
            f"{ref.name}: is quantised ({kind}), and what is learned would be lost in its rounding; give the unquantised model (training"
            " with --qlora rounds it by itself)"
        )


def load_adapter(base: Any, folder: Path) -> Any:
    """Return the base with an adapter in it. Raises UserError unless every weight that the two expect is there, in its shape."""
    import safetensors
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what 5.24 renames
            model = get_peft_model(base, PeftConfig.from_pretrained(str(folder)))
        found = load_peft_weights(str(folder), device="cpu")
    except (ValueError, TypeError, KeyError, EOFError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder}: does not fit its base, or is damaged: {' '.join(str(error).split())[:200]}") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing = sorted(expected.keys() - found.keys())
    foreign = sorted(found.keys() - expected.keys() - model.state_dict().keys())
    bent = sorted(name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape)
    if missing or foreign or bent:
        first = (bent or missing or foreign)[0]
        shapes = f" is {tuple(found[first].shape)}, expected {tuple(expected[first].shape)}" if bent else ""
        raise UserError(
            f"{folder}: is not whole, or belongs to another base: of {len(expected)} weights {len(missing)} are missing, {len(bent)} have"
            f" another shape, {len(foreign)} are unknown ({first}{shapes}); save it from all processes, or give its own base with --base"
        )
    set_peft_model_state_dict(model, found)
    return model.eval()


def merge_adapter(model: Any, prompts: Sequence[Sequence[int]], dtype: torch.dtype) -> tuple[Any, float, float]:
    """Merge an adapter into the model it is in, and round to `dtype`; return the model and two divergences, in nats a token.

    They are KL(adapter ‖ merged), what rounding changed, and KL(adapter ‖ base), what the adapter had learned.
    The sum is made in float32: a product of small matrices loses most of itself in 16 bits.
    """
    asked = [list(each[:PROMPT_TOKENS]) for each in prompts[:PROMPTS] if each]
    model = model.float().eval()
    apart = _last_logprobs(model, asked)
    with model.disable_adapter():
        learned = _divergence(apart, _last_logprobs(model, asked))
    whole = cast(model.merge_and_unload(), dtype).float()
    off = _divergence(apart, _last_logprobs(whole, asked))
    return cast(whole, dtype), off, learned


def _divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean of KL(one ‖ other) over positions, of log-probabilities [N, V]."""
    return max(0.0, float((one.exp() * (one - other)).sum(-1).mean()))  # of like ones rounding leaves less than nothing


@torch.no_grad()
def _last_logprobs(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    device = next(model.parameters()).device
    parts = [model(input_ids=torch.tensor([each], device=device), use_cache=False).logits[0, -POSITIONS:].float().cpu() for each in prompts]
    return torch.cat(parts).log_softmax(-1)


def save_model(model: Any, chat: Chat, folder: Path, facts: dict[str, Any]) -> None:
    """Save a model with its tokenizer, template, stop ids and `facts` (sftkit.json), whole or not at all."""
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    chat.configure(model)
    try:
        model.save_pretrained(scratch)
        chat.save(scratch)
        write_json(scratch / "sftkit.json", facts)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
