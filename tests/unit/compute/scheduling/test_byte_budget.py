"""Memory that several share."""

import asyncio

from cdam_server.compute.scheduling import ByteBudget


async def test_who_finds_no_room_waits_until_there_is() -> None:
    byte_budget = ByteBudget(100)
    await byte_budget.take(60)
    waiting = [asyncio.create_task(byte_budget.take(size)) for size in (50, 40)]
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [False, True]
    byte_budget.give_back(60)
    await waiting[0]
    assert byte_budget.try_take(10)
    assert not byte_budget.try_take(1)


async def test_one_that_is_alone_may_be_larger_than_the_room() -> None:
    byte_budget = ByteBudget(100)
    await byte_budget.take(1000)
    assert not byte_budget.try_take(1)
    byte_budget.give_back(1000)
    assert byte_budget.try_take(1)
