"""`cdam serve` whose engine costs nothing: what is left is the service itself.

    python tests/benchmarks/instant_server.py serve [OPTIONS]

The first image of a model is explained, and its explanation is the answer to all that are asked the same way. With INSTANT_SECONDS in the
environment every batch takes so long, without a processor: a device that is not the machine's own. With INSTANT_WAITS each front end writes
there, by its process's number, how long its event loop let something wait that was due, every 5 ms.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cdam_cli
from cdam_server.compute.models import ServedModel

_SECONDS = float(os.environ.get("INSTANT_SECONDS", "0"))
_compute: Callable[..., list[Any]] = ServedModel.compute
_known: dict[Any, Any] = {}
_lock = threading.Lock()


def _answer(self: ServedModel, jobs: Sequence[Any], *_: Any) -> list[Any]:
    with _lock:  # two that compute at once, with other threads, would differ in the last bits
        for job in jobs:
            key = _key(self, job)
            if key not in _known:
                (_known[key],) = _compute(self, [job], lambda: None)
    if _SECONDS:
        time.sleep(_SECONDS)
    return [_known[_key(self, job)] for job in jobs]


def _key(served: ServedModel, job: Any) -> Any:
    return served.loaded.name, job.pixels.shape, job.targets, job.methods


# At the top level, as child processes import this file.
ServedModel.compute = _answer  # type: ignore[assignment]
if "INSTANT_WAITS" in os.environ:
    from cdam_server.processes.front_end import FrontEnd  # there was none in a tree before it

    _beats = FrontEnd._keep_beating

    async def _keep_beating(self: FrontEnd) -> None:
        """The heartbeat, and how late it is."""
        with (Path(os.environ["INSTANT_WAITS"]) / str(os.getpid())).open("w", buffering=1) as file:
            beats = asyncio.ensure_future(_beats(self))
            try:
                while True:
                    due = time.monotonic() + 0.005
                    await asyncio.sleep(0.005)
                    file.write(f"{time.monotonic() - due}\n")
            finally:
                beats.cancel()

    FrontEnd._keep_beating = _keep_beating  # type: ignore[method-assign]  # it is replaced, as is `compute`

if __name__ == "__main__":
    cdam_cli.main(prog_name="cdam")
