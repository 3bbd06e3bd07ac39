"""What `CachedStore` says of its age, of failures and of memory, in front of a real store that can be cut off."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import structlog

from cdam_server.store import (
    ConceptStore,
    NameTakenError,
    Registration,
    StoreBusyError,
    StoredConcept,
    StoreError,
    StoreUnavailableError,
    StoreUnusableError,
    Version,
)
from cdam_server.store.cache import CachedStore, StoreObserver
from cdam_server.store.sqlite import SqliteStore
from contract.backends import content, registration, same, until

Result = TypeVar("Result")


class Wire(ConceptStore):
    """A store's calls, counted, and stopped on demand.

    Attributes:
        calls: How often each operation has been asked.
        failure: What is raised in place of an answer.
        opened: Answers wait until it is set, after the store has given them.
    """

    def __init__(self, store: ConceptStore) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()
        self.failure: StoreError | None = None
        self.opened = asyncio.Event()
        self.opened.set()

    async def open(self) -> None:
        await self._store.open()

    async def close(self) -> None:
        await self._store.close()

    async def register(self, registration: Registration) -> tuple[StoredConcept, bool]:
        return await self._pass("register", self._store.register(registration))

    async def newest(self, model: str, name: str) -> Version | None:
        return await self._pass("newest" if name else "probe", self._store.newest(model, name))

    async def by_name(self, model: str, name: str) -> StoredConcept | None:
        return await self._pass("by_name", self._store.by_name(model, name))

    async def by_id(self, concept_id: str) -> StoredConcept | None:
        return await self._pass("by_id", self._store.by_id(concept_id))

    async def page(
        self, *, model: str, labels: Mapping[str, str], after: tuple[str, str] | None, limit: int
    ) -> Sequence[Version]:
        return await self._pass("page", self._store.page(model=model, labels=labels, after=after, limit=limit))

    async def delete(self, model: str, name: str, expected_version: int | None) -> Version | None:
        return await self._pass("delete", self._store.delete(model, name, expected_version))

    async def _pass(self, operation: str, answer: Awaitable[Result]) -> Result:
        self.calls[operation] += 1
        result = await answer
        await self.opened.wait()
        if self.failure is not None:
            raise self.failure
        return result


class Told(StoreObserver):
    """Everything that an observer is told."""

    def __init__(self) -> None:
        self.operations: list[tuple[str, str]] = []
        self.hits: list[bool] = []
        self.up: list[bool] = []

    def observe_store(self, operation: str, seconds: float, outcome: str) -> None:
        assert seconds >= 0
        self.operations.append((operation, outcome))

    def observe_store_cache(self, *, hit: bool) -> None:
        self.hits.append(hit)

    def observe_store_up(self, *, up: bool) -> None:
        self.up.append(up)


class Bench:
    """A cached store, a wire to the store behind it, and a second replica's way to that.

    Attributes:
        now: What the cached store takes for the time.
    """

    def __init__(self, folder: Path, **options: float) -> None:
        self.now = 1000.0
        self.told = Told()
        self.replica = SqliteStore(folder)
        self.wire = Wire(SqliteStore(folder))
        self.store = CachedStore(self.wire, clock=lambda: self.now, observer=self.told, retry_seconds=0.02, **options)

    async def close(self) -> None:
        await self.store.close()
        await self.replica.close()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.store.open()
    yield bench
    await bench.close()


async def test_what_is_known_is_not_asked_for_again_while_it_is_fresh(bench: Bench) -> None:
    await bench.replica.register(registration())
    concept_id = content(1).facts.id
    for _ in range(5):
        assert await bench.store.by_name("vit", "zebra") is not None
        assert await bench.store.newest("vit", "zebra") is not None
        assert await bench.store.by_id(concept_id) is not None
    assert bench.wire.calls == {"by_name": 1, "by_id": 1}
    assert bench.told.hits == [False, False, *[True] * 8]
    assert bench.told.operations == [("by_name", "ok"), ("by_id", "ok")]


async def test_after_half_a_second_the_newest_version_is_asked_for_and_no_vector(bench: Bench) -> None:
    await bench.store.register(registration())
    for _ in range(3):
        bench.now += 0.5
        found = await bench.store.by_name("vit", "zebra")
        assert found is not None
        assert same(found.content, content(1))
    assert bench.wire.calls == {"register": 1, "newest": 3}
    assert bench.told.hits == [True] * 3


async def test_what_another_replica_did_shows_after_half_a_second(bench: Bench) -> None:
    await bench.store.register(registration())
    await bench.replica.register(registration(seed=2, replace=True))
    await bench.replica.register(registration("horse"))
    bench.now += 0.5
    found = await bench.store.by_name("vit", "zebra")
    assert found is not None
    assert found.version.number == 2
    assert same(found.content, content(2))
    found = await bench.store.by_id(content(1).facts.id)
    assert found is not None
    assert found.version.name == "horse"
    await bench.replica.delete("vit", "zebra", None)
    bench.now += 0.5
    assert await bench.store.by_name("vit", "zebra") is None
    assert await bench.store.newest("vit", "zebra") is None


async def test_what_was_not_found_is_asked_for_each_time(bench: Bench) -> None:
    assert await bench.store.by_name("vit", "zebra") is None
    assert await bench.store.by_id(content(1).facts.id) is None
    await bench.replica.register(registration())
    assert await bench.store.by_name("vit", "zebra") is not None
    assert await bench.store.by_id(content(1).facts.id) is not None


async def test_its_own_writes_show_at_once(bench: Bench) -> None:
    for number in range(1, 5):
        stored, _ = await bench.store.register(registration(seed=number, replace=True))
        assert await bench.store.newest("vit", "zebra") == stored.version
        found = await bench.store.by_name("vit", "zebra")
        assert found is not None
        assert found.version == stored.version
    await bench.store.delete("vit", "zebra", None)
    assert await bench.store.newest("vit", "zebra") is None
    assert await bench.store.by_name("vit", "zebra") is None
    stored, _ = await bench.store.register(registration("horse", 4))
    found = await bench.store.by_id(stored.content.facts.id)
    assert found is not None
    assert found.version == stored.version


async def test_an_answer_from_before_a_write_is_not_kept(bench: Bench) -> None:
    await bench.replica.register(registration())
    bench.wire.opened.clear()
    early = [
        asyncio.create_task(bench.store.by_name("vit", "zebra")),
        asyncio.create_task(bench.store.by_id(content(1).facts.id)),
    ]
    await until(lambda: bench.wire.calls.total() == 2)
    await asyncio.sleep(0.05)  # the store has answered; the answers are on their way
    writing = asyncio.create_task(bench.store.register(registration(description="new", replace=True)))
    await asyncio.sleep(0.05)
    bench.wire.opened.set()
    await writing
    await asyncio.gather(*early)
    for found in (await bench.store.by_name("vit", "zebra"), await bench.store.by_id(content(1).facts.id)):
        assert found is not None
        assert found.version.number == 2


async def test_many_who_look_for_one_thing_share_a_query(bench: Bench) -> None:
    await bench.replica.register(registration())
    looking = [asyncio.create_task(bench.store.by_name("vit", "zebra")) for _ in range(20)]
    await asyncio.sleep(0)
    looking[0].cancel()  # who asked leaves; the others are answered all the same
    found = await asyncio.gather(*looking, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert all(isinstance(item, StoredConcept) for item in found[1:])
    assert bench.wire.calls == {"by_name": 1}


async def test_a_store_that_hangs_delays_what_is_known_once_and_no_more_than_patience_bears(bench: Bench) -> None:
    await bench.store.register(registration())
    bench.now += 1
    bench.wire.opened.clear()
    for _ in range(3):
        found = await asyncio.wait_for(bench.store.by_name("vit", "zebra"), 10)
        assert found is not None
        assert found.version.number == 1
        bench.now += 1
    assert bench.wire.calls["newest"] == 1
    unknown = asyncio.create_task(bench.store.by_name("vit", "horse"))
    await asyncio.sleep(0.05)
    assert not unknown.done()
    await bench.replica.register(registration(seed=2, replace=True))
    bench.wire.opened.set()
    assert await unknown is None
    found = await bench.store.by_name("vit", "zebra")
    while found is not None and found.version.number == 1:  # the answer from before the new version may come in first
        bench.now += 1
        found = await bench.store.by_name("vit", "zebra")
    assert found is not None


@pytest.mark.parametrize("how", ["newest", "by_name", "by_id"])
async def test_while_a_store_hangs_what_is_kept_is_served(bench: Bench, how: str) -> None:
    stored, _ = await bench.store.register(registration())
    look = {
        "newest": lambda: bench.store.newest("vit", "zebra"),
        "by_name": lambda: bench.store.by_name("vit", "zebra"),
        "by_id": lambda: bench.store.by_id(stored.content.facts.id),
    }[how]
    bench.now += 1
    bench.wire.opened.clear()
    async with asyncio.timeout(10):
        found = await look()
    assert (found if how == "newest" else found.version) == stored.version
    bench.wire.opened.set()


async def test_a_store_that_is_busy_is_not_away(bench: Bench) -> None:
    await bench.store.register(registration())
    await bench.replica.register(registration("horse", 2))
    bench.wire.failure = StoreBusyError("locked")
    for refused in (
        bench.store.register(registration("ass", 3)),
        bench.store.delete("vit", "zebra", None),
        bench.store.by_name("vit", "horse"),
    ):
        with pytest.raises(StoreBusyError, match="locked"):
            await refused
    bench.now += 1
    assert await bench.store.by_name("vit", "zebra") is not None  # kept, and served for want of better
    bench.wire.failure = None
    assert await bench.store.by_name("vit", "horse") is not None
    assert bench.told.up == []
    assert bench.wire.calls["probe"] == 0


async def test_a_store_that_is_busy_is_not_back_either(bench: Bench) -> None:
    bench.wire.failure = StoreUnavailableError("away")
    with pytest.raises(StoreUnavailableError):
        await bench.store.by_name("vit", "zebra")
    bench.wire.failure = StoreBusyError("too many wait for it")
    with pytest.raises(StoreBusyError):
        await bench.store.register(registration())
    with pytest.raises(StoreUnavailableError, match="away"):
        await bench.store.by_name("vit", "zebra")
    assert bench.told.up == [False]


async def test_while_the_database_is_away_what_is_known_is_served_and_all_else_refused(bench: Bench) -> None:
    await bench.store.register(registration())
    await bench.replica.register(registration("horse", 2))
    concept_id = content(1).facts.id
    bench.wire.failure = StoreUnavailableError("away")
    bench.now += 1_000_000
    for _ in range(3):
        found = await bench.store.by_name("vit", "zebra")
        assert found is not None
        assert same(found.content, content(1))
        assert await bench.store.newest("vit", "zebra") == found.version
        assert await bench.store.by_id(concept_id) is not None
        for refused in (
            bench.store.by_name("vit", "horse"),
            bench.store.newest("vit", "horse"),
            bench.store.by_id(content(2).facts.id),
            bench.store.page(model="", labels={}, after=None, limit=1),
        ):
            with pytest.raises(StoreUnavailableError, match="away"):
                await refused
    assert bench.wire.calls["newest"] == 1  # by which it was noticed
    assert bench.wire.calls["by_name"] == bench.wire.calls["by_id"] == bench.wire.calls["page"] == 0
    with pytest.raises(StoreUnavailableError):
        await bench.store.register(registration("ass", 3))
    assert bench.wire.calls["register"] == 2
    assert bench.told.up == [False]


async def test_it_notices_by_itself_that_the_database_is_back(bench: Bench) -> None:
    await bench.replica.register(registration())
    bench.wire.failure = StoreUnavailableError("away")
    with pytest.raises(StoreUnavailableError):
        await bench.store.by_name("vit", "zebra")
    await until(lambda: bench.wire.calls["probe"] >= 3)
    assert bench.told.up == [False]
    bench.wire.failure = None
    await until(lambda: bench.told.up == [False, True])
    assert bench.told.up == [False, True]
    assert await bench.store.by_name("vit", "zebra") is not None
    probes = bench.wire.calls["probe"]
    await asyncio.sleep(0.1)
    assert bench.wire.calls["probe"] == probes


async def test_that_the_database_is_away_is_noticed_and_logged_though_nobody_asks(tmp_path: Path) -> None:
    bench = Bench(tmp_path, watch_seconds=0.02)
    with structlog.testing.capture_logs() as logs:
        await bench.store.open()
        await bench.store.register(registration())
        bench.wire.failure = StoreUnavailableError("the cable is cut")
        await until(lambda: bench.told.up == [False])
        bench.wire.failure = None
        await until(lambda: bench.told.up == [False, True])
    assert [line["event"] for line in logs if line["event"].startswith("store")] == [
        "store unavailable",
        "store available",
    ]
    assert logs[0]["reason"] == "the cable is cut"
    await bench.close()


async def test_a_name_never_goes_back_to_an_older_version(bench: Bench) -> None:
    """A write of one's own must not hide what was seen of another replica's later one."""
    await bench.store.register(registration())
    bench.now += 1
    bench.wire.opened.clear()
    writing = asyncio.create_task(bench.store.register(registration(seed=2, replace=True)))
    await until(lambda: bench.wire.calls["register"] == 2)
    await asyncio.sleep(0.05)  # it is stored; the answer is on its way
    stored, _ = await bench.replica.register(registration(seed=3, replace=True))
    bench.wire.opened.set()
    seen = await bench.store.by_name("vit", "zebra")
    await writing
    after = await bench.store.by_name("vit", "zebra")
    assert seen is not None
    assert after is not None
    assert seen.version.number <= after.version.number
    bench.now += 1
    newest = await bench.store.newest("vit", "zebra")
    assert newest is not None
    assert newest.number == stored.version.number == 3


async def test_a_write_that_gets_through_ends_the_failure(bench: Bench) -> None:
    bench.wire.failure = StoreUnavailableError("away")
    with pytest.raises(StoreUnavailableError):
        await bench.store.by_name("vit", "zebra")
    bench.wire.failure = None
    await bench.store.register(registration())
    assert bench.told.up == [False, True]
    assert await bench.store.page(model="", labels={}, after=None, limit=1)


async def test_after_a_write_of_unknown_outcome_the_database_is_asked(bench: Bench) -> None:
    await bench.store.register(registration())
    bench.wire.failure = StoreUnavailableError("the answer is lost")
    with pytest.raises(StoreUnavailableError):
        await bench.store.register(registration(seed=2, replace=True))
    bench.wire.failure = None
    await until(lambda: bench.told.up == [False, True])
    found = await bench.store.by_name("vit", "zebra")
    assert found is not None
    assert found.version.number == 2


async def test_a_refusal_is_no_failure(bench: Bench) -> None:
    await bench.store.register(registration())
    with pytest.raises(NameTakenError):
        await bench.store.register(registration(seed=2))
    assert bench.told.up == []
    assert bench.told.operations == [("register", "ok"), ("register", "NameTakenError")]


async def test_what_is_known_is_served_although_the_database_is_damaged(bench: Bench) -> None:
    await bench.store.register(registration())
    bench.wire.failure = StoreUnusableError("damaged")
    bench.now += 1
    assert await bench.store.by_name("vit", "zebra") is not None
    with pytest.raises(StoreUnusableError):
        await bench.store.by_name("vit", "horse")


async def test_memory_is_bounded_and_what_was_used_last_stays(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_bytes=100_000)
    for number in range(100):
        await bench.store.register(registration(f"name{number}", number))
        await bench.store.by_name("vit", "name0")
        assert bench.store.bytes <= 100_000
    bench.wire.calls.clear()
    await bench.store.by_name("vit", "name0")
    await bench.store.by_name("vit", "name99")
    assert not bench.wire.calls
    found = await bench.store.by_name("vit", "name1")
    assert bench.wire.calls == {"by_name": 1}
    assert found is not None
    assert same(found.content, content(1))
    await bench.close()


async def test_nothing_is_kept_without_memory_and_all_works(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_bytes=0)
    await bench.store.register(registration())
    for _ in range(2):
        assert await bench.store.by_name("vit", "zebra") is not None
        assert await bench.store.by_id(content(1).facts.id) is not None
    assert bench.wire.calls == {"register": 1, "by_name": 2, "by_id": 2}
    await bench.close()
