"""Jobs for tests of the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cdam_server.compute.scheduling import Bounds, Computed, Done, JobSpec, Pause, Scheduler
from cdam_server.compute.scheduling.job import Job
from cdam_server.compute.scheduling.queue import Queue

Compute: TypeAlias = Callable[[Any, Sequence[Any], Pause], Sequence[Any]]


@dataclass(frozen=True)
class Call:
    """Work that a function does, given the bucket, the batch's jobs and where to rest."""

    compute: Compute
    bucket: Hashable
    job: object

    def run(self, batch: Sequence[Call], pause: Pause) -> Sequence[Any]:
        return self.compute(self.bucket, [work.job for work in batch], pause)

    def record(self, batch: Sequence[Call], answers: Sequence[Any], computed: Computed) -> None:
        pass


class Calls(Scheduler):
    """A scheduler whose jobs one function computes."""

    def __init__(self, compute: Compute, **settings: Any) -> None:
        super().__init__(**settings)
        self._compute = compute

    async def submit(self, spec: JobSpec, job: object) -> Done[Any]:
        with self.admit(spec) as ticket:
            return await ticket.submit(Call(self._compute, spec.bucket, job))

    async def submit_together(self, jobs: Sequence[tuple[JobSpec, object]]) -> list[Done[Any]]:
        return await self.submit_all([(spec, Call(self._compute, spec.bucket, job)) for spec, job in jobs])


def job(number: int, seconds: float = 1.0, **spec: Any) -> Job:
    """A job of bucket "a" that arrives at the second of its number."""
    return Job(
        JobSpec(**{"bucket": "a", **spec}), float(number), number, lambda answer: None, seconds, submitted=float(number)
    )


def queue_of(jobs: Sequence[Job]) -> Queue:
    """A queue in which these wait."""
    queue = Queue(Bounds(10_000, 1e9, 1 << 40), credit=8.0)
    for item in jobs:
        queue.hold(item)
        queue.push(item)
    return queue
