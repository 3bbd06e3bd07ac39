"""Memory that several share."""

from __future__ import annotations

import asyncio


class ByteBudget:
    """Bytes that messages may take while nothing else bounds them, whoever sent them; one message may take more if it is alone.

    Args:
        most: Number of bytes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._freed = asyncio.Event()

    async def take(self, size: int) -> None:
        """Wait until so many bytes are free, and take them."""
        while not self.try_take(size):
            self._freed.clear()
            await self._freed.wait()

    def try_take(self, size: int) -> bool:
        """Take so many bytes if they are free now; whether they were."""
        if self._taken and self._taken + size > self._most:
            return False
        self._taken += size
        return True

    def give_back(self, size: int, _: object = None) -> None:
        """Free so many bytes; the second argument lets it be the callback of a task."""
        self._taken -= size
        self._freed.set()
