"""What the child processes do: each one function, from its first line to its exit.

They are told what to do over a `Connection` to the supervisor; if that closes, they end at once, as the supervisor is gone. Signals that a
terminal or a service manager sends to all processes at once are for the supervisor alone.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from multiprocessing import current_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import structlog

from cdam_server.compute.catalog import load_catalog
from cdam_server.compute.facts import Models
from cdam_server.operation import logs
from cdam_server.operation.health import Health
from cdam_server.operation.telemetry import Telemetry
from cdam_server.processes.board import FrontEndWrites
from cdam_server.processes.compute_host import SWITCH_SECONDS, ComputeHost, settle
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
from cdam_server.processes.front_end import SERVICE, FrontEnd
from cdam_server.processes.metrics import snapshot
from cdam_server.processes.remote import RemoteCompute
from cdam_server.processes.service import ComputeService
from cdam_server.processes.wire import Failed
from cdam_server.settings.config import Settings
from cdam_server.store import StoreUnusableError

# Seconds between two looks at what there is to do, where nothing else changes.
_PUBLISH_SECONDS: Final = 0.1
# Seconds for answers that are on their way when nothing can be computed any more.
_LAST_WORDS_SECONDS: Final = 0.5

_log = structlog.get_logger("cdam.server")


class Assignment(NamedTuple):
    """What a child is.

    Attributes:
        settings: The settings.
        number: Of its row of the board.
        board: The board.
        control: To the supervisor.
        folder: Where the compute processes' sockets are.
    """

    settings: Settings
    number: int
    board: Any
    control: Connection
    folder: Path

    def socket(self, device: int) -> Path:
        """Where a device's process listens."""
        return self.folder / f"compute-{device}"


def compute(its: Assignment) -> None:
    """A compute process: load the models, warm up, and serve front ends until it is told to close."""
    _begin(its.settings, f"cdam-compute-{its.number}")
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        catalog = load_catalog(its.settings)
    except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor says it
        _give_up(its.control, error)
    _run(its.control, _compute(its, catalog))


def front_end(its: Assignment, models: bytes, of: int, address: str) -> None:
    """A front end: serve the API over the devices that it is told of, until it is told to drain."""
    _begin(its.settings, f"cdam-front-{its.number}")
    settings = its.settings.model_copy(update={"address": address})
    _run(its.control, _front_end(its._replace(settings=settings), pickle.loads(models), of))  # noqa: S301 - ours


async def _compute(its: Assignment, catalog: Any) -> None:
    telemetry, failed = Telemetry(), asyncio.Event()
    row = its.board.devices[its.number]

    def fail(error: BaseException) -> None:
        row.up = 0  # before any caller hears of it
        _log.critical("failed", exc_info=error)
        failed.set()

    host = ComputeHost(its.settings, catalog, telemetry, fail)
    async with AsyncExitStack() as resources:
        host.open(resources)
        await host.warm_up()
        settle()
        service = ComputeService(host, telemetry, row)
        listening = resources.enter_context(service.listen(its.socket(its.number)))
        accepting = asyncio.create_task(service.accept(listening), name="accept")
        publishing = asyncio.create_task(_every(_PUBLISH_SECONDS, service.publish), name="publish")
        control = _Control(its.control)
        row.up = 1
        control.send(Ready(models=pickle.dumps(catalog.facts)))
        async for message in control.until(failed):
            match message:
                case SendMetrics():
                    control.send(Metrics(snapshot(telemetry.registry)))
                case Close(seconds):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(seconds):
                            await host.scheduler.close()
                    break
        if failed.is_set():
            await asyncio.sleep(_LAST_WORDS_SECONDS)
            control.send(Ended())
            os._exit(1)  # its threads may be stuck
        accepting.cancel()
        publishing.cancel()


async def _front_end(its: Assignment, models: Models, of: int) -> None:
    telemetry, row = Telemetry(), its.board.front_ends[its.number]
    remote = RemoteCompute(
        its.board,
        its.number,
        of,
        its.settings.max_pending,
        telemetry,
        remembers=its.settings.token_cache_mib > 0,
    )
    ready = False
    health = Health(live=lambda: True, ready=lambda: ready and remote.connected, service=SERVICE)
    others = FrontEndWrites(its.board, its.number, of)
    front = FrontEnd(its.settings, models, remote, telemetry, health, of, others)

    def beat() -> None:
        row.beat = front.beat

    async with AsyncExitStack() as resources:
        await front.open(resources, reuse_port=not front.of_a_unix_socket)
        beating = asyncio.create_task(_every(_PUBLISH_SECONDS, beat), name="beat")
        control = _Control(its.control)
        control.send(Ready(address=front.address))
        async for message in control.until(asyncio.Event()):
            match message:
                case SendMetrics():
                    control.send(Metrics(snapshot(telemetry.registry)))
                case SetReady(value):
                    ready = value
                    front.accepting = front.accepting or value
                    await front.publish()
                case Device(number):
                    await remote.connect(number, its.socket(number))
                case Drain(seconds):
                    await front.drain(seconds)
                    await front.last_arrivals()
                    break
        beating.cancel()
        remote.close()


class _Control:
    """The connection to the supervisor, in the event loop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        asyncio.get_running_loop().add_reader(connection.fileno(), self._read)

    def send(self, message: object) -> None:
        """Tell the supervisor."""
        with suppress(OSError):  # it is gone, which is noticed elsewhere
            self._connection.send(message)

    async def until(self, event: asyncio.Event) -> Any:
        """Messages as they come, until the event is set."""
        ended = asyncio.create_task(event.wait())
        try:
            while not event.is_set():
                coming = asyncio.create_task(self._messages.get())
                await asyncio.wait({coming, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    return
                yield coming.result()
        finally:
            ended.cancel()

    def _read(self) -> None:
        try:
            self._messages.put_nowait(self._connection.recv())
        except (EOFError, OSError):
            os._exit(1)


def _begin(settings: Settings, name: str) -> None:
    with suppress(OSError):  # a name for `ps` and `top`, where a system has this
        Path("/proc/self/comm").write_text(name)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logs.configure(settings.log_format, settings.log_level, process=current_process().name)


def _run(control: Connection, work: Awaitable[None]) -> None:
    """Run a child's event loop, and exit without waiting for threads: requests that outlived the drain may still be computed."""

    async def main() -> None:
        await work

    try:
        asyncio.run(main())
    except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor says it
        _give_up(control, error)
    sys.stderr.flush()
    os._exit(0)


def _give_up(control: Connection, error: Exception) -> NoReturn:
    with suppress(OSError):
        control.send(Ended(Failed.of(error)))
    if not isinstance(error, (ValueError, OSError, StoreUnusableError)):  # else it is in the user's words
        _log.critical("failed", exc_info=error)
    raise SystemExit(1)


async def _every(seconds: float, function: Callable[[], None]) -> None:
    while True:
        function()
        await asyncio.sleep(seconds)
