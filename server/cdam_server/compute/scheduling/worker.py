"""The threads that compute, and what they do when something fails."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from cdam_server.compute.scheduling import policy
from cdam_server.compute.scheduling.dispatcher import Dispatcher
from cdam_server.compute.scheduling.job import (
    AbandonedError,
    DeviceLostError,
    Done,
    ExpiredError,
    Job,
    TooLargeError,
)
from cdam_server.compute.scheduling.run import Run
from cdam_server.compute.scheduling.work import Computed

_log = structlog.get_logger("cdam.server")


class Worker(threading.Thread):
    """Computes one batch after the other; where a batch rests, others may interrupt it.

    Every job that it is handed gets exactly one answer. Should the thread itself fail, it says so before it ends.

    Args:
        dispatcher: Where batches come from.
        answer: Takes the answers to jobs of a batch, all that there are at once.
        failed: Called if nothing can be computed any more.
        number: Of the worker.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        answer: Callable[[Sequence[tuple[Job, Done[object] | Exception]]], None],
        failed: Callable[[BaseException], None],
        number: int,
    ) -> None:
        super().__init__(name=f"compute-{number}", daemon=True)
        self._dispatcher = dispatcher
        self._answer = answer
        self._failed = failed
        self._depth = 0
        self._last_rest = time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """How long it has been since it last came to where it may pause; 0 while it has nothing to do."""
        return time.monotonic() - self._last_rest if self._depth else 0.0

    def run(self) -> None:
        """Work until there is no more; to be called by `start` alone."""
        if sys.platform == "linux":  # elsewhere niceness is the whole process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), policy.NICENESS)
        try:
            while (run := self._dispatcher.next()) is not None:
                self._work(run)
                del run  # its images are not kept until the next batch comes
        except BaseException as error:  # noqa: BLE001 - if the thread ended silently, everyone would wait
            self._failed(error)

    def _work(self, run: Run) -> None:
        self._last_rest = time.monotonic()
        self._depth += 1
        computed = False
        try:
            computed = self._attempt(run, run.jobs)
        finally:
            self._depth -= 1
            self._dispatcher.finish(run, computed=computed)

    def _attempt(self, run: Run, jobs: Sequence[Job]) -> bool:
        """Answer some jobs of a batch; returns whether all of the batch was computed at once."""
        jobs = self._wanted(jobs)
        if not jobs:
            return False
        try:
            answers = self._compute(run, jobs)
        except AbandonedError:
            self._wanted(jobs)
            return False
        except DeviceLostError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, only its cause must fail
            self._attempt_halves(run, jobs, error)
            return False
        self._answer(
            [
                (job, answer if isinstance(answer, Exception) else Done(answer, run.started - job.submitted, len(jobs)))
                for job, answer in zip(jobs, answers, strict=True)
            ]
        )
        return len(jobs) == len(run.jobs)

    def _compute(self, run: Run, jobs: Sequence[Job]) -> Sequence[object]:
        """The answers to some jobs of a batch, computed at once and booked."""
        works = [job.work for job in jobs]
        started = run.computed(time.monotonic())
        answers = works[0].run(works, partial(self._pause, run, jobs))
        if len(answers) != len(works):
            raise RuntimeError(f"{len(answers)} answers to {len(works)} jobs")
        seconds = run.computed(time.monotonic()) - started
        fill = len(works) / self._dispatcher.ceiling(run.spec.bucket)
        try:
            works[0].record(works, answers, Computed(seconds, fill))
        except Exception:  # noqa: BLE001 - the answers are there, whatever is wrong with the metrics
            _log.exception("a batch could not be booked")
        return answers

    def _attempt_halves(self, run: Run, jobs: Sequence[Job], error: Exception) -> None:
        if isinstance(error, TooLargeError):
            self._dispatcher.too_large(run, len(jobs))
        if len(jobs) == 1:
            self._answer([(jobs[0], error)])
            return
        half = len(jobs) // 2
        while jobs:
            size = min(half, self._dispatcher.ceiling(run.spec.bucket))  # which the halves before may have lowered
            self._attempt(run, jobs[:size])
            jobs = jobs[size:]

    def _wanted(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """Those that somebody still waits for; the others are answered."""
        now = time.monotonic()
        if unwanted := [job for job in jobs if not job.wanted(now)]:
            late = "the deadline passed before the request was computed"
            self._answer([(job, ExpiredError(late)) for job in unwanted])
        return [job for job in jobs if job.wanted(now)]

    def _pause(self, run: Run, jobs: Sequence[Job]) -> int:
        while True:
            self._last_rest = started = time.monotonic()
            if not any(job.wanted(started) for job in jobs):
                raise AbandonedError
            other = self._dispatcher.interrupt(run) if self._depth <= policy.MAX_DEPTH else None
            if other is not None:
                self._work(other)
            rested = self._dispatcher.pause(run) or other is not None
            if rested:
                self._last_rest = time.monotonic()
                run.rested += self._last_rest - started
            if not (run.spec.background and rested):
                return self._dispatcher.sharing
