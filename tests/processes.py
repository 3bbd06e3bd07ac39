"""Real `cdam serve` processes for tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

_CDAM = (sys.executable, "-m", "cdam_cli")


class ServerProcess:
    """A running `cdam serve`.

    Args:
        log: File for its log.
        flags: Of the command.
        program: What is run in place of `cdam`.
        environment: Variables besides this process's own.

    Attributes:
        address: Where it serves the API.
        admin: Base URL of its admin port.
        process: The process itself.
    """

    def __init__(
        self, log: Path, *flags: str, program: Sequence[str] = _CDAM, environment: Mapping[str, str] | None = None
    ) -> None:
        api, admin = free_ports(2)
        self.address, self.admin, self._log = f"127.0.0.1:{api}", f"http://127.0.0.1:{admin}", log
        command = [*program, "serve", "--log-format", "json"]
        command += ["--address", self.address, "--admin-address", f"127.0.0.1:{admin}", *flags]
        with log.open("wb") as stderr:
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
            self.process = subprocess.Popen(command, stderr=stderr, env=variables)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an admin page."""
        try:
            with urllib.request.urlopen(self.admin + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def wait_until_ready(self, seconds: float = 120) -> None:
        """Wait for the readiness probe."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process.poll() is None, self._log.read_text()
            try:
                if self.get("/readyz")[0] == 200:
                    return
            except URLError:
                pass
            time.sleep(0.1)
        raise TimeoutError(self._log.read_text())

    def metrics(self) -> dict[str, float]:
        """The value of each metric, by its name and labels as they stand on the page."""
        lines = self.get("/metrics")[1].splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def usage(self) -> Usage:
        """What the process and its children take now (Linux)."""
        its = [_usage(pid) for pid in (self.process.pid, *self.children())]
        return Usage(
            mib=sum(one.mib for one in its),
            threads=sum(one.threads for one in its),
            files=sum(one.files for one in its),
            cpu_seconds=sum(one.cpu_seconds for one in its),
        )

    def children(self, kind: str = "") -> list[int]:
        """The child processes, all or those of one kind (``front``, ``compute``; Linux)."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                named = not kind or (path / "comm").read_text().startswith(f"cdam-{kind}")
                if named and self.process.pid in _ancestors(path.name) and _stat(path.name)[0] != "Z":
                    found.append(int(path.name))
        return sorted(found)

    def log_lines(self) -> list[dict[str, object]]:
        """The log so far, what is no JSON left out."""
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]


def _usage(pid: int) -> Usage:
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    times = _stat(str(pid))
    return Usage(
        mib=int(status["VmRSS"].split()[0]) / 1024,
        threads=int(status["Threads"]),
        files=len(list((proc / "fd").iterdir())),
        cpu_seconds=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
    )


def _stat(pid: str) -> list[str]:
    """The fields of a process from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _ancestors(pid: str) -> Iterator[int]:
    while pid != "0":
        pid = _stat(pid)[1]
        yield int(pid)


@dataclass(frozen=True)
class Usage:
    """What a process takes.

    Attributes:
        mib: Resident memory.
        threads: Threads.
        files: Open file descriptors.
        cpu_seconds: Processor time so far, of all threads.
    """

    mib: float
    threads: int
    files: int
    cpu_seconds: float


@contextmanager
def serving(
    log: Path, *flags: str, program: Sequence[str] = _CDAM, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A server that is ready; killed at the end if it still runs."""
    server = ServerProcess(log, *flags, program=program, environment=environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@contextmanager
def interruptible() -> Iterator[None]:
    """Commands that are started inside can be interrupted, also if these tests run in the background of a shell, which
    ignores SIGINT there, and so would they."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # of a handler, a new program has the default
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
