"""What computes, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from cdam_server.compute import scheduling
from cdam_server.compute.concurrency import Long, LongRequests
from cdam_server.compute.facts import EvaluationBucket, EvaluationFacts
from cdam_server.compute.models import Catalog
from cdam_server.compute.scheduling import Answer, Done, JobSpec, Scheduler
from cdam_server.compute.work import BatchObserver, Bound, ModelWork


class LocalTicket:
    """A ticket of this process."""

    def __init__(self, ticket: scheduling.Ticket, catalog: Catalog, observer: BatchObserver | None) -> None:
        self._ticket = ticket
        self._catalog = catalog
        self._observer = observer

    async def submit(self, work: ModelWork[Answer]) -> Done[Answer]:
        """See `Ticket`."""
        return await self._ticket.submit(Bound(work, self._catalog, self._observer))


class LocalCompute:
    """Computes in this process.

    Args:
        scheduler: Where work goes.
        catalog: The models.
        observer: Where batches are counted.
        limits: How many long requests there may be.
    """

    def __init__(
        self, scheduler: Scheduler, catalog: Catalog, observer: BatchObserver | None, limits: LongRequests
    ) -> None:
        self._scheduler = scheduler
        self._catalog = catalog
        self._observer = observer
        self._limits = limits

    @asynccontextmanager
    async def admit(self, spec: JobSpec, image: Callable[[], int] | None = None) -> AsyncIterator[LocalTicket]:  # noqa: ARG002 - there is one device
        """See `Compute`."""
        with self._scheduler.admit(spec) as ticket:
            yield LocalTicket(ticket, self._catalog, self._observer)

    @asynccontextmanager
    async def long_request(self, kind: Long, caller: str) -> AsyncIterator[None]:
        """See `Compute`."""
        with self._limits.take(kind, caller):
            yield

    @asynccontextmanager
    async def evaluation(self, bucket: EvaluationBucket) -> AsyncIterator[EvaluationFacts]:
        """See `Compute`."""
        with self._catalog.evaluation(bucket) as held:
            yield await asyncio.to_thread(held.facts)
