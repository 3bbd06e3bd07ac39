"""Which jobs make a batch, with estimates that are known."""

import math
from collections.abc import Sequence

import pytest

from cdam_server.compute.scheduling import BACKGROUND
from cdam_server.compute.scheduling.batching import Batching
from cdam_server.compute.scheduling.ceilings import Ceilings
from cdam_server.compute.scheduling.forecast import Forecast
from cdam_server.compute.scheduling.job import Job
from cdam_server.compute.scheduling.run import Device, Run
from jobs import job, queue_of


def batching(waiting: Sequence[Job], *, slots: int = 1, delay: float = 0.0, busy: bool = False) -> Batching:
    """Of a device that takes a second for a batch, and one for each job in it; up to eight are a batch."""
    device = Device(slots, Ceilings(8))
    forecast = Forecast(device)
    for size in (1, 2, 4, 8):
        device.runs.append(Run([job(number) for number in range(size)], 0.0, None, None, None))
        forecast.learn(device.runs.pop(), 1.0 + size)
    device.runs += [Run([job(0)], 0.0, None, None, None)] * busy
    return Batching(queue_of(waiting), device, forecast, delay)


def fits(made: Batching, jobs: Sequence[Job]) -> bool:
    """Whether all may be one batch."""
    first, *others = jobs
    joins = made.begin(first)
    return all(joins(other) for other in others)


@pytest.mark.parametrize(("timeout", "slots", "size"), [(None, 1, 8), (10.0, 1, 4), (18.0, 1, 8), (18.0, 2, 2)])
def test_a_batch_takes_half_of_a_deadline_at_most_which_the_slots_share(
    timeout: float | None, slots: int, size: int
) -> None:
    waiting = [job(0, timeout=timeout), *(job(number) for number in range(1, 8))]
    made = batching(waiting, slots=slots)
    fitting = [count for count in (1, 2, 4, 8) if fits(made, waiting[:count])]
    assert max(fitting) == size


def test_a_single_job_is_computed_however_long_it_takes() -> None:
    first = job(0, timeout=0.5)
    made = batching([first])
    assert made.take() == [first]


def test_who_has_had_little_is_in_no_batch_that_takes_much_longer_than_its_job_alone() -> None:
    much = [job(number, caller="much") for number in range(20)]
    made = batching(much)
    for _ in range(2):
        assert len(made.take()) == 8
    little = job(20, caller="little")
    made._queue.hold(little)
    assert made.is_behind(much)(little)
    assert not made.is_behind([little])(much[0])
    assert not made.is_behind(much)(much[0])
    assert fits(made, [little, much[16]])  # three seconds are 1.5 times two
    assert not fits(made, [little, *much[16:19]])


def test_what_is_in_the_background_begins_only_on_an_idle_device() -> None:
    waiting = [job(0, rank=BACKGROUND)]
    assert batching(waiting, busy=True).take() == []
    assert batching(waiting).take() == waiting


@pytest.mark.parametrize(
    ("waiting", "closed", "expected"),
    [
        ([], False, None),
        ([job(3), job(4)], False, 3 + 10 - 5),
        ([job(3), job(4, timeout=8.0)], False, 3 + 4 - 5),  # no longer than half of a deadline
        ([job(3), job(4)], True, 0.0),
        ([job(3, cost=100.0), job(4)], False, 0.0),  # it shares no batch
        ([job(number) for number in range(8)], False, 0.0),  # the batch is full
        ([job(0), *(job(number, bucket="b") for number in range(1, 9))], False, 0 + 10 - 5),
    ],
)
def test_how_long_a_job_waits_for_others(waiting: Sequence[Job], closed: bool, expected: float | None) -> None:
    assert batching(waiting, delay=10.0).delay(5.0, closed=closed) == expected


def test_without_a_delay_nothing_waits() -> None:
    assert batching([job(0)]).delay(5.0, closed=False) == 0.0


def test_what_cannot_be_done_in_time_is_dropped_but_for_the_last_one() -> None:
    gone, late, on_time = job(0), job(1, timeout=10.0), job(2, timeout=math.inf)
    gone.released = True
    made = batching([gone, late, on_time])
    assert made.drop_late(9.5) == [late, gone]  # a job takes two seconds, and there are one and a half
    alone = batching([late])
    assert alone.drop_late(9.5) == []  # estimates may be wrong
    assert alone.drop_late(11.5) == [late]
