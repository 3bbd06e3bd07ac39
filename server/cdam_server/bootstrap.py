"""Where objects meet: settings in, a running server out."""

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from time import monotonic
from typing import Final

import structlog

from cdam_server.compute.catalog import load_catalog
from cdam_server.compute.models import Catalog
from cdam_server.operation.admin import AdminServer
from cdam_server.operation.health import Health
from cdam_server.operation.telemetry import Telemetry
from cdam_server.processes.compute_host import SWITCH_SECONDS, ComputeHost, settle
from cdam_server.processes.failure import ServerFailedError
from cdam_server.processes.front_end import SERVICE, FrontEnd, cancel
from cdam_server.settings.config import Settings

# Seconds without a heartbeat until the event loop counts as hanging.
_STALL_SECONDS: Final = 10.0

_log = structlog.get_logger("cdam.server")


class Application:
    """A server whose parts are all in this process; `start`, then `stop`, both in one event loop.

    Args:
        settings: The settings.
        catalog: The models, loaded.

    Attributes:
        address: Where the API is served, once started.
        failed: Set when nothing can be computed any more.
    """

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings = settings
        self._telemetry = Telemetry()
        self._host = ComputeHost(settings, catalog, self._telemetry, self._fail)
        self._health = Health(live=self._live, ready=lambda: self._ready, service=SERVICE)
        self._ready = False
        self.address = ""
        self.failed = asyncio.Event()

    async def start(self) -> None:
        """Open the ports, warm the models up, and only then report ready; what fails leaves nothing open.

        Raises:
            OSError: A port is taken.
            StoreUnusableError: The store of concepts must not be used as it is.
            ValueError: A model can't be used, or tracing.
        """
        settings, host = self._settings, self._host
        async with AsyncExitStack() as resources:
            host.open(resources)
            self._front_end = FrontEnd(settings, host.catalog.facts, host.compute, self._telemetry, self._health)
            # Early, so that probes are answered while the rest closes.
            admin = resources.enter_context(
                closing(AdminServer(settings.admin_address, self._telemetry.registry, self._health))
            )
            await self._front_end.open(resources)
            self.address = self._front_end.address
            _log.info("listening", address=self.address, admin_port=admin.port)
            await host.warm_up()
            self._ready = self._front_end.accepting = True
            await self._front_end.publish()
            self._resources = resources.pop_all()
        _log.info("ready", models=[served.loaded.name for served in host.catalog])

    async def stop(self) -> None:
        """Report NOT_SERVING, wait, refuse new requests, finish those in flight, close."""
        settings, front_end = self._settings, self._front_end
        async with self._resources:
            self._ready = False
            await front_end.publish()
            _log.info("draining", wait_seconds=settings.drain_wait_seconds, seconds=settings.drain_seconds)
            if not self.failed.is_set():
                await asyncio.sleep(settings.drain_wait_seconds)
            ended = monotonic() + settings.drain_seconds
            await front_end.drain(settings.drain_seconds)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, ended - monotonic())):
                    await self._host.scheduler.close()
            await front_end.last_arrivals()
        _log.info("stopped")

    def _live(self) -> bool:
        """Whether the event loop turns and the workers work."""
        return monotonic() - self._front_end.beat < _STALL_SECONDS and self._host.scheduler.alive

    def _fail(self, error: BaseException) -> None:
        _log.critical("failed", exc_info=error)
        self._ready = self._front_end.accepting = False
        self.failed.set()


async def serve(settings: Settings, catalog: Catalog) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        ServerFailedError: Nothing can be computed any more; those who waited have been told.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    application = Application(settings, catalog)
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    starting, told = asyncio.create_task(application.start()), asyncio.create_task(stopping.wait())
    await asyncio.wait((starting, told), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        _log.info("stopped before it was ready")
        await cancel(starting)
        return
    await starting
    settle()
    failed = asyncio.create_task(application.failed.wait())
    await asyncio.wait((told, failed), return_when=asyncio.FIRST_COMPLETED)
    await application.stop()
    if application.failed.is_set():
        raise ServerFailedError("the device is lost, or the computing stands still; the log says more")


@contextmanager
def serve_in_background(settings: Settings) -> Iterator[str]:
    """A server in a thread of this process, ready when the block is entered; yields its address."""
    catalog = load_catalog(settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()
    try:
        application = Application(settings, catalog)
        asyncio.run_coroutine_threadsafe(application.start(), loop).result()
        try:
            yield application.address
        finally:
            asyncio.run_coroutine_threadsafe(application.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
