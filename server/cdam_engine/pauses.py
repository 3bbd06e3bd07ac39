"""Places where work may rest: shorter work goes first meanwhile, and what nobody wants any more ends.

>>> with interruptible(look_around):  # called at every such place; what it raises ends the work
...     explainer.explain(images, targets, methods)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter

import torch


@dataclass
class _Work:
    rest: Callable[[], None]
    rested: float = 0.0


_work: ContextVar[_Work | None] = ContextVar("_work", default=None)


@contextmanager
def interruptible(rest: Callable[[], None]) -> Iterator[None]:
    """Call a function wherever the work within the block may rest, in the same thread.

    Args:
        rest: It may use the same engine for something else; what it raises ends the work. Its time is not booked as the work's.
    """
    token = _work.set(_Work(rest))
    try:
        yield
    finally:
        _work.reset(token)


def pause(device: torch.device, *, brief: bool = False) -> None:
    """A place where the work may rest; does nothing unless somebody asked for it.

    Args:
        device: Where the work is done; what has been begun there is finished first, so that a rest can be short.
        brief: It is one of many such places, a layer of the model apart; a GPU would only lose by them.
    """
    if torch.compiler.is_compiling():
        return
    work = _work.get()
    if work is None:
        return
    if device.type == "cuda":
        if brief:
            return
        torch.cuda.current_stream(device).synchronize()
    started = perf_counter()
    token = _work.set(None)  # what is done meanwhile rests only if it is said to
    try:
        work.rest()
    finally:
        _work.reset(token)
        work.rested += perf_counter() - started


def rested() -> float:
    """Seconds that the work has rested so far."""
    work = _work.get()
    return 0.0 if work is None else work.rested
