"""How long jobs and batches will take, and when the device will be free; estimates in seconds."""

import math
from collections import defaultdict
from collections.abc import Sequence

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.job import Job, JobSpec, Kind
from cdam_server.compute.scheduling.run import Device, Run, cost


class Estimator:
    """Running estimates of the time of a batch by kind and cost.

    A batch's time grows more slowly than its cost while the device is not full, so each power of two of the cost has a rate of its own.
    """

    def __init__(self) -> None:
        self._rates: dict[Kind, dict[int, float]] = {}  # seconds for each unit of cost
        self._estimates: dict[tuple[Kind, float], float | None] = {}  # asked for again and again between two batches

    def observe(self, kind: Kind, cost: float, seconds: float) -> None:
        """Learn from a batch that took so long."""
        rates = self._rates.setdefault(kind, {})
        size, rate = _size(cost), seconds / cost
        known = rates.get(size, rate)
        self._estimates.clear()
        rates[size] = known + policy.NEWEST_WEIGHT * (min(rate, policy.MAX_SLOWDOWN * known) - known)

    def seconds(self, kind: Kind, cost: float) -> float | None:
        """What a batch of this cost will take; None if there was none of its kind."""
        key = kind, cost
        if key not in self._estimates:
            if len(self._estimates) >= policy.MAX_ESTIMATES:
                self._estimates.clear()
            self._estimates[key] = self._estimate(kind, cost)
        return self._estimates[key]

    def _estimate(self, kind: Kind, cost: float) -> float | None:
        rates = self._rates.get(kind)
        if not rates:
            return None
        size = _size(cost)
        # At worst no more efficient than smaller batches, and no slower than larger ones.
        known = [rate * 2.0**other for other, rate in rates.items() if other > size]
        known += [rates[other] * cost for other in sorted(rates, reverse=True) if other <= size][:1]
        return min(known)


class Forecast:
    """Estimates of what is being computed, and of what may come."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._estimator = Estimator()

    def learn(self, run: Run, now: float) -> None:
        """A batch has been computed at once."""
        self._estimator.observe(run.spec.kind, run.cost, run.computed(now) / self._device.sharing)

    def seconds(self, spec: JobSpec, cost: float) -> float | None:
        """What a batch of this cost will take, with the device to itself; None if nothing is known of its bucket."""
        known = self._estimator.seconds(spec.kind, cost)
        if known is None and (one := self._estimator.seconds((spec.bucket, True), 1.0)) is not None:
            return one * cost  # of this kind there was none yet
        return known

    def batch(self, jobs: Sequence[Job]) -> float | None:
        """What these jobs will take as one batch, with the device to itself; None if nothing is known of their bucket."""
        return self.seconds(jobs[0].spec, cost(jobs))

    def longest_batch(self, spec: JobSpec) -> float:
        """The longest batch that a job may be in, with the device to itself."""
        return self._within(spec, self.seconds(spec, self._most_jobs(spec) * spec.cost) or 0.0)

    def share(self, spec: JobSpec) -> float:
        """What a job adds to the work, in batches as full as its deadline lets them be."""
        jobs = self._most_jobs(spec)
        full = self.seconds(spec, jobs * spec.cost)
        if not full:
            return 0.0
        longest = self._within(spec, full)
        if longest < full:
            jobs = max(1, int(jobs * longest / full))
            full = self.seconds(spec, jobs * spec.cost) or 0.0
        return full / jobs

    def running(self, now: float) -> float:
        """What is left of all batches in work but those in the background."""
        sharing = self._device.sharing
        return sum(run.remaining(now, sharing) / sharing for run in self._device.foreground)

    def until_free(self, spec: JobSpec, now: float) -> float:
        """Seconds until a slot is free for a job; a slot counts as free if the job may interrupt all that is computed in it."""
        sharing = self._device.sharing
        slots: defaultdict[Run, float] = defaultdict(float)
        for run in self._device.runs:
            gives_way = (run.spec.background and not spec.background) or (spec.light and not run.spec.light)
            slots[run.outermost] += 0.0 if gives_way else run.remaining(now, sharing)
        return 0.0 if len(slots) < self._device.slots else min(slots.values())

    def _within(self, spec: JobSpec, seconds: float) -> float:
        """A batch's time, or the longest one that a job's deadline lets it take."""
        if spec.timeout is None:
            return seconds
        return min(seconds, policy.MAX_BATCH_SHARE * spec.timeout / self._device.slots)

    def _most_jobs(self, spec: JobSpec) -> int:
        return self._device.ceilings.jobs(spec.bucket) if spec.light else 1


def _size(cost: float) -> int:
    return math.ceil(math.log2(cost)) if cost > 0 else -16
