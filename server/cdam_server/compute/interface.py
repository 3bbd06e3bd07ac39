"""What computes, as those see it who ask: use cases know no more of it, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from cdam_server.compute.concurrency import Long
from cdam_server.compute.facts import EvaluationBucket, EvaluationFacts
from cdam_server.compute.scheduling import Answer, Done, JobSpec
from cdam_server.compute.work import ModelWork


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

    def admit(self, spec: JobSpec, image: Callable[[], int] | None = None) -> AbstractAsyncContextManager[Ticket]:
        """Give a job room for as long as the block runs, before anything is spent on preparing it.

        Args:
            spec: What is known of it.
            image: Computes 64 bits that stand for its image as the model sees it: the same image should go where its tokens are.

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
