"""Real `cdam serve` processes for tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError


class ServerProcess:
    """A running `cdam serve`.

    Attributes:
        address: Where it serves the API.
        admin: Base URL of its admin port.
        process: The process itself.
    """

    def __init__(self, log: Path, *flags: str) -> None:
        api, admin = free_ports(2)
        self.address, self.admin, self._log = f"127.0.0.1:{api}", f"http://127.0.0.1:{admin}", log
        command = [sys.executable, "-m", "cdam_server.cli", "serve", "--log-format", "json"]
        command += ["--address", self.address, "--admin-address", f"127.0.0.1:{admin}", *flags]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})

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

    def log_lines(self) -> list[dict[str, object]]:
        """The log so far."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]


@contextmanager
def serving(log: Path, *flags: str) -> Iterator[ServerProcess]:
    """A server that is ready; killed at the end if it still runs."""
    server = ServerProcess(log, *flags)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
