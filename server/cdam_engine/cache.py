"""What the trunk made of images seen before, so that another question about them costs the tail alone."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cdam_engine.families import TrunkOutput
from cdam_engine.tail import Tail


def digest(image: Tensor) -> bytes:
    """What makes two images the same: dtype, shape and values."""
    array = image.detach().cpu().contiguous()
    found = hashlib.sha256(f"{array.dtype}{tuple(array.shape)}".encode())
    if array.numel():
        found.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


@dataclass(frozen=True, eq=False)
class CacheEntry:
    """What is kept of an image.

    Attributes:
        trunk: The trunk's output, a batch of one.
        tail: Its tail, if that is small.
    """

    trunk: TrunkOutput
    tail: Tail | None = None

    @property
    def bytes(self) -> int:
        """Bytes of tensors."""
        its = self.trunk
        tensors = [its.residual, its.tokens, *(x for x in its.attention_arguments.values() if isinstance(x, Tensor))]
        return sum(map(_bytes, tensors)) + (self.tail.bytes if self.tail is not None else 0)


class TokenCache:
    """Trunk outputs by model and image, bounded in bytes; the least recently used goes first. Threads may share it.

    Args:
        max_bytes: Most bytes of tensors to keep, on the device where they were made.

    Attributes:
        bytes: Bytes that are kept.
        hits: How often an image was found.
        misses: How often it was not.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[Hashable, CacheEntry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Hashable) -> bool:
        """Whether something is kept of an image; neither hit nor miss."""
        return key in self._kept

    def get(self, key: Hashable) -> CacheEntry | None:
        """What is kept of an image; None if nothing is."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
                self._kept.move_to_end(key)
            return found

    def put(self, key: Hashable, trunk: TrunkOutput, tail: Tail | None = None) -> None:
        """Keep a batch of one, in the place of what is kept, if it is not too large for the cache."""
        # A view would keep its whole batch alive.
        kept = CacheEntry(replace(trunk, residual=_owned(trunk.residual), tokens=_owned(trunk.tokens)), tail)
        if kept.bytes > self.max_bytes:
            return
        with self._lock:
            if (old := self._kept.pop(key, None)) is not None:
                self.bytes -= old.bytes
            self._kept[key] = kept
            self.bytes += kept.bytes
            while self.bytes > self.max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.bytes -= oldest.bytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0


def join(parts: Sequence[TrunkOutput]) -> TrunkOutput:
    """One batch of several of the same grid."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        residual=torch.cat([part.residual for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
    )


def _owned(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() == _bytes(tensor) else tensor.clone()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
