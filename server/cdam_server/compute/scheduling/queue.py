"""Who is next: by rank, then callers in turn, then the earliest deadline; and what fits into the bounds.

No threads and no clock of its own: whoever owns a queue guards it.
"""

import heapq
import math
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.job import Bounds, Job, JobSpec, QueueFullError

_SETTINGS: Final = {"jobs": "max_pending", "cost": "max_pending_passes", "bytes": "max_pending_mib"}


@dataclass
class _Group:
    """Callers who take turns with each other: those of background jobs, and all others.

    Attributes:
        credit: As of the `Queue`.
        virtual_time: The most that a caller had had when it was served.
        waiting: Number of their jobs that wait.
    """

    credit: float
    virtual_time: float = 0.0
    waiting: int = 0

    @property
    def least_served(self) -> float:
        """What a caller who comes, or comes back, counts as having had at least."""
        return self.virtual_time - self.credit


class _Caller:
    """What one caller holds, waits for, and has had; for its background jobs there is an object apart.

    Attributes:
        group: With whom it takes turns.
        waiting: Submitted jobs in the order in which they will be served.
        held: How much was let in and is not yet answered, by the names of `Bounds`.
        backlog: Estimated seconds of work that was let in and is not yet begun, by rank, of light jobs and of others.
        served: The work that it has had, in units of cost: who has had least is next.
    """

    def __init__(self, group: _Group) -> None:
        self.group = group
        self.waiting: list[Job] = []
        self.held: defaultdict[str, float] = defaultdict(float)
        self.backlog: defaultdict[tuple[int, bool], float] = defaultdict(float)
        self.served = group.least_served

    @property
    def idle(self) -> bool:
        """Whether it has no jobs."""
        return not (self.held["jobs"] or self.held["background"])

    def ahead(self, spec: JobSpec) -> tuple[float, float]:
        """The backlog that a job waits for: of better rank, and of its own. A light one interrupts those that are not."""
        better = same = 0.0
        for (rank, light), seconds in self.backlog.items():
            if light or not spec.light:
                better += seconds * (rank < spec.rank)
                same += seconds * (rank == spec.rank)
        return better, same


class Queue:
    """Jobs that were let in.

    Args:
        bounds: How much may be let in.
        credit: How far, in units of cost, a caller who comes back after a pause may be behind those who never paused: it is served before
            them until it has had as much. Among background jobs, it is `policy.BACKGROUND_CREDIT` of the bound at least.
    """

    def __init__(self, bounds: Bounds, credit: float) -> None:
        self._bounds = bounds
        self._groups = {
            False: _Group(credit),
            True: _Group(max(credit, policy.BACKGROUND_CREDIT * bounds.cost)),
        }
        self._callers: dict[tuple[bool, str], _Caller] = {}
        self._held: defaultdict[str, float] = defaultdict(float)
        self._work = 0.0

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return sum(group.waiting for group in self._groups.values())

    @property
    def held(self) -> int:
        """Number of jobs that were let in and are not yet answered, but for those in the background."""
        return round(self._held["jobs"])

    def check_room(self, spec: JobSpec, retry_after: float) -> None:
        """Refuse what does not fit into the bounds.

        Args:
            spec: What comes.
            retry_after: Seconds after which there may be room.

        Raises:
            QueueFullError: With the bound that was hit.
        """
        caller = self._callers.get(_key(spec))
        for name, wanted, bound in self._amounts(spec):
            free = bound - self._held[name]
            own = caller.held[name] if caller is not None else 0
            # Whatever its size, a job that is alone is let in: the limits of a single one are checked elsewhere.
            if self._held[name] and (wanted > free or own + wanted > policy.MAX_SHARE_OF_FREE * free):
                message = f"the queue is full ({_SETTINGS[name]}); requests being served: {self.held}"
                raise QueueFullError(name, message, retry_after)

    def hold(self, job: Job) -> None:
        """Reserve room for a job that was let in."""
        caller = self._callers.get(_key(job.spec))
        if caller is None:
            self._forget()
            caller = self._callers[_key(job.spec)] = _Caller(self._groups[job.spec.background])
        elif caller.idle:
            caller.served = max(caller.served, caller.group.least_served)
        for name, wanted, _ in self._amounts(job.spec):
            caller.held[name] += wanted
            self._held[name] += wanted
        self._add_work(caller, job, job.seconds)

    def release(self, job: Job) -> bool:
        """Give the room back, wherever the job is now; whether it was waiting."""
        caller = self._callers[_key(job.spec)]
        waited = job in caller.waiting
        if waited:
            self._take_out(caller, job)
        elif job.submitted == math.inf:
            self._add_work(caller, job, -job.seconds)
        for name, wanted, _ in self._amounts(job.spec):
            caller.held[name] -= wanted
            self._held[name] -= wanted
        if caller.idle:
            caller.held.clear()
            caller.backlog.clear()  # so that rounding errors don't add up
        if not (self._held["jobs"] or self._held["background"]):
            self._held.clear()
            self._work = 0.0
        return waited

    def push(self, job: Job) -> None:
        """A job that may be computed from now on."""
        insort(self._callers[_key(job.spec)].waiting, job, key=lambda its: its.order)
        self._groups[job.spec.background].waiting += 1

    def waiting_with(self, spec: JobSpec) -> int:
        """Number of jobs that wait, of those in the background or of the others, as the spec says."""
        return self._groups[spec.background].waiting

    def jobs(self) -> list[Job]:
        """All that wait."""
        return [job for caller in self._callers.values() for job in caller.waiting]

    def drop(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Take out all for which it is true."""
        found = [job for job in self.jobs() if unwanted(job)]
        for job in found:
            self._take_out(self._callers[_key(job.spec)], job)
        return found

    def take(
        self,
        ceiling: Callable[[Hashable], int],
        begin: Callable[[Job], Callable[[Job], bool]],
        may: Callable[[Job], bool] = lambda job: True,  # noqa: ARG005
    ) -> list[Job]:
        """The next batch: the first job, and further light ones of its bucket in order, as long as they fit.

        Args:
            ceiling: Most jobs in a batch of a bucket.
            begin: Begins a batch with a job; what it returns says whether the next one fits as well, and then counts as a part of it.
            may: Whether a job may be computed now.
        """
        batch: list[Job] = []
        for job in self._in_order():
            if not may(job):
                continue
            if not batch:
                batch.append(job)
                most, fits = ceiling(job.spec.bucket), begin(job)
                if not job.spec.light:
                    break
            elif job.spec.light and job.spec.bucket == batch[0].spec.bucket:
                if not fits(job):
                    break
                batch.append(job)
            if len(batch) >= most:
                break
        for job in batch:
            caller = self._callers[_key(job.spec)]
            group = caller.group
            self._take_out(caller, job)
            group.virtual_time = max(group.virtual_time, caller.served)
            # Whoever had a very expensive job does not wait for as long as it took.
            caller.served = min(caller.served + job.spec.cost, group.virtual_time + group.credit)
        return batch

    def heads(self) -> list[Job]:
        """Each caller's next job."""
        return [caller.waiting[0] for caller in self._callers.values() if caller.waiting]

    def lag(self, others: Iterable[Job]) -> Callable[[Job], float]:
        """How much less, in units of cost, a job's caller has had than each of the others; negative if it is one of them."""
        their = {_key(other.spec) for other in others}
        least = min(
            (caller.served for key in their if (caller := self._callers.get(key)) is not None), default=math.inf
        )

        def of(job: Job) -> float:
            key = _key(job.spec)
            return -math.inf if key in their else least - self._callers[key].served

        return of

    def backlog(self, spec: JobSpec, own_seconds: float) -> float:
        """Estimated seconds of work that will be done before a job that comes now, its own not counted.

        All work of better rank. Of equal rank its caller's own, and of each other caller's as much at most, since they take turns,
        plus what that caller has received less.
        """
        own = self._callers.get(_key(spec))
        _, before = (0.0, 0.0) if own is None else own.ahead(spec)
        served = self._groups[spec.background].least_served if own is None else own.served
        rate = own_seconds / spec.cost
        total = before
        for caller in self._callers.values():
            better, same = caller.ahead(spec)
            total += better
            if caller is not own:
                total += min(same, before + own_seconds + max(0.0, served - caller.served) * rate)
        return total

    @property
    def work(self) -> float:
        """Estimated seconds of work that was let in and is not yet begun."""
        return self._work

    def _amounts(self, spec: JobSpec) -> tuple[tuple[str, float, float], ...]:
        if spec.background:
            return (("background", 1, math.inf),)
        return (
            ("jobs", 1, self._bounds.jobs),
            ("cost", spec.cost, self._bounds.cost),
            ("bytes", spec.bytes, self._bounds.bytes),
        )

    def _take_out(self, caller: _Caller, job: Job) -> None:
        caller.waiting.remove(job)
        self._add_work(caller, job, -job.seconds)
        caller.group.waiting -= 1

    def _add_work(self, caller: _Caller, job: Job, seconds: float) -> None:
        caller.backlog[job.spec.rank, job.spec.light] += seconds
        self._work += seconds

    def _in_order(self) -> Iterator[Job]:
        """All that wait, in the order in which they would be served if each took its turn."""
        heads = [
            (caller.waiting[0].spec.rank, caller.served, number, 0, caller)
            for number, caller in enumerate(self._callers.values())
            if caller.waiting
        ]
        heapq.heapify(heads)
        while heads:
            _, served, number, place, caller = heapq.heappop(heads)
            job = caller.waiting[place]
            if place + 1 < len(caller.waiting):
                following = caller.waiting[place + 1]
                heapq.heappush(heads, (following.spec.rank, served + job.spec.cost, number, place + 1, caller))
            yield job

    def _forget(self) -> None:
        """Drop idle callers that would not be treated otherwise if they were new; if there are none, the oldest."""
        if len(self._callers) <= policy.MAX_CALLERS:
            return
        idle = [key for key, caller in self._callers.items() if caller.idle]
        stale = [key for key in idle if self._callers[key].served <= self._callers[key].group.least_served]
        for key in stale or idle[: len(idle) // 2]:
            del self._callers[key]


def _key(spec: JobSpec) -> tuple[bool, str]:
    return spec.background, spec.caller
