"""Work in pieces, so that memory is bounded whatever is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


def is_wide(device: torch.device) -> bool:
    """Whether a few large steps take less time there than many small ones."""
    return device.type != "cpu"


class Limit(NamedTuple):
    """How many numbers work at a time: on a CPU what its caches hold, on a GPU what keeps all of it busy."""

    cpu: int
    gpu: int

    def on(self, device: torch.device) -> int:
        """The limit for a device."""
        return self.gpu if is_wide(device) else self.cpu


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover 0..count."""
    for start in range(0, count, max(1, size)):
        yield slice(start, min(start + max(1, size), count))
