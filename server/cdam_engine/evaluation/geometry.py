"""Patches and the pixels that they lie on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdam_engine.families import Grid

Enlargement = Literal["bilinear", "nearest"]
"""How a map over the patch grid becomes one over the input's pixels."""


@dataclass(frozen=True)
class Geometry:
    """How a patch grid lies on the input; its last patches may stick out.

    Attributes:
        input_size: (height, width) in pixels.
        patch_size: Likewise.
        grid: The patch grid.
    """

    input_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid: Grid

    def enlarge(self, scores: NDArray[np.floating[Any]], enlargement: Enlargement) -> NDArray[np.float64]:
        """A map over pixels (H, W) from one over patches (h, w)."""
        large = scores.astype(np.float64)
        if enlargement == "nearest":
            return self.spread(torch.from_numpy(large)).numpy()
        for axis, (patches, side, length) in enumerate(zip(self.grid, self.patch_size, self.input_size, strict=True)):
            place = np.clip((np.arange(length) + 0.5) / side - 0.5, 0, patches - 1)
            low = place.astype(np.intp)
            near, far = large.take(low, axis), large.take(np.minimum(low + 1, patches - 1), axis)
            # In this form equal neighbours give the very same value: beyond the outermost centres pixels tie.
            large = near + np.expand_dims(place - low, 1 - axis) * (far - near)
        return large

    def spread(self, values: Tensor) -> Tensor:
        """Every pixel's patch's value (H, W), from those of patches (h, w)."""
        (down, across), (height, width) = self.patch_size, self.input_size
        return values.repeat_interleave(down, 0).repeat_interleave(across, 1)[:height, :width].contiguous()

    def shares(self, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The share of each patch's pixels that lies in a mask (H, W), shape (h, w); pixels beyond the input don't count."""
        shares: NDArray[np.float64] = self.count(mask) / self.count(np.ones(self.input_size, np.bool_))
        return shares

    def count(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of each patch's pixels lie in a mask (H, W), shape (h, w)."""
        (down, across), (height, width) = self.patch_size, self.input_size
        missing = (0, self.grid.h * down - height), (0, self.grid.w * across - width)
        tiles = np.pad(mask, missing).reshape(self.grid.h, down, self.grid.w, across)
        counts: NDArray[np.int64] = tiles.sum(axis=(1, 3), dtype=np.int64)
        return counts
