"""An evaluation under way, and its table so far."""

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from types import TracebackType
from typing import Self

from cdam._evaluate import Evaluate
from cdam._evaluation import EvaluationProgress, EvaluationStarted, SampleResult
from cdam.statistics import Statistics, Table

_RATE_RESULTS = 100  # the newest, of which the rate is taken


class Outcome:
    """What both kinds of evaluation know: the results so far."""

    def __init__(self, job: Evaluate, progress: Callable[[EvaluationProgress], object] | None) -> None:
        self._job = job
        self._statistics = Statistics(len(job.methods), seed=job.seed, resamples=job.resamples)
        self._on_progress = progress
        self._times: deque[float] = deque(maxlen=_RATE_RESULTS)

    @property
    def started(self) -> EvaluationStarted | None:
        """What the evaluation is of; None before a server has answered."""
        return self._job.started

    @property
    def table(self) -> Table:
        """Means, standard errors, intervals and comparisons over the samples that have been handed out so far."""
        return self._statistics.table()

    @property
    def progress(self) -> EvaluationProgress:
        """How far the evaluation is."""
        done = self._statistics.samples + self._statistics.failures
        passed = self._times[-1] - self._times[0] if self._times else 0.0
        rate = (len(self._times) - 1) / passed if passed > 0 else 0.0
        expected = self._job.expected
        left = None if expected is None or not rate else max(0, expected - done) / rate
        return EvaluationProgress(done, self._statistics.failures, expected, rate, left)

    def _count(self, result: SampleResult) -> SampleResult:
        if result.error is None:
            values = [(v.method_index, v.metric_index, v.quantity, v.value, v.curve) for v in result.values]
            self._statistics.add(result.id, values)
        else:
            self._statistics.failed()
        self._times.append(time.monotonic())
        if self._on_progress is not None:
            self._on_progress(self.progress)
        return result


class Evaluation(Outcome, Iterator[SampleResult]):
    """An evaluation under way: an iterator over the samples' results, in any order. Closing it cancels the rest."""

    def __init__(
        self,
        results: Generator[SampleResult, None, None],
        job: Evaluate,
        progress: Callable[[EvaluationProgress], object] | None,
    ) -> None:
        super().__init__(job, progress)
        self._results = results

    def __next__(self) -> SampleResult:
        return self._count(next(self._results))

    def close(self) -> None:
        """Cancel what is under way."""
        self._results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncEvaluation(Outcome, AsyncIterator[SampleResult]):
    """As `Evaluation`, for asyncio."""

    def __init__(
        self,
        results: AsyncGenerator[SampleResult, None],
        job: Evaluate,
        progress: Callable[[EvaluationProgress], object] | None,
    ) -> None:
        super().__init__(job, progress)
        self._results = results

    async def __anext__(self) -> SampleResult:
        return self._count(await anext(self._results))

    async def close(self) -> None:
        """Cancel what is under way."""
        await self._results.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
