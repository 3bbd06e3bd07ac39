"""One stream of Evaluate: what is told first, samples and their results, progress in between, the table."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic
from typing import Final

import grpc
import structlog

from cdam.v1 import common_pb2, evaluation_pb2
from cdam_engine.evaluation import Anchor
from cdam_server.rpc import decode_evaluation, encode_evaluation, fields
from cdam_server.rpc.decode import Limits
from cdam_server.rpc.encode import duration
from cdam_server.rpc.stream import Exchange, StreamServer
from cdam_server.usecases.evaluate import Evaluation

_PROGRESS_SECONDS: Final = 1.0
_LATELY: Final = 10  # of so many reports the rate is taken
_LONGEST_SECONDS: Final = 1e9  # that a message can carry, with some to spare


class EvaluationStream:
    """Serves one evaluation.

    Args:
        evaluation: The evaluation.
        write: Sends an answer.
        limits: Limits of a request.
        expected: Number of samples that will come; 0: not known.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        write: Callable[[evaluation_pb2.EvaluateResponse], Awaitable[None]],
        limits: Limits,
        expected: int,
    ) -> None:
        self._evaluation = evaluation
        self._write = write
        self._limits = limits
        self._progress = Progress(expected)
        self._writing = asyncio.Lock()

    async def serve(self, requests: AsyncIterator[evaluation_pb2.EvaluateRequest], server: StreamServer) -> None:
        """From the first answer to the table; of a stream that ends early there is no table.

        Raises:
            ServiceError: What `StreamServer.serve` raises, when what was read has been answered.
        """
        evaluation, protocol = self._evaluation, self._evaluation.protocol
        structlog.contextvars.bind_contextvars(
            model=evaluation.model.name,
            methods=[method.value if isinstance(method, Anchor) else method.kind for method in protocol.methods],
            metrics=[metric.kind for metric in protocol.metrics],
        )
        await self._tell(encode_evaluation.started(evaluation, self._progress.expected))
        exchange = Exchange(_sample_id, self._answer, self._failure, self._size, "sample.sample_id")
        reporting = asyncio.create_task(self._report(), name="progress")
        try:
            await server.serve(
                self._samples(requests), self._send_result, exchange, max_items=evaluation.window, may_idle=False
            )
        finally:
            reporting.cancel()
            await asyncio.wait({reporting})
        await self._tell(encode_evaluation.table(await evaluation.table()))

    async def _samples(
        self, requests: AsyncIterator[evaluation_pb2.EvaluateRequest]
    ) -> AsyncIterator[evaluation_pb2.EvaluationSample]:
        async for sample in decode_evaluation.samples(requests):
            self._progress.received += 1
            yield sample

    async def _answer(self, message: evaluation_pb2.EvaluationSample) -> evaluation_pb2.EvaluateResponse:
        sample_command = decode_evaluation.sample(message, self._limits)
        with fields.named(fields.of_sample):
            measured = await self._evaluation.measure(sample_command)
        return encode_evaluation.measured(sample_command.id, measured)

    def _failure(self, sample_id: str, error: common_pb2.ItemError) -> evaluation_pb2.EvaluateResponse:
        self._evaluation.failed()
        return encode_evaluation.failure(sample_id, error)

    def _size(self, message: evaluation_pb2.EvaluationSample) -> int:
        return message.ByteSize() + self._evaluation.sample_bytes

    async def _report(self) -> None:
        """Tell how far it is, until nobody listens any more."""
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            try:
                await self._send(evaluation_pb2.EvaluateResponse(progress=self._progress.message(monotonic())))
            except grpc.aio.BaseError:
                return

    async def _send_result(self, response: evaluation_pb2.EvaluateResponse) -> None:
        await self._send(response)
        self._progress.done += 1

    async def _tell(self, response: evaluation_pb2.EvaluateResponse) -> None:
        try:
            await self._send(response)
        except grpc.aio.BaseError as error:
            raise asyncio.CancelledError from error  # as gRPC itself is about to say

    async def _send(self, response: evaluation_pb2.EvaluateResponse) -> None:
        async with self._writing:
            await self._write(response)


class Progress:
    """How far an evaluation is.

    Args:
        expected: Number of samples that will come; 0: not known.

    Attributes:
        expected: As given.
        received: Samples received.
        done: Samples answered.
    """

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.received = 0
        self.done = 0
        self._began = monotonic()
        self._reports = deque([(self._began, 0)], maxlen=_LATELY + 1)

    def message(self, now: float) -> evaluation_pb2.EvaluationProgress:
        """The report of a moment; to be called once a second."""
        self._reports.append((now, self.done))
        earlier, done = self._reports[0]
        if done == self.done:  # nothing lately: slow samples
            earlier, done = self._began, 0
        rate = (self.done - done) / (now - earlier) if now > earlier else 0.0
        left = max(0, self.expected - self.done)
        remaining = None
        if self.expected and (rate or not left):
            remaining = duration(min(left / rate, _LONGEST_SECONDS) if left else 0.0)
        return evaluation_pb2.EvaluationProgress(done=self.done, received=self.received, rate=rate, remaining=remaining)


def _sample_id(message: evaluation_pb2.EvaluationSample) -> str:
    return message.sample_id
