"""Processes that write to a store until they are killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from multiprocessing.connection import Connection

from contract.backends import Place, registration
from contract.workers import CONTEXT


def write_until_killed(place: Place, first: int, acknowledged: Connection) -> None:
    """Register one concept after another, each under a name of its own, and say so after each."""

    async def write() -> None:
        store = place.store()
        await store.open()
        seed = first
        while True:
            await store.register(registration(f"name{seed}", seed, labels={"a": str(seed)}))
            acknowledged.send(seed)
            seed += 1

    asyncio.run(write())


def kill_a_writer(place: Place, first: int, draw: random.Random) -> list[int]:
    """SIGKILL a writer at a random moment; returns what it had been told is stored."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=write_until_killed, args=(place, first, there))
    process.start()
    there.close()
    found = []
    try:
        # Some are killed on the way to their first.
        if draw.random() < 0.8:
            found.append(here.recv())
        here.poll(draw.uniform(0, 0.01))
        until = draw.randrange(8)
        while len(found) < until:
            found.append(here.recv())
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    try:
        while True:
            found.append(here.recv())
    except EOFError:
        pass
    here.close()
    process.join()
    process.close()
    return found
