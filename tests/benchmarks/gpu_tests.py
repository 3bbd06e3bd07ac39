"""Part of `gpu`: the tests that need one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from gpu_rows import Rows

_TESTS = Path(__file__).parents[1] / "integration" / "test_gpu.py"


def main() -> None:
    """Run them, as they stand, without the repository's settings for pytest."""
    rows = Rows(__doc__)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "-c",
        "/dev/null",
        f"--rootdir={_TESTS.parent}",
        "--tb=line",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(_TESTS)], capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines() or [""]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    rows.add(
        tests=_TESTS.name, **{word: counts.get(word, 0) for word in ("passed", "failed", "skipped")}, said=lines[-1]
    )
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "E ")):
            rows.add(tests=line[:200])
    if not counts:
        raise SystemExit((done.stdout + done.stderr)[-1000:])


if __name__ == "__main__":
    main()
