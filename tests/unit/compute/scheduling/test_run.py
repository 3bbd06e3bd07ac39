"""Batches on a device."""

import pytest

from cdam_server.compute.scheduling import BACKGROUND
from cdam_server.compute.scheduling.ceilings import Ceilings
from cdam_server.compute.scheduling.run import Device, Run
from jobs import job


def run(seconds: float | None = None, *, interrupts: Run | None = None, rank: int = 0) -> Run:
    return Run([job(0, cost=2.0, rank=rank), job(1, cost=1.5)], 10.0, seconds, interrupts, None)


def test_the_time_that_a_batch_rests_is_not_computed() -> None:
    batch = run(8.0)
    assert batch.cost == 3.5
    assert batch.computed(15.0) == 5.0
    batch.rested = 2.0
    assert batch.computed(15.0) == 3.0
    assert batch.remaining(15.0, sharing=1) == 8 - 3
    assert batch.remaining(15.0, sharing=2) == 16 - 3
    assert batch.remaining(30.0, sharing=1) == pytest.approx(18 / 4)  # it is late
    assert run().remaining(15.0, sharing=1) == 0.0  # nothing is known


def test_the_outermost_batch_is_the_one_that_nothing_else_is_within() -> None:
    outer = run()
    assert run(interrupts=run(interrupts=outer)).outermost is outer
    assert outer.outermost is outer


def test_batches_that_rest_share_no_device() -> None:
    device = Device(2, Ceilings(4))
    assert device.sharing == 1
    one, other = run(), run(rank=BACKGROUND)
    device.runs += [one, other]
    assert device.sharing == 2
    assert device.foreground == [one]
    one.resting = True
    assert device.sharing == 1
