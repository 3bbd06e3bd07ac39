"""What the trunk makes of images, kept on disk: it is computed once, and read as often as training needs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdam_server.load_error import LoadError

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
        self._check(folder / "kept.json", about)
        self._rows = _open(folder / "rows.npy", (rows, *shape), dtype)
        self._done = _open(folder / "done.npy", (-(-rows // CHUNK),), "bool")

    @staticmethod
    def _check(file: Path, about: Mapping[str, Any]) -> None:
        text = json.dumps(about, sort_keys=True)
        if not file.exists():
            file.write_text(text, encoding="utf-8")
        elif file.read_text(encoding="utf-8") != text:
            raise LoadError("work", f"{file.parent} holds what another model made of other images: name another folder")

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
    """A file of an array, made of zeros if it is not there."""
    if file.exists():
        return np.lib.format.open_memmap(file, mode="r+")
    partial = file.with_suffix(".partial")
    np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape).flush()
    partial.replace(file)
    return np.lib.format.open_memmap(file, mode="r+")
