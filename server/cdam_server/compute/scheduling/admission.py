"""Who is let in."""

import math

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.forecast import Forecast
from cdam_server.compute.scheduling.job import JobSpec, Kind, QueueFullError
from cdam_server.compute.scheduling.queue import Queue
from cdam_server.compute.scheduling.run import Device


class Admission:
    """Refuses jobs that find no room, or that would not be done in time."""

    def __init__(
        self, queue: Queue, device: Device, forecast: Forecast, deadline_margin: float = policy.DEADLINE_MARGIN
    ) -> None:
        self._queue = queue
        self._device = device
        self._forecast = forecast
        self._margin = deadline_margin
        self._tested: dict[Kind, float] = {}  # when a job of each kind was computed, or let in to be

    def check(self, spec: JobSpec, now: float) -> None:
        """Refuse a job that finds no room, or that, as far as can be told, would not be done in time.

        Raises:
            QueueFullError: With how long it should wait before it comes again.
        """
        try:
            self._queue.check_room(spec, policy.MIN_RETRY_SECONDS)
        except QueueFullError as full:
            raise QueueFullError(full.reason, str(full), self._retry_after(now)) from None
        late = self._late(spec, now)
        if late <= 0:
            return
        if now - self._tested.get(spec.kind, -math.inf) > policy.TRIAL_SECONDS:
            self.tested(spec.kind, now)
            return
        message = f"too busy to answer within {spec.timeout:.3g} s; requests being served: {self._queue.held}"
        raise QueueFullError("deadline", message, max(self._retry_after(now), late))

    def tested(self, kind: Kind, now: float) -> None:
        """The estimate of a kind is being compared with the time that a batch takes."""
        self._tested[kind] = now

    def _retry_after(self, now: float) -> float:
        """Seconds after which another try may succeed; computed for a refusal only, since it looks at all that is held."""
        work = self._forecast.running(now) + self._queue.work
        return max(policy.MIN_RETRY_SECONDS, policy.RETRY_SHARE * work)

    def _late(self, spec: JobSpec, now: float) -> float:
        """Seconds that a job would be late, at least."""
        if spec.timeout is None or not self._queue.held:  # an idle server tries
            return 0.0
        own = self._forecast.seconds(spec, spec.cost)
        if own is None:
            return 0.0
        ahead = self._queue.backlog(spec, self._forecast.share(spec))
        # Jobs ahead share its batch, up to the longest one; the others are computed before it.
        batch = min(ahead + own, max(own, self._forecast.longest_batch(spec)))
        work = ahead + own - batch + batch * self._device.slots
        if spec.light and any(not run.spec.light for run in self._device.foreground):
            work /= 1 - policy.MIN_SPEED
        return self._margin * (self._forecast.until_free(spec, now) + work) - spec.timeout
