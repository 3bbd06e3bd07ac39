"""The load generator, with calls that are coroutines of the test."""

import asyncio
import json
import time
from itertools import pairwise

import numpy as np
import pytest

from cdam_cli.load import NOT_SENT, OK, ClosedLoop, Load, OpenLoop, generate


def _load(seconds: float, *requests: tuple[str, float, float, float]) -> Load:
    codes, due, begun, ended = zip(*requests, strict=True) if requests else ((),) * 4
    times = (np.array(values, np.float64) for values in (due, begun, ended))
    return Load(seconds, np.arange(len(codes)), np.array(codes, np.str_), *times)


class Calls:
    """Answers "OK" after a moment, and remembers how many calls were in flight."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.in_flight = self.most_in_flight = self.cancelled = 0

    async def __call__(self, number: int) -> str:
        self.numbers.append(number)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.answer(number)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1

    async def answer(self, number: int) -> str:
        await asyncio.sleep(0.002)
        return OK


async def test_a_closed_loop_keeps_its_callers_busy() -> None:
    calls = Calls()
    load = await generate(calls, ClosedLoop(5), seconds=0.2)
    assert calls.most_in_flight == 5
    assert calls.in_flight == 0
    assert calls.numbers == list(range(len(calls.numbers)))
    assert load.numbers.tolist() == calls.numbers
    assert load.counts == {OK: len(calls.numbers)}
    assert load.requests == load.latencies.size > 5
    assert load.seconds == 0.2
    assert (load.due < 0.2).all()


async def test_a_closed_loop_gives_calls_that_never_wait_their_turn() -> None:
    turns: list[object] = []

    async def call(_: int) -> str:
        turns.append(asyncio.current_task())
        return OK

    await generate(call, ClosedLoop(2), seconds=0.02)
    assert all(one is not other for one, other in pairwise(turns[:10]))


async def test_an_open_loop_makes_the_arrivals_of_its_seed() -> None:
    loop, calls = OpenLoop(rate=300, seed=3), Calls()
    arrivals = loop.arrivals(0.3)
    load = await generate(calls, loop, seconds=0.2, warm_up_seconds=0.1)
    assert calls.numbers == list(range(arrivals.size))
    np.testing.assert_allclose(load.due, arrivals - 0.1, atol=1e-12)
    assert load.requests == (arrivals >= 0.1).sum()
    assert load.counts == {OK: load.requests}
    assert (load.begun >= load.due).all()
    np.testing.assert_array_equal(arrivals, OpenLoop(rate=300, seed=3).arrivals(0.3))
    assert arrivals.size != OpenLoop(rate=300, seed=4).arrivals(0.3).size


def test_arrivals_are_those_of_a_poisson_process() -> None:
    arrivals = OpenLoop(rate=50).arrivals(400)
    gaps = np.diff(arrivals)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)  # of an exponential distribution: the mean
    assert arrivals[-1] < 400


async def test_latencies_count_from_when_a_request_was_due() -> None:
    own: dict[int, float] = {}

    async def call(number: int) -> str:
        begun = time.perf_counter()
        if number == 0:
            time.sleep(0.1)  # noqa: ASYNC251 - holds up the generator itself, and with it all that is due meanwhile
        await asyncio.sleep(0.001)
        own[number] = time.perf_counter() - begun
        return OK

    loop = OpenLoop(rate=200)
    load = await generate(call, loop, seconds=0.3)
    arrivals = loop.arrivals(0.3)
    held_up = int(((arrivals > arrivals[0]) & (arrivals < arrivals[0] + 0.1)).sum())
    assert held_up > 5
    waited = load.late[1 : 1 + held_up]
    assert (waited >= arrivals[0] + 0.1 - arrivals[1 : 1 + held_up]).all()
    assert (load.latencies >= load.late + [own[number] for number in range(len(own))]).all()


async def test_an_open_loop_does_not_wait_for_answers_but_bounds_them() -> None:
    release = asyncio.Event()
    asyncio.get_running_loop().call_later(1.0, release.set)

    async def call(_: int) -> str:
        await release.wait()
        return OK

    loop = OpenLoop(rate=400, max_in_flight=3)
    load = await generate(call, loop, seconds=0.1)
    assert load.counts == {NOT_SENT: loop.arrivals(0.1).size - 3, OK: 3}
    assert (load.latencies > 0.5).all()  # awaited to their end, after the window
    assert load.throughput == 0


async def test_what_goes_wrong_is_counted_apart() -> None:
    async def call(number: int) -> str:
        await asyncio.sleep(0.001)
        return (OK, "BUSY", OK, "LATE")[number % 4]

    load = await generate(call, ClosedLoop(2), seconds=0.1)
    numbers = load.numbers
    assert load.counts[OK] == (numbers % 2 == 0).sum()
    assert load.counts["BUSY"] == (numbers % 4 == 1).sum()
    assert load.counts["LATE"] == (numbers % 4 == 3).sum()
    assert load.latencies.size == load.counts[OK]
    assert {code: latencies.size for code, latencies in load.failures.items()} == {
        code: count for code, count in load.counts.items() if code != OK
    }
    odd = load.part(load.numbers % 2 == 1)
    assert (odd.requests, odd.latencies.size) == (load.requests - load.counts[OK], 0)


async def test_the_warm_up_is_left_out() -> None:
    calls = Calls()
    load = await generate(calls, ClosedLoop(2), seconds=0.05, warm_up_seconds=0.1)
    early = int((load.due < 0).sum())
    assert early > 0
    assert load.requests == len(calls.numbers) - early == sum(load.counts.values()) > 0


class Hanging(Calls):
    """Answers ten calls, no more; sets an event when four hang."""

    def __init__(self) -> None:
        super().__init__()
        self.hang = asyncio.Event()

    async def answer(self, number: int) -> str:
        if number >= 10:
            if number == 13:
                self.hang.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        return OK


@pytest.mark.parametrize("loop", [ClosedLoop(4), OpenLoop(rate=500)])
async def test_a_stop_yields_what_was_measured_so_far(loop: ClosedLoop | OpenLoop) -> None:
    calls = Hanging()
    load = await generate(calls, loop, seconds=100, stop=calls.hang)
    assert load.counts == {OK: 10}
    assert 0 < load.ended.max() <= load.seconds < 100
    assert load.throughput == 10 / load.seconds
    assert (calls.in_flight, calls.cancelled) == (0, len(calls.numbers) - 10)


async def test_a_stop_during_the_warm_up_measures_nothing() -> None:
    calls = Hanging()
    load = await generate(calls, ClosedLoop(4), seconds=1, warm_up_seconds=100, stop=calls.hang)
    assert (load.seconds, load.requests, load.throughput, load.counts) == (0, 0, 0, {})


async def test_cancelling_cancels_every_call() -> None:
    calls = Hanging()
    task = asyncio.create_task(generate(calls, ClosedLoop(4), seconds=100))
    await calls.hang.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (calls.in_flight, calls.cancelled) == (0, 4)


@pytest.mark.parametrize("loop", [ClosedLoop(3), OpenLoop(rate=500)])
async def test_what_a_call_raises_ends_the_run(loop: ClosedLoop | OpenLoop) -> None:
    class Broken(Hanging):
        async def answer(self, number: int) -> str:
            if number == 12:
                raise RuntimeError("not counted")
            return await super().answer(number)

    calls = Broken()
    with pytest.raises(ExceptionGroup) as caught:
        await generate(calls, loop, seconds=100)
    assert caught.group_contains(RuntimeError, match="not counted")
    assert calls.in_flight == 0


def test_throughput_counts_what_ended_in_the_window() -> None:
    load = _load(
        2.0,
        (OK, -1.0, -1.0, 0.5),  # begun in the warm-up, ended in the window
        (OK, -1.0, -1.0, -0.5),
        (OK, 0.0, 0.0, 1.0),
        ("BUSY", 0.5, 0.5, 1.0),
        (OK, 1.5, 1.6, 2.5),  # left behind
    )
    assert load.throughput == 1.0
    assert load.counts == {OK: 2, "BUSY": 1}
    assert load.latencies.tolist() == [1.0, 1.0]
    assert load.late.tolist() == pytest.approx([0, 0, 0.1])


def test_json() -> None:
    load = _load(4.0, *((OK, 0.0, 0.0, latency) for latency in (1.0, 2.0, 3.0)), ("BUSY", 1.0, 1.0, 1.5))
    told = json.loads(json.dumps(load.to_json()))
    assert told["counts"] == {"OK": 3, "BUSY": 1}
    assert (told["requests"], told["seconds"], told["throughput"]) == (4, 4.0, 0.75)
    assert told["latency"] == {
        "count": 3,
        "mean": 2.0,
        "p50": 2.0,
        "max": 3.0,
        **{name: pytest.approx(load.quantile(q)) for name, q in (("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999))},
    }
    assert told["failures"]["BUSY"]["p99"] == 0.5
    assert load.quantile(0.5) == 2.0


def test_nothing_measured_is_no_number() -> None:
    load = _load(0.0)
    assert np.isnan(load.quantile(0.5))
    assert load.to_json()["latency"] == dict.fromkeys(("mean", "p50", "p90", "p99", "p99.9", "max")) | {"count": 0}


def test_loops_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="callers is at least 1, got 0"):
        ClosedLoop(0)
    for rate in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="rate is positive"):
            OpenLoop(rate)
