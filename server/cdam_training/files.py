"""Files that are there wholly or not at all, and folders that one process uses."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cdam_server.settings.load_error import LoadError

LOCK: Final = "lock"
"""A file in a folder that is in use."""


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and put it there at once.

    Args:
        file: The place.
        write: Writes the file that it is given.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        write(partial)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(file)


@contextmanager
def locked(folder: Path, setting: str, *, wait: bool = False) -> Iterator[None]:
    """Use a folder alone, until the block's end or this process's, however it ends.

    Args:
        folder: Which; it must be there.
        setting: That names it, for errors.
        wait: For another process to leave it.

    Raises:
        LoadError: Another process uses it.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise LoadError(
                setting, f"another `cdam train` is using {folder}: wait for it, or name another folder"
            ) from error
        yield
