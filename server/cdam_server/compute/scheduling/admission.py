"""Who is let in."""

import math

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.forecast import Forecast
from cdam_server.compute.scheduling.job import Job, JobSpec, Kind, QueueFullError
from cdam_server.compute.scheduling.queue import Queue
from cdam_server.compute.scheduling.run import Device


class Admission:
    """Refuses jobs that find no room, or that would not be done in time.

    How far an estimate may miss is learned: the margin rises until all but `policy.LATE_SHARE` of the jobs come within it.
    A machine that has more to do than this server is less even than one that has not.
    """

    def __init__(
        self, queue: Queue, device: Device, forecast: Forecast, deadline_margin: float = policy.DEADLINE_MARGIN
    ) -> None:
        self._queue = queue
        self._device = device
        self._forecast = forecast
        self._least_margin = deadline_margin
        self._margins: dict[tuple[int, bool], float] = {}  # by rank and by whether jobs share batches
        self._tested: dict[Kind, float] = {}  # when a job of each kind was computed, or let in to be

    def check(self, spec: JobSpec, now: float) -> float:
        """Refuse a job that finds no room, or that, as far as can be told, would not be done in time.

        Returns:
            Estimate of the seconds until it is done; 0 if there is none, or if it is in no danger to be late.

        Raises:
            QueueFullError: With how long it should wait before it comes again.
        """
        try:
            self._queue.check_room(spec, policy.MIN_RETRY_SECONDS)
        except QueueFullError as full:
            raise QueueFullError(full.reason, str(full), self._retry_after(now)) from None
        if spec.timeout is None or not self._queue.held or self._is_little(spec, now):  # an idle server tries
            return 0.0
        seconds = self._seconds(spec, now)
        late = self.margin(spec) * seconds - spec.timeout
        if late <= 0:
            return seconds
        if now - self._tested.get(spec.kind, -math.inf) > policy.TRIAL_SECONDS:
            self.tested(spec.kind, now)
            return seconds
        message = f"too busy to answer within {spec.timeout:.3g} s; requests being served: {self._queue.held}"
        raise QueueFullError("deadline", message, max(self._retry_after(now), late))

    def margin(self, spec: JobSpec) -> float:
        """A job like this is let in if its estimated seconds, so many times, are within its deadline."""
        return self._margins.get(_like(spec), self._least_margin)

    def tested(self, kind: Kind, now: float) -> None:
        """The estimate of a kind is being compared with the time that a batch takes."""
        self._tested[kind] = now

    def ended(self, job: Job, now: float, *, computed: bool) -> None:
        """Learn from a job whose time had been estimated, computed or not, how far estimates miss."""
        spec, margin = job.spec, self.margin(job.spec)
        # Where nobody is near to being refused, what is late is so for other reasons.
        if spec.timeout is None or margin * job.expected < policy.MARGIN_FROM * spec.timeout:
            return
        if now - job.arrived > margin * job.expected:
            margin *= 1 + policy.MARGIN_STEP
        elif computed:  # else its caller has left early, and nobody knows how long it would have taken
            margin *= 1 - policy.MARGIN_STEP * policy.LATE_SHARE
        self._margins[_like(spec)] = min(max(margin, self._least_margin), self._most)

    @property
    def _most(self) -> float:
        return max(self._least_margin, policy.MAX_DEADLINE_MARGIN)

    def _is_little(self, spec: JobSpec, now: float) -> bool:
        """Whether a job is safe even if it is served last of all, so that nobody need look at each caller's part."""
        if spec.background:  # it waits for others of its rank, too, whose batches don't count as running
            return False
        own = self._forecast.seconds(spec, spec.cost) or 0.0
        slots = self._device.slots
        work = slots * (self._forecast.running(now) + self._queue.work + own) / (1 - policy.MIN_SPEED)
        return self._most * work < policy.MARGIN_FROM * (spec.timeout or 0.0)

    def _retry_after(self, now: float) -> float:
        """Seconds after which another try may succeed; computed for a refusal only, since it looks at all that is held."""
        work = self._forecast.running(now) + self._queue.work
        return max(policy.MIN_RETRY_SECONDS, policy.RETRY_SHARE * work)

    def _seconds(self, spec: JobSpec, now: float) -> float:
        """Estimate of the seconds until a job that came now would be done, at least; 0 if nothing is known."""
        own = self._forecast.seconds(spec, spec.cost)
        if own is None:
            return 0.0
        ahead = self._queue.backlog(spec, self._forecast.share(spec))
        # Jobs ahead share its batch, up to the longest one; the others are computed before it.
        batch = min(ahead + own, max(own, self._forecast.longest_batch(spec)))
        work = ahead + own - batch + batch * self._device.slots
        if spec.light and any(not run.spec.light for run in self._device.foreground):
            work /= 1 - policy.MIN_SPEED
        return self._forecast.until_free(spec, now) + work


def _like(spec: JobSpec) -> tuple[int, bool]:
    return spec.rank, spec.light
