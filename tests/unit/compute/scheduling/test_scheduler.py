"""The scheduler, with real threads and work that the test can hold back."""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from structlog.testing import capture_logs

from cdam_server.compute.scheduling import (
    BACKGROUND,
    Bounds,
    ClosedError,
    Computed,
    DeviceLostError,
    ExpiredError,
    JobSpec,
    Observer,
    Pause,
    QueueFullError,
    Scheduler,
    TooLargeError,
)
from jobs import Call, Calls


class Gate:
    """A compute function that doubles its jobs, once the gate is open."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[tuple[str, list[int]]] = []

    def __call__(self, bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        self.batches.append((bucket, list(jobs)))
        self.entered.set()
        assert self.open.wait(10)
        return [2 * job for job in jobs]


class Steps:
    """A compute function that works in steps, and rests when the test says so."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.log: list[str] = []
        self.asked = threading.Event()

    def __call__(self, bucket: str, jobs: Sequence[str], pause: Pause) -> list[str | Exception]:
        name = "+".join(jobs)
        if not name.startswith("long"):
            self.log.append(name)
            return list(jobs)
        self.log.append(f"{name} begins")
        for _ in range(100):
            self.asked.set()
            assert self.steps.acquire(timeout=10)
            time.sleep(0.002)
            pause()
            if "over" in jobs[0]:
                break
        self.log.append(f"{name} ends")
        return list(jobs)


class Tally(Observer):
    """Counts what becomes of jobs."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def admitted(self) -> None:
        self._count("admitted")

    def refused(self, reason: str) -> None:
        self._count(f"refused {reason}")

    def dropped(self, reason: str) -> None:
        self._count(reason)

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1


async def _entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.wait, 10)


async def _busy(gate: Gate, scheduler: Calls) -> "asyncio.Task[object]":
    task = asyncio.create_task(scheduler.submit(JobSpec("busy", caller="busy"), 0))
    await _entered(gate)
    return task


async def _submitted(scheduler: Calls, *jobs: tuple[JobSpec, object]) -> list["asyncio.Task[object]"]:
    tasks = [asyncio.create_task(scheduler.submit(spec, job)) for spec, job in jobs]
    await asyncio.sleep(0)
    return tasks


async def test_jobs_that_wait_together_share_a_batch_in_order_of_arrival() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=4)
    scheduler.start()
    first = await _busy(gate, scheduler)
    pause = await _submitted(scheduler, *((JobSpec("a"), job) for job in range(1, 7)))
    gate.open.set()
    await first
    done = await asyncio.gather(*pause)
    assert [item.answer for item in done] == [2, 4, 6, 8, 10, 12]
    assert gate.batches[1:] == [("a", [1, 2, 3, 4]), ("a", [5, 6])]
    assert [item.batch_size for item in done] == [4, 4, 4, 4, 2, 2]
    await scheduler.close()


async def test_buckets_do_not_mix_and_the_oldest_goes_first() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=8)
    scheduler.start()
    hold = await _busy(gate, scheduler)
    tasks = await _submitted(
        scheduler, *((JobSpec(bucket), job) for bucket, job in (("a", 0), ("b", 1), ("a", 2), ("b", 3)))
    )
    gate.open.set()
    await asyncio.gather(hold, *tasks)
    assert gate.batches[1:] == [("a", [0, 2]), ("b", [1, 3])]
    await scheduler.close()


async def test_an_idle_worker_waits_for_company_until_the_batch_is_full() -> None:
    gate = Gate()
    gate.open.set()
    scheduler = Calls(gate, max_batch_size=3, max_queue_delay=30.0)
    scheduler.start()
    async with asyncio.timeout(10):
        await asyncio.gather(*(scheduler.submit(JobSpec("a"), job) for job in range(3)))
    assert gate.batches == [("a", [0, 1, 2])]
    await scheduler.close()


async def test_nobody_waits_for_the_batch_of_a_caller_who_has_left() -> None:
    gate = Gate()
    gate.open.set()
    scheduler = Calls(gate, max_batch_size=3, max_queue_delay=30.0)
    scheduler.start()
    light = asyncio.create_task(scheduler.submit(JobSpec("a"), 0))
    await asyncio.sleep(0.05)
    heavy = asyncio.create_task(scheduler.submit(JobSpec("b", cost=50.0), 1))
    await asyncio.sleep(0.05)
    assert not gate.batches  # the oldest job's batch may still fill
    light.cancel()
    async with asyncio.timeout(10):
        await heavy
    assert gate.batches == [("b", [1])]
    await scheduler.close()


async def test_jobs_handed_in_together_share_a_batch_at_once() -> None:
    gate = Gate()
    gate.open.set()
    scheduler = Calls(gate, max_batch_size=4)
    scheduler.start()
    done = await scheduler.submit_together([(JobSpec("a"), job) for job in range(4)])
    assert gate.batches == [("a", [0, 1, 2, 3])]
    assert [item.answer for item in done] == [0, 2, 4, 6]
    await scheduler.close()


@pytest.mark.parametrize(
    ("bounds", "spec", "reason"),
    [
        (Bounds(jobs=3), JobSpec("a"), "jobs"),
        (Bounds(cost=30), JobSpec("a", cost=10), "cost"),
        (Bounds(bytes=3000), JobSpec("a", bytes=1000), "bytes"),
    ],
)
async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(
    bounds: Bounds, spec: JobSpec, reason: str
) -> None:
    gate, tally = Gate(), Tally()
    scheduler = Calls(gate, max_batch_size=1, bounds=bounds, observer=tally)
    scheduler.start()
    admitted = await _submitted(scheduler, *((spec, job) for job in range(3)))
    with pytest.raises(QueueFullError) as refused:
        await scheduler.submit(spec, 3)
    assert refused.value.retry_after > 0
    assert refused.value.reason == reason
    gate.open.set()
    assert [item.answer for item in await asyncio.gather(*admitted)] == [0, 2, 4]
    assert tally.counts == {"admitted": 3, f"refused {reason}": 1}
    await scheduler.submit(spec, 3)  # there is room again
    await scheduler.close()


async def test_whatever_its_size_a_job_that_is_alone_is_let_in() -> None:
    gate = Gate()
    gate.open.set()
    scheduler = Calls(gate, bounds=Bounds(jobs=1, cost=1, bytes=1))
    scheduler.start()
    assert (await scheduler.submit(JobSpec("a", cost=100, bytes=100), 1)).answer == 2
    await scheduler.close()


async def test_a_caller_who_floods_leaves_room_for_others() -> None:
    gate = Gate()
    scheduler = Calls(gate, bounds=Bounds(jobs=36))
    scheduler.start()
    flood = await _submitted(scheduler, *((JobSpec("a", caller="flood"), job) for job in range(40)))
    refused = [task for task in flood if task.done()]
    assert len(refused) == 8  # it holds 32, and 4 are free
    assert all(isinstance(task.exception(), QueueFullError) for task in refused)
    others = await _submitted(scheduler, *((JobSpec("a", caller=name), 0) for name in "bcd"))
    assert not any(task.done() for task in others)
    gate.open.set()
    await asyncio.gather(*others, *(task for task in flood if task not in refused))
    await scheduler.close()


async def test_callers_take_turns() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=4)
    scheduler.start()
    hold = await _busy(gate, scheduler)
    flood = await _submitted(scheduler, *((JobSpec("a", caller="flood"), job) for job in range(10, 20)))
    late = await _submitted(scheduler, *((JobSpec("a", caller="late"), job) for job in range(2)))
    gate.open.set()
    await asyncio.gather(hold, *flood, *late)
    assert sorted(gate.batches[1][1]) == [0, 1, 10, 11]
    await scheduler.close()


async def test_what_a_job_costs_counts_for_turns() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=1)
    scheduler.start()
    hold = await _busy(gate, scheduler)
    dear = await _submitted(scheduler, *((JobSpec("a", caller="dear", cost=3), job) for job in range(2)))
    cheap = await _submitted(scheduler, *((JobSpec("a", caller="cheap"), job) for job in range(10, 15)))
    gate.open.set()
    await asyncio.gather(hold, *dear, *cheap)
    order = [jobs[0] for _, jobs in gate.batches[1:]]
    assert order.index(1) - order.index(0) == 4  # three of the cheap ones in between
    await scheduler.close()


async def test_the_earliest_deadline_of_a_caller_goes_first() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=1)
    scheduler.start()
    hold = await _busy(gate, scheduler)
    tasks = await _submitted(
        scheduler, *((JobSpec("a", timeout=timeout), job) for job, timeout in enumerate((90, 30, None, 60)))
    )
    gate.open.set()
    await asyncio.gather(hold, *tasks)
    assert [jobs for _, jobs in gate.batches[1:]] == [[1], [3], [0], [2]]
    await scheduler.close()


async def test_jobs_of_lower_rank_go_first() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=2)
    scheduler.start()
    hold = await _busy(gate, scheduler)
    tasks = await _submitted(
        scheduler, *((JobSpec("a", rank=rank), job) for job, rank in ((1, 1), (2, 0), (3, 0), (4, -1)))
    )
    gate.open.set()
    await asyncio.gather(hold, *tasks)
    assert gate.batches[1:] == [("a", [4, 2]), ("a", [3, 1])]
    await scheduler.close()


async def test_cancelled_and_expired_jobs_are_never_computed() -> None:
    gate, tally = Gate(), Tally()
    scheduler = Calls(gate, max_batch_size=4, observer=tally)
    scheduler.start()
    first = await _busy(gate, scheduler)
    cancelled, expired, kept = await _submitted(
        scheduler, (JobSpec("a"), 1), (JobSpec("a", timeout=0.01), 2), (JobSpec("a", timeout=60), 3)
    )
    await asyncio.sleep(0.05)
    cancelled.cancel()
    await asyncio.sleep(0)
    assert scheduler.waiting == 2
    gate.open.set()
    assert (await kept).answer == 6
    await first
    with pytest.raises(ExpiredError):
        await expired
    assert gate.batches == [("busy", [0]), ("a", [3])]
    assert tally.counts == {"admitted": 4, "cancelled": 1, "expired": 1}
    await scheduler.close()


async def test_a_job_cancelled_while_it_computes_leaves_the_others_alone() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=2, max_queue_delay=30.0)
    scheduler.start()
    leaves, stays = await _submitted(scheduler, (JobSpec("a"), 1), (JobSpec("a"), 2))
    await _entered(gate)
    leaves.cancel()
    gate.open.set()
    assert (await stays).answer == 4
    await scheduler.close()


async def test_only_the_culprit_of_a_failed_batch_fails() -> None:
    sizes = []

    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        sizes.append(len(jobs))
        if 2 in jobs:
            raise ZeroDivisionError
        return [ValueError("three") if job == 3 else 2 * job for job in jobs]

    scheduler = Calls(compute, max_batch_size=8)
    scheduler.start()
    tasks = [asyncio.ensure_future(scheduler.submit(JobSpec("a"), job)) for job in range(8)]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers[2], ZeroDivisionError)
    assert isinstance(answers[3], ValueError)
    assert [item.answer for job, item in enumerate(answers) if job not in {2, 3}] == [0, 2, 8, 10, 12, 14]
    assert sum(sizes) <= 8 * 4  # halved, not one by one
    assert scheduler.alive
    await scheduler.close()


async def test_a_compute_function_that_answers_too_little_is_an_error_for_everyone() -> None:
    scheduler = Calls(lambda bucket, jobs, pause: [], max_batch_size=2)
    scheduler.start()
    answers = await asyncio.gather(*(scheduler.submit(JobSpec("a"), job) for job in range(2)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [RuntimeError, RuntimeError]
    await scheduler.close()


@dataclass(frozen=True)
class Booked(Call):
    """Work that notes which batches are booked."""

    booked: list[tuple[list[object], list[object], Computed]] = field(default_factory=list)

    def record(self, batch: Sequence[Call], answers: Sequence[object], computed: Computed) -> None:
        self.booked.append(([work.job for work in batch], list(answers), computed))


async def test_what_was_computed_at_once_is_booked_once_without_what_raised() -> None:
    error = ValueError("one")

    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        if 2 in jobs:
            raise ZeroDivisionError
        return [error if job == 1 else 2 * job for job in jobs]

    scheduler = Scheduler(max_batch_size=4, max_queue_delay=30.0)
    scheduler.start()
    works = [Booked(compute, "a", job) for job in range(4)]
    answers = await asyncio.gather(
        *(scheduler.submit_all([(JobSpec("a"), work)]) for work in works), return_exceptions=True
    )
    await scheduler.close()
    assert answers[1] is error
    assert isinstance(answers[2], ZeroDivisionError)
    assert [work.booked[0][:2] for work in works if work.booked] == [([0, 1], [0, error]), ([3], [6])]
    assert [computed.fill for work in works for *_, computed in work.booked] == [2 / 4, 1 / 4]


async def test_the_time_in_which_a_batch_rests_is_not_booked() -> None:
    def compute(bucket: str, jobs: Sequence[str], pause: Pause) -> list[str | Exception]:
        if bucket == "short":
            time.sleep(0.2)
        else:
            entered.set()
            assert go.wait(10)
            pause()
        return list(jobs)

    entered, go = threading.Event(), threading.Event()
    scheduler = Scheduler()
    scheduler.start()
    long, short = Booked(compute, "long", "long"), Booked(compute, "short", "short")
    started = time.monotonic()
    first = asyncio.create_task(scheduler.submit_all([(JobSpec("long", cost=100.0), long)]))
    assert await asyncio.to_thread(entered.wait, 10)
    second = asyncio.create_task(scheduler.submit_all([(JobSpec("short", rank=-1), short)]))
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(first, second)
    elapsed = time.monotonic() - started
    ((_, _, computed),) = long.booked
    assert computed.seconds <= elapsed - 0.2
    ((_, _, computed),) = short.booked
    assert computed.seconds >= 0.2
    await scheduler.close()


async def test_an_error_of_the_booking_is_logged_and_loses_no_answer() -> None:
    class Wrong(Call):
        def record(self, batch: Sequence[Call], answers: Sequence[object], computed: Computed) -> None:
            raise ZeroDivisionError

    scheduler = Scheduler()
    scheduler.start()
    with capture_logs() as logs:
        done = await scheduler.submit_all(
            [(JobSpec("a"), Wrong(lambda bucket, jobs, pause: jobs, "a", job)) for job in range(3)]
        )
    assert [item.answer for item in done] == [0, 1, 2]
    assert [(line["event"], line["log_level"]) for line in logs] == [("a batch could not be booked", "error")]
    assert scheduler.alive
    await scheduler.close()


async def test_work_of_another_bucket_than_its_spec_says_is_refused_and_nothing_is_computed() -> None:
    gate = Gate()
    gate.open.set()
    scheduler = Scheduler(bounds=Bounds(jobs=2))
    scheduler.start()
    right, wrong = Call(gate, "a", 1), Call(gate, "b", 2)
    with scheduler.admit(JobSpec("a")) as ticket:
        with pytest.raises(ValueError, match="the work is of bucket 'b'; its spec says 'a'"):
            await ticket.submit(wrong)
        assert (await ticket.submit(right)).answer == 2
    with pytest.raises(ValueError, match="bucket 'b'"):
        await scheduler.submit_all([(JobSpec("a"), right), (JobSpec("a"), wrong)])
    done = await scheduler.submit_all([(JobSpec("a"), right), (JobSpec("b"), wrong)])  # there is room again
    assert [item.answer for item in done] == [2, 4]
    assert gate.batches == [("a", [1]), ("a", [1]), ("b", [2])]
    assert scheduler._dispatcher._queue.work == 0
    await scheduler.close()


async def test_a_batch_that_memory_cannot_hold_is_halved_and_the_ceiling_remembered_until_it_is_raised_again() -> None:
    limit, sizes = 5, []

    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        sizes.append(len(jobs))
        if len(jobs) > limit:
            raise TooLargeError("memory")
        return list(jobs)

    scheduler = Calls(compute, max_batch_size=16)
    scheduler.start()
    together = [(JobSpec("a", caller=str(job)), job) for job in range(16)]
    assert [done.answer for done in await scheduler.submit_together(together)] == list(range(16))
    assert scheduler.ceiling("a") == 4
    assert scheduler.ceiling("b") == 16
    assert sizes == [16, 8, 4, 4, 4, 4]
    sizes.clear()
    await scheduler.submit_together(together)
    assert sizes == [4, 4, 4, 4]
    limit = 16  # somebody else gave memory back
    for _ in range(3000):
        await scheduler.submit_together(together)
        if scheduler.ceiling("a") == 16:
            break
    assert scheduler.ceiling("a") == 16
    await scheduler.close()


async def test_a_single_job_that_memory_cannot_hold_fails_alone() -> None:
    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        if 3 in jobs:
            raise TooLargeError("memory")
        return list(jobs)

    scheduler = Calls(compute, max_batch_size=8, max_queue_delay=30.0)
    scheduler.start()
    tasks = [asyncio.ensure_future(scheduler.submit(JobSpec("a"), job)) for job in range(8)]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers[3], TooLargeError)
    assert [item.answer for item in answers if item is not answers[3]] == [0, 1, 2, 4, 5, 6, 7]
    assert scheduler.ceiling("a") == 8  # its company is not to blame
    await scheduler.close()


@pytest.mark.parametrize("error", [DeviceLostError("gone"), SystemExit(3), KeyboardInterrupt()])
async def test_when_nothing_can_be_computed_any_more_everyone_is_told_at_once(error: BaseException) -> None:
    entered, go = threading.Event(), threading.Event()

    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        entered.set()
        assert go.wait(10)
        raise error

    failures: list[BaseException] = []
    scheduler = Calls(compute, max_batch_size=1, on_failure=failures.append)
    scheduler.start()
    tasks = await _submitted(scheduler, *((JobSpec("a"), job) for job in range(3)))
    assert await asyncio.to_thread(entered.wait, 10)
    assert scheduler.alive
    go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [DeviceLostError] * 3
    assert failures == [error]
    assert not scheduler.alive
    with pytest.raises(DeviceLostError):
        await scheduler.submit(JobSpec("a"), 0)
    await scheduler.close()


async def test_a_silent_worker_is_seen_from_outside() -> None:
    gate = Gate()
    scheduler = Calls(gate)
    scheduler.start()
    assert scheduler.silent_seconds == 0
    task = await _busy(gate, scheduler)
    await asyncio.sleep(0.05)
    assert scheduler.silent_seconds > 0.04
    scheduler.fail(RuntimeError("stuck"))
    with pytest.raises(DeviceLostError):
        await task
    gate.open.set()
    await scheduler.close()


async def test_closing_answers_all_that_were_let_in_and_no_more() -> None:
    threads = set(threading.enumerate())
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=1)
    scheduler.start()
    tasks = await _submitted(scheduler, *((JobSpec("a"), job) for job in range(3)))
    await _entered(gate)
    closing = asyncio.create_task(scheduler.close())
    await asyncio.sleep(0)
    with pytest.raises(ClosedError):
        await scheduler.submit(JobSpec("a"), 9)
    gate.open.set()
    assert [item.answer for item in await asyncio.gather(*tasks)] == [0, 2, 4]
    await closing
    left = set(threading.enumerate()) - threads
    assert not [thread for thread in left if thread.name.startswith("compute")]


async def test_two_slots_work_on_two_batches_at_once() -> None:
    barrier = threading.Barrier(2)

    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        barrier.wait(10)
        return list(jobs)

    scheduler = Calls(compute, max_batch_size=1, slots=2)
    scheduler.start()
    done = await asyncio.gather(*(scheduler.submit(JobSpec("a"), job) for job in range(2)))
    assert [item.answer for item in done] == [0, 1]
    await scheduler.close()


async def test_a_cheap_job_goes_before_the_rest_of_an_expensive_one() -> None:
    steps = Steps()
    scheduler = Calls(steps, bounds=Bounds(cost=1e6))
    scheduler.start()
    await scheduler.submit(JobSpec("a"), "first")  # from now on it is known how long jobs take
    long = asyncio.create_task(scheduler.submit(JobSpec("a", cost=100_000), "long"))
    assert await asyncio.to_thread(steps.asked.wait, 10)
    for number in range(3):
        cheap = asyncio.create_task(scheduler.submit(JobSpec("a"), f"cheap {number}"))
        while not cheap.done():
            steps.steps.release()
            await asyncio.sleep(0.005)
        assert not long.done()
    dear = asyncio.create_task(scheduler.submit(JobSpec("a", cost=50_000), "dear"))
    for _ in range(100):
        steps.steps.release()
    await asyncio.gather(long, dear)
    assert steps.log == ["first", "long begins", "cheap 0", "cheap 1", "cheap 2", "long ends", "dear"]
    await scheduler.close()


async def test_a_flood_of_cheap_jobs_does_not_stop_an_expensive_one() -> None:
    steps = Steps()
    scheduler = Calls(steps, max_batch_size=1, bounds=Bounds(cost=1e6))
    scheduler.start()
    await scheduler.submit(JobSpec("a"), "first")
    long = asyncio.create_task(scheduler.submit(JobSpec("a", cost=100_000), "long"))
    for _ in range(100):
        steps.steps.release()

    async def flood() -> None:
        while not long.done():
            await scheduler.submit(JobSpec("a"), "cheap")

    async with asyncio.timeout(20):
        await asyncio.gather(*(flood() for _ in range(8)))
    await long
    await scheduler.close()


async def test_a_job_of_another_caller_who_asks_for_little_interrupts_a_flood_and_its_own_does_not() -> None:
    steps = Steps()
    scheduler = Calls(steps, max_batch_size=4)
    scheduler.start()
    for _ in range(30):
        await scheduler.submit(JobSpec("a", caller="flood"), "fast")
    for size in (1, 4):  # now it is known that batches take long
        steps.steps.release()
        jobs = [(JobSpec("b", caller=f"warm-up {number}"), "long over") for number in range(size)]
        await scheduler.submit_together(jobs)
    steps.log.clear()
    tasks = [
        asyncio.create_task(
            scheduler.submit_together([(JobSpec("b", caller="flood"), f"long {number}") for number in range(4)])
        )
    ]
    steps.asked.clear()
    assert await asyncio.to_thread(steps.asked.wait, 10)
    tasks += await _submitted(
        scheduler, (JobSpec("a", caller="flood"), "own"), (JobSpec("a", caller="little"), "other")
    )
    for _ in range(100):
        steps.steps.release()
    await asyncio.gather(*tasks)
    name = "long 0+long 1+long 2+long 3"
    assert steps.log == [f"{name} begins", "other", f"{name} ends", "own"]
    await scheduler.close()


async def test_who_asks_for_little_is_not_kept_by_the_company_of_a_flood() -> None:
    batches: list[list[int]] = []

    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        batches.append(list(jobs))
        time.sleep(0.01 * len(jobs))  # without a rest
        return list(jobs)

    scheduler = Calls(compute, max_batch_size=4)
    scheduler.start()
    for size in (1, 4):
        await scheduler.submit_together([(JobSpec("a", caller=f"warm-up {job}"), job) for job in range(size)])
    flood = await _submitted(scheduler, *((JobSpec("a", caller="flood"), job) for job in range(60)))
    await flood[40]
    await scheduler.submit(JobSpec("a", caller="little"), 99)
    assert [99] in batches
    await asyncio.gather(*flood)
    others = await _submitted(scheduler, *((JobSpec("a", caller=name), 7) for name in "bcdefghi"))
    await asyncio.gather(*others)
    assert [7, 7, 7, 7] in batches  # equals do share
    await scheduler.close()


async def test_jobs_in_the_background_take_nobodys_room() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=1, bounds=Bounds(jobs=2, cost=4.0))
    scheduler.start()
    hidden = await _submitted(
        scheduler, *((JobSpec(f"b{number}", cost=1000.0, rank=BACKGROUND), number) for number in range(4))
    )
    await _entered(gate)
    others = await _submitted(scheduler, *((JobSpec("a", cost=2.0, timeout=60.0), job) for job in range(2)))
    with pytest.raises(QueueFullError) as refused:
        await scheduler.submit(JobSpec("a", cost=2.0), 9)
    assert refused.value.reason == "jobs"
    gate.open.set()
    assert [item.answer for item in await asyncio.gather(*others)] == [0, 2]
    assert [item.answer for item in await asyncio.gather(*hidden)] == [0, 2, 4, 6]
    assert [bucket for bucket, _ in gate.batches] == ["b0", "a", "a", "b1", "b2", "b3"]
    assert not any(str(bucket).startswith("b") for bucket, _ in scheduler._dispatcher._forecast._estimator._rates)
    await scheduler.close()


async def test_whatever_comes_goes_before_the_rest_of_what_is_in_the_background() -> None:
    """Though nobody knows how long either takes, in all slots, and as often as it comes."""
    steps = Steps()
    scheduler = Calls(steps, slots=2)
    scheduler.start()
    long = await _submitted(
        scheduler, *((JobSpec(f"b{k}", cost=50.0, caller=str(k), rank=BACKGROUND), f"long {k}") for k in range(2))
    )
    while len(steps.log) < 2:  # noqa: ASYNC110 - it is threads that work
        await asyncio.sleep(0.005)
    for number in range(10):
        low = asyncio.create_task(scheduler.submit(JobSpec("a", rank=1), f"low {number}"))
        while not low.done():
            steps.steps.release()
            await asyncio.sleep(0.005)
        assert not any(task.done() for task in long)
    for _ in range(300):
        steps.steps.release()
    await asyncio.gather(*long)
    assert steps.log[2:12] == [f"low {number}" for number in range(10)]
    await scheduler.close()


async def test_the_background_stands_aside_while_anything_else_is_computed() -> None:
    steps, log = threading.Semaphore(0), list[str]()

    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        for _ in range(4 if bucket == "front" else 100):
            if bucket == "front":
                assert steps.acquire(timeout=10)
            time.sleep(0.002)
            log.append(bucket)
            pause()
        return list(jobs)

    scheduler = Calls(compute, slots=2)
    scheduler.start()

    def only_the_front_is_computed() -> bool:
        with scheduler._dispatcher._changed:
            device = scheduler._dispatcher._device
            return bool(device.foreground) and all(run.resting == run.spec.background for run in device.runs)

    front = asyncio.create_task(scheduler.submit(JobSpec("front"), 1))
    while not only_the_front_is_computed():  # noqa: ASYNC110 - it is threads that work
        await asyncio.sleep(0.005)
    back = [asyncio.create_task(scheduler.submit(JobSpec("back", cost=99.0, rank=BACKGROUND), k)) for k in range(2)]
    for _ in range(4):
        await asyncio.sleep(0.05)
        assert "back" not in log  # it does not even begin, though a slot is free
        steps.release()
    await front
    while "back" not in log:  # noqa: ASYNC110 - it is threads that work
        await asyncio.sleep(0.001)
    again = asyncio.create_task(scheduler.submit(JobSpec("front"), 1))
    for _ in range(4):
        while not only_the_front_is_computed():  # noqa: ASYNC110 - what is in the background comes to a rest first
            await asyncio.sleep(0.001)
        done = log.count("back")
        await asyncio.sleep(0.05)
        assert (again.done(), log.count("back")) == (False, done)
        steps.release()
    await asyncio.gather(again, *back)
    assert log.count("back") == 200
    await scheduler.close()


async def test_in_the_background_callers_take_turns_by_themselves() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=1)
    scheduler.start()
    hold = await _busy(gate, scheduler)
    background = [
        (JobSpec(caller, cost=100.0, caller=caller, rank=BACKGROUND), job) for caller in "ab" for job in range(3)
    ]
    tasks = await _submitted(scheduler, *background, (JobSpec("c", caller="a"), 7), (JobSpec("d", caller="d"), 8))
    gate.open.set()
    await asyncio.gather(hold, *tasks)
    assert [bucket for bucket, _ in gate.batches[1:]] == ["c", "d", "a", "b", "a", "b", "a", "b"]
    await scheduler.close()


async def test_jobs_share_batches_up_to_the_cost_that_they_say() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=4)
    scheduler.start()
    hold = await _busy(gate, scheduler)
    tasks = await _submitted(
        scheduler,
        *((JobSpec("a", cost=30.0, light_cost=32.0), job) for job in range(3)),
        *((JobSpec("b", cost=33.0, light_cost=32.0), job) for job in range(2)),
    )
    gate.open.set()
    await asyncio.gather(hold, *tasks)
    assert sorted(batch for _, batch in gate.batches[1:]) == [[0], [0, 1, 2], [1]]
    await scheduler.close()


async def test_work_whose_callers_have_gone_ends_at_the_next_rest() -> None:
    steps = Steps()
    scheduler = Calls(steps)
    scheduler.start()
    task = asyncio.create_task(scheduler.submit(JobSpec("a"), "long"))
    assert await asyncio.to_thread(steps.asked.wait, 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    steps.steps.release()
    assert (await scheduler.submit(JobSpec("a"), "next")).answer == "next"
    assert steps.log == ["long begins", "next"]
    await scheduler.close()


async def test_work_whose_deadline_has_passed_ends_at_the_next_rest() -> None:
    steps = Steps()
    scheduler = Calls(steps)
    scheduler.start()
    task = asyncio.create_task(scheduler.submit(JobSpec("a", timeout=0.05), "long"))
    assert await asyncio.to_thread(steps.asked.wait, 10)
    await asyncio.sleep(0.1)
    steps.steps.release()
    with pytest.raises(ExpiredError):
        await task
    assert steps.log == ["long begins"]
    await scheduler.close()


async def test_a_job_that_could_not_be_done_in_time_is_refused_on_arrival() -> None:
    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        time.sleep(0.1 * len(jobs))
        return list(jobs)

    tally = Tally()
    scheduler = Calls(compute, max_batch_size=2, observer=tally)
    scheduler.start()
    for size in (1, 2):
        await scheduler.submit_together([(JobSpec("a"), job) for job in range(size)])
    patient = await _submitted(scheduler, *((JobSpec("a", caller="patient"), job) for job in range(20)))
    with pytest.raises(QueueFullError) as refused:
        await scheduler.submit(JobSpec("a", caller="patient", timeout=0.5), 0)
    assert refused.value.reason == "deadline"
    assert 0.5 < refused.value.retry_after < 5
    assert (await scheduler.submit(JobSpec("a", caller="other", timeout=2), 1)).answer == 1  # its turn comes soon
    await asyncio.gather(*patient)
    assert (await scheduler.submit(JobSpec("a", timeout=0.15), 1)).answer == 1  # an idle server tries
    assert tally.counts["refused deadline"] == 1
    await scheduler.close()


async def test_jobs_that_take_longer_than_expected_leave_room_for_fewer() -> None:
    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        time.sleep(0.1)
        return list(jobs)

    scheduler = Calls(compute, max_batch_size=1)
    scheduler.start()
    dispatcher = scheduler._dispatcher
    dispatcher._forecast._estimator.observe(("a", True), 1.0, 0.05)  # as it was once
    spec = JobSpec("a", timeout=0.25)
    await asyncio.gather(*await _submitted(scheduler, (spec, 0), (spec, 1)))
    await scheduler.close()
    assert dispatcher._admission.margin(spec) > Bounds().deadline_margin


async def test_jobs_that_expire_while_they_wait_leave_room_for_fewer() -> None:
    gate = Gate()
    scheduler = Calls(gate, max_batch_size=1)
    scheduler.start()
    dispatcher = scheduler._dispatcher
    dispatcher._forecast._estimator.observe(("a", True), 1.0, 0.05)
    busy = await _busy(gate, scheduler)
    spec = JobSpec("a", timeout=0.25)
    waiting = await _submitted(scheduler, (spec, 1), (spec, 2))
    await asyncio.sleep(0.3)
    gate.open.set()
    assert all(isinstance(error, ExpiredError) for error in await asyncio.gather(*waiting, return_exceptions=True))
    await busy
    await scheduler.close()
    assert dispatcher._admission.margin(spec) > Bounds().deadline_margin


async def test_batches_are_no_longer_than_their_deadlines_bear() -> None:
    sizes = []

    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        sizes.append(len(jobs))
        return list(jobs)

    scheduler = Calls(compute, max_batch_size=16)
    scheduler.start()
    estimator = scheduler._dispatcher._forecast._estimator
    for size in (1.0, 16.0):  # as if that many had taken so long
        estimator.observe(("a", True), size, 3.0 * size)
    full = estimator.seconds(("a", True), 16.0)
    assert full is not None
    await scheduler.submit_together([(JobSpec("a", timeout=full / 0.53), job) for job in range(16)])
    assert max(sizes) < 16  # which take more than half of that
    sizes.clear()
    await scheduler.submit_together([(JobSpec("a", timeout=6000), job) for job in range(16)])
    assert sizes == [16]
    await scheduler.close()


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_every_job_gets_exactly_one_answer(seed: int) -> None:
    draw = random.Random(seed)
    tally = Tally()

    def compute(bucket: str, jobs: Sequence[int], pause: Pause) -> list[int | Exception]:
        for _ in range(draw.randrange(4)):
            time.sleep(0.001)
            pause()
        if any(job % 17 == 0 for job in jobs):
            raise ZeroDivisionError
        if len(jobs) > 6:
            raise TooLargeError("memory")
        return [ValueError() if job % 13 == 0 else 2 * job for job in jobs]

    scheduler = Calls(compute, max_batch_size=8, slots=1 + seed % 2, bounds=Bounds(jobs=64), observer=tally)
    scheduler.start()

    async def ask(job: int) -> str:
        await asyncio.sleep(draw.random() * 0.2)
        spec = JobSpec(
            draw.choice("ab"),
            cost=draw.choice((1.0, 1.0, 1.0, 20.0)),
            caller=draw.choice("xyz"),
            timeout=draw.choice((None, 0.01, 0.05, 5.0)),
            rank=draw.choice((-1, 0, 1)),
        )
        try:
            async with asyncio.timeout(draw.choice((None, None, None, 0.02))):
                done = await scheduler.submit(spec, job)
        except (QueueFullError, ExpiredError, TimeoutError) as error:
            return type(error).__name__
        except ZeroDivisionError:
            assert job % 17 == 0
            return "poison"
        except ValueError:
            assert job % 13 == 0
            return "error"
        assert done.answer == 2 * job
        assert 1 <= done.batch_size <= 6
        return "OK"

    async with asyncio.timeout(60):
        outcomes = Counter(await asyncio.gather(*(ask(job) for job in range(1, 600))))
    assert outcomes["OK"] > 3, outcomes
    assert outcomes["poison"] + outcomes["error"], outcomes
    counts = tally.counts
    assert counts["admitted"] + outcomes["QueueFullError"] == 599
    assert counts.get("expired", 0) == outcomes["ExpiredError"]
    assert counts.get("cancelled", 0) == outcomes["TimeoutError"]
    assert scheduler.waiting == 0
    async with asyncio.timeout(10):
        await scheduler.close()
