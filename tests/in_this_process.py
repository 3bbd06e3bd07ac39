"""Servers in the process of the tests: in a thread, or in the test's own event loop, where its tasks can be seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import CoroutineType
from typing import Any

from cdam_server.bootstrap import Application, load_catalog, serve_in_background
from cdam_server.settings.config import Settings


@contextmanager
def served(**settings: Any) -> Iterator[str]:
    """The address of a server in a thread."""
    with serve_in_background(_settings(settings)) as address:
        yield address


@asynccontextmanager
async def application(**settings: Any) -> AsyncIterator[str]:
    """The address of a server in this event loop."""
    loaded = _settings(settings)
    server = Application(loaded, load_catalog(loaded))
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop()


def tasks() -> set[asyncio.Task[Any]]:
    """This loop's tasks, without grpc's own: those are coroutines of Cython."""
    return {task for task in asyncio.all_tasks() if isinstance(task.get_coro(), CoroutineType)}


def _settings(settings: dict[str, Any]) -> Settings:
    return Settings.load(address="127.0.0.1:0", admin_address="127.0.0.1:0", **settings)
