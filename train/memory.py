"""What a training step will take in memory, known before it runs: the step itself, replayed on tensors that hold nothing.

The model's own code, our packs' loss and autograd run on fake tensors (torch's FakeTensorMode: shapes without data), and every
storage is counted from when it is made until it is let go. So saved activations, copies that autocast makes, gradients as they come
and the pieces of the head are all in it, for any architecture. A few layers are replayed and the rest follows: layers are alike, so
every phase of the step grows by the same amount with each, or with each turn where kinds of layers take turns. What runs inside kernels
is added from what is known of them. Of experts each token takes as many, whichever these are, so that routing decides no size.
"""

import copy
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from . import head
from .adapters import adapter_config, fuse_adapters
from .collective import sent_at_once
from .config import TrainConfig
from .rounding import BESIDE, PIECE

REPLAYED = 2  # layers in the smaller replay, and more in the larger: the whole depth follows from these
BLOCK = 512  # bytes: what PyTorch's allocator rounds up to
WORKSPACE = 2 * (32 << 20)  # cuBLAS takes 32 MiB on Hopper for the forward pass's handle, and again for autograd's
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight in nf4 with its scales in 8 bits (Dettmers et al. 2023, arXiv 2305.14314)
NAME = "sftkit_replayed"


class NotReplayed(Exception):
    """A model's own code cannot run on tensors that hold nothing, or takes no packs: it looks at values, or lacks a kernel."""


@contextmanager
def foreign_code() -> Iterator[None]:
    """Raise NotReplayed for whatever the code of a model raises in this block, which is not ours."""
    try:
        yield
    except NotReplayed:
        raise
    except Exception as error:
        raise NotReplayed(" ".join(str(error).split())[:160] or type(error).__name__) from error


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a training step takes. `peak` is the highest at any moment; the others say what stands all the time."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # all else, at the moment of the peak
    saved_layer: int  # what one layer keeps for its way back
    peak: int

    def shared(self, processes: int, gathered: int, *, accumulates: bool, adapter: bool = False) -> "Memory":
        """Return what each of several processes takes that share what stands (FSDP2), with what is gathered for a while.

        Of an adapter's model they share the base alone: the adapter, as large as its gradients, stands on each with all that belongs to it.
        """
        apart = [self.weights - self.gradients, 0, 0] if adapter else [self.weights, self.gradients, self.optimizer]
        spared = [round(each * (1 - 1 / processes)) for each in apart]
        own = [each - less for each, less in zip((self.weights, self.gradients, self.optimizer), spared, strict=True)]
        peak = self.peak - spared[0] - spared[2] - (spared[1] if accumulates else 0) + gathered
        return Memory(
            weights=own[0], gradients=own[1], optimizer=own[2], activations=peak - own[0] - own[2], saved_layer=self.saved_layer, peak=peak
        )

    def averaged(self, sent: int, *, recorded: bool) -> "Memory":
        """Return what each of several processes takes that average gradients in a copy of `sent` bytes.

        By then activations are gone, but the memory of a recorded pass stays its own.
        """
        standing = self.weights + self.optimizer
        peak = self.peak + sent if recorded else max(self.peak, standing + self.gradients + sent + WORKSPACE)
        return replace(self, peak=peak, activations=peak - standing)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step is made of."""

    tokens: int  # of one forward pass
    scored: int  # positions of them that are learned
    accumulates: bool  # several forward passes in an update: gradients stand while the next one runs
    adapter: bool = False
    quantised: bool = False  # the base in 4 bits
    rank: int = 16
    checkpointing: bool = False
    compiled: bool = False
    recorded: bool = False  # and its passes played from a recording
    dtype: torch.dtype = torch.float32  # of the weights
    half: torch.dtype | None = torch.bfloat16  # that the forward pass computes in; None: the weights'


def predict(settings: Any, load: Load) -> Memory:
    """Return what a step of a model with these settings (a transformers config) takes on a GPU. Takes a second or two.

    Raises NotReplayed for a model whose code does not run on tensors without data, or takes no rows end to end.
    """
    depth = settings.get_text_config().num_hidden_layers
    counts = replayed(layer_kinds(settings))
    replays = [_replay(_with_layers(settings, count), load) for count in counts]
    if len(replays) == 1:
        return replays[0].memory(load)
    return replays[0].extended(replays[1], counts, depth).memory(load)


def layer_kinds(settings: Any) -> list[frozenset[tuple[Any, ...]]]:
    """Return for each decoder layer what it is made of: layers that return the same are alike."""
    layers = decoder_layers(bare_model(settings, Load(tokens=1, scored=1, accumulates=False)))
    return [frozenset((name, tuple(each.shape)) for name, each in layer.named_parameters()) for layer in layers]


def replayed(kinds: list[Any]) -> tuple[int, ...]:
    """Return how many layers the replays have that all of them follow from: they end as the whole does, whole turns apart.

    DeepSeek-V3 begins with three layers that have no experts; in Qwen3-Next each fourth layer is another.
    """
    depth = len(kinds)

    def lead(turn: int) -> int:  # layers before those that take turns
        return next((place for place in range(depth - turn, 0, -1) if kinds[place - 1] != kinds[place - 1 + turn]), 0)

    turn = min(range(1, depth + 1), key=lambda turn: lead(turn) + 2 * turn)
    step = turn * -(-REPLAYED // turn)
    first = lead(turn) + step + (depth - lead(turn)) % turn
    return (first, first + step) if first + step < depth else (depth,)


def gathered(settings: Any, load: Load) -> int:
    """Return the bytes of weights that a process of several which share them borrows at once: what is outside of layers, and two layers."""
    model = bare_model(settings, load)
    layers = decoder_layers(model)
    inside = {id(each): each for layer in layers for each in layer.parameters()}
    outside = [each for each in model.parameters() if id(each) not in inside]
    layer = sum(each.numel() for each in inside.values()) / len(layers)
    return round(sum(each.numel() * each.element_size() for each in outside) + 2 * layer * (load.half or load.dtype).itemsize)


def copied(settings: Any, load: Load, *, shared: bool) -> int:
    """Return the bytes of the copy in which processes average gradients that each has whole: of `shared` weights an adapter's alone."""
    if shared and not load.adapter:
        return 0
    return sent_at_once([each for each in bare_model(settings, load).parameters() if each.requires_grad])


@dataclass(kw_only=True)
class Replay:
    """Bytes of a replayed step: what stands, and the highest of each phase."""

    weights: int  # those of the linear layers of the decoder apart
    linear: int  # numbers in the linear layers that a 4-bit base packs
    largest: int  # the largest of them
    trained: int  # bytes of trained weights
    saved: int  # by the first layers' fellows, each
    phases: tuple[int, ...]  # forward and head; the last layer's way back; the first one's; the embedding's

    def extended(self, other: "Replay", counts: tuple[int, ...], depth: int) -> "Replay":
        """Follow the line from two replays to `depth` layers."""

        def line(one: int, two: int) -> int:
            return round(one + (two - one) * (depth - counts[0]) / (counts[1] - counts[0]))

        return Replay(
            weights=line(self.weights, other.weights),
            linear=line(self.linear, other.linear),
            largest=other.largest,
            trained=line(self.trained, other.trained),
            saved=other.saved,
            phases=tuple(line(one, two) for one, two in zip(self.phases, other.phases, strict=True)),
        )

    def memory(self, load: Load) -> Memory:
        """Add up."""
        weights, dynamic = self.weights, max(self.phases)
        if load.quantised:
            weights += round(self.linear * (FOUR_BITS - load.dtype.itemsize))
            dynamic += self.largest * (load.half or load.dtype).itemsize  # unpacked for its product
        optimizer = 2 * self.trained
        standing = weights + optimizer
        rounds = load.half is torch.bfloat16 if load.quantised else load.dtype is torch.bfloat16 and not load.adapter
        beside = BESIDE * min(PIECE, self.trained // 2) if rounds else 0  # the update itself needs the gradients, and this
        peak = max(standing + dynamic + (beside if load.recorded else 0), standing + self.trained + beside) + WORKSPACE
        return Memory(
            weights=weights, gradients=self.trained, optimizer=optimizer, activations=peak - standing, saved_layer=self.saved, peak=peak
        )


def _with_layers(settings: Any, count: int) -> Any:
    """Return a copy of a config with fewer layers; lists with an entry a layer are cut too."""
    shorter = copy.deepcopy(settings)
    text = shorter.get_text_config()
    depth = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(text, key, type(value)(value[:count]))
    text.num_hidden_layers = count
    return shorter


class Live(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        """Take storages for ones that stood before."""
        self._known |= {each.untyped_storage()._cdata for each in tensors}

    def count(self, tensor: torch.Tensor) -> None:
        """Enter a storage that is seen for the first time."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, _rounded(storage.nbytes())
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def next_peak(self) -> int:
        """Return the highest since the last call, and begin anew from what is live."""
        found, self.peak = self.peak, self.now
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, torch.Tensor):
                self.count(each)
        return out


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class _Attention(torch.autograd.Function):
    """Keeps and takes what the kernel for variable lengths does (flash attention 2), and computes nothing. [T, heads, d].

    Where rows are short, `row_attention` keeps the same and where each token's row stands, and takes nothing but the gradients on its
    way back. That is counted for neither: the peaks of a step stand elsewhere, at the head or in the gated products.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = value.new_empty(*query.shape[:2], value.shape[-1])  # narrower than the query in DeepSeek's attention
        sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, _, sums = ctx.saved_tensors
        added = torch.empty_like(query, dtype=torch.float32)  # the query's gradient is added up in float32
        products = torch.empty_like(sums)
        grouped = key.shape[1] != query.shape[1]  # keys' and values' gradients by the heads of queries, summed after
        spread = [each.new_empty(*query.shape[:2], each.shape[-1]) for each in (key, value)] if grouped else []
        made = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value)]
        del added, products, spread
        return tuple(made)


def replayed_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, *,
    s_aux: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Stand for `attention.packed_attention` in a replay."""
    if s_aux is not None:
        raise NotReplayed("attention with sinks, which is trained row by row, by the model's own code")
    q, k, v = (each[0].transpose(0, 1) for each in (query.to(value.dtype), key.to(value.dtype), value))
    return _Attention.apply(q, k, v)[None], None


def bare_model(settings: Any, load: Load) -> Any:
    """Return a model on the meta device, as training has it."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, replayed_attention)
    with foreign_code(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(settings), dtype=load.dtype)
        model.set_attn_implementation(NAME)
    if load.adapter:
        from peft import get_peft_model

        wanted = adapter_config(TrainConfig(lora_rank=load.rank), model)
        with foreign_code(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, wanted)
        if not load.quantised:  # four bits are PEFT's own affair
            fuse_adapters(adapted)
        for weight in model.parameters() if load.quantised and load.half is not torch.float16 else ():
            weight.data = weight.data.to(torch.bfloat16) if weight.requires_grad else weight.data
        if load.checkpointing:
            model.enable_input_require_grads()
    if load.checkpointing:
        with foreign_code(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.24 renames it, 5.17 knows no other name
            model.gradient_checkpointing_enable()
    return model.train()


def _replay(settings: Any, load: Load) -> Replay:
    from transformers.integrations import moe  # whose loop over experts keeps and takes what the kernel does, in all formats

    losses = _fused_losses if load.compiled else head._losses
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = bare_model(settings, load)
    with fake, mock.patch.object(head, "_losses", losses), mock.patch.object(moe, "_can_use_grouped_mm", return_value=False):
        model.to_empty(device="cpu")
        model.tie_weights()
        layers = decoder_layers(model)
        weights = list(model.parameters())
        trained = [each for each in weights if each.requires_grad]
        inside = {module for layer in layers for module in layer.modules()}
        packed = (
            [each.weight for each in inside if isinstance(each, torch.nn.Linear) and not each.weight.requires_grad] if load.adapter else []
        )
        live = Live()
        live.ignore([*weights, *model.buffers()])
        if load.accumulates:
            for each in trained:
                each.grad = torch.empty_like(each)
        batch = _batch(load)
        phases, saved = _step(model, layers, batch, load, live)
        return Replay(
            weights=sum(_rounded(each.untyped_storage().nbytes()) for each in {id(each): each for each in weights}.values()),
            linear=sum(each.numel() for each in packed),
            largest=max((each.numel() for each in packed), default=0),
            trained=sum(_rounded(each.numel() * each.element_size()) for each in trained),
            saved=saved,
            phases=phases,
        )


def _step(model: Any, layers: Any, batch: dict[str, Any], load: Load, live: Live) -> tuple[tuple[int, ...], int]:
    """Replay one forward and backward pass; return the peak of each phase, and the bytes that a layer saved."""
    peaks: list[int] = []

    def enter(_grad: torch.Tensor) -> None:
        peaks.append(live.next_peak())

    def watch(_module: Any, _inputs: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            hidden.register_hook(enter)

    handles = [layer.register_forward_hook(watch) for layer in layers]
    half = load.half if load.half is not load.dtype or load.adapter else None  # an adapter is float32 on whatever base
    computing = torch.autocast("cpu", dtype=half) if half is not None else nullcontext()
    with live, saved_by(layers[-1], set(map(_storage, model.parameters()))) as saved:
        for each in model.parameters():
            if each.grad is not None:
                live.count(each.grad)
        with computing, mock.patch.object(model.base_model, "forward", foreign_code()(model.base_model.forward)):
            loss = head.loss_sum(model, batch) / 2
        with foreign_code():
            loss.backward()
    peaks.append(live.next_peak())
    for handle in handles:
        handle.remove()
    kept = sum(saved.values())
    order = (peaks[0], peaks[1], peaks[len(layers)] if len(peaks) > len(layers) else peaks[-1], peaks[-1])
    if load.compiled and not load.checkpointing and all(map(_is_gated, layers)):  # torch.compile's partitioner keeps less of a layer
        less = kept - compiled_layer(model, load)
        count = len(layers)
        order = (order[0] - less * count, order[1] - less * count, order[2] - less, order[3])
        kept -= less
    return order, kept


@contextmanager
def saved_by(layer: Any, weights: set[int]) -> Iterator[dict[int, int]]:
    """Yield a mapping that gets the bytes of each storage that a layer saves for its way back, its own weights left out."""
    found: dict[int, int] = {}
    inside = False

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if inside and _storage(tensor) not in weights:
            found[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    handles = [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def decoder_layers(model: Any) -> Any:
    """Return the list of a model's decoder layers. Raises NotReplayed where none has as many as the config says."""
    count = model.config.get_text_config().num_hidden_layers
    for each in model.modules():
        if isinstance(each, torch.nn.ModuleList) and len(each) == count:
            return each
    raise NotReplayed(f"no list of {count} decoder layers in {type(model).__name__}")


def compiled_layer(model: Any, load: Load) -> int:
    """Return the bytes that a compiled layer saves: what torch.compile's partitioner was seen to keep of a gated decoder layer.

    Its input and the stream after attention; two inverse norms; queries, keys and values as attention takes them, its output and sums;
    both halves of the gated product. The rest is made again on the way back (`trainer.compile_layers`).
    """
    config = model.config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    small, stream = (load.half or load.dtype).itemsize, (load.half if load.half is torch.bfloat16 else load.dtype).itemsize
    token = 2 * stream * width + small * (2 * (heads + groups) * size + 2 * config.intermediate_size) + 4 * heads + 8
    layer = decoder_layers(model)[0]
    if any("norm" in name and "layernorm" not in name for name, _ in layer.named_modules()):
        token += small * (heads + groups) * size + 4 * (heads + groups)  # queries and keys before they are normed (Qwen3, Gemma 3)
    if load.adapter:  # narrow products; and in four bits the attention's output once more: PEFT takes it through float32
        linear = [each for each in layer.modules() if isinstance(each, torch.nn.Linear)]
        token += small * load.rank * sum(1 for each in linear if each.weight.requires_grad) // 2
        token += small * heads * size if load.quantised else 0
    return load.tokens * token


def _is_gated(layer: Any) -> bool:
    """Say whether a layer is what `compiled_layer` was seen for: attention and a gated product of full matrices, no experts, no state."""
    own = {name for name, each in layer.named_parameters() if each.dim() > 1 and "lora_" not in name}
    names = {name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2] for name in own}
    separate = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    return names in (separate, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})  # the latter: Phi-3


def _fused_losses(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand for `head._compiled_losses`, which makes nothing but a number."""
    return torch.zeros((), dtype=torch.float32), logits


def _batch(load: Load) -> dict[str, Any]:
    places = torch.zeros(1, load.tokens, dtype=torch.long)
    bounds = torch.zeros(2, dtype=torch.int32)
    scored = torch.zeros(load.scored, dtype=torch.long)
    return {
        "input_ids": places, "position_ids": places, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": load.tokens,
        "max_length_k": load.tokens, "score_at": scored, "targets": scored, "static": load.compiled, "alone": False,
    }  # fmt: skip


def expert_weights(model: Any) -> list[torch.Tensor]:
    """Return the weights of experts, each [experts, ...] of a whole layer, as transformers keeps them."""
    holders = [each for each in model.modules() if isinstance(getattr(each, "num_experts", None), int)]
    return [weight for each in holders for weight in each.parameters(recurse=False) if weight.dim() == 3]


def experts_taken(config: Any) -> int | None:
    """Return how many experts a token goes to; None where a text config names none."""
    return getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)  # the latter: Gemma 4


def token_flops(model: Any, mean_length: float) -> float:
    """Return the operations that training takes for a token: 6 for each weight of a matrix product, 4 for a frozen one, and attention.

    Of experts those count that a token goes to; `mean_length` is in tokens a row. Kaplan et al. 2020, arXiv 2001.08361, section 2.1;
    attention over half of a row on average, 12 · layers · width · length / 2.
    """
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    tied = getattr(config, "tie_word_embeddings", False)
    weights = [each for each in model.parameters() if each.dim() > 1 and (tied or each is not embedding)]
    taken = experts_taken(config)
    experts = {id(each): taken / len(each) for each in expert_weights(model)} if taken else {}
    products = sum(each.numel() * experts.get(id(each), 1) * (6 if each.requires_grad else 4) for each in weights)
    return products + 6 * config.num_hidden_layers * config.hidden_size * mean_length
