"""A load generator for whatever can be called from asyncio; it knows neither gRPC nor images.

A closed loop has so many callers, each of which waits for its answer before it asks again: it finds out how much a
server can do. An open loop asks at a given rate, whether or not answers come, as a service's many users do: it finds
out how long they wait. Its latencies count from the moment at which a request was due, so that a server that stalls
is not forgiven the requests that a polite generator would have held back meanwhile.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import count
from time import perf_counter
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Call: TypeAlias = Callable[[int], Awaitable[str]]
"""Makes the request of this number, from 0; "OK", or the name of what went wrong. What it raises ends the run."""

OK: Final = "OK"
NOT_SENT: Final = "NOT_SENT"
"""The code of requests that were due while `OpenLoop.max_in_flight` others were still unanswered."""

_QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


@dataclass(frozen=True)
class ClosedLoop:
    """Callers that each wait for an answer before they ask again.

    Attributes:
        callers: How many there are, and so the number of requests in flight.
    """

    callers: int

    def __post_init__(self) -> None:
        if self.callers < 1:
            raise ValueError(f"callers is at least 1, got {self.callers}")


@dataclass(frozen=True)
class OpenLoop:
    """Requests at a rate, answered or not, at the random moments of a Poisson process.

    These are the moments at which many callers who don't know of each other ask; evenly spaced ones would flatter
    the server's queue.

    Attributes:
        rate: Mean number of requests a second.
        seed: Of the moments; the same seed gives the same ones.
        max_in_flight: Most requests unanswered, to bound memory; those due beyond count as `NOT_SENT`.
    """

    rate: float
    seed: int = 0
    max_in_flight: int = 4096

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate is positive, got {self.rate}")

    def arrivals(self, seconds: float) -> NDArray[np.float64]:
        """When requests are due, in seconds from the start, ascending."""
        random = np.random.default_rng(self.seed)
        # Given their number, the moments of a Poisson process are uniform.
        return np.sort(random.uniform(0, seconds, random.poisson(self.rate * seconds)))


@dataclass(frozen=True, eq=False)
class Load:
    """What came of a load: an entry for each request, by its number.

    Times are in seconds from the start of the window that is measured, negative during the warm-up. The properties
    tell of the requests that were due in the window, however late they ended; `throughput` alone counts ends.

    Attributes:
        seconds: Length of the window.
        numbers: The requests' numbers, as `Call` got them.
        codes: What `Call` returned.
        due: When they should have begun; in a closed loop, when they did.
        begun: When they began.
        ended: When they were answered.
    """

    seconds: float
    numbers: NDArray[np.int64]
    codes: NDArray[np.str_]
    due: NDArray[np.float64]
    begun: NDArray[np.float64]
    ended: NDArray[np.float64]

    @property
    def in_window(self) -> NDArray[np.bool_]:
        """Which requests were due in the window."""
        return self.due >= 0

    @property
    def requests(self) -> int:
        """Number of requests."""
        return int(self.in_window.sum())

    @property
    def counts(self) -> dict[str, int]:
        """Number of requests by code, the most frequent first."""
        return dict(Counter(self.codes[self.in_window].tolist()).most_common())

    @property
    def latencies(self) -> NDArray[np.float64]:
        """From due to answered, of the requests that were OK."""
        return self._latencies(OK)

    @property
    def failures(self) -> dict[str, NDArray[np.float64]]:
        """From due to refused, by code, of those that weren't."""
        return {code: self._latencies(code) for code in self.counts if code != OK}

    @property
    def late(self) -> NDArray[np.float64]:
        """How far behind the generator itself was, from due to begun: what it adds to the latencies."""
        return self.begun[self.in_window] - self.due[self.in_window]

    @property
    def throughput(self) -> float:
        """OK a second: those that ended in the window, as many as a steady load begins in it.

        Those that it leaves behind would count for more than the server can do, had it queued them up.
        """
        ended = (self.codes == OK) & (self.ended >= 0) & (self.ended < self.seconds)
        return float(ended.sum() / self.seconds) if self.seconds else 0.0

    def quantile(self, q: float) -> float:
        """The q-quantile (0..1) of `latencies`; NaN if there are none."""
        return float(np.quantile(self.latencies, q)) if self.latencies.size else float("nan")

    def part(self, chosen: NDArray[np.bool_]) -> "Load":
        """The requests that a mask over all of them chooses."""
        arrays = {name: getattr(self, name)[chosen] for name in ("numbers", "codes", "due", "begun", "ended")}
        return replace(self, **arrays)

    def to_json(self) -> dict[str, Any]:
        """Everything but the single requests, in JSON's types; seconds, and None where nothing was measured."""
        return {
            "seconds": self.seconds,
            "requests": self.requests,
            "counts": self.counts,
            "throughput": self.throughput,
            "latency": summary(self.latencies),
            "failures": {code: summary(latencies) for code, latencies in self.failures.items()},
            "late": summary(self.late),
        }

    def _latencies(self, code: str) -> NDArray[np.float64]:
        chosen: NDArray[np.bool_] = self.in_window & (self.codes == code)
        return self.ended[chosen] - self.due[chosen]


def summary(values: NDArray[np.float64]) -> dict[str, Any]:
    """Number, mean, quantiles and maximum; None where there are no values."""
    names = ("mean", *_QUANTILES, "max")
    if not values.size:
        return {"count": 0, **dict.fromkeys(names)}
    found = (values.mean(), *np.quantile(values, list(_QUANTILES.values())), values.max())
    return {"count": int(values.size), **dict(zip(names, map(float, found), strict=True))}


async def generate(
    call: Call,
    loop: ClosedLoop | OpenLoop,
    *,
    seconds: float,
    warm_up_seconds: float = 0.0,
    stop: asyncio.Event | None = None,
) -> Load:
    """Call for so long, then wait for the answers that are still due.

    Args:
        call: Makes one request.
        loop: When to make it.
        seconds: Length of the window that is measured.
        warm_up_seconds: Time before the window, under the same load.
        stop: Set it to end early: what is under way is cancelled and left out, what was measured so far is returned.
    """
    run = _Run(call, perf_counter() + warm_up_seconds, seconds)
    work = run.closed(loop) if isinstance(loop, ClosedLoop) else run.open(loop, warm_up_seconds)
    working = asyncio.create_task(work)
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        finished = working.done()
        working.cancel()
        stopping.cancel()
        await asyncio.wait({working, stopping})
    if finished:
        await working  # raises what a call raised
    return run.load(seconds if finished else run.now())


class _Run:
    """A load under way: the calls, and what came of those that ended.

    Args:
        call: Makes one request.
        start: When the window begins, by `perf_counter`.
        seconds: Its length.
    """

    def __init__(self, call: Call, start: float, seconds: float) -> None:
        self._call = call
        self._start = start
        self._seconds = seconds
        self._ended: list[tuple[int, str, float, float, float]] = []

    async def closed(self, loop: ClosedLoop) -> None:
        numbers = count()

        async def caller() -> None:
            while (now := self.now()) < self._seconds:
                await self._one(next(numbers), now)
                await asyncio.sleep(0)  # a call that never waits would keep the others from their turn

        async with asyncio.TaskGroup() as callers:
            for _ in range(loop.callers):
                callers.create_task(caller())

    async def open(self, loop: OpenLoop, warm_up_seconds: float) -> None:
        in_flight: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as requests:
            for number, due in enumerate((loop.arrivals(warm_up_seconds + self._seconds) - warm_up_seconds).tolist()):
                await asyncio.sleep(max(0.0, due - self.now()))
                if len(in_flight) < loop.max_in_flight:
                    task = requests.create_task(self._one(number, due))
                    in_flight.add(task)
                    task.add_done_callback(in_flight.discard)
                else:
                    now = self.now()
                    self._ended.append((number, NOT_SENT, due, now, now))

    async def _one(self, number: int, due: float) -> None:
        begun = self.now()
        code = await self._call(number)
        self._ended.append((number, code, due, begun, self.now()))

    def load(self, until: float) -> Load:
        """What has come of it, in a window that ends then."""
        numbers, codes, due, begun, ended = zip(*sorted(self._ended), strict=True) if self._ended else ((),) * 5
        return Load(
            seconds=max(0.0, min(self._seconds, until)),
            numbers=np.array(numbers, np.int64),
            codes=np.array(codes, np.str_),
            due=np.array(due, np.float64),
            begun=np.array(begun, np.float64),
            ended=np.array(ended, np.float64),
        )

    def now(self) -> float:
        """Seconds from the start of the window."""
        return perf_counter() - self._start
