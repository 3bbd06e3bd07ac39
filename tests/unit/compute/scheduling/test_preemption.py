"""Which jobs interrupt a batch."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdam_server.compute.scheduling import BACKGROUND
from cdam_server.compute.scheduling.batching import Batching
from cdam_server.compute.scheduling.ceilings import Ceilings
from cdam_server.compute.scheduling.forecast import Forecast
from cdam_server.compute.scheduling.job import Job
from cdam_server.compute.scheduling.preemption import Preemption
from cdam_server.compute.scheduling.run import Device, Run
from jobs import job, queue_of

NOW = 10.0


def interrupting(run: Run, waiting: Sequence[Job], *, known: bool = False) -> list[Job]:
    """What interrupts a batch; a job takes a second for each unit of cost if it is known how long it takes."""
    device = Device(slots=1, ceilings=Ceilings(4))
    forecast = Forecast(device)
    if known:
        device.runs.append(Run([job(0)], 0.0, None, None, None))
        forecast.learn(device.runs.pop(), 1.0)
    device.runs.append(run)
    queue = queue_of(waiting)
    queue.hold(run.jobs[0])
    return Preemption(queue, device, Batching(queue, device, forecast, 0.0)).take(run, NOW)


def running(*, computed: float = 1.0, rested: float = 0.0, interrupts: Run | None = None, **spec: object) -> Run:
    jobs = [job(99, **{"bucket": "running", "caller": "running", "cost": 80.0, **spec})]
    return Run(jobs, NOW - computed - rested, 100.0, interrupts, None, rested=rested)


@pytest.mark.parametrize(
    ("run", "waiting", "interrupts"),
    [
        (running(), job(0, cost=10.0), True),  # eight times cheaper
        (running(), job(0, cost=10.1), False),
        (running(), job(0, cost=200.0, rank=-1), True),  # of better rank
        (running(), job(0, rank=1), False),
        (running(rested=3.0), job(0), True),  # a quarter of its speed is left
        (running(rested=3.1), job(0), False),
        (running(rested=3.1), job(0, rank=-1), False),
        (running(rank=BACKGROUND), job(0, cost=200.0), True),
        (running(rank=BACKGROUND, rested=1e6), job(0, cost=200.0), True),
        (running(rank=BACKGROUND), job(0, rank=BACKGROUND), True),
        (running(rank=BACKGROUND, rested=1e6), job(0, rank=BACKGROUND), False),
        (running(rank=BACKGROUND, interrupts=running(rank=BACKGROUND)), job(0, rank=BACKGROUND), False),
        (running(rank=BACKGROUND, interrupts=running(rank=BACKGROUND)), job(0), True),
        (running(cost=1.0), job(0), False),  # both light, and neither caller has had more
        (running(cost=1.0), job(0, cost=0.1), False),
    ],
)
def test_who_interrupts(run: Run, waiting: Job, interrupts: bool) -> None:
    assert interrupting(run, [waiting]) == [waiting] * interrupts


def test_what_interrupts_takes_no_longer_than_what_is_left() -> None:
    waiting = [job(0, cost=8.0), job(1, cost=3.0), job(2, cost=3.0), job(3, cost=3.0)]
    run = running(computed=90.0)  # of 100 seconds; what is late may still take a quarter of that
    assert interrupting(run, waiting, known=True) == waiting[:1]
    run = running(computed=3.0)
    run.seconds = 10.0
    assert interrupting(run, waiting, known=True) == waiting[1:3]  # two take six seconds, of seven


def test_who_has_had_little_interrupts_a_batch_of_callers_who_have_had_much() -> None:
    device = Device(slots=1, ceilings=Ceilings(4))
    queue = queue_of([job(number, caller="much") for number in range(20)])
    batching = Batching(queue, device, Forecast(device), 0.0)
    for _ in range(2):
        assert len(batching.take()) == 4
    run = Run(batching.take(), NOW - 1.0, 100.0, None, None)
    device.runs.append(run)
    preemption = Preemption(queue, device, batching)
    assert preemption.take(run, NOW) == []  # its own caller's
    little = job(20, caller="little")
    queue.hold(little)
    queue.push(little)
    assert preemption.take(run, NOW)[0] is little


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_look_at_each_callers_next_job_misses_nobody(seed: int) -> None:
    def interrupting(*, at_a_glance: bool) -> list[Job]:
        draw = random.Random(seed)
        device = Device(slots=1, ceilings=Ceilings(4))

        def some(number: int) -> Job:
            rank = draw.choice((0, 0, 0, 1, BACKGROUND)) - (draw.random() < 0.05)
            return job(number, caller=draw.choice("abc"), rank=rank, cost=draw.choice((1.0, 4.0, 4.0, 40.0)))

        queue = queue_of([some(number) for number in range(draw.randrange(60))])
        batching = Batching(queue, device, Forecast(device), 0.0)
        for _ in range(draw.randrange(12)):  # some have had more than others
            batching.take()
        if not (batch := batching.take()):
            return []
        run = Run(batch, NOW - 1.0, 100.0, None, None, rested=draw.choice((0.0, 9.0)))
        device.runs.append(run)
        for number in range(100, 100 + draw.randrange(4)):
            new = job(number, caller=draw.choice("axyz"), cost=draw.choice((0.5, 0.5, 40.0)))
            queue.hold(new)
            queue.push(new)
        if not at_a_glance:
            queue.heads = lambda: [job(999, rank=-99)]  # type: ignore[method-assign]  # somebody, so that all are looked at
        return Preemption(queue, device, batching).take(run, NOW)

    assert [its.number for its in interrupting(at_a_glance=True)] == [
        its.number for its in interrupting(at_a_glance=False)
    ]
