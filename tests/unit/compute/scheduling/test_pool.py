"""Callers in turn."""

import asyncio
import random
import threading

import pytest

from cdam_server.compute.scheduling.pool import FairSemaphore, Pool


async def test_callers_take_turns() -> None:
    pool, order = FairSemaphore(1), []

    async def use(caller: str, number: int) -> None:
        async with pool(caller):
            order.append(f"{caller}{number}")
            await asyncio.sleep(0)

    await asyncio.gather(*(use("a", number) for number in range(4)), *(use("b", number) for number in range(2)))
    assert order == ["a0", "a1", "b0", "a2", "b1", "a3"]


async def test_never_more_than_there_are_places_and_none_is_lost_however_many_give_up() -> None:
    draw = random.Random(0)
    pool, inside, most, done = FairSemaphore(3), 0, 0, 0

    async def use(caller: str) -> None:
        nonlocal inside, most, done
        await asyncio.sleep(0.05 * draw.random())
        async with pool(caller):
            inside += 1
            most = max(most, inside)
            try:
                await asyncio.sleep(0.001)
                done += 1
            finally:
                inside -= 1

    tasks = [asyncio.create_task(use(draw.choice("abc"))) for _ in range(500)]
    for task in tasks:
        if draw.random() < 0.3:
            await asyncio.sleep(0.0005)
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 3
    assert 0 < done < 500
    assert not pool._waiting
    assert pool._free == 3


async def test_a_thread_keeps_its_place_until_it_is_done() -> None:
    pool, go, begun = Pool(1, "test"), threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert go.wait(10)

    first = asyncio.create_task(pool.run("a", slow))
    assert await asyncio.to_thread(begun.wait, 10)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(pool.run("b", lambda: 2))
    await asyncio.sleep(0.02)
    assert not second.done()
    go.set()
    assert await second == 2
    pool.close()
