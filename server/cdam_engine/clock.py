"""Where a batch's time goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

from cdam_engine.pauses import rested


class Clock:
    """Seconds by stage; on a GPU by events in its stream, so that nothing waits for the device.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Book the block's time on a stage."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)  # which need not be the current device's
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((stage, start, end))
        else:
            started = perf_counter() - rested()
            yield
            self._seconds[stage] += perf_counter() - rested() - started

    def seconds(self) -> dict[str, float]:
        """The time of every stage, in seconds; waits for what is still being computed."""
        for stage, start, end in self._events:
            end.synchronize()
            self._seconds[stage] += start.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)
