"""Gaussian blur of a model's input."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from cdam_engine.transfer import send

_REFERENCE_SIDE: Final = 224  # sigmas are given in pixels at 224 x 224


def blurred(pixels: Tensor, blur_sigma: float) -> Tensor:
    """The image, blurred; computed in double precision.

    Args:
        pixels: Shape (C, H, W).
        blur_sigma: In pixels at an input of 224 x 224; scaled by sqrt(H W) / 224.
    """
    height, width = pixels.shape[-2:]
    sigma = blur_sigma * math.sqrt(height * width) / _REFERENCE_SIDE
    down, across = _blur(height, sigma, pixels.device), _blur(width, sigma, pixels.device)
    return (down @ pixels.double() @ across.T).to(pixels.dtype)


@lru_cache(maxsize=8)
def _blur(side: int, sigma: float, device: torch.device) -> Tensor:
    """The blur of an axis as a matrix, shape (side, side), float64; what lies outside is mirrored in the outermost pixel."""
    reach = math.ceil(min(4 * sigma, side - 1))
    offsets = np.arange(-reach, reach + 1)
    taps = np.exp(-0.5 * np.minimum(np.abs(offsets) / sigma, 50) ** 2)  # beyond it is 0
    rows = np.arange(side)[:, None]
    read = np.abs(rows + offsets)  # the pixel that each tap reads, mirrored at the start
    read = np.where(read >= side, 2 * (side - 1) - read, read)  # and at the end
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.broadcast_to(rows, read.shape), read), taps / taps.sum())
    return send(torch.from_numpy(matrix), device)
