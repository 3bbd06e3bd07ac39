"""A command that is killed while it works, and given again until it is done."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def kill_and_repeat(command: Sequence[str], result: Path, kept: Sequence[Path], kills: int = 2) -> None:
    """Run the command until its result is there; SIGKILL it so many times, each after it has kept something more.

    Args:
        command: What to run, with one thread. Compare what it writes with what another run of it wrote, for the
            process of the tests may have more.
        result: The file that it writes at its end.
        kept: Files that change whenever it keeps something.
        kills: How often it is killed; 0: it runs once, undisturbed.
    """
    done = 0
    while not result.exists():
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        before = _states(kept)
        while process.poll() is None and (_states(kept) == before or done >= kills):
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
        assert process.returncode in {0, -signal.SIGKILL}
    assert done == kills


def _states(files: Sequence[Path]) -> list[object]:
    """Changes whenever a file does."""
    found: list[object] = []
    for file in files:
        try:
            its = file.stat()
        except FileNotFoundError:  # not yet there, or no longer
            found.append(None)
        else:
            found.append((its.st_mtime_ns, its.st_ino))
    return found
