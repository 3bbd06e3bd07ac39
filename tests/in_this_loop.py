"""A server in the event loop of the test, where its tasks can be seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import CoroutineType
from typing import Any

from cdam_server.bootstrap import Application, load_catalog
from cdam_server.settings.config import Settings


def tasks() -> set[asyncio.Task[Any]]:
    """This loop's tasks, without grpc's own: those are coroutines of Cython."""
    return {task for task in asyncio.all_tasks() if isinstance(task.get_coro(), CoroutineType)}


@asynccontextmanager
async def application(**settings: Any) -> AsyncIterator[str]:
    """The address of a server that is stopped at the end of the block."""
    loaded = Settings.load(address="127.0.0.1:0", admin_address="127.0.0.1:0", **settings)
    server = Application(loaded, load_catalog(loaded))
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop()
