"""What the trunk makes of images, kept on disk: it is computed once, and read as often as training needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdam_server.load_error import LoadError
from cdam_training.files import locked, replace_file

CHUNK = 16
"""Images that are computed together, and are there together or not at all: rounding depends on the size of a batch."""


class Kept:
    """Tensors of equal shape, a row for each view of each image, in a memory-mapped file.

    Rows are filled in chunks; a process that is killed leaves those that are done, and another goes on with the rest.

    Args:
        folder: Where the files are; made if need be.
        key: What decides the numbers: equal keys, equal rows. Must be representable in JSON.
        shape: Of one row.
        rows: How many.
        limit: Bytes that may be used.
        dtype: Of the numbers on disk.

    Raises:
        LoadError: More bytes are needed than allowed, or the folder holds rows of something else.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        shape: tuple[int, ...],
        rows: int,
        *,
        limit: int,
        dtype: str = "float32",
    ) -> None:
        needed = rows * int(np.prod(shape)) * np.dtype(dtype).itemsize
        if needed > limit:
            raise LoadError(
                "keep-limit",
                f"{rows} rows of {' x '.join(map(str, shape))} numbers need {needed / 1e9:.1f} GB, and "
                f"{limit / 1e9:.1f} GB are allowed: allow more, keep float16, or take fewer views or images",
            )
        folder.mkdir(parents=True, exist_ok=True)
        about = {**key, "shape": list(shape), "rows": rows, "dtype": dtype}
        with locked(folder, "kept", wait=True):  # until the files are there: then two processes write the same numbers
            self._check(folder / "kept.json", about)
            self._rows = _open(folder / "rows.npy", (rows, *shape), dtype)
            self._done = _open(folder / "done.npy", (-(-rows // CHUNK),), "bool")

    @staticmethod
    def _check(file: Path, about: Mapping[str, Any]) -> None:
        text = json.dumps(about, sort_keys=True)
        if not file.exists():
            replace_file(file, lambda partial: partial.write_text(text, encoding="utf-8"))
        elif file.read_text(encoding="utf-8") != text:
            raise LoadError(
                "kept",
                f"{file.parent} holds what another model made of other images: remove it, or name another folder",
            )

    def missing(self) -> Iterator[range]:
        """The rows that are still to be filled, a chunk at a time."""
        for chunk in np.flatnonzero(~self._done).tolist():
            yield range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self._rows)))

    def fill(self, compute: Callable[[range], Tensor]) -> Iterator[range]:
        """Compute what is missing; yields each chunk that is done.

        Args:
            compute: The rows of a range, shape (rows, *shape).

        Raises:
            LoadError: A row is not finite in the dtype on disk.
        """
        for rows in self.missing():
            values = compute(rows).cpu().numpy().astype(self._rows.dtype)
            if not np.isfinite(values).all():
                raise LoadError("kept-dtype", f"not all numbers fit into {self._rows.dtype}: keep float32")
            self._rows[rows.start : rows.stop] = values
            self._rows.flush()
            self._done[rows.start // CHUNK] = True  # after the rows, so that what is marked is there
            self._done.flush()
            yield rows

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """Rows in float32, shape (len(rows), *shape)."""
        order = np.argsort(rows, kind="stable")
        # torch's memory, because a matrix product rounds by where its operands lie; numpy's begins anywhere.
        taken = torch.empty((len(rows), *self._rows.shape[1:]))
        taken.numpy()[order] = self._rows[rows[order]]  # in the file's order, which disks like
        return taken


def _open(file: Path, shape: tuple[int, ...], dtype: str) -> np.memmap[Any, Any]:
    """A file of an array, made of zeros if it is not there.

    Raises:
        LoadError: It is of another size, or there is no room for it.
    """
    if not file.exists():
        replace_file(file, lambda partial: _make(partial, shape, dtype))
    try:
        np.lib.format.open_memmap(file, mode="r")  # for writing, numpy would make a file that was cut short longer
        found = np.lib.format.open_memmap(file, mode="r+")
    except ValueError as error:
        raise LoadError("kept", f"{file} is damaged: remove {file.parent}, and the trunk runs again") from error
    if (found.shape, found.dtype) != (shape, np.dtype(dtype)):
        raise LoadError("kept", f"{file} is of other rows than kept.json says: remove {file.parent}")
    return found


def _make(file: Path, shape: tuple[int, ...], dtype: str) -> None:
    np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape).flush()
    if not hasattr(os, "posix_fallocate"):
        return
    with file.open("r+b") as opened:  # without room on the disk a write to memory would end the process
        try:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:
            needed = file.stat().st_size
            file.unlink()
            raise LoadError(
                "kept",
                f"there is no room for {needed / 1e9:.3g} GB in {file.parent} ({error.strerror}): name "
                "another folder, keep float16, or take fewer views",
            ) from error
