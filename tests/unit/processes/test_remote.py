"""A front end's connections to devices."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdam_server.operation.telemetry import Telemetry
from cdam_server.processes.board import make_board
from cdam_server.processes.remote import RemoteCompute
from cdam_server.processes.wire import GREETING


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "compute-0"))
        server.listen()
        server.setblocking(False)
        yield server


async def accepted(server: socket.socket) -> socket.socket:
    """A front end's connection; its ring is not read."""
    client, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(server), 10)
    client.setblocking(True)
    greeting, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, client, len(GREETING), 1)
    assert greeting == GREETING
    for descriptor in descriptors:
        os.close(descriptor)
    return client


async def test_a_connection_that_is_lost_is_made_again_as_long_as_its_process_lives(
    listening: socket.socket, tmp_path: Path
) -> None:
    board = make_board(multiprocessing.get_context("spawn"))
    remote = RemoteCompute(board, 0, 1, 100, Telemetry(), remembers=False)
    path = tmp_path / "compute-0"
    await asyncio.gather(remote.connect(0, path), remote.connect(0, path))
    client = await accepted(listening)
    assert board.front_ends[0].devices == 1

    client.close()
    again = await accepted(listening)
    await asyncio.sleep(0.1)
    assert remote.connected
    with pytest.raises(BlockingIOError):  # two that connected at once made one connection
        listening.accept()

    listening.close()
    again.close()
    await asyncio.sleep(0.3)
    assert not remote.connected
    assert board.front_ends[0].devices == 0
    remote.close()


async def test_a_connection_that_is_left_is_not_made_again(listening: socket.socket, tmp_path: Path) -> None:
    board = make_board(multiprocessing.get_context("spawn"))
    remote = RemoteCompute(board, 0, 1, 100, Telemetry(), remembers=False)
    await remote.connect(0, tmp_path / "compute-0")
    client = await accepted(listening)
    remote.close()
    await asyncio.sleep(0.3)
    assert await asyncio.to_thread(client.recv, 1) == b""
    client.close()
    with pytest.raises(BlockingIOError):
        listening.accept()
