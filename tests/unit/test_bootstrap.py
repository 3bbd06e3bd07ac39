"""Starting and stopping a server: whatever fails, nothing of it is left."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cdam_server import bootstrap
from cdam_server.bootstrap import Application, load_catalog
from cdam_server.compute.models import Catalog
from cdam_server.settings.config import Settings
from cdam_server.store import StoreUnusableError
from cdam_server.store.sqlite import FILE_NAME
from cdam_server.store.sqlite_file import make
from processes import free_ports

SERVING = 1


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog(Settings.load())


@pytest.fixture(scope="module", autouse=True)
def _threads_of_grpc() -> Iterator[None]:
    """One channel stays open, so that the threads which gRPC starts for its first object and ends with its last don't count."""

    async def keep() -> grpc.aio.Channel:
        return grpc.aio.insecure_channel("127.0.0.1:1")

    with closing(asyncio.new_event_loop()) as loop:
        channel = loop.run_until_complete(keep())
        yield
        loop.run_until_complete(channel.close())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    make(tmp_path / FILE_NAME)
    api, admin = free_ports(2)
    return Settings.load(address=f"127.0.0.1:{api}", admin_address=f"127.0.0.1:{admin}", data_dir=tmp_path)


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_server((host, int(port)))


def _nothing_is_left(run: Callable[[], None], settings: Settings) -> None:
    """Run it, and look whether there is a thread more than before, a port in use, or a lock."""
    before = set(threading.enumerate())
    run()
    until = time.monotonic() + 30
    while left := set(threading.enumerate()) - before:  # idle threads need a moment to end
        assert time.monotonic() < until, left
        time.sleep(0.02)
    for address in (settings.address, settings.admin_address):
        _listen(address).close()
    with closing(sqlite3.connect(settings.data_dir / FILE_NAME, timeout=0)) as connection:
        connection.execute("BEGIN EXCLUSIVE")


async def _fail_to_start(settings: Settings, catalog: Catalog, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        await Application(settings, catalog).start()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("setting", ["address", "admin_address"])
def test_a_taken_port_leaves_nothing(setting: str, settings: Settings, catalog: Catalog) -> None:
    address = getattr(settings, setting)

    def run() -> None:
        with _listen(address):
            asyncio.run(_fail_to_start(settings, catalog, OSError, rf"{address} \({setting}\)"))

    _nothing_is_left(run, settings)


def test_an_unusable_store_leaves_nothing(settings: Settings, catalog: Catalog) -> None:
    file = settings.data_dir / FILE_NAME
    good = file.read_bytes()

    def run() -> None:
        file.write_bytes(b"no database" * 1000)
        asyncio.run(_fail_to_start(settings, catalog, StoreUnusableError, FILE_NAME))
        file.write_bytes(good)

    _nothing_is_left(run, settings)


def test_a_model_that_cannot_be_used_leaves_nothing(
    settings: Settings, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ValueError("not finite")

    monkeypatch.setattr(bootstrap, "warm_up", fail)
    _nothing_is_left(lambda: asyncio.run(_fail_to_start(settings, catalog, ValueError, "not finite")), settings)


def test_tracing_that_cannot_be_used_leaves_nothing(settings: Settings, catalog: Catalog) -> None:
    traced = settings.model_copy(update={"tracing_endpoint": "collector"})
    _nothing_is_left(lambda: asyncio.run(_fail_to_start(traced, catalog, ValueError, "tracing_endpoint")), settings)


def test_a_start_that_is_cancelled_leaves_nothing(
    settings: Settings, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    warming_up = asyncio.Event()

    async def hang(*_: object) -> None:
        warming_up.set()
        await asyncio.Event().wait()

    async def cancel() -> None:
        starting = asyncio.create_task(Application(settings, catalog).start())
        await warming_up.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert asyncio.all_tasks() == {asyncio.current_task()}

    monkeypatch.setattr(bootstrap, "warm_up", hang)
    _nothing_is_left(lambda: asyncio.run(cancel()), settings)


def test_stopping_leaves_nothing(settings: Settings, catalog: Catalog) -> None:
    async def start_and_stop() -> None:
        application = Application(settings, catalog)
        await application.start()
        async with grpc.aio.insecure_channel(application.address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == SERVING
        await application.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    _nothing_is_left(lambda: asyncio.run(start_and_stop()), settings)
