"""Which jobs interrupt a batch that is being computed."""

import math
from collections.abc import Callable

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.batching import Batching
from cdam_server.compute.scheduling.job import Job
from cdam_server.compute.scheduling.queue import Queue
from cdam_server.compute.scheduling.run import Device, Run


class Preemption:
    """Takes batches from the queue that interrupt one that is being computed."""

    def __init__(self, queue: Queue, device: Device, batching: Batching) -> None:
        self._queue = queue
        self._device = device
        self._batching = batching

    def take(self, run: Run, now: float) -> list[Job]:
        """The batch that interrupts one now; empty if none may."""
        slowed_enough = run.rested * policy.MIN_SPEED > run.computed(now) * (1 - policy.MIN_SPEED)
        if not self._queue.waiting or (slowed_enough and not run.spec.background):
            return []
        rank = min(job.spec.rank for job in run.jobs)
        is_behind = self._batching.is_behind(run.jobs)
        if run.spec.light and not any(
            head.spec.rank < rank or (head.spec.rank == rank and is_behind(head)) for head in self._queue.heads()
        ):
            return []
        # No longer than the rest of it: else it is soon its turn anyway.
        sharing = self._device.sharing
        most = math.inf if run.spec.background else run.remaining(now, sharing) / sharing

        def may_interrupt(job: Job) -> bool:
            if job.spec.rank == rank and (slowed_enough or not _interrupts_equals(job, run, is_behind)):
                return False
            return job.spec.rank <= rank and self._batching.lasts(job) <= most

        return self._queue.take(
            self._device.ceilings.jobs, lambda first: self._batching.begin(first, most), may_interrupt
        )


def _interrupts_equals(job: Job, run: Run, is_behind: Callable[[Job], bool]) -> bool:
    """Whether a job interrupts a batch of its own rank."""
    # Interruptions in the background are not nested: what is not in the background must still find a place.
    if run.spec.background and run.interrupts is not None:
        return False
    if not run.spec.light:
        return job.spec.cost * policy.MIN_COST_RATIO <= run.cost
    return job.spec.light and is_behind(job)
