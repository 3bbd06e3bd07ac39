"""The scheduler's face to the event loop: it lets jobs in, and waits for their answers."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from typing import Generic

from cdam_server.scheduling.dispatcher import Dispatcher
from cdam_server.scheduling.entry import (
    Answer,
    Bounds,
    Bucket,
    DeviceLostError,
    Done,
    Entry,
    ExpiredError,
    Job,
    QueueFullError,
    Terms,
)
from cdam_server.scheduling.queue import AnyEntry
from cdam_server.scheduling.worker import Rest, Worker

__all__ = ["Observer", "Rest", "Scheduler", "Ticket"]


class Observer:
    """Told what becomes of jobs, in the event loop's thread; does nothing unless a subclass does."""

    def admitted(self) -> None:
        """A job was let in."""

    def refused(self, reason: str) -> None:
        """A job was not let in: the bound that was hit (``jobs``, ``cost``, ``bytes``) or ``deadline``."""

    def dropped(self, reason: str) -> None:
        """A job that was let in was not answered: ``expired`` or ``cancelled``."""


class Ticket(Generic[Bucket, Job, Answer]):
    """Room that a job has been given; from `Scheduler.admit`."""

    def __init__(self, entry: Entry[Bucket, Job, Answer], dispatcher: Dispatcher) -> None:
        self._entry = entry
        self._dispatcher = dispatcher

    async def submit(self, job: Job) -> Done[Answer]:
        """Wait for the job's answer; cancelling the wait withdraws the job.

        Raises:
            ExpiredError: The deadline passed before it was computed.
            DeviceLostError: Nothing can be computed any more.
            Exception: Whatever the compute function raised or returned for this job.
        """
        self._dispatcher.submit([self.ready(job)])
        return await self.answered()

    def ready(self, job: Job) -> Entry[Bucket, Job, Answer]:
        """The entry, now that its job is there."""
        self._entry.job, self._entry.submitted = job, time.monotonic()
        return self._entry

    async def answered(self) -> Done[Answer]:
        """The answer, once the entry has been handed in; raises what `submit` raises."""
        return await self._entry.answered


class Scheduler(Generic[Bucket, Job, Answer]):
    """Gathers jobs into batches and has them computed.

    Args:
        compute: Called in a worker's thread with a bucket, its jobs and a `Rest`; see `Worker`.
        bounds: How much may be let in and not yet answered.
        max_batch_size: Largest number of jobs in a batch.
        max_queue_delay: Longest time, in seconds, that a job waits for company while a worker is idle.
        slots: Batches in work at once, on one device.
        observer: Told what becomes of jobs.
        on_failure: Called once in the event loop, with the reason, if nothing can be computed any more.
    """

    def __init__(
        self,
        compute: Callable[[Bucket, Sequence[Job], Rest], Sequence[Answer | Exception]],
        *,
        bounds: Bounds = Bounds(),  # noqa: B008 - frozen
        max_batch_size: int = 16,
        max_queue_delay: float = 0.0,
        slots: int = 1,
        observer: Observer | None = None,
        on_failure: Callable[[BaseException], None] = lambda error: None,  # noqa: ARG005
    ) -> None:
        self._observer = observer or Observer()
        self._on_failure = on_failure
        self._numbers = count()
        self._failure: BaseException | None = None
        self._held: set[AnyEntry] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._dispatcher = Dispatcher(bounds, max_batch_size, max_queue_delay, slots, self._expire)
        self._workers = [
            Worker(self._dispatcher, compute, self._answer, self._fail_soon, number) for number in range(slots)
        ]
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for their batch."""
        return self._dispatcher.waiting

    @property
    def alive(self) -> bool:
        """Whether it is working: started, and every worker alive."""
        return self._loop is not None and self._failure is None and all(worker.is_alive() for worker in self._workers)

    @property
    def silent_seconds(self) -> float:
        """How long the worker that is busy and has been silent for longest has been so."""
        return max(worker.silent_seconds for worker in self._workers)

    def ceiling(self, bucket: Bucket) -> int:
        """Most jobs in a batch of a bucket, as far as memory is known to hold them."""
        return self._dispatcher.ceiling(bucket)

    def start(self) -> None:
        """Begin to work; to be called in the event loop that admits."""
        self._loop = asyncio.get_running_loop()
        for worker in self._workers:
            worker.start()

    @contextmanager
    def admit(self, terms: Terms[Bucket]) -> Iterator[Ticket[Bucket, Job, Answer]]:
        """Give a job room for as long as the block runs, before anything is spent on preparing it.

        Raises:
            ClosedError: No more jobs are taken.
            DeviceLostError: Nothing can be computed any more.
            QueueFullError: There is no room, or it would not be done in time.
        """
        if self._failure is not None:
            raise DeviceLostError("nothing can be computed any more")
        assert self._loop is not None
        answered: asyncio.Future[Done[Answer]] = self._loop.create_future()

        def make(seconds: float) -> AnyEntry:
            return Entry(terms, time.monotonic(), next(self._numbers), seconds, answered)

        try:
            entry = self._dispatcher.admit(make, terms)
        except QueueFullError as refusal:
            self._observer.refused(refusal.reason)
            raise
        self._observer.admitted()
        self._held.add(entry)
        self._empty.clear()
        try:
            yield Ticket(entry, self._dispatcher)
        except asyncio.CancelledError:
            self._observer.dropped("cancelled")
            raise
        except ExpiredError:
            self._observer.dropped("expired")
            raise
        finally:
            entry.gone = True
            if not answered.cancel() and not answered.cancelled():
                answered.exception()  # if nobody came to read it, asyncio need not complain
            self._held.discard(entry)
            if not self._held:
                self._empty.set()
            self._dispatcher.release(entry)

    async def submit(self, terms: Terms[Bucket], job: Job) -> Done[Answer]:
        """Let a job in that is ready, and wait for its answer; raises what `admit` and `Ticket.submit` raise."""
        with self.admit(terms) as ticket:
            return await ticket.submit(job)

    async def submit_all(self, jobs: Sequence[tuple[Terms[Bucket], Job]]) -> list[Done[Answer]]:
        """Let jobs in that are ready, all or none, to be batched together; raises what `submit` raises."""
        with ExitStack() as stack:
            tickets = [(stack.enter_context(self.admit(terms)), job) for terms, job in jobs]
            self._dispatcher.submit([ticket.ready(job) for ticket, job in tickets])
            return [await ticket.answered() for ticket, _ in tickets]

    async def close(self) -> None:
        """Take no more jobs, wait until all that were let in are answered, and end the workers."""
        self._dispatcher.close()
        await self._empty.wait()
        self.abandon()
        while self._failure is None and any(worker.is_alive() for worker in self._workers):  # noqa: ASYNC110 - it is threads that end
            await asyncio.sleep(0.01)

    def abandon(self) -> None:
        """End without waiting for what is being computed."""
        self._dispatcher.end()

    def fail(self, error: BaseException) -> None:
        """Nothing can be computed any more: answer everyone, and tell."""
        if self._failure is not None:
            return
        self._failure = error
        self._dispatcher.end()
        for entry in self._held:
            if not entry.answered.done():
                entry.answered.set_exception(DeviceLostError("nothing can be computed any more"))
        self._on_failure(error)

    def _fail_soon(self, error: BaseException) -> None:
        self._call(self.fail, error)

    def _expire(self, entries: Sequence[AnyEntry]) -> None:
        for entry in entries:
            self._answer(entry, ExpiredError("the deadline passed while the request waited for its turn"))

    def _answer(self, entry: AnyEntry, answer: Done[Answer] | Exception) -> None:
        self._call(_set, entry.answered, answer)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Have a function called in the event loop, from any thread; not if the loop has ended."""
        assert self._loop is not None
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


def _set(answered: "asyncio.Future[Done[Answer]]", answer: Done[Answer] | Exception) -> None:
    if answered.done():  # the caller has gone
        return
    if isinstance(answer, Exception):
        answered.set_exception(answer)
    else:
        answered.set_result(answer)
