"""What explainers of one trunk share: the trunk itself, how images reach it, and what it made of recent ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cdam_engine.cache import CacheEntry, TokenCache, digest, join
from cdam_engine.clock import Clock
from cdam_engine.families import TrunkOutput
from cdam_engine.preprocess import DataConfig, normalise
from cdam_engine.transfer import send
from cdam_engine.trunk import Trunk
from cdam_engine.vit import SplitViT


class Fetched(NamedTuple):
    """The trunk's output of some images, and which of them the cache knew.

    Attributes:
        trunk: In the images' order.
        hits: For each image whether it was kept.
        alone: What was kept of a single image.
    """

    trunk: TrunkOutput
    hits: list[bool]
    alone: CacheEntry | None


@dataclass(frozen=True, eq=False)
class Trunks:
    """A trunk with its cache.

    Attributes:
        vit: The model that it is the trunk of.
        run: The trunk.
        cache: What is kept of recent images, or None.
        name: What tells the trunk from all others in a shared cache.
        data_config: How the model wants its pixels; needed for uint8 pixels alone.
        made: Outputs that were made for several explainers at once, by the images' keys.
    """

    vit: SplitViT
    run: Trunk
    cache: TokenCache | None
    name: str
    data_config: Callable[[], DataConfig]
    made: Mapping[Hashable, TrunkOutput] = field(default_factory=dict)

    def with_made(self, made: Mapping[Hashable, TrunkOutput]) -> Trunks:
        """The same, with outputs that need not be made again."""
        return replace(self, made=made)

    def keys(self, images: Tensor, *, several: bool = False) -> list[Hashable]:
        """What is equal for equal images, if they are looked at: for a cache, or where a pass costs more than a digest.

        Args:
            images: A batch.
            several: Whether other batches are compared with it.
        """
        on_gpu = images.is_cuda or next(self.vit.model.parameters()).is_cuda
        if self.cache is None and not several and (len(images) == 1 or on_gpu):
            return list(range(len(images)))
        return [(self.name, digest(image)) for image in images.detach().cpu()]

    def load(self, images: Tensor) -> Tensor:
        """Normalised input on the model's device."""
        if images.is_inference():  # which autograd refuses; a copy is a tensor like any other
            images = images.clone()
        if images.dtype != torch.uint8:
            return images.detach()
        weight = next(self.vit.model.parameters())
        return normalise(send(images, weight.device), self.data_config(), weight.dtype)

    def fetch(
        self, images: Tensor, keys: Sequence[Hashable], clock: Clock, load: Callable[[], Tensor] | None = None
    ) -> Fetched:
        """The trunk's output of some images: from those made before, the cache, or a run for all others.

        Args:
            images: The images, all different.
            keys: Their keys.
            clock: Books the run.
            load: The normalised input of all of them, if somebody else wants it, too.
        """
        kept = [None if self.cache is None or key in self.made else self.cache.get(key) for key in keys]
        known = [self.made.get(key) if found is None else found.trunk for key, found in zip(keys, kept, strict=True)]
        hits = [found is not None for found in kept]
        missing = [place for place, found in enumerate(known) if found is None]
        with clock("trunk") if missing else nullcontext():
            if missing and len(missing) == len(keys):
                trunk = self.run(self.load(images) if load is None else load())
            else:
                if missing:
                    out = self.run(self.load(images[missing]))
                    known = [
                        out.part(missing.index(place)) if found is None else found for place, found in enumerate(known)
                    ]
                trunk = join([found for found in known if found is not None])
        return Fetched(trunk, hits, kept[0] if len(keys) == 1 else None)
