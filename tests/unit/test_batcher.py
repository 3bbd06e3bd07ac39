"""The queue and its batches, with real threads and a compute function that the test can hold back."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from cdam_server.scheduling import Batcher, ClosedError, ExpiredError, QueueFullError


class Gate:
    """A compute function that doubles its jobs, once the gate is open."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[tuple[str, list[int]]] = []

    def __call__(self, bucket: str, jobs: Sequence[int]) -> list[int | Exception]:
        self.batches.append((bucket, list(jobs)))
        self.entered.set()
        assert self.open.wait(10)
        return [2 * job for job in jobs]


async def _entered(gate: Gate) -> None:
    await asyncio.to_thread(gate.entered.wait, 10)


async def test_jobs_that_wait_together_share_a_batch_in_order_of_arrival() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch_size=4)
    batcher.start()
    first = asyncio.create_task(batcher.submit("a", 0))
    await _entered(gate)
    rest = [asyncio.create_task(batcher.submit("a", job)) for job in range(1, 7)]
    await asyncio.sleep(0)
    gate.open.set()
    done = await asyncio.gather(first, *rest)
    assert [item.answer for item in done] == [0, 2, 4, 6, 8, 10, 12]
    assert gate.batches == [("a", [0]), ("a", [1, 2, 3, 4]), ("a", [5, 6])]
    assert [item.batch_size for item in done] == [1, 4, 4, 4, 4, 2, 2]
    await batcher.close()


async def test_buckets_do_not_mix_and_the_oldest_goes_first() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch_size=8)
    batcher.start()
    jobs = [("a", 0), ("b", 1), ("a", 2), ("b", 3)]
    hold = asyncio.create_task(batcher.submit("x", 9))
    await _entered(gate)
    tasks = [asyncio.create_task(batcher.submit(bucket, job)) for bucket, job in jobs]
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.gather(hold, *tasks)
    assert gate.batches[1:] == [("a", [0, 2]), ("b", [1, 3])]
    await batcher.close()


async def test_an_idle_thread_waits_for_company_until_the_batch_is_full() -> None:
    gate = Gate()
    gate.open.set()
    batcher = Batcher(gate, max_batch_size=3, max_queue_delay=30.0)
    batcher.start()
    async with asyncio.timeout(10):
        await asyncio.gather(*(batcher.submit("a", job) for job in range(3)))
    assert gate.batches == [("a", [0, 1, 2])]
    await batcher.close()


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch_size=1, max_pending=2)
    batcher.start()
    admitted = [asyncio.create_task(batcher.submit("a", 0))]
    await _entered(gate)
    admitted += [asyncio.create_task(batcher.submit("a", job)) for job in (1, 2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError) as refused:
        await batcher.submit("a", 3)
    assert refused.value.retry_after > 0
    gate.open.set()
    assert [item.answer for item in await asyncio.gather(*admitted)] == [0, 2, 4]
    await batcher.close()


async def test_cancelled_and_expired_jobs_are_never_computed() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch_size=4)
    batcher.start()
    first = asyncio.create_task(batcher.submit("a", 0))
    await _entered(gate)
    cancelled = asyncio.create_task(batcher.submit("a", 1))
    expired = asyncio.create_task(batcher.submit("a", 2, timeout=0.01))
    kept = asyncio.create_task(batcher.submit("a", 3, timeout=60))
    await asyncio.sleep(0.05)
    cancelled.cancel()
    await asyncio.sleep(0)
    assert batcher.pending == 2
    gate.open.set()
    assert (await kept).answer == 6
    await first
    with pytest.raises(ExpiredError):
        await expired
    assert gate.batches == [("a", [0]), ("a", [3])]
    await batcher.close()


async def test_a_job_cancelled_while_it_computes_leaves_the_others_alone() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch_size=2, max_queue_delay=30.0)
    batcher.start()
    leaves = asyncio.create_task(batcher.submit("a", 1))
    stays = asyncio.create_task(batcher.submit("a", 2))
    await _entered(gate)
    leaves.cancel()
    gate.open.set()
    assert (await stays).answer == 4
    await batcher.close()


async def test_only_the_culprit_of_a_failed_batch_fails() -> None:
    def compute(bucket: str, jobs: Sequence[int]) -> list[int | Exception]:
        if 2 in jobs:
            raise ZeroDivisionError
        return [ValueError("three") if job == 3 else 2 * job for job in jobs]

    batcher = Batcher(compute, max_batch_size=4, max_queue_delay=30.0)
    batcher.start()
    answers = await asyncio.gather(*(batcher.submit("a", job) for job in range(1, 5)), return_exceptions=True)
    assert answers[0].answer == 2
    assert isinstance(answers[1], ZeroDivisionError)
    assert isinstance(answers[2], ValueError)
    assert answers[3].answer == 8
    assert batcher.alive
    await batcher.close()


async def test_a_compute_function_that_answers_too_little_is_an_error_for_everyone() -> None:
    batcher = Batcher(lambda bucket, jobs: [], max_batch_size=2, max_queue_delay=30.0)
    batcher.start()
    answers = await asyncio.gather(batcher.submit("a", 1), batcher.submit("a", 2), return_exceptions=True)
    assert [type(answer) for answer in answers] == [RuntimeError, RuntimeError]
    await batcher.close()


async def test_closing_answers_all_that_were_let_in_and_no_more() -> None:
    threads = set(threading.enumerate())
    gate = Gate()
    batcher = Batcher(gate, max_batch_size=1)
    batcher.start()
    tasks = [asyncio.create_task(batcher.submit("a", job)) for job in range(3)]
    await _entered(gate)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    with pytest.raises(ClosedError):
        await batcher.submit("a", 9)
    gate.open.set()
    assert [item.answer for item in await asyncio.gather(*tasks)] == [0, 2, 4]
    await closing
    left = set(threading.enumerate()) - threads
    assert not [thread for thread in left if thread.name.startswith("compute")]


async def test_jobs_of_lower_rank_go_first() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch_size=2)
    batcher.start()
    hold = asyncio.create_task(batcher.submit("a", 0))
    await _entered(gate)
    tasks = [
        asyncio.create_task(batcher.submit("a", job, rank=rank)) for job, rank in ((1, 1), (2, 0), (3, 0), (4, -1))
    ]
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.gather(hold, *tasks)
    assert gate.batches == [("a", [0]), ("a", [4, 2]), ("a", [3, 1])]
    await batcher.close()
