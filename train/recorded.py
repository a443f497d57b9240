"""One forward and backward pass, recorded as a CUDA graph and played again: the host gives thousands of kernels to the card in one call.

Where passes are short the host's own time is what counts: on one H200's host a pass of 16,384 tokens took 138 ms where half of one of
32,768 took 106 (Qwen2.5-0.5B). Packs of one shape make every pass the same sequence of kernels on the same places in
memory, so that it can be recorded. What a graph computed in stays its own until it is dropped.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch

from ..core.errors import UserError
from .collective import held_here
from .config import PreferenceConfig, TrainConfig

log = logging.getLogger(__name__)

_failed: list[Any] = []  # graphs that were not recorded to their end: PyTorch's allocator of pinned memory goes on asking them


def can_record(config: TrainConfig, half: Any, *, experts: bool = False) -> bool:
    """Say whether compiled passes of such a run are recorded: not where the host has a say. `half`: the 16-bit format computed in.

    Activations computed twice ask for random numbers' state, float16 looks at gradients, and pairs have no shape of their own. Kernels
    for 4 bits are another package's, which a recording would lack without a word if they chose their own stream. Of a model of
    `experts` shared by FSDP2 a recording that fails would end the run.
    """
    apart = config.qlora or isinstance(config, PreferenceConfig) or (experts and config.gpus > 1 and config.parallel == "fsdp")
    return not apart and not config.gradient_checkpointing and half is not torch.float16


class Recorded:
    """Calls `step(inputs, count)`, which returns a loss and adds to the parameters' gradients: first as it is, then from a recording.

    Tensors among the inputs keep their shapes and formats from call to call, other values may change only if the step's kernels do not
    depend on them. What cannot be recorded, a step that waits for the device, goes on as it is, which is said once.
    Raises what the step raises; memory that runs out while recording is an OutOfMemoryError as anywhere.
    """

    def __init__(self, step: Callable[[dict[str, Any], torch.Tensor], torch.Tensor], parameters: Iterable[torch.nn.Parameter]) -> None:
        self._step, self._parameters = step, list(parameters)
        self._stream = torch.cuda.Stream()
        self._fails = False
        self._forget()

    def _forget(self) -> None:
        self._graph: Any = None
        self._learned: list[tuple[torch.nn.Parameter, torch.Tensor]] = []  # with the places of their gradients
        self._inputs: dict[str, Any] = {}  # what is recorded reads, and what it leaves
        self._count = self._loss = torch.empty(0)

    def __call__(self, inputs: dict[str, Any], count: torch.Tensor) -> torch.Tensor:
        """Return the loss, in memory of its own."""
        if self._fails:
            return self._step(inputs, count)
        if not self._learned:
            return self._first(inputs, count)
        begins = self._take_gradients()
        # where an update begins: by then the optimizer has its state, and what recording takes is what a run takes
        if self._graph is None and not (begins and self._record(inputs, count)):
            return self._step(inputs, count)
        for name, each in self._inputs.items():
            if isinstance(each, torch.Tensor):
                assert each.shape == inputs[name].shape, name
                each.copy_(inputs[name])
        self._count.copy_(count)
        self._graph.replay()
        return self._loss.clone()

    def drop(self) -> None:
        """Give the graph's memory back, before something else needs it; after that it is recorded anew."""
        self._forget()
        torch.cuda.empty_cache()

    def _first(self, inputs: dict[str, Any], count: torch.Tensor) -> torch.Tensor:
        """Make the first pass on the recording's stream: code is compiled, workspaces are taken, gradients get their places."""
        ours = torch.cuda.current_stream()
        self._stream.wait_stream(ours)
        with torch.cuda.stream(self._stream):
            loss = self._step(inputs, count)
        ours.wait_stream(self._stream)
        self._learned = [(each, each.grad) for each in self._parameters if each.grad is not None]
        return loss

    def _take_gradients(self) -> bool:
        """Put zeroed gradients back where they were, once the optimizer's zero_grad has taken them off; return whether it had."""
        if self._learned[0][0].grad is not None:
            return False
        torch._foreach_zero_([held_here(grad) for _, grad in self._learned])
        for parameter, grad in self._learned:
            parameter.grad = grad
        return True

    def _record(self, inputs: dict[str, Any], count: torch.Tensor) -> bool:
        """Record the step; return whether that went."""
        self._inputs = {name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}
        self._count = count.clone()
        graph, pool, ours = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        try:
            # within our own stream, which PyTorch does not come back to where a recording fails; by thread, because another one pins
            # the next batches' memory meanwhile
            with torch.cuda.stream(ours), torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                self._loss = self._step(self._inputs, self._count)
        except RuntimeError as error:
            _end(graph, pool)
            self.drop()
            within = error.__context__  # what ended the recording, where its end failed too
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if isinstance(within, torch.OutOfMemoryError | UserError) or not isinstance(within, Exception | None):
                raise within from None
            return self._give_up(within or error)
        known = {id(each) for each, _ in self._learned}
        if late := [each for each in self._parameters if each.grad is not None and id(each) not in known]:
            for each in late:  # their gradients were to be what each replay leaves of its own pass, until zero_grad took them off
                each.grad = None
            self.drop()
            return self._give_up("weights without a gradient in the first pass have one in the next")
        self._graph = graph
        return True

    def _give_up(self, reason: object) -> bool:
        """Record no more, and say why."""
        self._fails = True
        told = " ".join(str(reason).split())[:160]
        log.warning("passes cannot be recorded for this model (%s): each is launched by the host", told)
        return False


def _end(graph: Any, pool: tuple[int, int]) -> None:
    """Take a recording that failed as over, which PyTorch (2.11 to 2.13) does not where what is recorded has waited for the device.

    Its memory would stay taken, none of what is cached would be given back, and who draws random numbers would be told that there is a
    recording.
    """
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())  # the same numbers, without a mark
    try:
        graph.pool()
    except RuntimeError:  # it did not come to its end
        _failed.append(graph)
        with suppress(RuntimeError):  # nor to its beginning
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
