"""What vLLM's engine process sends back: each answer once, when it is whole, not a message for every token of every sequence.

vLLM's engine tells the process that feeds it of every new token: at a thousand sequences a thousand objects a step are built,
packed, sent, unpacked and looked at, and with each a log-probability in arrays of its own, although nobody waits for anything
but the whole answer and the sum of its log-probabilities. For a small model that is most of a step. Here the tokens
are gathered where they arise. vLLM takes a scheduler by its name (`scheduler_cls`).
"""

import time
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import LogprobsLists

SECONDS_BETWEEN_SIGNS = 0.5  # of life, where no answer ends


class _Gathering:
    """Keeps what a request has got so far, and lets it go with the last token. Stands before one of vLLM's schedulers."""

    requests: dict[str, Any]  # vLLM's, by name

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gathered: dict[str, tuple[list[int], list[float]]] = {}  # tokens and their log-probabilities, by request
        self._last_sign = time.monotonic()

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
            if output.new_prompt_logprobs_tensors is not None or output.pooling_output is not None:
                kept.append(output)
                continue
            if output.finish_reason is not None and output.new_logprobs is not None and name not in self._gathered:
                kept.append(output)  # whole in one step, with the probabilities of the choices that it was asked for
                continue
            if (gathered := self._gathered.get(name)) is None:
                gathered = self._gathered[name] = [], []
            gathered[0].extend(output.new_token_ids)
            if output.new_logprobs is not None:
                gathered[1].extend(output.new_logprobs.logprobs[:, 0].tolist())
            elif column is not None and len(output.new_token_ids) == 1:
                gathered[1].append(column[places[name]])
            if output.finish_reason is not None or self._looked_at(name):
                kept.append(self._with_all(output))
        now = time.monotonic()
        if kept:
            self._last_sign = now
        elif outputs and now - self._last_sign > SECONDS_BETWEEN_SIGNS:
            self._last_sign = now
            kept.append(self._with_all(outputs[0]))  # what it has so far: the watchdog is to see that something moves
        return kept

    def _looked_at(self, name: str) -> bool:
        """Say whether a request's text decides where it ends, which only the process that feeds the engine sees."""
        request = self.requests.get(name)
        return request is not None and request.sampling_params is not None and bool(request.sampling_params.stop)

    def _with_all(self, output: Any) -> Any:
        """Give an output all that was gathered for its request; the log-probabilities as one, their sum."""
        tokens, logprobs = self._gathered.pop(output.request_id)
        output.new_token_ids = tokens
        if logprobs:
            last = np.array([[tokens[-1]]], dtype=np.int32)
            output.new_logprobs = LogprobsLists(last, np.array([[sum(logprobs)]]), np.zeros(1, dtype=np.int32))
        return output

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Forget what was gathered for requests that are ended from outside, too."""
        ended = super().finish_requests(*args, **kwargs)  # type: ignore[misc]
        for name in self._gathered.keys() - self.requests.keys():
            del self._gathered[name]
        return ended


class GatheringScheduler(_Gathering, Scheduler):  # type: ignore[misc]
    """For engines that schedule one step after the other: those on a CPU."""


class GatheringAsyncScheduler(_Gathering, AsyncScheduler):  # type: ignore[misc]
    """For engines that schedule a step while the card works on the one before."""
