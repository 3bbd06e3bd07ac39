"""Which jobs make a batch, and when it begins."""

import math
from collections.abc import Callable, Iterable, Sequence

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.forecast import Forecast
from cdam_server.compute.scheduling.job import Job
from cdam_server.compute.scheduling.queue import Queue
from cdam_server.compute.scheduling.run import Device


class Batching:
    """Takes batches from the queue for idle workers; a job waits for others to share its batch `max_queue_delay` seconds at most."""

    def __init__(self, queue: Queue, device: Device, forecast: Forecast, max_queue_delay: float) -> None:
        self._queue = queue
        self._device = device
        self._forecast = forecast
        self._max_queue_delay = max_queue_delay

    def drop_late(self, now: float) -> list[Job]:
        """Take out the jobs that nobody waits for any more, or that can't be done in time."""
        return self._queue.drop(lambda job: self._is_late(job, now))

    def delay(self, now: float, *, closed: bool) -> float | None:
        """Seconds to wait for the oldest job's batch to fill; None if no job waits."""
        if not self._queue.waiting:
            return None
        if not self._max_queue_delay:
            return 0.0
        jobs = self._queue.jobs()
        oldest = min(jobs, key=lambda job: job.submitted)
        if closed or not oldest.spec.light:
            return 0.0
        bucket = oldest.spec.bucket
        if sum(job.spec.bucket == bucket for job in jobs) >= self._device.ceilings.jobs(bucket):
            return 0.0
        delay = min(self._max_queue_delay, policy.MAX_BATCH_SHARE * _shortest_timeout(jobs))
        return oldest.submitted + delay - now

    def take(self) -> list[Job]:
        """The next batch for an idle worker; empty if none may begin now."""
        busy = bool(self._device.foreground)
        return self._queue.take(self._device.ceilings.jobs, self.begin, lambda job: not (job.spec.background and busy))

    def begin(self, first: Job, most: float = math.inf) -> Callable[[Job], bool]:
        """Begin a batch of at most `most` seconds with a job; what is returned says whether the next one fits as well, and then counts as a part of it."""
        cost, shortest = first.spec.cost, first.timeout
        stretched = policy.MAX_BATCH_STRETCH * (self._forecast.seconds(first.spec, cost) or math.inf)

        def fits(job: Job) -> bool:
            nonlocal cost, shortest
            both, shorter = cost + job.spec.cost, min(shortest, job.timeout)
            seconds = self._forecast.seconds(first.spec, both)
            if seconds is not None:
                longest = min(most, policy.MAX_BATCH_SHARE * shorter / self._device.slots)
                if seconds > longest or (seconds > stretched and self.is_behind([job])(first)):
                    return False
            cost, shortest = both, shorter
            return True

        return fits

    def lasts(self, job: Job) -> float:
        """Estimate of the seconds that a job takes alone; 0 if there is none."""
        return self._forecast.seconds(job.spec, job.spec.cost) or 0.0

    def is_behind(self, others: Iterable[Job]) -> Callable[[Job], bool]:
        """Whether a job's caller has received less than each of the others', by more than a full batch; two busy callers never differ so much."""
        lag, most = self._queue.lag(others), self._device.ceilings.max_batch_size
        return lambda job: lag(job) > most

    def _is_late(self, job: Job, now: float) -> bool:
        if not job.wanted(now):
            return True
        alone = self._forecast.seconds(job.spec, job.spec.cost)
        # Since estimates may be wrong, the last one that waits is tried in any case.
        if alone is None or self._queue.waiting_with(job.spec) <= 1 or not job.spec.light:
            return False
        return now + alone * self._device.slots > job.deadline


def _shortest_timeout(jobs: Sequence[Job]) -> float:
    return min(job.timeout for job in jobs)
