"""Connections to a PostgreSQL server. What takes too long is cut off, not asked to end: a server that hangs hears no requests."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row

from cdam_server.store.protocol import StoreUnusableError

Connection: TypeAlias = psycopg.AsyncConnection[DictRow]

_CONNECT_SECONDS: Final = 2  # to one host; the least that libpq waits
_BEGIN_SECONDS: Final = 2.5  # until a server has answered at all, with one host

# How soon the kernel gives up a peer that is gone; what the URL says goes before.
_NETWORK: Final = {
    "connect_timeout": str(_CONNECT_SECONDS),
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "application_name": "cdam",
}


class Connections:
    """Makes connections when they are wanted, and keeps them for who wants one next; how many at once, others see to.

    Args:
        url: Whatever libpq understands. Never logged.

    Attributes:
        where: What may be said about the database in logs and errors.
        extra_seconds: How much longer it may take to begin, since the URL names several hosts.

    Raises:
        StoreUnusableError: The URL is none.
    """

    def __init__(self, url: str) -> None:
        parameters = _parameters(url)
        hosts = str(parameters.get("host", "localhost"))
        self.where = f"PostgreSQL {hosts}:{parameters.get('port', '5432')}/{parameters.get('dbname', '')}"
        self.extra_seconds = _CONNECT_SECONDS * hosts.count(",")
        self._options: dict[str, Any] = {
            **_NETWORK,
            **parameters,
            "client_encoding": "utf8",
            "autocommit": True,
            "prepare_threshold": None,  # PgBouncer gives every transaction another connection
            "row_factory": dict_row,
        }
        self._free: list[Connection] = []
        self._used: set[Connection] = set()
        self._connecting: set[asyncio.Timeout] = set()
        self._closed = False

    @asynccontextmanager
    async def begun(self, begin: str, until: float) -> AsyncIterator[Connection]:
        """A connection that has answered to `begin`, with which a transaction begins.

        Args:
            begin: SQL.
            until: When to cut it off, in the event loop's time.

        Raises:
            psycopg.Error: As psycopg says; also from inside.
            TimeoutError: It was cut off; also from inside.
        """
        connection = await self._begin(begin, min(until, self._soon()))
        try:
            with self._cut_at(connection, until):
                yield connection
        finally:
            self._put_back(connection)

    @asynccontextmanager
    async def new(self, until: float) -> AsyncIterator[Connection]:
        """A connection that has not been used; see `begun`."""
        connection = await self._connect(min(until, self._soon()))
        try:
            with self._cut_at(connection, until):
                yield connection
        finally:
            self._put_back(connection)

    def cut(self) -> None:
        """Cut off whatever is being done; connections are kept no longer."""
        self._closed = True
        self._drop()
        for connection in self._used:
            _cut(connection)
        for limit in self._connecting:
            limit.reschedule(0)

    def _soon(self) -> float:
        return asyncio.get_running_loop().time() + _BEGIN_SECONDS + self.extra_seconds

    async def _begin(self, begin: str, until: float) -> Connection:
        while self._free:
            connection = self._free.pop()
            with suppress(psycopg.OperationalError):  # cut since it was used: the next is tried, then a new one
                await self._execute(connection, begin, until)
                return connection
        connection = await self._connect(until)
        await self._execute(connection, begin, until)
        return connection

    async def _execute(self, connection: Connection, begin: str, until: float) -> None:
        try:
            with self._cut_at(connection, until):
                await connection.execute(begin.encode())
        except BaseException as error:
            _close(connection)
            if isinstance(error, TimeoutError):
                self._drop()  # the others are no better
            raise

    async def _connect(self, until: float) -> Connection:
        if self._closed:
            raise TimeoutError("closed")
        limit = asyncio.timeout_at(until)
        self._connecting.add(limit)
        try:
            async with limit:
                return await Connection.connect(**self._options)
        except TimeoutError:
            raise TimeoutError("connecting takes too long") from None
        finally:
            self._connecting.discard(limit)

    @contextmanager
    def _cut_at(self, connection: Connection, until: float) -> Iterator[None]:
        """While it is used, see that it does not hang; see `begun`."""
        loop, lapsed = asyncio.get_running_loop(), False

        def lapse() -> None:
            nonlocal lapsed
            lapsed = True
            _cut(connection)

        timer = loop.call_at(until, lapse)
        self._used.add(connection)
        try:
            yield
        except psycopg.Error as error:
            if not lapsed:
                raise
            raise TimeoutError("no answer in time") from error
        finally:
            timer.cancel()
            self._used.discard(connection)

    def _put_back(self, connection: Connection) -> None:
        """Keep it, unless it is in the middle of something."""
        if connection.pgconn.transaction_status == TransactionStatus.IDLE and not self._closed:
            self._free.append(connection)
        else:
            _close(connection)

    def _drop(self) -> None:
        while self._free:
            _close(self._free.pop())


def _cut(connection: Connection) -> None:
    """Shut the socket: whoever waits for it is told at once. The descriptor stays the connection's, who may yet look at it."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.pgconn.socket)) as same:
        same.shutdown(socket.SHUT_RDWR)


def _close(connection: Connection) -> None:
    connection.pgconn.finish()  # what `close` does, and that needs an event loop


def _parameters(url: str) -> Mapping[str, Any]:
    try:
        parameters = conninfo_to_dict(url)
    except psycopg.ProgrammingError:  # its message holds the URL
        raise StoreUnusableError(
            "the URL of the store is not valid: postgresql://USER:PASSWORD@HOST:PORT/DATABASE is expected"
        ) from None
    hosts = f"{parameters.get('host', '')},{parameters.get('hostaddr', '')}".split(",")
    ports = str(parameters.get("port", "")).split(",")
    if (
        not all(map(_is_host, hosts))
        or not all(port.isdecimal() or not port for port in ports)
        or set(str(parameters.get("dbname", ""))) & set("@:")
    ):
        # Some of the password may have been taken for a host: nothing of it must be said.
        raise StoreUnusableError(
            "the URL of the store is not valid: its host, port or database has characters that belong to none. "
            "Escape @ / : # % in the password as %40 %2F %3A %23 %25."
        )
    return parameters


def _is_host(host: str) -> bool:
    if host.startswith("/"):  # the folder of a socket
        return True
    if "@" in host:
        return False
    try:
        return ":" not in host or bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False
