"""Layers on their way from one library's names to timm's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from cdam_server.compute.conversions.tensors import ConversionError, StateDict, Tensors

NOT_LINEAR: Final = (
    "the classifier is not one linear layer, and its activations are in no file: give one with the setting head (and "
    "head_layers), or leave it out with num_outputs: 0"
)


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio of which timm makes `hidden` again by ``int(width * ratio)``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def with_bias(layer: StateDict) -> StateDict:
    """The layer with a bias of zeros if it has none, where timm's always has one."""
    return {"bias": layer["weight"].new_zeros(len(layer["weight"])), **layer}


def put(weights: StateDict, name: str, layer: Mapping[str, Tensor]) -> None:
    """Adds a layer's tensors under its name."""
    weights.update({f"{name}.{part}": tensor for part, tensor in layer.items()})


def qkv(tensors: Tensors, names: tuple[str, str, str]) -> StateDict:
    """One layer of three: queries, keys, values. Biases are zeros for those that have none, if any has one."""
    layers = [tensors.take_layer(name) for name in names]
    if any("bias" in layer for layer in layers):
        layers = [with_bias(layer) for layer in layers]
    return {part: torch.cat([layer[part] for layer in layers]) for part in layers[0]}


def resample_positions(
    positions: Tensor,
    prefix: int,
    own: tuple[int, int],
    grid: tuple[int, int],
    *,
    antialias: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """Positions of another patch grid, by bicubic interpolation in float32, as all the libraries do it.

    Args:
        positions: Shape (1, prefix + own height * own width, D).
        prefix: How many come before the patches'; they stay.
        own: The grid that the positions are for.
        grid: The grid that is wanted.
        antialias: Whether the library does.
        align_corners: Likewise.

    Raises:
        ConversionError: There are not as many positions as patches, or `own` is no square, which the libraries take
            for granted here.
    """
    if positions.shape[1] != prefix + own[0] * own[1]:
        raise ConversionError(f"there are {positions.shape[1]} positions for {own[0]} x {own[1]} patches")
    if own == grid:
        return positions
    if own[0] != own[1]:
        raise ConversionError(f"positions of {own[0]} x {own[1]} patches, no square, can't be resampled")
    planes = positions[:, prefix:].reshape(1, *own, -1).permute(0, 3, 1, 2).float()
    planes = nn.functional.interpolate(
        planes, size=grid, mode="bicubic", align_corners=align_corners, antialias=antialias
    )
    patches = planes.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat((positions[:, :prefix], patches), dim=1)


def resampled(own: tuple[int, int], size: tuple[int, int]) -> str:
    """What `resample_positions` did, in words, from the inputs' sizes; "" if nothing."""
    return "" if own == size else f"positions from those for {_times(own)} pixels to those for {_times(size)}"


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def crop_fraction(taken: tuple[int, int], resized: tuple[int, int]) -> float:
    """The fraction that gives back `resized` as ``floor(taken / fraction)``, which is how it is used.

    Raises:
        ConversionError: There is none for both sides.
    """
    for offset in (0.0, 1e-9, 0.5):
        fraction = max(part / (edge + offset) for part, edge in zip(taken, resized, strict=True))
        if all(math.floor(part / fraction) == edge for part, edge in zip(taken, resized, strict=True)):
            return fraction
    raise ConversionError(f"no single crop fraction makes {taken} of {resized}")
