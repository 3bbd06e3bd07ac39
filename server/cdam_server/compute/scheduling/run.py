"""What is being computed."""

from collections.abc import Sequence
from dataclasses import dataclass

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.ceilings import Ceiling, Ceilings
from cdam_server.compute.scheduling.job import Job, JobSpec


@dataclass(eq=False)
class Run:
    """A batch that is being computed.

    Attributes:
        jobs: Its jobs.
        started: When it began.
        seconds: Estimate of how long it will compute, with the device to itself; None if there is none.
        interrupts: The batch that it interrupts, if it does.
        ceiling: What was known about its bucket's ceiling when it began.
        rested: Seconds that it has rested while others were computed.
        resting: Whether it rests now.
        one_is_too_large: Whether one of its jobs does not fit into memory alone.
    """

    jobs: Sequence[Job]
    started: float
    seconds: float | None
    interrupts: "Run | None"
    ceiling: Ceiling | None
    rested: float = 0.0
    resting: bool = False
    one_is_too_large: bool = False

    @property
    def spec(self) -> JobSpec:
        """Spec of its first job, which stands for all."""
        return self.jobs[0].spec

    @property
    def cost(self) -> float:
        """The jobs' costs together."""
        return cost(self.jobs)

    @property
    def outermost(self) -> "Run":
        """The batch that the worker began with."""
        return self if self.interrupts is None else self.interrupts.outermost

    def computed(self, now: float) -> float:
        """Seconds that it has been computed."""
        return now - self.started - self.rested

    def remaining(self, now: float, sharing: int) -> float:
        """Estimate of how long it will still compute, with so many batches on the device."""
        computed = self.computed(now)
        return 0.0 if self.seconds is None else max(policy.OVERRUN * computed, self.seconds * sharing - computed)


class Device:
    """One device.

    Attributes:
        slots: Number of workers; each has a batch in work, and those that interrupt it.
        ceilings: How large batches may be.
        runs: The batches in work.
    """

    def __init__(self, slots: int, ceilings: Ceilings) -> None:
        self.slots = slots
        self.ceilings = ceilings
        self.runs: list[Run] = []

    @property
    def sharing(self) -> int:
        """Number of batches that share the device now, or 1."""
        return max(1, sum(not run.resting for run in self.runs))

    @property
    def foreground(self) -> list[Run]:
        """The batches that are not in the background."""
        return [run for run in self.runs if not run.spec.background]


def cost(jobs: Sequence[Job]) -> float:
    """The jobs' costs together."""
    return sum(job.spec.cost for job in jobs)
