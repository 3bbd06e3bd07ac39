"""What the event loop and the workers share; one lock guards it."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.admission import Admission
from cdam_server.compute.scheduling.batching import Batching
from cdam_server.compute.scheduling.ceilings import Ceilings
from cdam_server.compute.scheduling.forecast import Forecast
from cdam_server.compute.scheduling.job import Bounds, ClosedError, Job
from cdam_server.compute.scheduling.preemption import Preemption
from cdam_server.compute.scheduling.queue import Queue
from cdam_server.compute.scheduling.run import Device, Run


class Dispatcher:
    """Lets jobs in, and hands batches out; has the parts that decide do so under the lock.

    Args:
        bounds: How much may be let in and not yet answered.
        max_batch_size: Largest number of jobs in a batch.
        max_queue_delay: Longest time, in seconds, that a job waits for others to share its batch while a worker is idle.
        slots: Batches in work at once, on one device.
        expired: Called with the jobs whose deadlines passed while they waited, the lock not being held.
    """

    def __init__(
        self,
        bounds: Bounds,
        max_batch_size: int,
        max_queue_delay: float,
        slots: int,
        expired: Callable[[Sequence[Job]], None],
    ) -> None:
        self._expired = expired
        self._changed = threading.Condition()
        self._closed = self._ended = False
        self._queue = Queue(bounds, credit=policy.CREDIT_BATCHES * max_batch_size)
        self._ceilings = Ceilings(max_batch_size)
        self._device = Device(slots, self._ceilings)
        self._forecast = Forecast(self._device)
        self._admission = Admission(self._queue, self._device, self._forecast, bounds.deadline_margin)
        self._batching = Batching(self._queue, self._device, self._forecast, max_queue_delay)
        self._preemption = Preemption(self._queue, self._device, self._batching)

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for their batch."""
        return self._queue.waiting

    @property
    def load(self) -> tuple[int, float]:
        """Number of jobs that were let in and are not yet answered, and the seconds of work that are left; without the background."""
        with self._changed:
            return self._queue.held, self._forecast.running(time.monotonic()) + self._queue.work

    @property
    def sharing(self) -> int:
        """Number of batches that share the device now."""
        with self._changed:
            return self._device.sharing

    def ceiling(self, bucket: Hashable) -> int:
        """Most jobs in a batch of a bucket."""
        return self._ceilings.jobs(bucket)

    def admit(self, job: Job) -> None:
        """Let a job in, or refuse it.

        Raises:
            ClosedError: No more jobs are taken.
            QueueFullError: There is no room, or it would not be done in time.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            job.expected = self._admission.check(job.spec, time.monotonic())
            job.seconds = self._forecast.share(job.spec)
            self._queue.hold(job)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Their jobs may be computed from now on."""
        with self._changed:
            for job in jobs:
                self._queue.push(job)
            self._changed.notify_all()

    def release(self, job: Job) -> None:
        """Its caller has an answer, or has left."""
        with self._changed:
            job.released = True
            if self._queue.release(job):  # others may have waited for a batch with it
                self._changed.notify_all()

    def next(self) -> Run | None:
        """The next batch, as soon as there is one; None if there will be none."""
        while True:
            with self._changed:
                late, run = self._wait()
            if late:
                self._expired(late)
            if run is not None or self._ended:
                return run

    def interrupt(self, run: Run) -> Run | None:
        """A batch that interrupts one that is being computed, if there is any."""
        with self._changed:
            now = time.monotonic()
            batch = self._preemption.take(run, now)
            if not batch:
                return None
            run.resting = True
            return self._begin(batch, now, interrupts=run)

    def pause(self, run: Run) -> bool:
        """Wait a moment if the batch is in the background and another, which is not, is being computed; whether so."""
        with self._changed:
            run.resting = run.spec.background and bool(self._device.foreground) and not self._ended
            if run.resting:
                self._changed.wait(policy.PAUSE_SECONDS)
            return run.resting

    def finish(self, run: Run, *, computed: bool) -> None:
        """A batch is done; learn from it if all of it was computed at once."""
        with self._changed:
            now = time.monotonic()
            for job in run.jobs:
                self._admission.ended(job, now, computed=computed)
            if (
                computed and not run.spec.background
            ):  # their kinds are too many, each with too few batches to learn from
                self._forecast.learn(run, now)
                self._admission.tested(run.spec.kind, now)
                self._ceilings.fitted(run.spec.bucket, len(run.jobs))
            self._device.runs.remove(run)
            if run.interrupts is not None:
                run.interrupts.resting = False
            self._changed.notify_all()

    def too_large(self, run: Run, size: int) -> None:
        """So many jobs of a batch did not fit into memory together."""
        with self._changed:
            if size == 1 and not run.one_is_too_large:  # then it was not the number
                run.one_is_too_large = True
                self._ceilings.restore(run.spec.bucket, run.ceiling)
            if not (run.one_is_too_large or run.spec.background):
                self._ceilings.lower(run.spec.bucket, size)

    def close(self) -> None:
        """Take no more jobs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def end(self) -> None:
        """Hand out no more batches."""
        with self._changed:
            self._closed = self._ended = True
            self._changed.notify_all()

    def _wait(self) -> tuple[list[Job], Run | None]:
        """Wait for jobs, then take a batch, and those that are late; either may be empty."""
        while not self._ended:
            now = time.monotonic()
            if late := self._batching.drop_late(now):
                for job in late:
                    self._admission.ended(job, now, computed=False)
                return late, None
            delay = self._batching.delay(now, closed=self._closed)
            if delay is not None and delay <= 0:
                if batch := self._batching.take():
                    return [], self._begin(batch, now)
                delay = None
            self._changed.wait(delay)
        return [], None

    def _begin(self, batch: Sequence[Job], now: float, interrupts: Run | None = None) -> Run:
        run = Run(batch, now, self._forecast.batch(batch), interrupts, self._ceilings.get(batch[0].spec.bucket))
        self._device.runs.append(run)
        return run
