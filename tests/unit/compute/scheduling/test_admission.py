"""Who is let in, with estimates that are known and a clock that stands still."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdam_server.compute.scheduling import BACKGROUND, JobSpec, QueueFullError, policy
from cdam_server.compute.scheduling.admission import Admission
from cdam_server.compute.scheduling.ceilings import Ceilings
from cdam_server.compute.scheduling.forecast import Forecast
from cdam_server.compute.scheduling.job import Job
from cdam_server.compute.scheduling.run import Device, Run
from jobs import job, queue_of

NOW = 1000.0


def admission(waiting: Sequence[Job], runs: Sequence[Run] = (), *, tested: float = NOW, slots: int = 1) -> Admission:
    """Of a device that takes a second for each job, one after the other."""
    device = Device(slots, ceilings=Ceilings(1))
    forecast = Forecast(device)
    device.runs.append(Run([job(0)], 0.0, None, None, None))
    forecast.learn(device.runs.pop(), 1.0)
    device.runs.extend(runs)
    made = Admission(queue_of(waiting), device, forecast)
    made.tested(JobSpec("a").kind, tested)
    return made


def refusal(made: Admission, **spec: object) -> QueueFullError | None:
    try:
        made.check(JobSpec(**{"bucket": "a", "caller": "new", **spec}), NOW)
    except QueueFullError as error:
        return error
    return None


def test_who_would_be_late_is_refused_with_how_late() -> None:
    made = admission([job(0, caller="other")])
    refused = refusal(made, timeout=2.0)
    assert refused is not None
    assert refused.reason == "deadline"
    # A second for the other's job and one for its own, times the margin of 1.5.
    assert refused.retry_after == pytest.approx(1.5 * (1 + 1) - 2)
    assert refusal(made, timeout=3.0) is None
    assert refusal(made) is None  # who gives no deadline can't miss one


def test_who_would_be_late_waits_until_half_of_the_work_is_done_at_least() -> None:
    waiting = [job(number, caller=str(number)) for number in range(9)]
    running = Run([job(9)], NOW - 0.25, 1.0, None, None)
    refused = refusal(admission(waiting, [running]), timeout=16.0)
    assert refused is not None
    assert 0 < 1.5 * (0.75 + 9 + 1) - 16 < (0.75 + 9) / 2 == pytest.approx(refused.retry_after)


def test_what_would_be_late_is_tried_if_its_kind_was_not_for_long() -> None:
    made = admission([job(0, caller="other")], tested=NOW - policy.TRIAL_SECONDS - 0.1)
    assert refusal(made, timeout=2.0) is None
    assert refusal(made, timeout=2.0) is not None


def test_an_idle_server_refuses_nobody_for_a_deadline() -> None:
    assert refusal(admission([]), timeout=0.001) is None
    assert refusal(admission([job(0, cost=500.0, rank=BACKGROUND)]), timeout=0.001) is None


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_who_is_let_in_at_a_glance_is_let_in_after_a_closer_look_and_teaches_nothing_either_way(seed: int) -> None:
    draw = random.Random(seed)
    ranks, costs = (-1, 0, 1, BACKGROUND), (0.5, 1.0, 4.0, 40.0)

    def some(number: int) -> Job:
        return job(
            number,
            caller=draw.choice("abcd"),
            rank=draw.choice(ranks),
            cost=draw.choice(costs),
            seconds=draw.random() * draw.choice((0.1, 3.0)),
        )

    waiting = [some(number) for number in range(draw.randrange(12))]
    runs = [Run([some(100 + number)], NOW - draw.random(), 2 * draw.random(), None, None) for number in range(2)]
    made = admission(waiting, runs[: draw.randrange(3)], slots=2)
    timeout = 200 * draw.random() ** 2
    spec = JobSpec("a", cost=draw.choice(costs), caller=draw.choice("abe"), rank=draw.choice(ranks), timeout=timeout)
    if made._is_little(spec, NOW):
        assert made.check(spec, NOW) == 0
        closer = made._seconds(spec, NOW)
        assert policy.MAX_DEADLINE_MARGIN * closer < policy.MARGIN_FROM * timeout


def ended(made: Admission, took: float, *, computed: bool = True, times: int = 1, **spec: object) -> float:
    """The margin after so many jobs that were expected to take a second of their two."""
    of = job(0, **{"timeout": 2.0, **spec})
    of.expected = 1.0
    for _ in range(times):
        made.ended(of, of.arrived + took, computed=computed)
    return made.margin(of.spec)


def test_where_answers_come_later_than_expected_the_margin_grows() -> None:
    made = admission([job(0, caller="other")])
    assert refusal(made, timeout=3.1) is None
    assert ended(made, took=1.6) == pytest.approx(1.5 * (1 + policy.MARGIN_STEP))
    assert refusal(made, timeout=3.1) is not None
    assert refusal(made, timeout=3.1, rank=1) is None  # those behind learn for themselves
    assert ended(made, took=9.0, times=100) == policy.MAX_DEADLINE_MARGIN


def test_the_margin_shrinks_again_but_not_below_what_was_asked_for() -> None:
    made = admission([])
    raised = ended(made, took=2.0, times=5)
    assert 1.5 < ended(made, took=1.0, times=50) < raised
    assert ended(made, took=1.0, times=1000) == 1.5


def test_the_margin_settles_where_so_few_are_late_as_the_policy_says() -> None:
    made, late = admission([]), 0
    took = np.random.default_rng(0).lognormal(np.log(1.2), 0.25, 40_000)
    for number, seconds in enumerate(took):
        late += number >= 20_000 and seconds > made.margin(job(0, timeout=2.0).spec)
        ended(made, seconds)
    assert late / 20_000 == pytest.approx(policy.LATE_SHARE, rel=0.2)


@pytest.mark.parametrize(
    ("took", "computed", "timeout"),
    [
        (1.0, False, 2.0),  # its caller has left early
        (1.6, True, None),
        (9.0, True, 20.0),  # it was not near to being refused
    ],
)
def test_of_what_says_nothing_about_estimates_nothing_is_learned(
    took: float, computed: bool, timeout: float | None
) -> None:
    made = admission([])
    before = ended(made, took=2.0, times=5)
    assert ended(made, took, computed=computed, timeout=timeout) == before


def test_of_what_nothing_is_known_nothing_is_refused() -> None:
    assert refusal(admission([job(0)]), bucket="unknown", timeout=0.001) is None


def test_what_interrupts_a_long_batch_leaves_it_a_quarter_of_the_device() -> None:
    long = Run([job(9, cost=100.0)], NOW, 100.0, None, None)
    refused = refusal(admission([job(0, caller="other")], [long]), timeout=2.0)
    assert refused is not None
    assert refused.retry_after == pytest.approx(max(1.5 * 2 / 0.75 - 2, (100 + 1) / 2))
