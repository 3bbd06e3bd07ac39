"""A job in the scheduler: its spec, its answer, and the errors that can take the answer's place.

Exception
├── QueueFullError    refused on arrival: no room, or it could not be done in time
├── ClosedError       refused on arrival: the scheduler is closing
├── ExpiredError      let in, but its deadline passed before it was computed
├── DeviceLostError   let in, but nothing can be computed any more
├── TooLargeError     raised by `Work.run`: the batch does not fit into memory
└── AbandonedError    raised by `Pause`: nobody waits for the batch any more
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeAlias

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.work import Answer, Work

BACKGROUND: Final = 2
"""Rank of jobs that are computed while there is nothing else to do, and that keep nothing else out.

They count against no bound: whoever hands them in sees to it that they are few.
"""

Kind: TypeAlias = tuple[Hashable, bool]


class QueueFullError(Exception):
    """There is no room for a job, or it would not be done in time.

    Attributes:
        reason: The bound that was hit (``jobs``, ``cost``, ``bytes``) or ``deadline``.
        retry_after: Estimate, in seconds, of when another try may succeed.
    """

    def __init__(self, reason: str, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class ExpiredError(Exception):
    """The job's deadline passed before it was computed."""


class ClosedError(Exception):
    """The scheduler takes no more jobs."""


class DeviceLostError(Exception):
    """The device computes no more; only a new process can help."""


class TooLargeError(Exception):
    """The batch does not fit into the device's memory."""


class AbandonedError(Exception):
    """All callers of a batch have left, or their deadlines have passed."""


@dataclass(frozen=True)
class Bounds:
    """How much may be let in and not yet answered.

    Attributes:
        jobs: Number of jobs.
        cost: Their costs together.
        bytes: The memory that they hold.
        deadline_margin: A job is let in if its estimated time, at least so many times, is within its deadline.
    """

    jobs: int = 256
    cost: float = 4096.0
    bytes: int = 1 << 28
    deadline_margin: float = policy.DEADLINE_MARGIN


@dataclass(frozen=True)
class JobSpec:
    """What is known of a job when it arrives.

    Attributes:
        bucket: Only jobs of one bucket share a batch.
        cost: Its work, in units that are the same for all jobs of a bucket: passes of the trunk for one image.
        bytes: Memory that it holds until it is answered.
        caller: Who asks; callers take turns.
        timeout: Seconds that the caller will wait, or None.
        rank: Jobs of lower rank go first.
        light_cost: Jobs of the bucket that cost more share no batch.
    """

    bucket: Hashable
    cost: float = 1.0
    bytes: int = 0
    caller: str = ""
    timeout: float | None = None
    rank: int = 0
    light_cost: float = policy.LIGHT_COST

    @property
    def light(self) -> bool:
        """Whether it shares batches."""
        return self.cost <= self.light_cost

    @property
    def background(self) -> bool:
        """Whether it is of rank `BACKGROUND`."""
        return self.rank >= BACKGROUND

    @property
    def kind(self) -> Kind:
        """What its time is estimated by: jobs that share batches take another time than those that don't."""
        return self.bucket, self.light


@dataclass(frozen=True)
class Done(Generic[Answer]):
    """An answer and how it came about.

    Attributes:
        answer: What `Work.run` returned for the job.
        queue_seconds: Time from submission to the start of its batch.
        batch_size: Number of jobs in its batch.
    """

    answer: Answer
    queue_seconds: float
    batch_size: int


@dataclass(eq=False)
class Job:
    """A job that was let in. All times are of `time.monotonic`, which all processes of a machine share.

    The type of its answer is known to the caller alone.

    Attributes:
        spec: What was known of it when it arrived.
        arrived: When it arrived.
        number: Larger than that of any job that arrived before it.
        reply: Takes its answer, once, in the event loop's thread; not if it has been released.
        seconds: Estimate of what it adds to the work.
        expected: Estimate, when it was let in, of the seconds until it is done; 0 if there was none.
        submitted: When its work was there; infinity until then.
        released: Whether the caller has an answer, or has left.
        deadline: When its timeout is over.
        work: What is to be computed; only once it is submitted.
    """

    spec: JobSpec
    arrived: float
    number: int
    reply: "Callable[[Done[object] | Exception], None]"
    seconds: float = 0.0
    expected: float = 0.0
    submitted: float = math.inf
    released: bool = False
    deadline: float = field(init=False)
    work: Work[object] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.deadline = self.arrived + self.timeout

    @property
    def timeout(self) -> float:
        """Seconds that its caller gives it; infinity if it waits for ever."""
        return math.inf if self.spec.timeout is None else self.spec.timeout

    @property
    def order(self) -> tuple[int, float, int]:
        """Its place among its caller's jobs: by rank, then by deadline, then by arrival."""
        return self.spec.rank, self.deadline, self.number

    def wanted(self, now: float) -> bool:
        """Whether an answer would still be read."""
        return not self.released and self.deadline > now
