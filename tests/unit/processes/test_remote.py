"""A front end's connections to devices."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from cdam_server.compute.facts import EvaluationBucket
from cdam_server.compute.scheduling import DeviceLostError
from cdam_server.operation.telemetry import Telemetry
from cdam_server.processes import remote as remote_module
from cdam_server.processes.board import make_board
from cdam_server.processes.remote import RemoteCompute
from cdam_server.processes.wire import GREETING, Admitted, Welcome


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "compute-0"))
        server.listen()
        server.setblocking(False)
        yield server


async def accepted(server: socket.socket, *, welcome: bool = True) -> socket.socket:
    """A front end's connection; its ring is not read."""
    client, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(server), 10)
    client.setblocking(True)
    greeting, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, client, len(GREETING), 1)
    assert greeting == GREETING
    for descriptor in descriptors:
        os.close(descriptor)
    if welcome:
        send(client, Welcome())
    return client


def send(client: socket.socket, *messages: object) -> None:
    """As a `Link` sends them."""
    data = pickle.dumps(list(messages))
    client.sendall(struct.pack("<II", len(data), 0) + data)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it is sockets that change
            await asyncio.sleep(0.01)


def remote_of(board: Any) -> RemoteCompute:
    return RemoteCompute(board, 0, 1, 100, Telemetry(), remembers=False)


async def test_a_connection_that_is_lost_is_made_again_as_long_as_its_process_lives(
    listening: socket.socket, tmp_path: Path
) -> None:
    board = make_board(multiprocessing.get_context("spawn"))
    remote, path = remote_of(board), tmp_path / "compute-0"
    connecting = asyncio.gather(remote.connect(0, path), remote.connect(0, path))
    client = await accepted(listening)
    await connecting
    assert board.front_ends[0].devices == 1

    client.close()
    again = await accepted(listening)
    await until(lambda: remote.connected)
    with pytest.raises(BlockingIOError):  # two that connected at once made one connection
        listening.accept()

    listening.close()
    again.close()
    await until(lambda: not remote.connected)
    assert board.front_ends[0].devices == 0
    remote.close()


async def test_a_connection_that_is_left_is_not_made_again(listening: socket.socket, tmp_path: Path) -> None:
    remote = remote_of(make_board(multiprocessing.get_context("spawn")))
    connecting = asyncio.create_task(remote.connect(0, tmp_path / "compute-0"))
    client = await accepted(listening)
    await connecting
    remote.close()
    await asyncio.sleep(1)
    assert await asyncio.to_thread(client.recv, 1) == b""
    client.close()
    with pytest.raises(BlockingIOError):
        listening.accept()


async def test_a_device_that_does_not_answer_counts_as_none_and_is_asked_again(
    listening: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "GREETING_SECONDS", 0.2)
    remote = remote_of(make_board(multiprocessing.get_context("spawn")))
    await remote.connect(0, tmp_path / "compute-0")  # the kernel says yes, and nobody reads
    assert not remote.connected
    deaf = await accepted(listening, welcome=False)
    client = await accepted(listening)
    await until(lambda: remote.connected)
    remote.close()
    for each in (deaf, client):
        each.close()


async def test_an_evaluation_ends_with_its_device_and_the_next_one_goes_elsewhere(tmp_path: Path) -> None:
    remote = remote_of(make_board(multiprocessing.get_context("spawn")))
    bucket = cast("EvaluationBucket", "what is measured")
    clients = []
    with ExitStack() as stack:
        for number in range(2):
            server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            server.bind(str(tmp_path / f"compute-{number}"))
            server.listen()
            server.setblocking(False)
            connecting = asyncio.create_task(remote.connect(number, tmp_path / f"compute-{number}"))
            clients.append(stack.enter_context(await accepted(server)))
            await connecting
            server.close()

        began = asyncio.Event()

        async def evaluate() -> None:
            async with remote.evaluation(bucket) as facts:
                assert facts == "facts"
                began.set()
                await asyncio.get_running_loop().create_future()

        first = asyncio.create_task(evaluate())
        await asyncio.sleep(0.1)
        send(clients[0], Admitted(0, "facts"))
        await began.wait()
        clients[0].close()
        with pytest.raises(DeviceLostError):
            await asyncio.wait_for(first, 10)

        began.clear()
        second = asyncio.create_task(evaluate())
        await asyncio.sleep(0.1)
        send(clients[1], Admitted(0, "facts"))
        await asyncio.wait_for(began.wait(), 10)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):  # who leaves is not told of a device
            await second
        remote.close()
