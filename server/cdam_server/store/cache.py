"""What a store said a moment ago, so that an explanation rarely waits for it, and goes on without it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

import structlog

from cdam_server.store.protocol import (
    ConceptStore,
    Content,
    Registration,
    StoreBusyError,
    StoredConcept,
    StoreError,
    StoreUnavailableError,
    Version,
)

Result = TypeVar("Result")
Key: TypeAlias = tuple[str, str]  # model and name

_NEVER: Final = float("-inf")
_OBJECT_BYTES: Final = 1500  # of a record without its long parts; of an example, a fifth
_log = structlog.get_logger("cdam.store")


class StoreObserver:
    """Told what becomes of calls to a store, in the event loop's thread; does nothing unless a subclass does."""

    def observe_store(self, operation: str, seconds: float, outcome: str) -> None:
        """The database was asked: the operation's name, how long it took, and ``ok`` or the error's class."""

    def observe_store_cache(self, *, hit: bool) -> None:
        """A concept was looked up: whether it was known."""

    def observe_store_up(self, *, up: bool) -> None:
        """The database could be reached, or not, and it was the other way before; at first it counts as up."""


class OtherWriters:
    """Other processes that write to the same store, and say so; there are none unless a subclass has some."""

    def writes(self) -> int:
        """How often they have written so far; what was asked before the last time is not trusted any more."""
        return 0

    def wrote(self) -> None:
        """Tell them that this process has written."""


@dataclass(frozen=True)
class _Asking:
    """A question that the store has not answered yet, when it was put, and how often others had written then."""

    task: asyncio.Task[Any]
    since: float
    writes: int


@dataclass(frozen=True)
class _Known:
    """A version that the store named, when it did, and how often others had written when it was asked."""

    version: Version
    asked: float
    writes: int


class _Lru:
    """What is kept, by kind and key, bounded in bytes; the least recently used goes first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        found = self._items.get(key)
        if found is None:
            return None
        self._items.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: object, size: int) -> None:
        self.remove(key)
        self._items[key] = value, size
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.remove(next(iter(self._items)))

    def remove(self, key: Hashable) -> None:
        _, size = self._items.pop(key, (None, 0))
        self.bytes -= size


class CachedStore(ConceptStore):
    """A store in front of another.

    Content never changes, and is kept. Which version a name or an id stands for is trusted for `fresh_seconds`, then the
    store is asked again; if it takes longer than `patience_seconds` to say, what is kept is served. For so long a name may
    still stand for what another replica has replaced or deleted, and an id for an earlier version of the same content. What
    was not found is not remembered, and what was written through this object is seen at once; so is what others wrote, if they say that
    they did, unless the store takes longer than `patience_seconds` to say what.

    While the database can't be reached, what is kept is served however old it is, and all else raises
    `StoreUnavailableError`, both at once: it is asked in the background, every `retry_seconds`, until it answers. Only what
    writes asks it always.

    Args:
        store: The other.
        fresh_seconds: How long an answer is trusted.
        patience_seconds: How long what is kept and no longer trusted waits for the store to say better.
        retry_seconds: Between two attempts at a database that can't be reached.
        watch_seconds: How often to see whether it can, whoever asks for something; from `open` on.
        max_bytes: About how much memory to use; what has not been used for longest goes first.
        clock: Seconds that only grow.
        observer: Told what becomes of calls.
        others: Processes whose writes are seen at once, too.
    """

    def __init__(
        self,
        store: ConceptStore,
        *,
        fresh_seconds: float = 0.5,
        patience_seconds: float = 0.4,
        retry_seconds: float = 1.0,
        watch_seconds: float = 5.0,
        max_bytes: int = 64 * 2**20,
        clock: Callable[[], float] = time.monotonic,
        observer: StoreObserver | None = None,
        others: OtherWriters | None = None,
    ) -> None:
        self._store = store
        self._fresh_seconds = fresh_seconds
        self._patience_seconds = patience_seconds
        self._retry_seconds = retry_seconds
        self._watch_seconds = watch_seconds
        self._clock = clock
        self._observer = observer or StoreObserver()
        self._others = others or OtherWriters()
        self._kept = _Lru(max_bytes)
        self._asking: dict[Hashable, _Asking] = {}  # whose answers may be shared
        self._tasks: set[asyncio.Task[Any]] = set()  # these, and those that a write has made too old for that
        self._writes = 0
        self._probe: asyncio.Task[None] | None = None  # runs while the database can't be reached
        self._reason = ""  # for which it can't
        self._watching: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def bytes(self) -> int:
        """About how much memory is used."""
        return self._kept.bytes

    async def open(self) -> None:
        """See `ConceptStore.open`."""
        await self._store.open()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """See `ConceptStore.close`."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
            self._tasks.add(self._watching)
        if self._probe is not None:
            self._probe.cancel()
            self._tasks.add(self._probe)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()

    async def register(self, registration: Registration) -> tuple[StoredConcept, bool]:
        """See `ConceptStore.register`."""
        key, others = (registration.model, registration.name), self._others.writes()
        stored, created = await self._write(key, "register", self._store.register(registration))
        self._keep_name(key, stored.version, others)
        self._keep_content(stored.content)
        if created:
            self._keep_id(stored.version, others)
        return stored, created

    async def delete(self, model: str, name: str, expected_version: int | None) -> Version | None:
        """See `ConceptStore.delete`."""
        key = (model, name)
        version = await self._write(key, "delete", self._store.delete(model, name, expected_version))
        self._keep_name(key, None, self._others.writes())
        return version

    async def newest(self, model: str, name: str) -> Version | None:
        """See `ConceptStore.newest`, and above how old the answer may be."""
        key = (model, name)
        known: _Known | None = self._kept.get(("name", key))
        kept = known.version if known is not None else None
        return await self._look_up(("newest", key), known, kept, lambda: self._ask_newest(key))

    async def by_name(self, model: str, name: str) -> StoredConcept | None:
        """See `ConceptStore.by_name`, and above how old the answer may be."""
        key = (model, name)
        known: _Known | None = self._kept.get(("name", key))
        kept = self._with_content(known.version) if known is not None else None
        found = await self._look_up(("name", key), known, kept, lambda: self._ask_by_name(key))
        self._observe_hit(kept, found)
        return found

    async def by_id(self, concept_id: str) -> StoredConcept | None:
        """See `ConceptStore.by_id`, and above how old the version beside the content may be."""
        known: _Known | None = self._kept.get(("id", concept_id))
        kept = self._with_content(known.version) if known is not None else None
        found = await self._look_up(("id", concept_id), known, kept, lambda: self._ask_by_id(concept_id))
        self._observe_hit(kept, found)
        return found

    async def page(self, *, model: str, labels: Mapping[str, str], after: Key | None, limit: int) -> Sequence[Version]:
        """See `ConceptStore.page`; nothing of it is kept."""
        self._refuse_while_down()
        return await self._ask("page", self._store.page(model=model, labels=labels, after=after, limit=limit))

    # --- looking up

    async def _look_up(
        self,
        key: Hashable,
        known: _Known | None,
        kept: Result | None,
        ask: Callable[[], Coroutine[Any, Any, Result | None]],
    ) -> Result | None:
        """What is kept, if it may be trusted or there is no better; else what the store says, asked once for all who wait."""
        if known is not None and kept is not None and (self._probe is not None or self._is_fresh(known)):
            return kept
        self._refuse_while_down()
        asking = self._asking.get(key)
        if asking is None or asking.writes != self._others.writes():
            asking = self._asking[key] = _Asking(asyncio.create_task(ask()), self._clock(), self._others.writes())
            self._tasks.add(asking.task)
            asking.task.add_done_callback(lambda task: self._answered(key, task))
        if kept is None:
            return await asyncio.shield(asking.task)  # others may wait for it, too
        patience = max(0.0, asking.since + self._patience_seconds - self._clock())
        await asyncio.wait({asking.task}, timeout=patience)
        if not asking.task.done() or isinstance(asking.task.exception(), StoreError):
            return kept
        found: Result | None = asking.task.result()
        return found

    def _is_fresh(self, known: _Known) -> bool:
        return known.writes == self._others.writes() and self._clock() - known.asked < self._fresh_seconds

    def _answered(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if (asking := self._asking.get(key)) is not None and asking.task is task:
            del self._asking[key]
        if not task.cancelled():
            task.exception()  # all who waited may have gone

    async def _ask_newest(self, key: Key) -> Version | None:
        writes, others = self._writes, self._others.writes()
        version = await self._ask("newest", self._store.newest(*key))
        if writes == self._writes or self._is_newer(key, version):  # else it may be what was before
            self._keep_name(key, version, others)
        return version

    async def _ask_by_name(self, key: Key) -> StoredConcept | None:
        known: _Known | None = self._kept.get(("name", key))
        if known is not None and self._with_content(known.version) is not None:
            version = await self._ask_newest(key)
            if version is None or (stored := self._with_content(version)) is not None:
                return None if version is None else stored
        writes, others = self._writes, self._others.writes()
        found = await self._ask("by_name", self._store.by_name(*key))
        if found is not None:
            self._keep_content(found.content)
        version = found.version if found is not None else None
        if writes == self._writes or self._is_newer(key, version):
            self._keep_name(key, version, others)
        return found

    async def _ask_by_id(self, concept_id: str) -> StoredConcept | None:
        writes, others = self._writes, self._others.writes()
        found = await self._ask("by_id", self._store.by_id(concept_id))
        if found is not None:
            self._keep_content(found.content)
            if writes == self._writes:
                self._keep_id(found.version, others)
        return found

    async def _write(self, key: Key, operation: str, answer: Awaitable[Result]) -> Result:
        try:
            return await self._ask(operation, answer)
        except BaseException:  # it may have been done all the same, and what is known be too old
            known: _Known | None = self._kept.get(("name", key))
            if known is not None:
                self._keep_name(key, known.version, known.writes, asked=_NEVER)
            raise
        finally:
            self._writes += 1
            self._others.wrote()
            self._asking.clear()

    # --- the database

    async def _ask(self, operation: str, answer: Awaitable[Result]) -> Result:
        started, outcome = time.perf_counter(), "ok"
        try:
            result = await answer
        except StoreUnavailableError as error:
            outcome = type(error).__name__
            if not isinstance(error, StoreBusyError):  # which says nothing about what others ask for
                self._went_down(str(error))
            raise
        except BaseException as error:
            outcome = type(error).__name__
            if isinstance(error, StoreError):
                self._came_up()
            raise
        else:
            self._came_up()
            return result
        finally:
            self._observer.observe_store(operation, time.perf_counter() - started, outcome)

    def _refuse_while_down(self) -> None:
        if self._probe is not None:
            raise StoreUnavailableError(self._reason, self._retry_seconds)

    def _went_down(self, reason: str) -> None:
        self._reason = reason
        if self._probe is None and not self._closed:
            _log.warning("store unavailable", reason=reason)
            self._probe = asyncio.create_task(self._probe_until_up())
            self._observer.observe_store_up(up=False)

    def _came_up(self) -> None:
        if self._probe is not None:
            if self._probe is not asyncio.current_task():
                self._probe.cancel()
            self._probe = None
            _log.info("store available")
            self._observer.observe_store_up(up=True)

    async def _probe_until_up(self) -> None:
        while self._probe is not None:
            await asyncio.sleep(self._retry_seconds)
            with suppress(StoreError):  # of which some say that it is up
                await self._ask("probe", self._store.newest("", ""))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._watch_seconds)
            if self._probe is None:
                with suppress(StoreError):
                    await self._ask("probe", self._store.newest("", ""))

    # --- what is kept

    def _with_content(self, version: Version) -> StoredConcept | None:
        content: Content | None = self._kept.get(("content", version.facts.id))
        return StoredConcept(version, content) if content is not None else None

    def _keep_name(self, key: Key, version: Version | None, others: int, asked: float | None = None) -> None:
        if version is None:
            self._kept.remove(("name", key))
        elif not self._is_older(key, version):  # a name's versions only grow
            self._keep_version(("name", key), version, others, asked)

    def _is_older(self, key: Key, version: Version) -> bool:
        known: _Known | None = self._kept.get(("name", key))
        return known is not None and version.number < known.version.number

    def _is_newer(self, key: Key, version: Version | None) -> bool:
        known: _Known | None = self._kept.get(("name", key))
        return known is not None and version is not None and version.number > known.version.number

    def _keep_id(self, version: Version, others: int) -> None:
        self._keep_version(("id", version.facts.id), version, others)

    def _keep_version(self, key: Hashable, version: Version, others: int, asked: float | None = None) -> None:
        words = [version.description, *version.labels, *version.labels.values()]
        known = _Known(version, self._clock() if asked is None else asked, others)
        self._kept.put(key, known, _OBJECT_BYTES + sum(map(sys.getsizeof, words)))

    def _keep_content(self, content: Content) -> None:
        examples = len(content.examples) + len(content.negatives)
        size = _OBJECT_BYTES + content.vector.nbytes + examples * _OBJECT_BYTES // 5
        self._kept.put(("content", content.facts.id), content, size)

    def _observe_hit(self, kept: StoredConcept | None, found: StoredConcept | None) -> None:
        self._observer.observe_store_cache(hit=kept is not None and found is not None and found.content is kept.content)
