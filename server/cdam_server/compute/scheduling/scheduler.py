"""The scheduler's face to the event loop: it lets jobs in, and waits for their answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from typing import cast

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.dispatcher import Dispatcher
from cdam_server.compute.scheduling.job import (
    Bounds,
    DeviceLostError,
    Done,
    ExpiredError,
    Job,
    JobSpec,
    QueueFullError,
)
from cdam_server.compute.scheduling.work import Answer, Work
from cdam_server.compute.scheduling.worker import Worker

__all__ = ["Observer", "Scheduler", "Ticket"]


class Observer:
    """Told what becomes of jobs, in the event loop's thread; does nothing unless a subclass does."""

    def admitted(self) -> None:
        """A job was let in."""

    def refused(self, reason: str) -> None:
        """A job was not let in: the bound that was hit (``jobs``, ``cost``, ``bytes``) or ``deadline``."""

    def dropped(self, reason: str) -> None:
        """A job that was let in was not answered: ``expired`` or ``cancelled``."""


class Ticket:
    """Room that a job has been given; from `Scheduler.admit`."""

    def __init__(self, scheduler: Scheduler, job: Job, answered: asyncio.Future[Done[object]]) -> None:
        self.job = job
        self.answered = answered
        self._scheduler = scheduler

    async def submit(self, work: Work[Answer]) -> Done[Answer]:
        """Wait for the work's answer; cancelling the wait withdraws it.

        Raises:
            ValueError: The work is of another bucket than its spec says.
            ExpiredError: The deadline passed before it was computed.
            DeviceLostError: Nothing can be computed any more.
            Exception: Whatever `Work.run` raised or returned for it.
        """
        self._scheduler.enqueue([(self.job, work)])
        return cast("Done[Answer]", await self.answered)


class Scheduler:
    """Gathers jobs into batches and has them computed.

    Args:
        bounds: How much may be let in and not yet answered.
        max_batch_size: Largest number of jobs in a batch.
        max_queue_delay: Longest time, in seconds, that a job waits for others to share its batch while a worker is idle.
        slots: Batches in work at once, on one device.
        observer: Told what becomes of jobs.
        on_failure: Called once in the event loop, with the reason, if nothing can be computed any more.
    """

    def __init__(
        self,
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
        self._held: set[Job] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._dispatcher = Dispatcher(bounds, max_batch_size, max_queue_delay, slots, self._expire)
        self._workers = [Worker(self._dispatcher, self._answer, self._fail_soon, number) for number in range(slots)]
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for their batch."""
        return self._dispatcher.waiting

    @property
    def load(self) -> tuple[int, float]:
        """Number of jobs that were let in and are not yet answered, and the seconds of work that are left; without the background."""
        return self._dispatcher.load

    @property
    def alive(self) -> bool:
        """Whether it is working: started, and every worker alive."""
        return self._loop is not None and self._failure is None and all(worker.is_alive() for worker in self._workers)

    @property
    def silent_seconds(self) -> float:
        """The longest silence of a worker that is busy, in seconds."""
        return max(worker.silent_seconds for worker in self._workers)

    def ceiling(self, bucket: Hashable) -> int:
        """Most jobs in a batch of a bucket, as far as memory is known to hold them."""
        return self._dispatcher.ceiling(bucket)

    def start(self) -> None:
        """Begin to work; to be called in the event loop that admits."""
        self._loop = asyncio.get_running_loop()
        for worker in self._workers:
            worker.start()

    def hold(
        self, spec: JobSpec, reply: Callable[[Done[object] | Exception], None], arrived: float | None = None
    ) -> Job:
        """Give a job room until `release`, before anything is spent on preparing it.

        Args:
            spec: What is known of it.
            reply: Takes its answer, once, in the event loop's thread.
            arrived: When it arrived, by `time.monotonic`; None: now.

        Raises:
            ClosedError: No more jobs are taken.
            DeviceLostError: Nothing can be computed any more.
            QueueFullError: There is no room, or it would not be done in time.
        """
        if self._failure is not None:
            raise DeviceLostError("nothing can be computed any more")
        job = Job(spec, time.monotonic() if arrived is None else arrived, next(self._numbers), reply)
        try:
            self._dispatcher.admit(job)
        except QueueFullError as refusal:
            self._observer.refused(refusal.reason)
            raise
        self._observer.admitted()
        self._held.add(job)
        self._empty.clear()
        return job

    def enqueue(self, jobs: Sequence[tuple[Job, Work[Answer]]]) -> None:
        """Hand in jobs that were let in, to be batched together if they can be.

        Raises:
            ValueError: A work is of another bucket than its spec says; none is handed in.
        """
        for job, work in jobs:
            if work.bucket != job.spec.bucket:
                raise ValueError(f"the work is of bucket {work.bucket!r}; its spec says {job.spec.bucket!r}")
        for job, work in jobs:
            # Between here and the answer nothing depends on the answer's type.
            job.work, job.submitted = cast("Work[object]", work), time.monotonic()
        self._dispatcher.submit([job for job, _ in jobs])

    def release(self, job: Job, dropped: str = "") -> None:
        """Give its room back, whatever has become of it; the reason counts it as one that was not answered."""
        if dropped:
            self._observer.dropped(dropped)
        self._held.discard(job)
        if not self._held:
            self._empty.set()
        self._dispatcher.release(job)

    @contextmanager
    def admit(self, spec: JobSpec) -> Iterator[Ticket]:
        """Give a job room for as long as the block runs; raises what `hold` raises."""
        assert self._loop is not None
        answered: asyncio.Future[Done[object]] = self._loop.create_future()
        job = self.hold(spec, partial(_set, answered))
        dropped = ""
        try:
            yield Ticket(self, job, answered)
        except asyncio.CancelledError:
            dropped = "cancelled"
            raise
        except ExpiredError:
            dropped = "expired"
            raise
        finally:
            if not answered.cancel() and not answered.cancelled():
                answered.exception()  # if nobody came to read it, asyncio need not complain
            self.release(job, dropped)

    async def submit_all(self, jobs: Sequence[tuple[JobSpec, Work[Answer]]]) -> list[Done[Answer]]:
        """Let jobs in whose work is there, all or none, to be batched together, and wait for their answers.

        Raises:
            Exception: What `admit` and `Ticket.submit` raise.
        """
        with ExitStack() as stack:
            tickets = [stack.enter_context(self.admit(spec)) for spec, _ in jobs]
            self.enqueue([(ticket.job, work) for ticket, (_, work) in zip(tickets, jobs, strict=True)])
            return [cast("Done[Answer]", await ticket.answered) for ticket in tickets]

    async def close(self) -> None:
        """Take no more jobs, wait until all that were let in are answered, and end the workers."""
        self._dispatcher.close()
        await self._empty.wait()
        self.abandon()
        while self._failure is None and any(worker.is_alive() for worker in self._workers):  # noqa: ASYNC110 - it is threads that end
            await asyncio.sleep(policy.CLOSE_POLL_SECONDS)

    def abandon(self) -> None:
        """End without waiting for what is being computed."""
        self._dispatcher.end()

    def fail(self, error: BaseException) -> None:
        """Nothing can be computed any more: answer everyone, and tell."""
        if self._failure is not None:
            return
        self._failure = error
        self._dispatcher.end()
        _deliver([(job, DeviceLostError("nothing can be computed any more")) for job in self._held])
        self._on_failure(error)

    def _fail_soon(self, error: BaseException) -> None:
        self._call(self.fail, error)

    def _expire(self, jobs: Sequence[Job]) -> None:
        self._answer([(job, ExpiredError("the deadline passed while the request waited for its turn")) for job in jobs])

    def _answer(self, answers: Sequence[tuple[Job, Done[object] | Exception]]) -> None:
        self._call(_deliver, answers)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Have a function called in the event loop, from any thread; not if the loop has ended."""
        assert self._loop is not None
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


def _deliver(answers: Sequence[tuple[Job, Done[object] | Exception]]) -> None:
    for job, answer in answers:
        if not job.released:  # else the caller has left
            job.reply(answer)


def _set(answered: asyncio.Future[Done[object]], answer: Done[object] | Exception) -> None:
    if answered.done():  # the wait was cancelled
        return
    if isinstance(answer, Exception):
        answered.set_exception(answer)
    else:
        answered.set_result(answer)
