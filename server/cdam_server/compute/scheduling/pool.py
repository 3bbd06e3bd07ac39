"""What only so many can use at a time, callers in turn."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar, TypeVarTuple

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class FairSemaphore:
    """Gives so many places; those who wait go by callers in turn, so that one who asks for much keeps nobody else waiting.

    Belongs to one event loop.

    Args:
        places: How many.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the caller whose turn is next comes first

    @asynccontextmanager
    async def __call__(self, caller: str) -> AsyncIterator[None]:
        """Wait for the caller's turn, and have a place as long as the block runs."""
        await self.enter(caller)
        try:
            yield
        finally:
            self.leave()

    async def enter(self, caller: str) -> None:
        """Wait for the caller's turn, and have a place until `leave`."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(caller)

    async def _wait(self, caller: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had just come
                self.leave()
            raise

    def leave(self) -> None:
        """Give the place to the next, or keep it free."""
        while self._waiting:
            caller = next(iter(self._waiting))
            queue = self._waiting.pop(caller)
            turn = queue.popleft()
            if queue:
                self._waiting[caller] = queue
            if not turn.done():  # else whoever waited has left
                turn.set_result(None)
                return
        self._free += 1


class Pool:
    """Threads for work of some milliseconds, which callers use in turn.

    Args:
        threads: How many.
        name: What their names begin with.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._turns = FairSemaphore(threads)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, caller: str, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """What the function returns, called in a thread when it is the caller's turn.

        Cancelling it does not stop the thread, whose place is handed on only when it is done.
        """
        await self._turns.enter(caller)
        work = asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        work.add_done_callback(self._done)
        return await asyncio.shield(work)

    def _done(self, work: "asyncio.Future[Result]") -> None:
        if not work.cancelled():
            work.exception()  # whoever waited may have left
        self._turns.leave()

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
