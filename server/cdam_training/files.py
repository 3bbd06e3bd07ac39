"""Files that are there wholly or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and put it there at once.

    Args:
        file: The place.
        write: Writes the file that it is given.
    """
    partial = file.with_name(f".{file.name}.partial")
    write(partial)
    os.replace(partial, file)  # noqa: PTH105 - Path.replace is the same, but this says so
