"""The compute process's side of the connections."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cdam_server.operation.telemetry import Telemetry
from cdam_server.processes import service as service_module
from cdam_server.processes.compute_host import ComputeHost
from cdam_server.processes.ring import RingWriter
from cdam_server.processes.service import ComputeService
from cdam_server.processes.wire import GREETING


async def test_front_ends_are_accepted_again_after_a_lack_of_descriptors_and_one_that_said_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_ACCEPT_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(service_module, "GREETING_SECONDS", 0.1)
    loop = asyncio.get_running_loop()
    accept, failures = loop.sock_accept, 2

    async def scarce(server: socket.socket) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return await accept(server)

    monkeypatch.setattr(loop, "sock_accept", scarce)
    host = cast("ComputeHost", SimpleNamespace(scheduler=SimpleNamespace(load=(0, 0.0))))
    service = ComputeService(host, Telemetry(), SimpleNamespace(beat=0.0))
    path = tmp_path / "compute-0"
    ring = RingWriter()
    with service.listen(path) as listening:
        accepting = asyncio.create_task(service.accept(listening))
        with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as client:
            silent.connect(str(path))
            client.connect(str(path))
            socket.send_fds(client, [GREETING], [ring.file])
            client.settimeout(10)
            assert await asyncio.to_thread(client.recv, 1)  # the welcome
        accepting.cancel()
    assert not failures
    ring.close()
