"""Concepts in a PostgreSQL database; needs the extra `postgres`."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, Final, TypeAlias, TypeVar

import psycopg
import psycopg_pool
import structlog
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row

from cdam_server.store import operations
from cdam_server.store.migrations import migrations
from cdam_server.store.operations import Operation
from cdam_server.store.protocol import (
    ConceptStore,
    Registration,
    StoredConcept,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnusableError,
    Version,
)

Result = TypeVar("Result")
Connection: TypeAlias = psycopg.AsyncConnection[DictRow]

_log = structlog.get_logger("cdam.store")

_CONNECT_SECONDS: Final = 2  # the least that libpq waits
_POOL_SECONDS: Final = 2.0
_OPERATION_SECONDS: Final = 5.0
_TRIES: Final = 5  # of a transaction that lost a race
_FULL_HINT: Final = "Check free disk space."  # also where a quota is used up, which has no code
_LOCK: Final = 0x6364616D  # "cdam": the advisory lock under which migrations are applied

# How soon the kernel gives up a peer that is gone; what the URL says goes before.
_NETWORK: Final = {
    "connect_timeout": str(_CONNECT_SECONDS),
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "application_name": "cdam",
}


class PostgresStore(ConceptStore):
    """Tables in a schema `cdam`, which is made at the first opportunity. Works behind PgBouncer, too.

    A server that can't be reached is asked again at every operation, and used as soon as it is back.

    Args:
        url: ``postgresql://USER:PASSWORD@HOST:PORT/DATABASE``, or whatever else libpq understands. Never logged.
        max_connections: Connections at once.

    Raises:
        StoreUnusableError: The URL is none.
    """

    def __init__(self, url: str, *, max_connections: int = 4) -> None:
        try:
            parameters = conninfo_to_dict(url)
        except psycopg.ProgrammingError:  # its message holds the URL
            raise StoreUnusableError(
                "the URL of the store is not valid: postgresql://USER:PASSWORD@HOST:PORT/DATABASE is expected"
            ) from None
        self._where = _where(parameters)
        self._options: dict[str, Any] = {
            **_NETWORK,
            **parameters,
            "client_encoding": "utf8",
            "autocommit": True,
            "prepare_threshold": None,  # PgBouncer gives every transaction another connection
            "row_factory": dict_row,
        }
        self._pool = psycopg_pool.AsyncConnectionPool[Connection](
            kwargs=self._options,
            min_size=0,
            max_size=max_connections,
            open=False,
            timeout=_POOL_SECONDS,
            check=psycopg_pool.AsyncConnectionPool.check_connection,
            configure=_configure,
            name="concepts",
        )
        self._preparing = asyncio.Lock()
        self._ready = False

        # It tells of every attempt to connect; what matters comes as an error of the operation that wanted one.
        logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)

    async def open(self) -> None:
        """See `ConceptStore.open`."""
        try:
            await self._prepare()
        except StoreUnavailableError as error:
            _log.warning("store unavailable", store=self._where, reason=str(error))

    async def close(self) -> None:
        """See `ConceptStore.close`."""
        await self._pool.close()

    async def register(self, registration: Registration) -> tuple[StoredConcept, bool]:
        """See `ConceptStore.register`."""
        return await self._write(lambda: operations.register(registration))

    async def newest(self, model: str, name: str) -> Version | None:
        """See `ConceptStore.newest`."""
        return await self._read(operations.newest(model, name))

    async def by_name(self, model: str, name: str) -> StoredConcept | None:
        """See `ConceptStore.by_name`."""
        return await self._read(operations.by_name(model, name))

    async def by_id(self, concept_id: str) -> StoredConcept | None:
        """See `ConceptStore.by_id`."""
        return await self._read(operations.by_id(concept_id))

    async def page(
        self, *, model: str, labels: Mapping[str, str], after: tuple[str, str] | None, limit: int
    ) -> Sequence[Version]:
        """See `ConceptStore.page`."""
        return await self._read(operations.page(model, labels, after, limit))

    async def delete(self, model: str, name: str, expected_version: int | None) -> Version | None:
        """See `ConceptStore.delete`."""
        return await self._write(lambda: operations.delete(model, name, expected_version))

    async def _read(self, operation: Operation[Result]) -> Result:
        """Run an operation of one statement, which is a transaction by itself."""
        async with self._connection() as connection:
            return await _run(connection, operation)

    async def _write(self, operation: Callable[[], Operation[Result]]) -> Result:
        lost = 0
        while True:
            try:
                async with self._connection() as connection, connection.transaction():
                    # Whoever has switched it off for the database has other data in mind.
                    await connection.execute(
                        "SELECT set_config('synchronous_commit', 'on', true)"
                        " WHERE current_setting('synchronous_commit') = 'off'"
                    )
                    return await _run(connection, operation())
            except _LostRaceError:
                lost += 1
                if lost == _TRIES:
                    raise

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """A connection to a database that is up to date; raises what its errors mean."""
        await self._prepare()
        with_time = asyncio.timeout(_OPERATION_SECONDS)
        try:
            async with with_time, self._pool.connection() as connection:
                yield connection
        except (psycopg.Error, TimeoutError) as error:
            if isinstance(error, TimeoutError) and not with_time.expired():
                raise
            raise self._meaning(error) from error

    async def _prepare(self) -> None:
        """Bring the schema up to date, once.

        Raises:
            StoreUnavailableError: The server can't be reached.
            StoreUnusableError: The database is not for us.
        """
        if self._ready:
            return
        async with self._preparing:
            if not self._ready:
                try:
                    async with asyncio.timeout(_OPERATION_SECONDS):
                        await self._bring_up_to_date()
                except (psycopg.Error, TimeoutError) as error:
                    raise self._meaning(error) from error
                self._ready = True
                _log.info("store ready", store=self._where)

    async def _bring_up_to_date(self) -> None:
        # By a connection of its own: it says why it can't be made, which the pool keeps to itself.
        async with await Connection.connect(**self._options) as connection:
            await _configure(connection)
            await _migrate(connection, self._where)
        await self._pool.open()

    def _meaning(self, error: Exception) -> StoreError:
        """What an error of psycopg's means."""
        where, reason = self._where, _first_line(error)
        match error:
            case errors.SerializationFailure() | errors.DeadlockDetected() | errors.UniqueViolation():
                return _LostRaceError(f"{where}: {reason}")
            case psycopg.Error() if isinstance(error, errors.DiskFull) or error.diag.message_hint == _FULL_HINT:
                return StoreFullError(f"{where} has no space left: {reason}")
            case errors.InsufficientPrivilege():
                return StoreUnusableError(
                    f"{where}: {reason}. The user needs CREATE on the database, or on a schema `cdam` made for it."
                )
            case errors.UndefinedTable() | errors.InvalidSchemaName() | errors.UndefinedColumn():
                return StoreUnusableError(f"{where}: {reason}. Restore the schema `cdam` from a backup.")
            case errors.DataCorrupted() | errors.IndexCorrupted():
                return StoreUnusableError(f"{where}: {reason}. Restore the database from a backup.")
            case (
                psycopg.OperationalError()
                | psycopg.InterfaceError()
                | TimeoutError()
                | errors.ReadOnlySqlTransaction()  # a standby, until it is promoted
                | errors.InFailedSqlTransaction()
                | psycopg.InternalError()
            ):
                return StoreUnavailableError(f"{where} can't be reached: {reason}")
            case _:
                raise error


class _LostRaceError(StoreUnavailableError):
    """Another transaction came first; to be tried again."""


async def _configure(connection: Connection) -> None:
    # Whatever the database's default: operations lock what they change, and read again after that.
    await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)


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


def _where(parameters: Mapping[str, Any]) -> str:
    """What may be said about a database in logs and errors."""
    host, port = parameters.get("host", "localhost"), parameters.get("port", "5432")
    return f"PostgreSQL {host}:{port}/{parameters.get('dbname', '')}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
