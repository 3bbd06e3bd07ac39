"""Concepts in a SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

import structlog

from cdam_server.store import operations, sqlite_file
from cdam_server.store.operations import Operation
from cdam_server.store.protocol import (
    ConceptStore,
    Registration,
    StoreBusyError,
    StoredConcept,
    Version,
)
from cdam_server.store.sqlite_file import BUSY_SECONDS, Identity

Result = TypeVar("Result")

FILE_NAME: Final = "concepts.sqlite3"
_READERS: Final = 2
_TRIES: Final = 5  # of what finds another file each time
_READ_SECONDS: Final = 2.0  # after which it isn't begun; the same of writing is `BUSY_SECONDS`

_log = structlog.get_logger("cdam.store")


class SqliteStore(ConceptStore):
    """A file `concepts.sqlite3`, which is made, with its folder, when it is first written to.

    One thread writes, in transactions that are on disk when they end; a few read meanwhile what was there before. Several
    processes may share the file, on one machine: locks do not reach further. Nothing is written to a file that another has
    taken the place of, or none: what is there now is then checked as at the beginning, or made.

    Args:
        folder: Where the file is.

    Attributes:
        file: The file.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE_NAME
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._reading = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        self._writer: sqlite3.Connection | None = None
        self._readers: SimpleQueue[tuple[Identity | None, sqlite3.Connection]] = (
            SimpleQueue()
        )  # and whose file they have
        self._identity: Identity | None = None  # of the file that has been checked
        self._log_identity: Identity | None = None
        self._closed = False

    async def open(self) -> None:
        """See `ConceptStore.open`."""
        await self._until_found(self._prepare_in_turn)

    async def close(self) -> None:
        """See `ConceptStore.close`; what has not begun is refused."""
        self._closed = True
        await asyncio.to_thread(self._close)

    async def register(self, registration: Registration) -> tuple[StoredConcept, bool]:
        """See `ConceptStore.register`."""
        return await self._write(lambda: operations.register(registration))

    async def newest(self, model: str, name: str) -> Version | None:
        """See `ConceptStore.newest`."""
        return await self._read(lambda: operations.newest(model, name), None)

    async def by_name(self, model: str, name: str) -> StoredConcept | None:
        """See `ConceptStore.by_name`."""
        return await self._read(lambda: operations.by_name(model, name), None)

    async def by_id(self, concept_id: str) -> StoredConcept | None:
        """See `ConceptStore.by_id`."""
        return await self._read(lambda: operations.by_id(concept_id), None)

    async def page(
        self, *, model: str, labels: Mapping[str, str], after: tuple[str, str] | None, limit: int
    ) -> Sequence[Version]:
        """See `ConceptStore.page`."""
        return await self._read(lambda: operations.page(model, labels, after, limit), ())

    async def delete(self, model: str, name: str, expected_version: int | None) -> Version | None:
        """See `ConceptStore.delete`."""
        if self._identity is None and not await self._until_found(self._prepare_in_turn):
            return None
        return await self._write(lambda: operations.delete(model, name, expected_version))

    async def _read(self, operation: Callable[[], Operation[Result]], nothing: Result) -> Result:
        async def read() -> Result:
            if self._identity is None and not await self._prepare_in_turn():
                return nothing
            try:
                return await self._in(self._reading, _READ_SECONDS, lambda until: self._run_reading(operation(), until))
            except _ReplacedError:
                await self._prepare_in_turn()
                raise

        return await self._until_found(read)

    async def _write(self, operation: Callable[[], Operation[Result]]) -> Result:
        return await self._until_found(
            lambda: self._in(self._writing, BUSY_SECONDS, lambda until: self._run_writing(operation(), until))
        )

    async def _prepare_in_turn(self) -> bool:
        """Check the file; returns whether there is one, if need be one that another process has made by now."""
        return await self._in(self._writing, BUSY_SECONDS, lambda _: self._prepare())

    async def _until_found(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Try it with what is at the file's path now, until that stays the same meanwhile."""
        for _ in range(_TRIES):
            with suppress(_ReplacedError):
                return await attempt()
        raise StoreBusyError(f"{self.file} is replaced again and again")

    async def _in(self, threads: ThreadPoolExecutor, seconds: float, work: Callable[[float], Result]) -> Result:
        """Work in a thread, told until when to wait for locks; who stops waiting for it does not stop it once it has begun.

        Raises:
            StoreBusyError: Its turn did not come in time, or the store has been closed.
        """
        until = time.monotonic() + seconds

        def begin() -> Result:
            if time.monotonic() > until:
                raise StoreBusyError(f"{self.file}: too many wait for it")
            return work(until)

        try:
            return await asyncio.get_running_loop().run_in_executor(threads, begin)
        except (asyncio.CancelledError, RuntimeError) as error:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise StoreBusyError(f"{self.file}: closed") from error  # before its turn came

    # --- in the writer's thread

    def _prepare(self, *, make: bool = False) -> bool:
        """Check the file and bring it up to date, once; returns whether there is one."""
        if self._identity is not None and sqlite_file.identity(self.file) != self._identity:
            self._forget()
        if self._identity is None:
            found = sqlite_file.identity(self.file)
            with sqlite_file.translated(self.file):
                there = sqlite_file.exists(self.file)
                if there:
                    sqlite_file.check(self.file)
                elif not make:
                    return False
                sqlite_file.make(self.file)
            made = sqlite_file.identity(self.file)
            if there and made != found:  # it is not the one that was checked
                raise _ReplacedError
            self._identity = made
        return True

    def _run_writing(self, operation: Operation[Result], until: float) -> Result:
        self._prepare(make=True)
        with sqlite_file.translated(self.file), self._writer_connection() as connection:
            sqlite_file.wait_at_most(connection, until - time.monotonic())
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = _run(connection, operation)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            self._expect(self._identity)  # before anybody is told that it is stored
            return result

    @contextmanager
    def _writer_connection(self) -> Iterator[sqlite3.Connection]:
        """The connection; after an error of SQLite's it is let go, and the next one is new."""
        try:
            if self._writer is None:
                self._writer = sqlite_file.connect(self.file)
                self._writer.execute("SELECT count(*) FROM sqlite_schema")  # opens the log
                self._log_identity = sqlite_file.identity(sqlite_file.log(self.file))
            self._expect(self._identity)
            yield self._writer
        except sqlite3.Error:
            self._close_writer()
            self._expect(self._identity)  # else that is the reason
            raise

    def _forget(self) -> None:
        """Let go of a file that is not the one at its path any more."""
        _log.warning("store replaced", file=str(self.file))
        wal = sqlite_file.log(self.file)
        if self._log_identity is not None and sqlite_file.identity(wal) == self._log_identity:
            # What is in it is of the old file: the new one must not take it for its own.
            for path in (wal, sqlite_file.index(self.file)):
                path.unlink(missing_ok=True)
        self._identity = self._log_identity = None
        self._close_readers()
        if self._writer is not None:
            with suppress(sqlite3.Error):  # the old file may only have been moved
                self._writer.execute("PRAGMA wal_checkpoint")
        self._close_writer()

    def _close_writer(self) -> None:
        if self._writer is not None:
            _close(self._writer)
            self._writer = None

    # --- in any thread

    def _expect(self, identity: Identity | None) -> None:
        if identity is None or sqlite_file.identity(self.file) != identity:
            raise _ReplacedError

    # --- in a reader's thread

    def _run_reading(self, operation: Operation[Result], until: float) -> Result:
        identity = self._identity
        self._expect(identity)
        with sqlite_file.translated(self.file), self._reader_connection(identity) as connection:
            self._expect(identity)
            sqlite_file.wait_at_most(connection, until - time.monotonic())
            return _run(connection, operation)

    @contextmanager
    def _reader_connection(self, identity: Identity | None) -> Iterator[sqlite3.Connection]:
        """A connection to this file, kept for the next who reads it; after an error it is let go."""
        connection = None
        try:
            connection = self._take_reader(identity) or sqlite_file.connect_reader(self.file)
            yield connection
        except BaseException as error:
            if connection is not None:
                _close(connection)
            if isinstance(error, sqlite3.Error):
                self._expect(identity)  # else that is the reason
            raise
        self._readers.put((identity, connection))

    def _take_reader(self, identity: Identity | None) -> sqlite3.Connection | None:
        with suppress(Empty):
            while True:
                its, connection = self._readers.get_nowait()
                if its == identity:
                    return connection
                _close(connection)
        return None

    def _close_readers(self) -> None:
        with suppress(Empty):
            while True:
                _close(self._readers.get_nowait()[1])

    def _close(self) -> None:
        for threads in (self._reading, self._writing):
            threads.shutdown(wait=False, cancel_futures=True)
        for threads in (self._reading, self._writing):
            threads.shutdown()
        self._close_readers()
        self._close_writer()  # the last to go: it takes the log in


class _ReplacedError(Exception):
    """The file is not the one that was checked; to be tried again."""


def _run(connection: sqlite3.Connection, operation: Operation[Result]) -> Result:
    try:
        statement = next(operation)
        while True:
            rows = connection.execute(statement.sql.replace("cdam.", ""), statement.parameters).fetchall()
            statement = operation.send(rows)
    except StopIteration as end:
        result: Result = end.value
        return result


def _close(connection: sqlite3.Connection) -> None:
    with suppress(sqlite3.Error):
        connection.close()
