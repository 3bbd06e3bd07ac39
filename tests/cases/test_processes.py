"""Clients in processes and event loops that are not the usual ones."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import pytest
import uvloop
from PIL import Image

import cdam
from processes import ServerProcess

PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def _label(client: cdam.Client) -> str:
    return client.explain(PIXELS, cdam.TopK(1)).maps[0].label


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a server in a process of its own: a child of this one would inherit the threads of a server in it."""
    server = ServerProcess(tmp_path_factory.mktemp("served") / "log")
    try:
        server.wait_until_ready()
        yield server.address
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("inherited", [True, False], ids=["the parent's client", "its own client"])
def test_a_client_that_was_used_before_a_fork(address: str, inherited: bool) -> None:
    """grpc/grpc#18321: DataLoader workers and multiprocessing hang on a channel from before the fork."""
    with cdam.Client(address, timeout=60) as client:
        expected = _label(client)
        context = multiprocessing.get_context("fork")
        answers = context.Queue()

        def work() -> None:
            if inherited:
                answers.put(_label(client))
                return
            with cdam.Client(address, timeout=60) as own:
                answers.put(_label(own))

        child = context.Process(target=work)
        child.start()
        child.join(120)
        if child.is_alive():
            child.kill()
        assert child.exitcode == 0
        assert answers.get(timeout=10) == expected
        assert _label(client) == expected


def test_uvloop(address: str) -> None:
    """grpc/grpc#41752: gRPC's asyncio on another event loop than Python's own."""

    async def main() -> set[str]:
        async with cdam.AsyncClient(address, timeout=60) as client:
            return {(await client.explain(PIXELS, cdam.TopK(1))).maps[0].label for _ in range(3)}

    with cdam.Client(address, timeout=60) as client:
        assert uvloop.run(main()) == {_label(client)}
