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
        while not self.try_take(size):
            self._freed.clear()
            await self._freed.wait()

    def try_take(self, size: int) -> bool:
        """Have it if there is room now; whether there was."""
        if self._taken and self._taken + size > self._most:
            return False
        self._taken += size
        return True

    def give_back(self, size: int, _: object = None) -> None:
        """Have it no more; what comes second is a task that is done."""
        self._taken -= size
        self._freed.set()
