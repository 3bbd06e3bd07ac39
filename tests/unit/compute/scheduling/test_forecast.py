"""Estimates, compared with sums done by hand."""

import pytest

from cdam_server.compute.scheduling import BACKGROUND, JobSpec
from cdam_server.compute.scheduling.ceilings import Ceilings
from cdam_server.compute.scheduling.forecast import Estimator, Forecast
from cdam_server.compute.scheduling.run import Device, Run
from jobs import job


def run(started: float, seconds: float | None, *, interrupts: Run | None = None, **spec: object) -> Run:
    return Run([job(0, **spec)], started, seconds, interrupts, None)


def known(device: Device, **costs: float) -> Forecast:
    """A forecast that has seen batches of bucket "a" of these costs, alone on the device."""
    forecast = Forecast(device)
    for cost, seconds in costs.items():
        size = int(cost.removeprefix("of_"))
        batch = Run([job(number) for number in range(size)], 0.0, None, None, None)
        device.runs.append(batch)
        forecast.learn(batch, seconds)
        device.runs.remove(batch)
    return forecast


def test_estimates_grow_with_the_cost_and_are_cautious_about_what_is_not_known() -> None:
    estimator = Estimator()
    assert estimator.seconds("a", 1.0) is None
    for cost, seconds in ((1.0, 0.010), (16.0, 0.040)):
        estimator.observe("a", cost, seconds)
    assert estimator.seconds("a", 1.0) == pytest.approx(0.010)
    assert estimator.seconds("a", 16.0) == pytest.approx(0.040)
    assert estimator.seconds("a", 4.0) == pytest.approx(0.040)  # no better than single ones
    assert estimator.seconds("a", 64.0) == pytest.approx(0.160)
    assert estimator.seconds("b", 1.0) is None


def test_estimates_follow_and_a_single_standstill_changes_them_little() -> None:
    estimator = Estimator()
    for _ in range(10):
        estimator.observe("a", 1.0, 0.010)
    estimator.observe("a", 1.0, 30.0)
    assert estimator.seconds("a", 1.0) == pytest.approx(0.016)
    for _ in range(60):
        estimator.observe("a", 1.0, 0.100)
    assert estimator.seconds("a", 1.0) == pytest.approx(0.100, rel=0.01)


def test_a_batch_that_shared_the_device_would_have_taken_less_alone() -> None:
    device = Device(slots=2, ceilings=Ceilings(4))
    forecast = Forecast(device)
    batch, other = run(10.0, None), run(10.0, None)
    batch.rested = 1.0
    device.runs += [batch, other]
    forecast.learn(batch, 13.0)
    assert forecast.seconds(JobSpec("a"), 1.0) == pytest.approx((13 - 10 - 1) / 2)


def test_what_shares_no_batch_is_estimated_by_single_jobs_until_one_was_computed() -> None:
    device = Device(slots=1, ceilings=Ceilings(4))
    forecast = known(device, of_1=0.010, of_4=0.016)
    assert forecast.seconds(JobSpec("a", cost=100.0), 100.0) == pytest.approx(1.0)
    long = run(0.0, None, cost=100.0)
    device.runs.append(long)
    forecast.learn(long, 3.0)
    assert forecast.seconds(JobSpec("a", cost=100.0), 100.0) == pytest.approx(3.0)
    assert forecast.seconds(JobSpec("b", cost=100.0), 100.0) is None


def test_a_job_adds_its_share_of_as_full_a_batch_as_its_deadline_allows() -> None:
    forecast = known(Device(slots=1, ceilings=Ceilings(4)), of_1=0.010, of_4=0.016)
    assert forecast.share(JobSpec("a")) == pytest.approx(0.016 / 4)
    # Half of the timeout is less than a full batch takes; two jobs are thought to take no less than four.
    assert forecast.share(JobSpec("a", timeout=0.020)) == pytest.approx(0.016 / 2)
    assert forecast.longest_batch(JobSpec("a", timeout=0.020)) == pytest.approx(0.010)
    assert forecast.longest_batch(JobSpec("a")) == pytest.approx(0.016)
    assert forecast.share(JobSpec("unknown")) == 0.0


def test_a_slot_is_free_when_the_batches_in_it_are_done() -> None:
    device = Device(slots=2, ceilings=Ceilings(4))
    forecast = Forecast(device)
    outer, other = run(0.0, 6.0, cost=100.0), run(0.0, 5.0)
    device.runs.append(outer)
    assert forecast.until_free(JobSpec("a"), 1.0) == 0.0  # of the other slot
    outer.resting = True
    device.runs += [run(0.0, 1.5, interrupts=outer), other]
    outer.rested = 1.0  # it has not been computed at all
    assert forecast.running(1.0) == pytest.approx((12 + (3 - 1) + (10 - 1)) / 2)
    assert forecast.until_free(JobSpec("a", cost=100.0), 1.0) == pytest.approx(10 - 1)
    assert forecast.until_free(JobSpec("a"), 1.0) == pytest.approx(3 - 1)  # the outer one gives way to it
    assert forecast.until_free(JobSpec("a"), 9.0) == pytest.approx(9 / 4)  # what is late will be later


def test_what_is_in_the_background_keeps_no_slot_from_the_others() -> None:
    device = Device(slots=1, ceilings=Ceilings(4))
    forecast = Forecast(device)
    device.runs.append(run(0.0, 50.0, rank=BACKGROUND))
    assert forecast.running(1.0) == 0.0
    assert forecast.until_free(JobSpec("a"), 1.0) == 0.0
    assert forecast.until_free(JobSpec("a", rank=BACKGROUND), 1.0) == pytest.approx(49.0)
