"""vLLM's schedulers with a clock: what a step costs the engine's process. vLLM imports it there; `distill_study.py` says when to look.

While a file `look` stands in the folder that SFTKIT_WATCH names, the next steps are measured: first 60 with nothing but
clocks, then 40 under cProfile, then 10 under torch's profiler of the card. The findings are written beside it, and `look` is removed.
"""

import cProfile
import io
import json
import os
import pstats
import time
from pathlib import Path
from typing import Any

from sftkit.core.engines.vllm_scheduler import GatheringAsyncScheduler, GatheringScheduler
from vllm.v1 import serial_utils
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

CLOCKED, PROFILED, TRACED = 60, 40, 10
packing = [0.0]  # CPU seconds of the thread that packs what is sent, so far


def _clock_packing() -> None:
    encode = serial_utils.MsgpackEncoder.encode_into

    def clocked(self: Any, *args: Any) -> Any:
        start = time.thread_time()
        try:
            return encode(self, *args)
        finally:
            packing[0] += time.thread_time() - start

    serial_utils.MsgpackEncoder.encode_into = clocked


_clock_packing()


class _Watched:
    """Stands before a scheduler and looks when it is told to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._folder = Path(os.environ["SFTKIT_WATCH"])
        self._step = -1  # not looking
        self._sums: dict[str, float] = {}
        self._before = (0.0, 0.0)
        self._profile: Any = None

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._look()
        start = time.thread_time()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._add("schedule", time.thread_time() - start)
        self._add("sequences", len(output.num_scheduled_tokens))
        self._add("tokens", output.total_num_scheduled_tokens)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._add("update", time.thread_time() - start)

    def _add(self, name: str, value: float) -> None:
        if 0 <= self._step < CLOCKED:
            self._sums[name] = self._sums.get(name, 0.0) + value

    def _look(self) -> None:
        """Go on with what is being looked at; begin when asked."""
        if self._step < 0:
            if (self._folder / "look").exists():
                self._step, self._sums = 0, {}
                self._before = (time.perf_counter(), time.thread_time())
                packing[0] = 0.0
            return
        self._step += 1
        if self._step == CLOCKED:
            wall, cpu = time.perf_counter() - self._before[0], time.thread_time() - self._before[1]
            found = {"step": wall, "main thread": cpu, "packing thread": packing[0], **self._sums}
            (self._folder / "clock.json").write_text(json.dumps({name: value / CLOCKED for name, value in found.items()}))
            self._profile = cProfile.Profile()
            self._profile.enable()
        elif self._step == CLOCKED + PROFILED:
            self._profile.disable()
            text = io.StringIO()
            pstats.Stats(self._profile, stream=text).sort_stats("tottime").print_stats(45)
            pstats.Stats(self._profile, stream=text).sort_stats("cumulative").print_stats(45)
            (self._folder / "host.txt").write_text(f"{PROFILED} steps under cProfile\n{text.getvalue()}")
            self._profile = self._start_trace()
        elif self._step == CLOCKED + PROFILED + TRACED:
            self._end_trace()
            self._step = -1
            (self._folder / "look").unlink(missing_ok=True)

    @staticmethod
    def _start_trace() -> Any:
        import torch

        if not torch.cuda.is_available():
            return None
        torch.cuda.synchronize()
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        profile.start()
        return profile, time.perf_counter()

    def _end_trace(self) -> None:
        if self._profile is None:
            return
        import torch

        profile, start = self._profile
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
        profile.stop()
        averages = profile.key_averages()
        busy = sum(each.self_device_time_total for each in averages) / 1e6
        table = averages.table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=90)
        (self._folder / "card.txt").write_text(f"{TRACED} steps: {wall:.4f} s, kernels {busy:.4f} s\n{table}")


class Plain(_Watched, Scheduler):  # type: ignore[misc]
    """vLLM's own."""


class PlainAsync(_Watched, AsyncScheduler):  # type: ignore[misc]
    """vLLM's own, a step ahead of the card."""


class Gathering(_Watched, GatheringScheduler):
    """sftkit's."""


class GatheringAsync(_Watched, GatheringAsyncScheduler):
    """sftkit's, a step ahead of the card."""
