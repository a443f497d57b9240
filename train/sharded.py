"""FSDP2: each process keeps its share of the weights, gradients and optimizer state, and borrows a layer's weights while it computes.

The numbers are those of one GPU. There, autocast makes 16-bit copies of float32 weights, which stand until the way back; here a layer's
weights are gathered in 16 bits, nothing more stands, and what goes from layer to layer is bfloat16 as there. Norms read their weights in
32 bits, which therefore stand whole on each process, as biases do: they are what the optimizer does not decay, a group by itself, and
less than a thousandth of a model. Gradients are added up in float32.

An adapter is small and stands whole, too: FSDP2 has the host handle tensor by tensor, and most of them are the adapter's.

A checkpoint is written whole, tensor by tensor, as a run on one GPU writes it: any number of processes goes on from it. PyTorch's
fully_shard is called here, and not accelerate's plugin, whose checkpoints only as many processes read, an adapter's with the whole base
in it. Zhao et al. 2023, arXiv 2304.11277.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..core.errors import UserError
from .trainer import Trainer


class ShardedTrainer(Trainer):
    """The trainer on shards. The model stays on the CPU, whole, until the optimizer is made: then a checkpoint is in it already."""

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Leave it where it is: layer by layer, it moves when it is sharded."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Shard the model, then make the optimizer of its shards."""
        if not isinstance(self.model, FSDPModule):
            decayed = set(self.get_decay_parameter_names(self.model))
            beside = {weight for name, weight in self.model.named_parameters() if name not in decayed}
            shard(self.model, self.args.device.type, torch.bfloat16 if self.args.bf16 else None, beside)
        return super().create_optimizer(*args, **kwargs)

    def one_pass(self, model: Any, inputs: dict[str, Any], count: torch.Tensor) -> torch.Tensor:
        """Make a pass that can be recorded with all that FSDP2 does on streams of its own, and leaves nothing for the next to wait for.

        Raises UserError where it cannot be recorded: FSDP2 stands in the middle of a pass then, and none can follow.
        """
        try:
            loss = super().one_pass(model, inputs, count)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not _recording():
                raise
            told = " ".join(str(error).split())[:160]
            raise UserError(f"passes of this model cannot be recorded on shards of it ({told}); give compile: false") from error
        beside = model._get_fsdp_state()._comm_ctx
        beside.all_gather_state = None  # with an event of this pass, which the next one would wait for: a recorded one must not
        for stream in [each for each in vars(beside).values() if isinstance(each, torch.cuda.Stream)] if _recording() else []:
            with torch.cuda.stream(stream):
                taken = _recording()
            if taken:
                torch.cuda.current_stream().wait_stream(stream)  # a recording ends with all that it began
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, of an adapter's model the adapter alone."""
        weights = whole_weights(self.model, trained=hasattr(self.model, "get_base_model"))
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = whole_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
            self.optimizer.load_state_dict(sharded_state(self.optimizer, state))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def _recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def shard(model: Any, device: str, half: torch.dtype | None = None, exact: Collection[torch.nn.Parameter] = ()) -> None:
    """Give each process its share of every tensor but an adapter's, layer by layer; what stands outside of layers is gathered for a step.

    `half` is the 16-bit format that layers compute in, None for their weights' own. Weights that are not in it and `exact` stay whole.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    layers = set(base._no_split_modules or ())
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False)
    whole = {each for each in model.parameters() if each.requires_grad} if base is not model else set()
    if half:
        whole |= {each for each in exact if each.dtype is not half}
    for each in whole:
        each.data = each.data.to(device)
    for each in [module for module in base.modules() if type(module).__name__ in layers]:
        fully_shard(each, mesh=mesh, mp_policy=policy, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def whole_weights(model: Any, *, trained: bool = False) -> dict[str, torch.Tensor]:
    """Return a model's weights (with `trained` only those) whole, on the CPU, to the first process; all processes have to ask.

    A model that is not sharded has them already. What is tied comes once.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the outermost weights still stand gathered
    known = set(model.state_dict(keep_vars=True))
    named = [*model.named_parameters(), *((name, each) for name, each in model.named_buffers() if name in known)]
    whole = {name: _whole(each) for name, each in named if each.requires_grad or not trained}
    return {name: each for name, each in whole.items() if each is not None}


def whole_state(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state whole, on the CPU, to the first process; all processes have to ask."""
    state: dict[str, Any] = optimizer.state_dict()
    whole = {
        place: {name: _whole(each) if isinstance(each, torch.Tensor) else each for name, each in values.items()}
        for place, values in state["state"].items()  # these are the optimizer's own, and stay as they are
    }
    return {**state, "state": whole}


def _whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """Gather a tensor; return it to the first process alone, so that a machine's memory holds it once."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu() if torch.distributed.get_rank() == 0 else None


def sharded_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return a whole state with this process's share of each tensor."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for place, values in state["state"].items():
        weight = weights[place]
        for name, each in values.items():
            if isinstance(weight, DTensor) and isinstance(each, torch.Tensor) and each.shape == weight.shape:
                values[name] = distribute_tensor(each, weight.device_mesh, weight.placements, src_data_rank=None)
    return state


def sharing(kind: type[Trainer]) -> type[Trainer]:
    """Return the trainer of a kind whose processes share the weights."""
    return ShardedTrainer if kind is Trainer else type(kind.__name__, (ShardedTrainer, kind), {})
