"""Memory that several share."""

import asyncio

from cdam_server.compute.scheduling import Room


async def test_who_finds_no_room_waits_until_there_is() -> None:
    room = Room(100)
    await room.take(60)
    waiting = [asyncio.create_task(room.take(size)) for size in (50, 40)]
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [False, True]
    room.give_back(60)
    await waiting[0]
    assert room.try_take(10)
    assert not room.try_take(1)


async def test_one_that_is_alone_may_be_larger_than_the_room() -> None:
    room = Room(100)
    await room.take(1000)
    assert not room.try_take(1)
    room.give_back(1000)
    assert room.try_take(1)
