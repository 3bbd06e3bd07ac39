"""Between the host and a GPU without a wait that nobody needs.

A copy from ordinary memory waits until the device has done all that was asked of it before; one from pinned memory does
not. Back from the device there is one wait for everything that is copied together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HALF: Final = (torch.bfloat16, torch.float16)


def send(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, of a tensor or of numbers.

    Args:
        values: A tensor, on the host or on the device, or numbers, or sequences of them.
        device: Where it goes.
        dtype: Of the result; None: what it is, or what torch makes of the numbers.
    """
    found = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if device.type != "cuda" or found.is_cuda:
        return found.to(device, dtype or found.dtype)
    # Converted before, since a copy that converts goes by way of ordinary memory.
    return found.to(dtype or found.dtype).pin_memory().to(device, non_blocking=True)


def fetch(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Tensors as arrays, in float32 where numpy does not know their type; of those on a GPU copies, after one wait.

    Args:
        tensors: On the host, or on one GPU.
    """
    found = [widened(its).detach() for its in tensors]
    streams = {torch.cuda.current_stream(its.device) for its in found if its.is_cuda}
    if not streams:
        return [its.cpu().numpy() for its in found]
    found = [torch.empty(its.shape, dtype=its.dtype, pin_memory=True).copy_(its, non_blocking=True) for its in found]
    for stream in streams:
        stream.synchronize()
    return [np.array(its.numpy()) for its in found]  # pinned memory is scarce, and wanted for the next answer


def widened(values: Tensor) -> Tensor:
    """The same in float32 if numpy does not know its type."""
    return values.float() if values.dtype in _HALF else values


def pick(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor, in the order of their indices; all of them in order are the tensor itself."""
    chosen = list(rows)
    return values if chosen == list(range(len(values))) else values[send(chosen, values.device)]
