"""Messages between processes: in order, whole, and whatever they carry."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cdam_server.compute.facts import Bucket
from cdam_server.compute.scheduling import QueueFullError
from cdam_server.compute.work import EmbedWork
from cdam_server.errors import FailedPreconditionError, InvalidArgumentError, OverloadedError
from cdam_server.processes.ring import Place, RingReader, RingWriter
from cdam_server.processes.wire import Failed, Link, Submit


async def _pair(received: list[Any], lost: asyncio.Event) -> tuple[Link, Link]:
    loop = asyncio.get_running_loop()
    one, other = socket.socketpair()
    first, second = Link(lambda messages: None, lambda: None), Link(received.extend, lost.set)
    await loop.create_connection(lambda: first, sock=one)
    await loop.create_connection(lambda: second, sock=other)
    return first, second


async def test_messages_arrive_in_order_and_whole() -> None:
    received: list[Any] = []
    lost = asyncio.Event()
    link, _ = await _pair(received, lost)
    sent = [(number, "x" * (number * 977 % 300_000)) for number in range(200)]
    for number, message in enumerate(sent):
        link.send(message)
        if number % 7 == 0:
            await asyncio.sleep(0)
    link.close()
    await lost.wait()
    assert received == sent


async def test_those_of_one_turn_of_the_event_loop_arrive_together() -> None:
    turns: list[Sequence[Any]] = []
    loop = asyncio.get_running_loop()
    one, other = socket.socketpair()
    lost = asyncio.Event()
    link = Link(lambda messages: None, lambda: None)
    await loop.create_connection(lambda: link, sock=one)
    await loop.create_connection(lambda: Link(turns.append, lost.set), sock=other)
    for number in range(10):
        link.send(number)
    link.close()
    await asyncio.wait_for(lost.wait(), 10)
    assert turns == [list(range(10))]


async def test_what_cannot_be_sent_ends_the_connection_for_both() -> None:
    received: list[Any] = []
    losses = [asyncio.Event(), asyncio.Event()]
    loop = asyncio.get_running_loop()
    one, other = socket.socketpair()
    link = Link(lambda messages: None, losses[0].set)
    await loop.create_connection(lambda: link, sock=one)
    await loop.create_connection(lambda: Link(received.extend, losses[1].set), sock=other)
    link.send("as usual")
    await asyncio.sleep(0)
    link.send(lambda: "no pickle of this")
    for lost in losses:
        await asyncio.wait_for(lost.wait(), 10)
    assert link.closed
    assert received == ["as usual"]


async def test_what_cannot_be_received_ends_the_connection_for_both() -> None:
    losses = [asyncio.Event(), asyncio.Event()]
    loop = asyncio.get_running_loop()
    one, other = socket.socketpair()
    link = Link(lambda messages: None, losses[0].set)
    await loop.create_connection(lambda: link, sock=one)
    await loop.create_connection(lambda: Link(lambda messages: 1 / 0, losses[1].set), sock=other)
    loop.set_exception_handler(lambda *_: None)
    link.send("whatever")
    for lost in losses:
        await asyncio.wait_for(lost.wait(), 10)
    assert link.closed


@pytest.mark.parametrize(
    "error",
    [
        QueueFullError("jobs", "full", 0.5),
        InvalidArgumentError("metrics[0]", "no such thing"),
        FailedPreconditionError("NO_CDAM", "can't", model="m"),
        OverloadedError("too many", 5.0),
        RuntimeError("plain"),
        MemoryError(),
    ],
)
def test_errors_arrive_as_they_were(error: Exception) -> None:
    arrived = pickle.loads(pickle.dumps(Failed.of(error))).error()
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    assert arrived.__dict__ == error.__dict__


def test_an_error_that_holds_what_cannot_travel_arrives_in_words() -> None:
    error = RuntimeError("broken", lambda: None)
    arrived = pickle.loads(pickle.dumps(Failed.of(error))).error()
    assert "broken" in str(arrived)


async def test_arrays_go_where_there_is_room_and_else_along() -> None:
    random = np.random.default_rng(0)
    ring = RingWriter(400_000)
    reader = RingReader(os.dup(ring.file))
    received: list[Any] = []
    lost = asyncio.Event()
    loop = asyncio.get_running_loop()
    one, other = socket.socketpair()
    places: list[Place | None] = []

    def put(data: memoryview) -> Place | None:
        places.append(ring.put(data))
        return places[-1]

    link = Link(lambda messages: None, lambda: None, put=put)
    await loop.create_connection(lambda: link, sock=one)
    await loop.create_connection(lambda: Link(received.extend, lost.set, take=reader.take), sock=other)
    works = [
        EmbedWork(Bucket("m", (224, 224)), "m", random.integers(0, 256, (224, 224, 3), np.uint8)) for _ in range(4)
    ]
    for number, work in enumerate(works):
        link.send(Submit(number, work))
    link.close()
    await lost.wait()
    assert [place is None for place in places] == [False, False, True, True]
    for number, (arrived, work) in enumerate(zip(received, works, strict=True)):
        assert isinstance(arrived, Submit)
        assert isinstance(arrived.work, EmbedWork)
        assert arrived.number == number
        assert (arrived.work.pixels == work.pixels).all()
        assert arrived.work.bucket == work.bucket
