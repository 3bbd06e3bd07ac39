"""What computes, as those see it who ask: use cases know no more of it, wherever it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from cdam_server.compute import scheduling
from cdam_server.compute.concurrency import Long, LongRequests
from cdam_server.compute.facts import EvaluationBucket, EvaluationFacts
from cdam_server.compute.models import Catalog
from cdam_server.compute.scheduling import Answer, Done, JobSpec, Scheduler
from cdam_server.compute.work import BatchObserver, Bound, ModelWork


class Ticket(Protocol):
    """Room that a job has been given; from `Compute.admit`."""

    async def submit(self, work: ModelWork[Answer]) -> Done[Answer]:
        """Wait for the work's answer; cancelling the wait withdraws it.

        Raises:
            QueueFullError: There is no room after all.
            ExpiredError: The deadline passed before it was computed.
            DeviceLostError: Nothing can be computed any more.
            Exception: What was wrong with it.
        """


class Compute(Protocol):
    """What computes."""

    def admit(self, spec: JobSpec) -> AbstractAsyncContextManager[Ticket]:
        """Give a job room for as long as the block runs, before anything is spent on preparing it.

        Raises:
            ClosedError: No more jobs are taken.
            DeviceLostError: Nothing can be computed any more.
            QueueFullError: There is no room, or it would not be done in time.
        """

    def long_request(self, kind: Long, caller: str) -> AbstractAsyncContextManager[None]:
        """Let a request that is many jobs begin, and count it for as long as the block runs.

        Raises:
            OverloadedError: There are too many of its kind, or of the caller's.
        """

    def evaluation(self, bucket: EvaluationBucket) -> AbstractAsyncContextManager[EvaluationFacts]:
        """Hold what measures the samples of a bucket for as long as the block runs.

        Raises:
            UnsupportedMethodError: The model can't serve a method.
            ValueError: A metric can't be had.
        """


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
    async def admit(self, spec: JobSpec) -> AsyncIterator[LocalTicket]:
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
