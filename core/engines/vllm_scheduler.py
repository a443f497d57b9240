"""What vLLM's engine process sends back: each answer once, when it is whole, not a message for every token of every sequence.

vLLM's engine tells the process that feeds it of every new token: at a thousand sequences a thousand objects a step are built,
packed, sent, unpacked and looked at, and with each a log-probability in arrays of its own, where it is asked for, although nobody
waits for anything but the whole answer and the sum of its log-probabilities. For a small model that is most of a step. Here the tokens
are gathered where they arise, an answer that had a logit that is not a number is ended as failed, and a sequence that goes on in the
middle of a block of its cache is not looked at as if it might need another one: of 62 ms that a step of a 1.5 B model took on an H200,
the card worked for 14, and 15 went to scheduling. vLLM takes a scheduler by its name (`scheduler_cls`).
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import RequestStatus

from .vllm_errors import NOT_A_NUMBER

SECONDS_BETWEEN_SIGNS = 0.5  # of life, where no answer ends


@dataclass(slots=True)
class _Gathered:
    """What a request has got since it was last told of."""

    asked: bool  # for log-probabilities: a step has them of all its sequences, if of one
    looked_at: bool  # its text decides where it ends, which only the process that feeds the engine sees
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    broken: bool = False  # since its beginning, a logit was not a number


class _Gathering:
    """Keeps what a request has got so far, and lets it go with the last token. Stands before one of vLLM's schedulers."""

    requests: dict[str, Any]  # vLLM's, by name
    kv_cache_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gathered: dict[str, _Gathered] = {}  # by request
        self._last_sign = time.monotonic()
        self._block = _shorten_way_within_blocks(self.kv_cache_manager)

    def add_request(self, request: Any) -> None:
        """Take a request in as vLLM does; what it asks for is not known any more once its last token is there."""
        super().add_request(request)  # type: ignore[misc]
        params = request.sampling_params
        asked, looked_at = (params.num_logprobs is not None, bool(params.stop)) if params is not None else (False, False)
        self._gathered[request.request_id] = _Gathered(asked, looked_at)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Do as vLLM does, and take out what belongs to answers that are not whole."""
        column, places = self._take_logprobs(model_runner_output), model_runner_output.req_id_to_index
        found = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for client, outputs in list(found.items()):
            outputs.outputs = self._whole(outputs.outputs, column, places)
            if not outputs.outputs and outputs.finished_requests is None and outputs.scheduler_stats is None:
                del found[client]
        return found

    @staticmethod
    def _take_logprobs(model_runner_output: Any) -> list[float] | None:
        """Take the sampled tokens' log-probabilities out of a step in one piece; None where it holds others, which vLLM parts itself."""
        logprobs = model_runner_output.logprobs
        if logprobs is None or logprobs.cu_num_generated_tokens is not None or logprobs.logprobs.shape[1] != 1:
            return None
        model_runner_output.logprobs = None
        column: list[float] = logprobs.logprobs[:, 0].tolist()
        return column

    def _whole(self, outputs: list[Any], column: list[float] | None, places: dict[str, int]) -> list[Any]:
        kept = []
        for output in outputs:
            name = output.request_id
            gathered = self._gathered.get(name)
            if gathered is None:  # ended by vLLM, for a fault
                kept.append(output)
                continue
            if output.new_prompt_logprobs_tensors is not None or output.pooling_output is not None:
                kept.append(output)
            elif output.finish_reason is not None and output.new_logprobs is not None and not gathered.tokens:
                kept.append(output)  # whole in one step, with the probabilities of the choices that it was asked for
            else:
                gathered.tokens.extend(output.new_token_ids)
                if output.num_nans_in_logits:
                    gathered.broken = True
                if gathered.asked and output.new_logprobs is not None:
                    gathered.logprobs.extend(output.new_logprobs.logprobs[:, 0].tolist())
                elif gathered.asked and column is not None and len(output.new_token_ids) == 1:
                    gathered.logprobs.append(column[places[name]])
                if output.finish_reason is not None or gathered.looked_at:
                    kept.append(self._with_all(output))
            if output.finish_reason is not None:
                del self._gathered[name]
        now = time.monotonic()
        if kept:
            self._last_sign = now
        elif outputs and now - self._last_sign > SECONDS_BETWEEN_SIGNS:
            self._last_sign = now
            kept.append(self._with_all(outputs[0]))  # what it has so far: the watchdog is to see that something moves
        return kept

    def _with_all(self, output: Any) -> Any:
        """Give an output all that was gathered for its request; the log-probabilities as one, their sum."""
        gathered = self._gathered[output.request_id]
        output.new_token_ids, gathered.tokens = gathered.tokens, []
        if gathered.logprobs:
            last = np.array([[output.new_token_ids[-1]]], dtype=np.int32)
            output.new_logprobs = LogprobsLists(last, np.array([[sum(gathered.logprobs)]]), np.zeros(1, dtype=np.int32))
            gathered.logprobs = []
        if gathered.broken and output.finish_reason is not None:
            output.finish_reason, output.stop_reason = FinishReason.ERROR, NOT_A_NUMBER
        return output

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Forget what was gathered for requests that are ended from outside, too."""
        before = set(self.requests)
        ended = super().finish_requests(*args, **kwargs)  # type: ignore[misc]
        for name in before - self.requests.keys():
            self._gathered.pop(name, None)
        return ended


def _shorten_way_within_blocks(manager: Any) -> int:
    """Let the manager of vLLM's cache look at a sequence that goes on by one token only where that begins a block.

    Elsewhere the block is there already, nothing is to be freed that the next look would not free, and no block has become full.
    Returns the tokens of a block, 0 for caches of another kind, which are left as they are.
    """
    kinds = manager.coordinator.single_type_managers
    if any(type(each).__name__ not in ("FullAttentionManager", "SlidingWindowManager") for each in kinds):
        return 0
    size = math.gcd(*(each.block_size for each in kinds))
    allocate, cache, nothing = manager.allocate_slots, manager.cache_blocks, manager.empty_kv_cache_blocks

    def allocate_slots(
        request: Any, num_new_tokens: int, *others: Any, num_lookahead_tokens: int = 0, **more: Any
    ) -> Any:  # another argument: of a request that is not running yet
        if num_new_tokens == 1 and not num_lookahead_tokens and not more and not others and request.num_computed_tokens % size:
            return nothing
        return allocate(request, num_new_tokens, *others, num_lookahead_tokens=num_lookahead_tokens, **more)

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        if num_computed_tokens % size == 0:  # the prompt's are kept when they are allocated
            cache(request, num_computed_tokens)

    manager.allocate_slots, manager.cache_blocks = allocate_slots, cache_blocks
    return size


class GatheringScheduler(_Gathering, Scheduler):  # type: ignore[misc]
    """For engines that schedule one step after the other: those on a CPU."""


class GatheringAsyncScheduler(_Gathering, AsyncScheduler):  # type: ignore[misc]
    """For engines that schedule a step while the card works on the one before."""

    def _update_request_with_output(self, request: Any, new_token_ids: list[int], **flags: Any) -> tuple[list[int], bool]:
        """Take a token in; one that ends neither the answer nor a block needs no more than to be kept."""
        if len(new_token_ids) == 1 and self._block and not any(flags.values()) and self._goes_on(request, new_token_ids[0]):
            request._all_token_ids.append(new_token_ids[0])
            request._output_token_ids.append(new_token_ids[0])
            request.num_output_placeholders -= 1
            return new_token_ids, False
        taken: tuple[list[int], bool] = super()._update_request_with_output(request, new_token_ids, **flags)
        return taken

    def _goes_on(self, request: Any, token: int) -> bool:
        """Say whether a sequence surely goes on after a token, in the middle of a block. Flags and discards are of steps before a pause."""
        params, length = request.sampling_params, len(request._all_token_ids) + 1
        computed = request.num_computed_tokens - request.num_output_placeholders + 1
        return bool(
            length % self._block
            and computed % self._block
            and request.num_output_placeholders > 0
            and request.status == RequestStatus.RUNNING
            and not getattr(request, "async_tokens_to_discard", 0)
            and token != params.eos_token_id
            and token not in (params.stop_token_ids or ())
            and length < self.max_model_len
            and len(request._output_token_ids) + 1 < request.max_tokens
            and params.repetition_detection is None
        )
