"""Concepts in a PostgreSQL database; needs the extra `postgres`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import psycopg
import structlog
from psycopg import errors

from cdam_server.store import operations
from cdam_server.store.migrations import migrations
from cdam_server.store.operations import Operation
from cdam_server.store.postgres_connections import Connection, Connections
from cdam_server.store.protocol import (
    ConceptStore,
    Registration,
    StoreBusyError,
    StoredConcept,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnusableError,
    Version,
)

Result = TypeVar("Result")
Line: TypeAlias = asyncio.Lock | asyncio.Semaphore

_log = structlog.get_logger("cdam.store")

_READ_SECONDS: Final = 2.5
_WRITE_SECONDS: Final = 5.0
_LINE_SECONDS: Final = 2.0  # of these, how long to wait for a turn
_CLOSE_SECONDS: Final = 2.0  # that what is being done may still take
_TRIES: Final = 5  # of a transaction that lost a race
_FULL_HINT: Final = "Check free disk space."  # also where a quota is used up, which has no code
_UNUSABLE: Final = (  # errors, and what to do about them
    (errors.InsufficientPrivilege, "The user needs CREATE on the database, or on a schema `cdam` made for it."),
    (
        (errors.UndefinedTable, errors.InvalidSchemaName, errors.UndefinedColumn),
        "Restore the schema `cdam` from a backup.",
    ),
    ((errors.DataCorrupted, errors.IndexCorrupted), "Restore the database from a backup."),
)
_LOCK: Final = 0x6364616D  # "cdam": the advisory lock under which migrations are applied


@dataclass(frozen=True)
class _Kind:
    """Of transactions.

    Attributes:
        begin: What begins one. The server keeps to limits of its own, a little closer: it knows nothing of ours.
        seconds: How long one may take.
        writes: Whether it is of those that write.
    """

    begin: str
    seconds: float
    writes: bool


# Whatever the database's defaults: operations lock what they change, and read again after that.
_READ: Final = _Kind(
    "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; SET LOCAL statement_timeout = '2s'", _READ_SECONDS, writes=False
)
_WRITE: Final = _Kind(
    "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = '4s'; SET LOCAL lock_timeout = '1s';"
    # Whoever has switched it off for the database has other data in mind.
    " SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'",
    _WRITE_SECONDS,
    writes=True,
)


class PostgresStore(ConceptStore):
    """Tables in a schema `cdam`, which is made at the first opportunity. Nothing is kept in a session, as PgBouncer wants it;
    behind one it has not been tried.

    A server that can't be reached is asked again at every operation, and used as soon as it is back.

    Args:
        url: ``postgresql://USER:PASSWORD@HOST:PORT/DATABASE``, or whatever else libpq understands. Never logged.
        max_connections: Connections at once.

    Raises:
        StoreUnusableError: The URL is none.
    """

    def __init__(self, url: str, *, max_connections: int = 4) -> None:
        self._connections = Connections(url)
        self._where = self._connections.where
        self._places = asyncio.Semaphore(max_connections)
        self._writing = asyncio.Semaphore(max(1, max_connections // 2))  # the other half is for those who read
        self._names: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._preparing: asyncio.Task[None] | None = None
        self._ready = False
        self._closed = False

    async def open(self) -> None:
        """See `ConceptStore.open`."""
        try:
            await self._prepare()
        except StoreUnavailableError as error:
            _log.warning("store unavailable", store=self._where, reason=str(error))

    async def close(self) -> None:
        """See `ConceptStore.close`; what hangs is cut off."""
        self._closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
        self._connections.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def register(self, registration: Registration) -> tuple[StoredConcept, bool]:
        """See `ConceptStore.register`."""
        key = (registration.model, registration.name)
        return await self._write(key, lambda: operations.register(registration))

    async def newest(self, model: str, name: str) -> Version | None:
        """See `ConceptStore.newest`."""
        return await self._read(lambda: operations.newest(model, name))

    async def by_name(self, model: str, name: str) -> StoredConcept | None:
        """See `ConceptStore.by_name`."""
        return await self._read(lambda: operations.by_name(model, name))

    async def by_id(self, concept_id: str) -> StoredConcept | None:
        """See `ConceptStore.by_id`."""
        return await self._read(lambda: operations.by_id(concept_id))

    async def page(
        self, *, model: str, labels: Mapping[str, str], after: tuple[str, str] | None, limit: int
    ) -> Sequence[Version]:
        """See `ConceptStore.page`."""
        return await self._read(lambda: operations.page(model, labels, after, limit))

    async def delete(self, model: str, name: str, expected_version: int | None) -> Version | None:
        """See `ConceptStore.delete`."""
        return await self._write((model, name), lambda: operations.delete(model, name, expected_version))

    async def _read(self, operation: Callable[[], Operation[Result]]) -> Result:
        return await self._run(_READ, operation)

    async def _write(self, key: tuple[str, str], operation: Callable[[], Operation[Result]]) -> Result:
        # Who writes a name that another server has locked waits with one connection, and those behind with none.
        line = self._names.setdefault(key, asyncio.Lock())
        return await self._run(_WRITE, operation, line, self._writing)

    async def _run(self, kind: _Kind, operation: Callable[[], Operation[Result]], *lines: Line) -> Result:
        """Run a transaction, once it is its turn in all these lines; who stops waiting then does not stop it."""
        await self._prepare()
        until = asyncio.get_running_loop().time() + kind.seconds + self._connections.extra_seconds
        async with AsyncExitStack() as turns:
            try:
                async with asyncio.timeout(_LINE_SECONDS):
                    for line in (*lines, self._places):
                        await turns.enter_async_context(line)
            except TimeoutError:
                raise StoreBusyError(f"{self._where}: too many wait for it") from None
            task = self._start(self._transact(turns.pop_all(), kind, operation, until))
        return await asyncio.shield(task)

    async def _transact(
        self, turns: AsyncExitStack, kind: _Kind, operation: Callable[[], Operation[Result]], until: float
    ) -> Result:
        async with turns:
            for _ in range(_TRIES):
                begun = False
                try:
                    async with self._connections.begun(kind.begin, until) as connection:
                        begun = True
                        return await _transaction(connection, operation())
                except (psycopg.Error, TimeoutError) as error:
                    found = self._meaning(error, wrote=begun and kind.writes)
                    if not isinstance(found, _LostRaceError):
                        raise found from error
            raise found

    def _start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Have it done in a task of its own, which may outlive who waits for it.

        Raises:
            StoreBusyError: The store has been closed.
        """
        if self._closed:
            work.close()
            raise StoreBusyError(f"{self._where}: closed")
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # all who waited may have gone

    async def _prepare(self) -> None:
        """Bring the schema up to date, once.

        Raises:
            StoreUnavailableError: The server can't be reached.
            StoreUnusableError: The database is not for us.
        """
        if self._ready:
            return
        if self._preparing is None or self._preparing.done():
            self._preparing = self._start(self._bring_up_to_date())
        await asyncio.shield(self._preparing)

    async def _bring_up_to_date(self) -> None:
        until = asyncio.get_running_loop().time() + _WRITE_SECONDS + self._connections.extra_seconds
        try:
            async with self._connections.new(until) as connection:
                await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
                await _migrate(connection, self._where)
        except (psycopg.Error, TimeoutError) as error:
            raise self._meaning(error) from error
        self._ready = True
        _log.info("store ready", store=self._where)

    def _meaning(self, error: Exception, *, wrote: bool = False) -> StoreError:
        """What an error of psycopg's means, if need be of one that came while writing."""
        where, reason = self._where, _first_line(error)
        for kinds, advice in _UNUSABLE:
            if isinstance(error, kinds):
                return StoreUnusableError(f"{where}: {reason}. {advice}")
        match error:
            case errors.SerializationFailure() | errors.DeadlockDetected() | errors.UniqueViolation():
                return _LostRaceError(f"{where}: {reason}")
            case psycopg.Error() if isinstance(error, errors.DiskFull) or error.diag.message_hint == _FULL_HINT:
                return StoreFullError(f"{where} has no space left: {reason}")
            case errors.QueryCanceled() | errors.LockNotAvailable() | errors.ReadOnlySqlTransaction():
                return StoreBusyError(f"{where}: {reason}")  # read-only as a standby is, until it is promoted
            case (
                psycopg.OperationalError()
                | psycopg.InterfaceError()
                | TimeoutError()
                | errors.InFailedSqlTransaction()
                | psycopg.InternalError()
            ):
                if wrote and (isinstance(error, TimeoutError) or error.sqlstate):
                    return StoreBusyError(f"{where} can't be written: {reason}")
                return StoreUnavailableError(f"{where} can't be reached: {reason}")
            case _:
                raise error


class _LostRaceError(StoreBusyError):
    """Another transaction came first; to be tried again."""


async def _transaction(connection: Connection, operation: Operation[Result]) -> Result:
    """Run an operation in a transaction that has begun, and end that."""
    try:
        result = await _run(connection, operation)
    except StoreError:
        await connection.execute("ROLLBACK")
        raise
    await connection.execute("COMMIT")
    return result


async def _run(connection: Connection, operation: Operation[Result]) -> Result:
    try:
        statement = next(operation)
        while True:
            cursor = await connection.execute(_spelled(statement.sql), statement.parameters)
            rows = await cursor.fetchall() if cursor.description else []
            statement = operation.send(rows)
    except StopIteration as end:
        result: Result = end.value
        return result


@cache
def _spelled(sql: str) -> bytes:
    """A statement of `queries` with psycopg's spelling of parameters."""
    return re.sub(r":(\w+)", r"%(\1)s", sql).encode()


async def _migrate(connection: Connection, where: str) -> None:
    """Apply the missing migrations; whoever comes first does it, and others wait."""
    steps = migrations("postgres")
    while (found := await _schema_version(connection, where)) < len(steps):
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
            if await _schema_version(connection, where) != found:
                continue
            if found == 0:
                await connection.execute("CREATE SCHEMA IF NOT EXISTS cdam")
                await connection.execute(
                    "CREATE TABLE cdam.migrations (number BIGINT PRIMARY KEY, applied TIMESTAMPTZ)"
                )
            await connection.execute(steps[found].sql.encode())
            await connection.execute("INSERT INTO cdam.migrations VALUES (%s, now())", [steps[found].number])
    if found > len(steps):
        raise StoreUnusableError(
            f"{where} has schema version {found}, and this program knows none above {len(steps)}: "
            "run the version that wrote it, or a later one"
        )


async def _schema_version(connection: Connection, where: str) -> int:
    # By the catalogue: what to_regclass says may be older than the lock.
    cursor = await connection.execute(
        "SELECT current_setting('server_encoding') AS encoding, EXISTS ("
        "SELECT FROM pg_catalog.pg_tables WHERE schemaname = 'cdam' AND tablename = 'migrations') AS made"
    )
    row = await cursor.fetchone()
    assert row is not None
    if row["encoding"] != "UTF8":
        raise StoreUnusableError(f"{where} has the encoding {row['encoding']}: make a database with UTF8")
    if not row["made"]:
        return 0
    cursor = await connection.execute("SELECT coalesce(max(number), 0) AS number FROM cdam.migrations")
    row = await cursor.fetchone()
    assert row is not None
    number: int = row["number"]
    return number


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
