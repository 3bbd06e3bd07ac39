"""A bounded queue, batches by bucket, and one compute thread.

Every job that is let in gets exactly one answer: its result, its own exception, or, if its caller has gone or its
deadline has passed before the work began, none of the compute.
"""

import asyncio
import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

Bucket = TypeVar("Bucket", bound=Hashable)
Job = TypeVar("Job")
Answer = TypeVar("Answer")


class QueueFullError(Exception):
    """No room for another job.

    Attributes:
        retry_after: Estimate, in seconds, of when there will be.
    """

    def __init__(self, pending: int, retry_after: float) -> None:
        super().__init__(f"the queue is full: {pending} waiting")
        self.retry_after = retry_after


class ExpiredError(Exception):
    """The job's deadline passed before the work began."""


class ClosedError(Exception):
    """The batcher takes no more jobs."""


@dataclass(frozen=True)
class Done(Generic[Answer]):
    """An answer and how it came about.

    Attributes:
        answer: What the compute function returned for the job.
        queue_seconds: Time from submission to the start of its batch.
        batch_size: Number of jobs in its batch.
    """

    answer: Answer
    queue_seconds: float
    batch_size: int


@dataclass(eq=False)
class _Entry(Generic[Bucket, Job, Answer]):
    bucket: Bucket
    job: Job
    answered: "asyncio.Future[Done[Answer]]"
    arrived: float
    deadline: float
    rank: int


class Batcher(Generic[Bucket, Job, Answer]):
    """Gathers jobs of one bucket into batches and computes them, one batch at a time, in one thread.

    Args:
        compute: Blocking function of a bucket and its jobs; returns one answer for each job, in order. An answer that
            is an exception fails that job alone. If the call raises, the batch's jobs are tried one by one, so that
            only the culprit fails.
        max_batch_size: Largest number of jobs in a batch.
        max_queue_delay: Longest time, in seconds, that a job waits for company while the thread is idle.
        max_pending: Largest number of waiting jobs.
    """

    def __init__(
        self,
        compute: Callable[[Bucket, Sequence[Job]], Sequence[Answer | Exception]],
        *,
        max_batch_size: int,
        max_queue_delay: float = 0.0,
        max_pending: int = 256,
    ) -> None:
        self._compute = compute
        self._max_batch_size = max_batch_size
        self._max_queue_delay = max_queue_delay
        self._max_pending = max_pending
        # In order of arrival; a dict, so that a caller who leaves is taken out at once.
        self._waiting: dict[int, _Entry[Bucket, Job, Answer]] = {}
        self._changed = asyncio.Event()
        self._computing = 0
        self._closed = False
        self._batch_seconds = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._runner: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Number of jobs waiting."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the batcher is working: started, and not ended."""
        return self._runner is not None and not self._runner.done()

    def start(self) -> None:
        """Begin to work; to be called in the event loop that submits."""
        self._runner = asyncio.create_task(self._run(), name="batcher")

    def check_room(self, preparing: int = 0) -> None:
        """Refuse early: before a job is prepared at some cost.

        Args:
            preparing: Number of jobs that will be submitted soon.

        Raises:
            ClosedError: The batcher takes no more jobs.
            QueueFullError: Too many jobs are waiting, those being prepared counted in.
        """
        if self._closed:
            raise ClosedError
        pending = len(self._waiting) + preparing
        if pending >= self._max_pending:
            raise QueueFullError(pending, self._retry_after())

    async def submit(
        self,
        bucket: Bucket,
        job: Job,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        rank: int = 0,
    ) -> Done[Answer]:
        """Wait for a job's answer; cancelling the wait withdraws the job.

        Args:
            bucket: Only jobs of one bucket share a batch.
            job: The job.
            timeout: Time in seconds after which the work need not begin any more.
            rank: Jobs of lower rank go first, within a rank those that came first.

        Raises:
            ClosedError: The batcher takes no more jobs.
            QueueFullError: Too many jobs are waiting.
            ExpiredError: The time ran out before the work began.
            Exception: Whatever the compute function raised or returned for this job.
        """
        self.check_room()
        loop = asyncio.get_running_loop()
        now = loop.time()
        entry = _Entry(bucket, job, loop.create_future(), now, math.inf if timeout is None else now + timeout, rank)
        self._waiting[id(entry)] = entry
        self._changed.set()
        try:
            return await entry.answered
        finally:
            self._waiting.pop(id(entry), None)
            self._changed.set()

    async def close(self) -> None:
        """Take no more jobs, answer all that were let in, and end the thread."""
        self._closed = True
        while self._waiting or self._computing:
            self._changed.clear()
            await self._changed.wait()
        self.abandon()
        self._thread.shutdown()  # at once, since nothing is computed any more

    def abandon(self) -> None:
        """End without waiting for what is still being computed."""
        self._closed = True
        if self._runner is not None:
            self._runner.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _retry_after(self) -> float:
        batches = math.ceil((len(self._waiting) + self._computing) / self._max_batch_size)
        return max(0.05, batches * self._batch_seconds)

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            await self._gather()
            if batch := self._take():
                await self._answer(batch)

    async def _gather(self) -> None:
        """Wait until the oldest job's batch is full or it has waited long enough."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            remaining = oldest.arrived + self._max_queue_delay - loop.time()
            same = sum(entry.bucket == oldest.bucket for entry in self._waiting.values())
            if remaining <= 0 or same >= self._max_batch_size:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(remaining):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Entry[Bucket, Job, Answer]]:
        """The next batch: jobs of the first job's bucket, by rank and arrival, without those out of time."""
        now = asyncio.get_running_loop().time()
        for entry in [entry for entry in self._waiting.values() if entry.deadline <= now]:
            del self._waiting[id(entry)]
            entry.answered.set_exception(ExpiredError("the deadline passed while the request waited for its turn"))
        if not self._waiting:
            return []
        ranked = sorted(self._waiting.values(), key=lambda entry: entry.rank)  # stable: arrival decides within a rank
        bucket = ranked[0].bucket
        same = (entry for entry in ranked if entry.bucket == bucket)
        batch = list(islice(same, self._max_batch_size))
        for entry in batch:
            del self._waiting[id(entry)]
        return batch

    async def _answer(self, batch: list[_Entry[Bucket, Job, Answer]]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._computing = len(batch)
        try:
            answers = await loop.run_in_executor(self._thread, self._compute_each, [*batch])
        finally:
            self._computing = 0
            self._changed.set()
        elapsed = loop.time() - started
        self._batch_seconds = elapsed if not self._batch_seconds else 0.8 * self._batch_seconds + 0.2 * elapsed
        for entry, answer in zip(batch, answers, strict=True):
            if entry.answered.done():  # the caller has gone
                continue
            if isinstance(answer, Exception):
                entry.answered.set_exception(answer)
            else:
                entry.answered.set_result(Done(answer, started - entry.arrived, len(batch)))

    def _compute_each(self, batch: list[_Entry[Bucket, Job, Answer]]) -> Sequence[Answer | Exception]:
        """One answer or exception for each entry, whatever happens."""
        try:
            answers = self._compute(batch[0].bucket, [entry.job for entry in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to {len(batch)} jobs")  # noqa: TRY301
        except Exception as error:  # noqa: BLE001
            if len(batch) == 1:
                return [error]
            return [self._compute_each([entry])[0] for entry in batch]
        return answers
