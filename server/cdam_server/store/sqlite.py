"""Concepts in a SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

from cdam_server.store import operations, sqlite_file
from cdam_server.store.operations import Operation
from cdam_server.store.protocol import ConceptStore, Registration, StoredConcept, StoreError, Version

Result = TypeVar("Result")

FILE_NAME: Final = "concepts.sqlite3"
_READERS: Final = 2


class SqliteStore(ConceptStore):
    """A file `concepts.sqlite3`, which is made, with its folder, when it is first written to.

    One thread writes, in transactions that are on disk when they end; a few read meanwhile what was there before. Several
    processes may share the file, on one machine: locks do not reach further.

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
        self._readers: SimpleQueue[sqlite3.Connection] = SimpleQueue()
        self._checked = False

    async def open(self) -> None:
        """See `ConceptStore.open`."""
        await self._in(self._writing, self._prepare)

    async def close(self) -> None:
        """See `ConceptStore.close`."""
        await asyncio.to_thread(self._close)

    async def register(self, registration: Registration) -> tuple[StoredConcept, bool]:
        """See `ConceptStore.register`."""
        return await self._write(operations.register(registration))

    async def newest(self, model: str, name: str) -> Version | None:
        """See `ConceptStore.newest`."""
        return await self._read(operations.newest(model, name), None)

    async def by_name(self, model: str, name: str) -> StoredConcept | None:
        """See `ConceptStore.by_name`."""
        return await self._read(operations.by_name(model, name), None)

    async def by_id(self, concept_id: str) -> StoredConcept | None:
        """See `ConceptStore.by_id`."""
        return await self._read(operations.by_id(concept_id), None)

    async def page(
        self, *, model: str, labels: Mapping[str, str], after: tuple[str, str] | None, limit: int
    ) -> Sequence[Version]:
        """See `ConceptStore.page`."""
        return await self._read(operations.page(model, labels, after, limit), ())

    async def delete(self, model: str, name: str, expected_version: int | None) -> Version | None:
        """See `ConceptStore.delete`."""
        if not await self._there():
            return None
        return await self._write(operations.delete(model, name, expected_version))

    async def _read(self, operation: Operation[Result], nothing: Result) -> Result:
        if not await self._there():
            return nothing
        return await self._in(self._reading, lambda: self._run_reading(operation))

    async def _write(self, operation: Operation[Result]) -> Result:
        return await self._in(self._writing, lambda: self._run_writing(operation))

    async def _there(self) -> bool:
        """Whether there is a database, if need be one that another process has made by now."""
        return self._checked or await self._in(self._writing, self._prepare)

    @staticmethod
    async def _in(threads: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        """Work in a thread; who stops waiting for it does not stop it once it has begun."""
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    # --- in the writer's thread

    def _prepare(self, *, make: bool = False) -> bool:
        """Check the file and bring it up to date, once; returns whether there is one."""
        if self._checked:
            return True
        with sqlite_file.translated(self.file):
            there = sqlite_file.exists(self.file)
            if there:
                sqlite_file.check(self.file)
            elif not make:
                return False
            with self._writer_connection() as connection:
                sqlite_file.migrate(connection, self.file)
        self._checked = True
        return True

    def _run_writing(self, operation: Operation[Result]) -> Result:
        self._prepare(make=True)
        with sqlite_file.translated(self.file), self._writer_connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = _run(connection, operation)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return result

    @contextmanager
    def _writer_connection(self) -> Iterator[sqlite3.Connection]:
        """The connection; after an error of SQLite's it is let go, and the next one is new."""
        if self._writer is None:
            self._writer = sqlite_file.connect(self.file)
        try:
            yield self._writer
        except sqlite3.Error:
            _close(self._writer)
            self._writer = None
            raise

    # --- in a reader's thread

    def _run_reading(self, operation: Operation[Result]) -> Result:
        with sqlite_file.translated(self.file):
            try:
                connection = self._readers.get_nowait()
            except Empty:
                connection = sqlite_file.connect_reader(self.file)
            try:
                result = _run(connection, operation)
            except BaseException:
                _close(connection)
                raise
            self._readers.put(connection)
            return result

    def _close(self) -> None:
        self._reading.shutdown()
        self._writing.shutdown()
        with suppress(Empty):
            while True:
                _close(self._readers.get_nowait())
        if self._writer is not None:
            _close(self._writer)  # the last to go: it takes the log in
            self._writer = None


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


__all__ = ["FILE_NAME", "SqliteStore", "StoreError"]
