"""Which jobs make a batch, and when it begins."""

import math
from collections.abc import Sequence

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
        return self._queue.take(self._device.ceilings.jobs, self.fits, lambda job: not (job.spec.background and busy))

    def fits(self, jobs: Sequence[Job], most: float = math.inf) -> bool:
        """Whether these jobs may be one batch, which takes at most `most` seconds."""
        first, last = jobs[0], jobs[-1]
        seconds = self._forecast.batch(jobs)
        if seconds is None:
            return True
        if len(jobs) == 1:  # it must be computed, however long it takes
            return seconds <= most
        if self.is_behind(first, [last]):
            most = min(most, policy.MAX_BATCH_STRETCH * (self._forecast.batch([first]) or math.inf))
        return seconds <= min(most, policy.MAX_BATCH_SHARE * _shortest_timeout(jobs) / self._device.slots)

    def is_behind(self, job: Job, others: Sequence[Job]) -> bool:
        """Whether its caller has received less than each of the others', by more than a full batch; two busy callers never differ so much."""
        return self._queue.lag(job, others) > self._device.ceilings.max_batch_size

    def _is_late(self, job: Job, now: float) -> bool:
        if not job.wanted(now):
            return True
        alone = self._forecast.batch([job])
        # Since estimates may be wrong, the last one that waits is tried in any case.
        if alone is None or self._queue.waiting_with(job.spec) <= 1 or not job.spec.light:
            return False
        return now + alone * self._device.slots > job.deadline


def _shortest_timeout(jobs: Sequence[Job]) -> float:
    return min(job.deadline - job.arrived for job in jobs)
