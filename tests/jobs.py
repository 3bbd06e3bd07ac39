"""Jobs for tests of the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cdam_server.compute.scheduling import Bounds, Computed, Done, Rest, Scheduler, Terms
from cdam_server.compute.scheduling.entry import Entry
from cdam_server.compute.scheduling.queue import Queue

Compute: TypeAlias = Callable[[Any, Sequence[Any], Rest], Sequence[Any]]
_LOOP = asyncio.new_event_loop()
_LOOP.close()


@dataclass(frozen=True)
class Call:
    """Work that a function does, given the bucket, the batch's jobs and where to rest."""

    compute: Compute
    bucket: Hashable
    job: object

    def run(self, batch: Sequence[Call], rest: Rest) -> Sequence[Any]:
        return self.compute(self.bucket, [work.job for work in batch], rest)

    def book(self, batch: Sequence[Call], answers: Sequence[Any], computed: Computed) -> None:
        pass


class Calls(Scheduler):
    """A scheduler whose jobs one function computes."""

    def __init__(self, compute: Compute, **settings: Any) -> None:
        super().__init__(**settings)
        self._compute = compute

    async def submit(self, terms: Terms, job: object) -> Done[Any]:
        with self.admit(terms) as ticket:
            return await ticket.submit(Call(self._compute, terms.bucket, job))

    async def submit_together(self, jobs: Sequence[tuple[Terms, object]]) -> list[Done[Any]]:
        return await self.submit_all([(terms, Call(self._compute, terms.bucket, job)) for terms, job in jobs])


def entry(number: int, seconds: float = 1.0, **terms: Any) -> Entry:
    """A job of bucket "a" that arrives at the second of its number."""
    future: asyncio.Future[Done[object]] = asyncio.Future(loop=_LOOP)
    return Entry(Terms(**{"bucket": "a", **terms}), float(number), number, future, seconds, submitted=float(number))


def queue_of(entries: Sequence[Entry]) -> Queue:
    """A queue in which these wait."""
    queue = Queue(Bounds(10_000, 1e9, 1 << 40), credit=8.0)
    for item in entries:
        queue.hold(item)
        queue.push(item)
    return queue
