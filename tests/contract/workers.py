"""What tests have done by several processes at once."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any, Final

from cdam_server.store import NameTakenError
from contract.backends import Place, registration

# Children of a process that has no threads, and in which all is imported already.
CONTEXT: Final = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["contract.backends", "cdam_server.store.sqlite", "cdam_server.store.postgres"])

_barrier: Barrier


def _start(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603 - the way to hand it to a pool's processes
    _barrier = barrier


def at_once(work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Results of a function of this module, called in as many processes as there are arguments, all at the same moment."""
    barrier = CONTEXT.Barrier(len(arguments))
    with ProcessPoolExecutor(len(arguments), CONTEXT, _start, (barrier,)) as pool:
        return [future.result(timeout=100) for future in [pool.submit(work, *its) for its in arguments]]


def register_one(place: Place, name: str, seed: int) -> str:
    """Open a store and register content under a name; returns what came of it."""

    async def register() -> str:
        store = place.store()
        _barrier.wait(timeout=60)
        await store.open()
        try:
            stored, _ = await store.register(registration(name, seed))
        except NameTakenError:
            return "taken"
        else:
            return f"won {stored.version.number}"
        finally:
            await store.close()

    return asyncio.run(register())


def register_many(place: Place, seeds: Sequence[int]) -> list[int]:
    """Register one version of one name after another; returns their numbers."""

    async def register() -> list[int]:
        store = place.store()
        await store.open()
        _barrier.wait(timeout=60)
        try:
            answers = [await store.register(registration(seed=seed, replace=True)) for seed in seeds]
        finally:
            await store.close()
        return [stored.version.number for stored, _ in answers]

    return asyncio.run(register())
