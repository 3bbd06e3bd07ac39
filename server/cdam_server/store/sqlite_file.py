"""The file of a SQLite store: checking it without changing it, opening it, bringing its schema up to date, its errors."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

from cdam_server.store import records
from cdam_server.store.migrations import migrations
from cdam_server.store.protocol import (
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnusableError,
    StoreUnwritableError,
)

APPLICATION_ID: Final = 0x6364616D  # "cdam"
BUSY_SECONDS: Final = 5.0  # that another process may keep the file locked

Identity: TypeAlias = tuple[int, int]  # device and inode

_MAGIC: Final = b"SQLite format 3\0"
_FULL: Final = {
    sqlite3.SQLITE_FULL,
    # Quotas and limits of file size, and a full disk under the index of the log.
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
}
_READ_CONTENTS: Final = "SELECT * FROM contents"


def exists(file: Path) -> bool:
    """Whether there is anything to read; a process that is just making it may have come no further than an empty file."""
    try:
        return file.stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StoreUnusableError(
            f"{file} can't be reached: {error.strerror}. Give this process the right to."
        ) from error


def check(file: Path) -> None:
    """Read all of a file that exists, and change nothing, neither it nor what lies beside it.

    Raises:
        StoreUnusableError: It is damaged, of a newer schema, not a store, or may not be read or written.
        StoreBusyError: Another process keeps it locked.
    """
    if not os.access(file, os.R_OK | os.W_OK) or not os.access(file.parent, os.W_OK | os.X_OK):
        raise StoreUnusableError(
            f"{file} can't be opened: this process needs the right to read and write it and to make files beside it"
        )
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(_MAGIC))
    except OSError as error:
        raise StoreUnusableError(f"{file} can't be read: {error.strerror}") from error
    if magic != _MAGIC:
        raise _damaged(file, "it is not a SQLite database")
    while True:
        before = _state(file)
        try:
            with translated(file):
                _check_content(file)
        except StoreUnusableError:
            if _state(file) == before:  # else another process has been writing meanwhile
                raise
        else:
            return


def identity(file: Path) -> Identity | None:
    """What tells a file from another that takes its place; None if there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def log(file: Path) -> Path:
    """Its write-ahead log, which is there while it is in use."""
    return _beside(file, "-wal")


def index(file: Path) -> Path:
    """The index of its log."""
    return _beside(file, "-shm")


def make(file: Path) -> None:
    """Make the file, and its folder, if it is not there, and bring its schema up to date.

    Raises:
        StoreError: As `translated` says.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(file, error.strerror or "") from error
    with closing(_connect(file, "rwc")) as connection:
        migrate(connection, file)


def connect(file: Path) -> sqlite3.Connection:
    """Open the file, which exists, for reading and writing."""
    return _connect(file, "rw")


def connect_reader(file: Path) -> sqlite3.Connection:
    """Open the file, which exists, for reading."""
    connection = _connect(file, "rw")  # readers, too, write to the index of the log
    connection.execute("PRAGMA query_only = ON")
    return connection


def wait_at_most(connection: sqlite3.Connection, seconds: float) -> None:
    """How long it waits from now on while another process keeps the file locked."""
    connection.execute(f"PRAGMA busy_timeout = {max(1, round(1000 * seconds))}")


def migrate(connection: sqlite3.Connection, file: Path) -> None:
    """Bring the schema up to date; whoever comes first does it, and others wait.

    Raises:
        StoreUnusableError: The schema is newer than this program.
    """
    if _pragma(connection, "journal_mode") != "wal":
        _use_log(connection)
    steps = migrations("sqlite")
    for step in steps[schema_version(connection) :]:
        connection.execute("BEGIN EXCLUSIVE")
        try:
            if schema_version(connection) == step.number - 1:
                for statement in _statements(step.sql):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {step.number}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    check_schema(connection, file)


def check_schema(connection: sqlite3.Connection, file: Path) -> None:
    """See that the schema is not newer than this program.

    Raises:
        StoreUnusableError: It is.
    """
    found, known = schema_version(connection), len(migrations("sqlite"))
    if found > known:
        raise StoreUnusableError(
            f"{file} has schema version {found}, and this program knows none above {known}: "
            "run the version that wrote it, or a later one"
        )


def schema_version(connection: sqlite3.Connection) -> int:
    """The number of the last migration that was applied; 0 if none was."""
    version: int = _pragma(connection, "user_version")
    return version


@contextmanager
def translated(file: Path) -> Iterator[None]:
    """What SQLite's errors mean, raised as such.

    Raises:
        StoreFullError: No space is left.
        StoreUnwritableError: The file or its folder can't be written.
        StoreUnusableError: The file is damaged.
        StoreBusyError: Another process keeps it locked.
        StoreUnavailableError: The disk failed.
    """
    try:
        yield
    except (sqlite3.DatabaseError, sqlite3.InterfaceError) as error:
        found = _meaning(file, error)
        if found is None:
            raise
        raise found from error


def unwritable(file: Path, reason: str) -> StoreUnwritableError:
    """What to tell an operator whose server can't write."""
    return StoreUnwritableError(
        f"{file} can't be written ({reason}): name a folder that this process may write to with --data-dir, "
        "or a database with --store"
    )


def _meaning(file: Path, error: sqlite3.Error) -> StoreError | None:
    code = getattr(error, "sqlite_errorcode", 0)
    if not code and "decode to UTF-8" in str(error):  # said by Python
        return _damaged(file, str(error))
    if code in _FULL:
        return StoreFullError(f"no space is left to write {file}")
    meanings: dict[int, Callable[[], StoreError]] = {
        sqlite3.SQLITE_CORRUPT: lambda: _damaged(file, str(error)),
        sqlite3.SQLITE_NOTADB: lambda: _damaged(file, str(error)),
        sqlite3.SQLITE_READONLY: lambda: unwritable(file, str(error)),
        sqlite3.SQLITE_PERM: lambda: unwritable(file, str(error)),
        sqlite3.SQLITE_CANTOPEN: lambda: unwritable(file, str(error)),
        sqlite3.SQLITE_BUSY: lambda: StoreBusyError(f"another process keeps {file} locked"),
        sqlite3.SQLITE_LOCKED: lambda: StoreBusyError(f"another process keeps {file} locked"),
        sqlite3.SQLITE_IOERR: lambda: StoreUnavailableError(f"{file}: {error} ({error.sqlite_errorname})"),
    }
    meaning = meanings.get(code & 0xFF)
    return meaning() if meaning is not None else None


def _damaged(file: Path, reason: str) -> StoreUnusableError:
    return StoreUnusableError(
        f"{file} can't be used: {reason}. It was left as it is. Stop the server and put a backup in its place, "
        f"or move it away, with what lies beside it, to start with an empty store; `sqlite3 {file} .recover` prints what "
        "can be saved."
    )


def _check_content(file: Path) -> None:
    # Without a log nobody has the file open, and SQLite can read it without making one.
    mode = "mode=ro" if exists(log(file)) else "immutable=1"
    had_index = index(file).exists()
    try:
        with closing(
            sqlite3.connect(f"{file.absolute().as_uri()}?{mode}", uri=True, timeout=BUSY_SECONDS)
        ) as connection:
            _check_connection(connection, file)
    except BaseException:
        if mode == "mode=ro" and not had_index:  # made by us, to read the log
            index(file).unlink(missing_ok=True)
        raise


def _check_connection(connection: sqlite3.Connection, file: Path) -> None:
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _damaged(file, found)
    if not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        return  # another process, or one that was killed, was about to make its tables
    if _pragma(connection, "application_id") != APPLICATION_ID:
        raise _damaged(file, "it is a database of something else")
    check_schema(connection, file)
    connection.row_factory = sqlite3.Row
    for row in connection.execute(_READ_CONTENTS):
        if not records.intact(row):
            raise _damaged(file, f"the checksum of content {row['id']} is wrong")


def _state(file: Path) -> tuple[object, ...]:
    """What changes if another process writes."""
    found: list[object] = []
    for path in (file, log(file)):
        try:
            status = path.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{file.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,  # transactions are begun in so many words
        check_same_thread=False,  # one thread at a time has it
    )
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _use_log(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log; SQLite does not wait by itself for others who are about to."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _pragma(connection: sqlite3.Connection, name: str) -> Any:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]
