"""The parent of all processes of a server: starts them, watches them, tells probes and Prometheus about them, and ends them in order.

It imports no torch, so that it is small and starts at once: the others are forked from a process that has imported all there is, and share its
memory.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, closing, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from cdam_server.operation.admin import AdminServer
from cdam_server.operation.health import Health
from cdam_server.processes.board import make_board
from cdam_server.processes.control import (
    Close,
    Device,
    Drain,
    Ended,
    Metrics,
    Ready,
    SendMetrics,
    SetReady,
)
from cdam_server.processes.failure import ServerFailedError
from cdam_server.processes.metrics import MergedMetrics, Page
from cdam_server.settings.config import Settings

_PRELOAD: Final = "cdam_server.processes.preload"
# Bytes. Systems allow 104 at least for the path of a socket, whose own name takes some.
_LONGEST_FOLDER: Final = 90
# Seconds without a heartbeat until a front end is replaced.
_STALL_SECONDS: Final = 10.0
# Seconds between two looks at the heartbeats.
_WATCH_SECONDS: Final = 0.5
# Seconds. A process that died sooner after its start is not started again at once.
_CALM_SECONDS: Final = 1.0
# Seconds until it is, at first; twice as many after each start that fails, up to the second number.
_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 30.0
# Seconds for a child's metrics; a child that takes longer counts with what it said before.
_METRICS_SECONDS: Final = 1.0
# Seconds that a child may take for what comes after the drain, before it is killed.
_EXIT_SECONDS: Final = 5.0

_log = structlog.get_logger("cdam.server")


async def serve(settings: Settings, front_ends: int) -> None:
    """Serve from so many front ends until SIGTERM or SIGINT, then drain.

    Raises:
        OSError: A port is taken.
        StoreUnusableError: The store of concepts must not be used as it is.
        ValueError: A model can't be loaded or used, or a setting.
        ServerFailedError: Nothing can be computed any more; those who waited have been told.
    """
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    supervisor = _Supervisor(settings, front_ends)
    starting, told = asyncio.create_task(supervisor.start()), asyncio.create_task(stopping.wait())
    await asyncio.wait((starting, told), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        _log.info("stopped before it was ready")
        starting.cancel()
        await asyncio.wait([starting])
        return
    await starting
    failed = asyncio.create_task(supervisor.failed.wait())
    await asyncio.wait((told, failed), return_when=asyncio.FIRST_COMPLETED)
    await supervisor.stop()
    if supervisor.failed.is_set():
        raise ServerFailedError("the device is lost, or the computing stands still; the log says more")


class Child:
    """A child process.

    Args:
        process: Started.
        control: The supervisor's end of the connection to it.

    Attributes:
        exited: Set when it is no more.
    """

    def __init__(self, process: BaseProcess, control: Connection) -> None:
        self.exited = asyncio.Event()
        self._process = process
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._metrics: asyncio.Future[Page] | None = None
        self._loop.add_reader(control.fileno(), self._read)
        self._loop.add_reader(process.sentinel, self._exit)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return not self.exited.is_set()

    @property
    def name(self) -> str:
        """Of the process: its kind and number."""
        return self._process.name

    @property
    def exit_code(self) -> int | None:
        """Of the process, once it has ended; the number of a signal that ended it is negative."""
        return self._process.exitcode

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    async def ready(self) -> Ready:
        """What it says when it works.

        Raises:
            ServerFailedError: It has died before.
            Exception: Why it can't work.
        """
        return await asyncio.shield(self._ready)

    def tell(self, message: object) -> None:
        """Send it a message; nobody reads it if it is dead."""
        with suppress(OSError):
            self._control.send(message)

    async def metrics(self) -> Page | None:
        """Its metrics; None if it does not say."""
        if not self.alive:
            return None
        if self._metrics is None:
            self._metrics = self._loop.create_future()
            self.tell(SendMetrics())
        with suppress(TimeoutError):
            async with asyncio.timeout(_METRICS_SECONDS):
                return await asyncio.shield(self._metrics)
        return None

    def kill(self) -> None:
        """End it at once."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def end(self, seconds: float) -> None:
        """Wait for its exit, and kill it if it takes longer."""
        try:
            async with asyncio.timeout(seconds):
                await self.exited.wait()
        except TimeoutError:
            _log.warning("killed a process that did not end", pid=self.pid)
            self.kill()
            await self.exited.wait()

    def _read(self) -> None:
        try:
            self._hear(self._control.recv())
        except (EOFError, OSError):
            self._loop.remove_reader(self._control.fileno())

    def _hear(self, message: object) -> None:
        match message:
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(message)
            case Ended(reason):
                if reason is not None and not self._ready.done():
                    self._ready.set_exception(reason.error())
            case Metrics(page):
                if self._metrics is not None and not self._metrics.done():
                    self._metrics.set_result(page)
                self._metrics = None

    def _exit(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._loop.remove_reader(self._control.fileno())
        with suppress(EOFError, OSError):
            while self._control.poll():  # its last words
                self._hear(self._control.recv())
        self._control.close()
        self._process.join()
        if not self._ready.done():
            self._ready.set_exception(ServerFailedError(f"a process ended, exit code {self._process.exitcode}"))
        if not self._ready.cancelled():
            self._ready.exception()  # nobody may ever ask
        self.exited.set()


class _Supervisor:
    def __init__(self, settings: Settings, front_ends: int) -> None:
        self.failed = asyncio.Event()
        self._settings = settings
        self._devices = settings.devices
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", _PRELOAD])
        self._board = make_board(self._context)
        self._compute: dict[int, Child] = {}
        self._front_ends: dict[int, Child] = {}
        self._front_end_count = front_ends
        self._models = b""
        self._rows = [self._board.devices[number] for number in range(len(self._devices))]
        self._ready = self._serving = self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        registry = CollectorRegistry()
        self._metrics = MergedMetrics(self._gather, registry)
        self._restarts = Counter(
            "cdam_process_restarts", "Processes that died and were started again.", ["kind"], registry=registry
        )
        processes = Gauge("cdam_processes", "Processes that are there.", ["kind"], registry=registry)
        for kind, children in (("compute", self._compute), ("front_end", self._front_ends)):
            self._restarts.labels(kind)
            processes.labels(kind).set_function(partial(_alive, children))
        self._health = Health(live=self._live, ready=lambda: self._ready and self._serves, service="")
        self._beat = monotonic()

    async def start(self) -> None:
        """Start everything, and report ready; what fails leaves nothing behind."""
        async with AsyncExitStack() as resources:
            self._loop = asyncio.get_running_loop()
            self._folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="cdam-")))
            if len(os.fsencode(self._folder)) > _LONGEST_FOLDER:
                raise ValueError(f"{tempfile.gettempdir()} (TMPDIR) is too long a path for sockets")
            resources.push_async_callback(self._kill_all)
            address = self._claim_port(resources)
            admin = resources.enter_context(
                closing(AdminServer(self._settings.admin_address, self._metrics, self._health))
            )
            await _all(self._start_compute(number) for number in range(len(self._devices)))
            self._address = address
            await _all(self._start_front_end(number) for number in range(self._front_end_count))
            _log.info("listening", address=self._address, admin_port=admin.port)
            self._beat = monotonic()
            self._serving = True
            self._set_ready(True)
            self._spawn(self._watch())
            for number in self._compute:
                self._spawn(self._keep_device(number))
            for number in self._front_ends:
                self._spawn(self._keep_front_end(number))
            self._resources = resources.pop_all()
        _log.info("ready", front_ends=self._front_end_count, devices=list(self._devices))

    async def stop(self) -> None:
        """Report NOT_SERVING, wait, refuse new requests, finish those in flight, close; in this order."""
        settings = self._settings
        async with self._resources:
            self._stopping = True
            self._set_ready(False)
            _log.info("draining", wait_seconds=settings.drain_wait_seconds, seconds=settings.drain_seconds)
            if not self.failed.is_set():
                await asyncio.sleep(settings.drain_wait_seconds)
            ended = monotonic() + settings.drain_seconds
            await self._end(self._front_ends, Drain(settings.drain_seconds), settings.drain_seconds)
            left = max(0.0, ended - monotonic())
            await self._end(self._compute, Close(left), left)
        _log.info("stopped")

    async def _end(self, children: dict[int, Child], message: object, seconds: float) -> None:
        for child in children.values():
            child.tell(message)
        await asyncio.gather(*(child.end(seconds + _EXIT_SECONDS) for child in children.values()))

    # --- starting

    async def _start_compute(self, number: int) -> None:
        with suppress(FileNotFoundError):  # of one that died
            (self._folder / f"compute-{number}").unlink()
        settings = self._settings.model_copy(update={"device": self._devices[number]})
        child = self._compute[number] = await self._child("compute", number, settings)
        self._models = (await child.ready()).models

    async def _start_front_end(self, number: int) -> None:
        child = self._front_ends[number] = await self._child(
            "front_end", number, self._settings, self._models, self._front_end_count, self._address
        )
        said = await child.ready()
        self._address = said.address
        for device, compute in self._compute.items():
            if compute.alive:
                child.tell(Device(device))
        child.tell(SetReady(self._ready))

    async def _child(self, function: str, number: int, settings: Settings, *arguments: object) -> Child:
        ours, theirs = self._context.Pipe()
        assignment = (settings, number, self._board, theirs, self._folder)
        process = self._context.Process(
            target=run_child, args=(function, assignment, *arguments), name=f"{function}-{number}"
        )
        # In a thread: the first one waits until everything has been imported.
        await asyncio.to_thread(process.start)
        theirs.close()
        return Child(process, ours)

    def _claim_port(self, resources: AsyncExitStack) -> str:
        """The address with a port that no other server has, and that front ends may share.

        Raises:
            OSError: Another server has it.
        """
        address = self._settings.address
        if address.startswith("unix:"):
            return address
        host, _, port = address.rpartition(":")
        bare = host.strip("[]")
        family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        try:
            where = socket.getaddrinfo(bare, int(port), family, socket.SOCK_STREAM)[0][4]
            with socket.socket(family, socket.SOCK_STREAM) as alone:
                # Nobody may have it, not even somebody who would share it.
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(where)
                where = alone.getsockname()
            claim = resources.enter_context(socket.socket(family, socket.SOCK_STREAM))
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            claim.bind(where)
        except OSError as error:
            raise OSError(f"can't listen on {address} (address): is another server there?") from error
        return f"{host}:{where[1]}"

    # --- watching

    async def _keep_front_end(self, number: int) -> None:
        """Replace a front end whenever it dies; only its calls in flight are lost."""
        while True:
            child = self._front_ends[number]
            lived = await self._lifetime(child)
            row = self._board.front_ends[number]
            row.devices = row.preparing = row.beat = 0.0  # it can't say so itself
            if self._stopping:
                return
            _log.error("a front end died, and is replaced", number=number, pid=child.pid, exit_code=child.exit_code)
            await self._again(lambda: self._start_front_end(number), lived, number=number)
            self._restarts.labels("front_end").inc()
            _log.info("a front end was replaced", number=number, pid=self._front_ends[number].pid)

    async def _keep_device(self, number: int) -> None:
        """Start a device's process again whenever it dies; but without its only device a server ends, as whoever runs it knows better."""
        while True:
            child = self._compute[number]
            lived = await self._lifetime(child)
            self._rows[number].up = self._rows[number].beat = 0.0  # it can't say so itself
            if self._stopping:
                return
            device = self._devices[number]
            if len(self._compute) == 1:
                _log.critical("the compute process died", device=device, pid=child.pid, exit_code=child.exit_code)
                self._set_ready(False)
                self.failed.set()
                return
            _log.error(
                "a compute process died, and is started again",
                device=device,
                pid=child.pid,
                exit_code=child.exit_code,
            )
            await self._again(lambda: self._start_compute(number), lived, device=device)
            self._restarts.labels("compute").inc()
            _log.info("a compute process was started again", device=device, pid=self._compute[number].pid)
            for front_end in self._front_ends.values():
                front_end.tell(Device(number))

    async def _lifetime(self, child: Child) -> float:
        """Seconds until it dies."""
        began = monotonic()
        await child.exited.wait()
        self._metrics.keep(child)
        return monotonic() - began

    async def _again(self, start: Callable[[], Awaitable[None]], lived: float, **which: object) -> None:
        """Start a process until it works, at once if the one before lived long enough."""
        pause = _FIRST_PAUSE_SECONDS if lived < _CALM_SECONDS else 0.0
        while not self._stopping:
            await asyncio.sleep(pause)
            try:
                await start()
            except Exception as error:  # noqa: BLE001 - it is tried again
                _log.error("a process can't be started", **which, exc_info=error)
                pause = min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            else:
                return

    async def _watch(self) -> None:
        """Kill processes that hang, so that they are replaced; but not the only device's, whose end is the server's: liveness says so."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = monotonic()
            slept, self._beat = now - self._beat, now
            if slept > _STALL_SECONDS / 2:  # the whole machine stood still, or all of this server
                continue
            watched = [(child, self._board.front_ends[number]) for number, child in self._front_ends.items()]
            if len(self._compute) > 1:
                watched += [(child, self._rows[number]) for number, child in self._compute.items()]
            for child, row in watched:
                if row.beat and now - row.beat > _STALL_SECONDS and child.alive:
                    _log.error("a process hangs, and is killed", name=child.name, pid=child.pid)
                    row.beat = 0.0
                    child.kill()

    def _live(self) -> bool:
        """Whether this process turns, and what computes."""
        now = monotonic()
        if not self._serving:
            return not self.failed.is_set()
        newest = max(row.beat for row in self._rows)
        return self._computes and now - newest < _STALL_SECONDS and now - self._beat < _STALL_SECONDS

    @property
    def _computes(self) -> bool:
        """Whether there is a device that does."""
        return any(self._rows[number].up and child.alive for number, child in self._compute.items())

    @property
    def _serves(self) -> bool:
        """Whether there is a front end that answers requests."""
        rows = self._board.front_ends
        return self._computes and any(rows[number].devices and its.alive for number, its in self._front_ends.items())

    def _set_ready(self, value: bool) -> None:
        self._ready = value
        for child in self._front_ends.values():
            child.tell(SetReady(value))

    def _gather(self) -> Sequence[tuple[Child, Page | None]]:
        """All children's metrics; called in a thread of the admin port."""

        async def gather() -> list[tuple[Child, Page | None]]:
            children = [*self._compute.values(), *self._front_ends.values()]
            return list(zip(children, await asyncio.gather(*(child.metrics() for child in children)), strict=True))

        return asyncio.run_coroutine_threadsafe(gather(), self._loop).result(2 * _METRICS_SECONDS)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _kill_all(self) -> None:
        """End what is still there, children last started first."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        children = [*self._front_ends.values(), *self._compute.values()]
        for child in children:
            child.kill()
        for child in children:
            await child.exited.wait()


async def _all(starting: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; raises what the first one that fails raises."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for each in starting:
                tasks.create_task(each)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def _alive(children: dict[int, Child]) -> int:
    return sum(child.alive for child in children.values())


def run_child(function: str, assignment: tuple[Any, ...], *arguments: Any) -> None:
    """A child's first line; imported late, since the supervisor has no torch."""
    from cdam_server.processes import children

    getattr(children, function)(children.Assignment(*assignment), *arguments)
