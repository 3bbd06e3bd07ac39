"""The queue's order and its book-keeping."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdam_server.compute.scheduling import BACKGROUND, Bounds, JobSpec, QueueFullError
from cdam_server.compute.scheduling.job import Job
from cdam_server.compute.scheduling.queue import Queue
from jobs import job, queue_of


def take(queue: Queue, size: int = 1) -> list[int]:
    return [item.number for item in queue.take(lambda bucket: size, lambda first: lambda job: True)]


def at_most_three(first: Job) -> Callable[[Job], bool]:
    joined = [first]

    def fits(item: Job) -> bool:
        joined.append(item)
        return len(joined) <= 3

    return fits


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_job_comes_out_once_and_the_books_balance(seed: int) -> None:
    draw = random.Random(seed)
    queue = Queue(Bounds(jobs=40, cost=200.0, bytes=4000), credit=8.0)
    held: dict[int, Job] = {}
    pushed: set[int] = set()
    out: Counter[int] = Counter()
    for number in range(150):
        item = job(
            number,
            seconds=draw.random(),
            caller=draw.choice("abc"),
            bucket=draw.choice("xy"),
            cost=draw.choice((1.0, 2.0, 30.0)),
            bytes=draw.randrange(300),
            timeout=draw.choice((None, draw.random() * 100)),
            rank=draw.choice((-1, 0, 1, BACKGROUND)),
        )
        try:
            queue.check_room(item.spec, 1.0)
        except QueueFullError:
            assert held
            assert not item.spec.background
        else:
            item.submitted = math.inf
            queue.hold(item)
            held[number] = item
        match draw.randrange(4):
            case 0 if waits := [its for its in held.values() if its.submitted == math.inf]:
                chosen = draw.choice(waits)
                chosen.submitted = float(number)
                queue.push(chosen)
                pushed.add(chosen.number)
            case 1:
                batch = queue.take(lambda bucket: 4, at_most_three)
                assert len({its.spec.bucket for its in batch}) <= 1
                assert len(batch) == 1 or all(its.spec.light for its in batch)
                out.update(its.number for its in batch)
            case 2 if held:
                chosen = held.pop(draw.choice(list(held)))
                queue.release(chosen)
                out[chosen.number] += chosen.number in pushed and not out[chosen.number]
            case _:
                dropped = queue.drop(lambda its: draw.random() < 0.1)
                out.update(its.number for its in dropped)
        assert queue.held == sum(not its.spec.background for its in held.values())
        assert queue.held <= 40
        begun = out.keys()
        left = sum(its.seconds for its in held.values() if its.number not in begun)
        assert queue.work == pytest.approx(left, abs=1e-9)
    while batch := queue.take(lambda bucket: 4, lambda first: lambda job: True):
        out.update(its.number for its in batch)
    assert set(out.elements()) == pushed
    assert max(out.values(), default=1) == 1
    for item in held.values():
        queue.release(item)
    assert queue.held == queue.waiting == 0
    assert queue.work == pytest.approx(0)


def test_callers_get_equal_shares_of_work_whatever_they_ask_for() -> None:
    costs = {"small": 1.0, "medium": 2.0, "large": 4.0}
    jobs = [
        job(1000 * place + number, caller=name, cost=cost)
        for place, (name, cost) in enumerate(costs.items())
        for number in range(400)
    ]
    queue = queue_of(jobs)
    had: Counter[str] = Counter()
    for _ in range(200):
        (chosen,) = queue.take(lambda bucket: 1, lambda first: lambda job: True)
        had[chosen.spec.caller] += int(chosen.spec.cost)
    assert max(had.values()) - min(had.values()) <= 8


def test_who_comes_back_is_ahead_for_as_much_as_its_credit_and_no_more() -> None:
    queue = queue_of([job(number, caller="always") for number in range(200)])
    for _ in range(100):
        take(queue)
    for number in range(1000, 1050):
        item = job(number, caller="back")
        queue.hold(item)
        queue.push(item)
    first = [take(queue)[0] >= 1000 for _ in range(40)]
    assert sum(first[:8]) >= 7
    assert 20 <= sum(first) <= 30  # its credit of 8, and then every second one


def test_a_very_expensive_job_is_not_held_against_its_caller_for_long() -> None:
    queue = queue_of([job(0, caller="dear", cost=1000.0), job(1, caller="dear")])
    assert take(queue) == [0]
    for number in range(100, 200):
        item = job(number, caller="other")
        queue.hold(item)
        queue.push(item)
    order = [take(queue)[0] for _ in range(40)]
    assert order.index(1) <= 20


def test_callers_that_went_long_ago_are_forgotten() -> None:
    queue = Queue(Bounds(), credit=8.0)
    for number in range(5000):
        item = job(number, caller=f"caller {number}")
        queue.hold(item)
        queue.push(item)
        assert take(queue) == [number]
        queue.release(item)
    assert len(queue._callers) <= 1025


def test_what_will_be_done_before() -> None:
    queue = queue_of(
        [
            job(0, caller="own", seconds=1.0),
            job(1, caller="other", seconds=5.0),
            job(2, caller="urgent", seconds=2.0, rank=-1),
            job(3, caller="bulk", seconds=9.0, rank=1),
            job(4, caller="heavy", seconds=60.0, cost=500.0),
        ]
    )
    # Its own 1, as much of the other's as it has itself (1 + 0.5), and all that is urgent.
    assert queue.backlog(JobSpec("a", caller="own"), 0.5) == pytest.approx(1 + 1.5 + 2)
    assert queue.backlog(JobSpec("a", caller="own", cost=500.0), 0.5) == pytest.approx(1 + 1.5 + 1.5 + 2)
    assert queue.backlog(JobSpec("a", caller="own", rank=1), 0.5) == pytest.approx(1 + 5 + 2 + 0.5)
