"""A real PostgreSQL server for tests, in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Literal

import psycopg
import pytest

from processes import free_ports

_INSTALLED = Path("/usr/lib/postgresql")  # where Debian and Ubuntu put them, off the PATH


def find_programs() -> Path | None:
    """The folder with `initdb`, `pg_ctl` and `postgres`; of several versions the latest; None if there is none."""
    candidates = sorted(_INSTALLED.glob("*/bin"), key=lambda folder: float(folder.parent.name), reverse=True)
    if (on_path := shutil.which("initdb")) is not None:
        candidates.insert(0, Path(on_path).resolve().parent)
    for folder in candidates:
        if all((folder / program).exists() for program in ("initdb", "pg_ctl", "postgres")):
            return folder
    return None


class PostgresServer:
    """A cluster that is served on a port of its own; see `postgres_server`.

    Args:
        programs: Where `initdb` and `pg_ctl` are.
        folder: An empty one, for all that it writes; the way there must be open to everyone.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self.folder = programs, folder
        (self.port,) = free_ports(1)
        self._numbers = count(1)
        self.newest_database = "postgres"
        self._user = _unprivileged()  # PostgreSQL refuses to be run by root
        # Not by subprocess's `user`, which has to fork: this process may have gRPC's threads, which don't bear it.
        self._as_user: list[str] = []
        if self._user is not None:
            shutil.chown(folder, self._user)
            entry = pwd.getpwnam(self._user)
            self._as_user = ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", "--"]
        self._run(
            "initdb",
            "--auth=trust",
            "--username=cdam",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--no-instructions",
            "--wal-segsize=1",
        )
        settings = {
            "listen_addresses": "'127.0.0.1'",
            "port": self.port,
            "unix_socket_directories": "''",
            "max_connections": 100,
            "shared_buffers": "'16MB'",
            "fsync": "on",
        }
        with (self.data / "postgresql.auto.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())

    @property
    def data(self) -> Path:
        """The cluster's folder."""
        return self.folder / "data"

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def url(self, database: str = "postgres") -> str:
        """URL of a database."""
        return f"postgresql://cdam@127.0.0.1:{self.port}/{database}"

    def execute(self, sql: str, database: str = "postgres") -> Sequence[tuple[object, ...]]:
        """Run a statement, not in a transaction; returns the rows that it found."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def new_database(self, options: str = "") -> str:
        """Make a database and return its URL."""
        self.newest_database = f"test{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {self.newest_database} {options}")
        return self.url(self.newest_database)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._run("pg_ctl", "start", "--wait", "--timeout=60", f"--log={self.folder / 'log'}")

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it: in order, or at once, which it recovers from at the next start."""
        self._run("pg_ctl", "stop", "--wait", "--timeout=60", f"--mode={mode}")

    def kill(self) -> None:
        """SIGKILL the postmaster and all its children, as a machine that loses power does."""
        os.kill(self.pid, signal.SIGSTOP)  # it shall not make more of them meanwhile
        processes = self.processes()
        for process in reversed(processes):
            os.kill(process, signal.SIGKILL)
        while any(map(_lives, processes)):
            time.sleep(0.01)
        (self.data / "postmaster.pid").unlink()  # a zombie that nobody has reaped yet would look like another server

    def processes(self) -> list[int]:
        """The postmaster and its children."""
        return [self.pid, *_children(self.pid)]

    def limit_file_size(self, size: int | None) -> None:
        """Limit how large a file its processes can make, to some bytes or (None) not at all."""
        limit = "unlimited" if size is None else size
        for process in self.processes():
            command = [*self._as_user, "prlimit", f"--pid={process}", f"--fsize={limit}:"]
            done = subprocess.run(command, check=False)
            assert done.returncode == 0 or not _lives(process)

    def _run(self, program: str, *arguments: str) -> None:
        # Output goes to a file: the server would keep a pipe open.
        with (self.folder / "programs.log").open("a+b") as log:
            done = subprocess.run(
                [*self._as_user, self._programs / program, *arguments, f"--pgdata={self.data}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                timeout=120,
                check=False,
            )
            if done.returncode:
                log.seek(0)
                logs = [log.read(), (self.folder / "log").read_bytes() if (self.folder / "log").exists() else b""]
                raise RuntimeError(f"{program} failed: {b''.join(logs).decode(errors='replace')}")


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A server that runs; stopped at the end, and all that it wrote removed.

    Raises:
        LookupError: PostgreSQL is not installed.
    """
    programs = find_programs()
    if programs is None:
        raise LookupError("PostgreSQL is not installed: no initdb on the PATH or in /usr/lib/postgresql")
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        server = PostgresServer(programs, Path(folder))
        server.start()
        try:
            yield server
        finally:
            if (server.data / "postmaster.pid").exists():
                server.stop("immediate")


@contextmanager
def postgres_or_skip() -> Iterator[PostgresServer]:
    """The same for fixtures: without PostgreSQL the test is skipped."""
    try:
        with postgres_server() as server:
            yield server
    except LookupError as error:
        pytest.skip(str(error))


def _unprivileged() -> str | None:
    """Whom to run it as: None for the one who runs this."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _lives(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "State:\tZ" not in status


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
