"""The compute process's side of the connections: front ends ask, and are answered."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from cdam_server.compute.facts import EvaluationBucket
from cdam_server.compute.scheduling import Done
from cdam_server.compute.scheduling.job import Job
from cdam_server.compute.work import Bound, ModelWork
from cdam_server.operation.telemetry import Telemetry
from cdam_server.processes.compute_host import ComputeHost
from cdam_server.processes.ring import RING_BYTES, RingReader
from cdam_server.processes.wire import (
    GREETING,
    GREETING_SECONDS,
    Admit,
    Admitted,
    Answered,
    Consumed,
    Failed,
    Hold,
    Link,
    Release,
    Submit,
    Welcome,
)

# Front ends that connect at once; there are at most half as many.
_BACKLOG: Final = 128
# Seconds until another front end is accepted, after one could not be.
_ACCEPT_PAUSE_SECONDS: Final = 0.5
# Bytes. So much of a ring has been read when the front end is told.
_TOLD_AFTER: Final = RING_BYTES // 8
# Seconds. What the board says is as old at most while anything happens.
_PUBLISH_SECONDS: Final = 0.01
_log = structlog.get_logger("cdam.server")


class ComputeService:
    """Serves front ends, each over a connection of its own.

    Args:
        host: What computes.
        telemetry: Metrics.
        row: Of the board, for what there is to do.
    """

    def __init__(self, host: ComputeHost, telemetry: Telemetry, row: Any) -> None:
        self.host = host
        self.telemetry = telemetry
        self._row = row
        self._connections: set[_Connection] = set()

    def listen(self, path: Path) -> socket.socket:
        """A socket to `accept` front ends from; they may connect from now on."""
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(str(path))
        server.listen(_BACKLOG)
        server.setblocking(False)
        return server

    async def accept(self, server: socket.socket) -> None:
        """Serve front ends as they come, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(server)
            except OSError as error:  # too many open files, for example, which may pass
                _log.error("front ends can't connect", error=str(error))
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            try:
                await self._connect(client)
            except OSError as error:
                client.close()  # it was killed meanwhile, or is given up
                _log.warning("a front end did not connect", error=str(error))

    async def _connect(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(client, readable.set)
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                await readable.wait()
        finally:
            loop.remove_reader(client)
        greeting, descriptors, _, _ = socket.recv_fds(client, len(GREETING), 1)
        if greeting != GREETING or len(descriptors) != 1:
            raise OSError("not a front end")
        connection = _Connection(self, RingReader(descriptors[0]), self._connections.discard)
        self._connections.add(connection)
        await loop.connect_accepted_socket(lambda: connection.link, client)
        connection.link.send(Welcome())

    def publish(self) -> None:
        """Say on the board how much there is to do, unless that was said a moment ago."""
        now = time.monotonic()
        if now - self._row.beat >= _PUBLISH_SECONDS:
            self._row.jobs, self._row.seconds = self.host.scheduler.load
            self._row.beat = now


class _Connection:
    """One front end's."""

    def __init__(self, service: ComputeService, ring: RingReader, lost: Callable[[_Connection], None]) -> None:
        self.link = Link(self._receive, self._end, take=ring.take)
        self._service = service
        self._host = service.host
        self._ring = ring
        self._told = 0
        self._lost = lost
        self._jobs: dict[int, Job] = {}
        self._held: dict[int, asyncio.Task[None]] = {}

    def _receive(self, messages: Sequence[Any]) -> None:
        """Do what is asked; all work that has come is handed in together, so that it can share a batch."""
        ready: list[tuple[Job, Bound[Any]]] = []
        for message in messages:
            match message:
                case Admit(number, spec, arrived, work):
                    job = self._admit(number, spec, arrived, told=work is None)
                    if job is not None and work is not None:
                        ready.append((job, self._bound(work)))
                case Submit(number, work):
                    if (job := self._jobs.get(number)) is not None:  # else it has been told why not
                        ready.append((job, self._bound(work)))
                case Release(number):
                    self._release(number)
                case Hold(number, what):
                    self._held[number] = asyncio.create_task(self._hold(number, what))
        if ready:
            self._host.scheduler.enqueue(ready)
        if self._ring.consumed - self._told >= _TOLD_AFTER:
            self._told = self._ring.consumed
            self.link.send(Consumed(self._told))
        self._service.publish()

    def _admit(self, number: int, spec: Any, arrived: float, *, told: bool) -> Job | None:
        try:
            job = self._host.scheduler.hold(spec, partial(self._answer, number), arrived)
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever asks is told
            self.link.send(Answered(number, Failed.of(error)))
            return None
        self._jobs[number] = job
        if told:
            self.link.send(Admitted(number))
        return job

    def _answer(self, number: int, answer: Done[object] | Exception) -> None:
        self._host.scheduler.release(self._jobs.pop(number))
        self.link.send(Answered(number, Failed.of(answer) if isinstance(answer, Exception) else answer))
        self._service.publish()

    def _release(self, number: int, dropped: str = "") -> None:
        if (job := self._jobs.pop(number, None)) is not None:
            self._host.scheduler.release(job, dropped)
        elif (task := self._held.pop(number, None)) is not None:
            task.cancel()

    async def _hold(self, number: int, what: Any) -> None:
        compute = self._host.compute
        holding: AbstractAsyncContextManager[object] = (
            compute.evaluation(what) if isinstance(what, EvaluationBucket) else compute.long_request(*what)
        )
        try:
            async with holding as facts:
                self.link.send(Admitted(number, facts))
                await asyncio.get_running_loop().create_future()  # until it is cancelled
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever asks is told
            self._held.pop(number, None)
            self.link.send(Answered(number, Failed.of(error)))

    def _bound(self, work: ModelWork[Any]) -> Bound[Any]:
        return Bound(work, self._host.catalog, self._service.telemetry)

    def _end(self) -> None:
        """The front end is gone: nobody waits for its jobs any more."""
        for number in list(self._jobs):
            self._release(number, "cancelled")
        for task in self._held.values():
            task.cancel()
        self._held.clear()
        with suppress(BufferError):
            self._ring.close()
        self._lost(self)
        self._service.publish()
