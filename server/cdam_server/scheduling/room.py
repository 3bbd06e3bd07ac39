"""Memory that several may fill together."""

from __future__ import annotations

import asyncio


class Room:
    """Bytes that messages may take while nothing else bounds them, whoever sent them; an empty room takes anything.

    Args:
        most: Bytes that it has.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._freed = asyncio.Event()

    async def take(self, size: int) -> None:
        """Wait until there is room, and have it."""
        while self._taken and self._taken + size > self._most:
            self._freed.clear()
            await self._freed.wait()
        self._taken += size

    def give_back(self, size: int, _: object = None) -> None:
        """Have it no more; what comes second is a task that is done."""
        self._taken -= size
        self._freed.set()
