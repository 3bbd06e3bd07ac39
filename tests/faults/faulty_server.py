"""`cdam serve` with an engine that fails when it is asked to; everything else is as shipped.

    python tests/faults/faulty_server.py serve [OPTIONS]

An image asks for a fault by its first pixel (`marked`), which reaches the engine as it is if the image has the size of
the model's input. Two variables set the rest: FAULTS_MEMORY names a file with the number of images that fit into memory
(as many as you like while there is no such file), FAULTS_STALL the seconds for which `Fault.STALL` holds the event loop.
"""

from __future__ import annotations

import asyncio
import enum
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

import cdam_cli as cli
from cdam_engine import Explanation
from cdam_server.compute import catalog
from cdam_server.compute.catalog import load_catalog
from cdam_server.compute.models import Catalog
from cdam_server.compute.scheduling import DeviceLostError
from cdam_server.processes import children
from cdam_server.processes.compute_host import ComputeHost
from cdam_server.settings.config import Settings

_RED, _GREEN = 254, 1
_log = structlog.get_logger("faults")


class Fault(enum.IntEnum):
    """What an image can do to its batch."""

    POISON = 1
    """A RuntimeError."""
    LOGITS = 2
    """Logits of this image that are NaN."""
    SCORES = 3
    """Scores of this image that are infinite."""
    HUNGRY = 4
    """Out of memory, however small the batch is."""
    HOST_MEMORY = 5
    """Python's MemoryError."""
    EXIT = 6
    """SystemExit in the thread that computes."""
    INTERRUPT = 7
    """KeyboardInterrupt in the thread that computes."""
    DEVICE_LOST = 8
    """The device computes no more."""
    STUCK = 9
    """The batch takes for ever."""
    STALL = 10
    """The event loop stands still; the image itself is explained."""


_RAISED: dict[Fault, Callable[[], BaseException]] = {
    Fault.POISON: lambda: RuntimeError("poison"),
    Fault.HUNGRY: lambda: torch.OutOfMemoryError("out of memory: hungry"),
    Fault.HOST_MEMORY: lambda: MemoryError("host memory"),
    Fault.EXIT: lambda: SystemExit(3),
    Fault.INTERRUPT: KeyboardInterrupt,
    Fault.DEVICE_LOST: lambda: DeviceLostError("lost"),
}


def marked(pixels: NDArray[np.uint8], fault: Fault) -> NDArray[np.uint8]:
    """An image (H, W, 3) that asks for a fault."""
    changed = pixels.copy()
    changed[0, 0] = _RED, _GREEN, fault
    return changed


def _asked(pixels: torch.Tensor) -> Fault | None:
    red, green, blue = pixels[0, 0].tolist()
    return Fault(blue) if (red, green) == (_RED, _GREEN) else None


class Faulty:
    """An explainer's `explain` with faults.

    Attributes:
        loop: The server's event loop, once it runs.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, explain: Callable[..., list[Explanation]]) -> None:
        self._explain = explain
        self._memory = Path(os.environ["FAULTS_MEMORY"])
        self._stall = float(os.environ.get("FAULTS_STALL", "0"))

    def __call__(self, images: torch.Tensor, targets: Sequence[Any], methods: Sequence[Any]) -> list[Explanation]:
        faults = [_asked(image) for image in images]
        for fault in filter(None, faults):
            _log.warning("fault", fault=fault.name, batch=len(images))
        self._fail(len(images), faults)
        explanations = self._explain(images, targets, methods)
        return [_spoil(explanation, fault) for explanation, fault in zip(explanations, faults, strict=True)]

    def _fail(self, size: int, faults: Sequence[Fault | None]) -> None:
        if size > self._most():
            _log.warning("fault", fault="MEMORY", batch=size)
            raise torch.OutOfMemoryError(f"out of memory: {size} images")
        if Fault.STALL in faults:
            self.loop.call_soon_threadsafe(time.sleep, self._stall)
        if Fault.STUCK in faults:
            threading.Event().wait()
        for fault in faults:
            if fault in _RAISED:
                error = _RAISED[fault]()
                raise error

    def _most(self) -> float:
        """Number of images that fit into memory."""
        try:
            return float(self._memory.read_text())
        except FileNotFoundError:
            return math.inf


def _spoil(explanation: Explanation, fault: Fault | None) -> Explanation:
    if fault is Fault.LOGITS:
        return replace(explanation, logits=explanation.logits * np.nan)
    if fault is Fault.SCORES:
        first, *others = explanation.maps
        scores = first.scores.copy()
        scores[0, 0] = np.inf
        return replace(explanation, maps=(replace(first, scores=scores), *others))
    return explanation


def _load(settings: Settings) -> Catalog:
    loaded = load_catalog(settings)
    for served in loaded:
        explainer: Any = served.explainer
        explainer.explain = Faulty(explainer.explain)
    return loaded


def _open(self: ComputeHost, resources: AsyncExitStack) -> None:
    Faulty.loop = asyncio.get_running_loop()
    _open_as_shipped(self, resources)


_open_as_shipped = ComputeHost.open
if __name__ in {"__main__", "__mp_main__"}:  # here, or in a child process
    ComputeHost.open = _open  # type: ignore[method-assign]
    catalog.load_catalog = children.load_catalog = _load
if __name__ == "__main__":
    cli.main(prog_name="cdam")
