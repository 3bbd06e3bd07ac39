"""A batch of images while it is being explained: what is known of each, and what has been computed so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from cdam_engine import targets
from cdam_engine.tail import Tail, make_tail
from cdam_engine.targets import Scalar, Target, TopK
from cdam_engine.vit import Grid, SplitViT, TrunkOutput


class Batch:
    """Images of one size, all different.

    Args:
        vit: The model.
        grid: The patch grid.
        count: Number of images.
        load: Makes the normalised input (B, 3, H, W) of all images, on the model's device; called if a method needs it.

    Attributes:
        trunk: What the trunk left of the images; None if no method starts from there.
    """

    def __init__(self, vit: SplitViT, grid: Grid, count: int, load: Callable[[], Tensor]) -> None:
        self.vit = vit
        self.grid = grid
        self.trunk: TrunkOutput | None = None
        self._load = load
        self._outputs: list[tuple[Tensor, Tensor] | None] = [None] * count

    @cached_property
    def pixels(self) -> Tensor:
        """Normalised input, shape (B, 3, H, W)."""
        return self._load()

    @property
    def tokens(self) -> int:
        """N, prefix tokens and patches."""
        return self.vit.num_prefix_tokens + self.grid.h * self.grid.w

    def tail(self, images: Sequence[int]) -> Tail:
        """The tail of some images, by their indices."""
        if list(images) == list(range(len(self._outputs))):
            return self._whole_tail
        assert self.trunk is not None
        return make_tail(self.vit, self.trunk.take(images))

    def learn_from_tail(self) -> None:
        """Keep every image's latent and logits."""
        tail = self._whole_tail
        self.learn(range(len(self._outputs)), tail.latent, tail.logits)

    def learn(self, images: Sequence[int], latent: Tensor, logits: Tensor) -> None:
        """Keep latents (B, D) and logits (B, C) of some images, unless they are known."""
        for row, image in enumerate(images):
            if self._outputs[image] is None:
                self._outputs[image] = latent[row].detach(), logits[row].detach()

    def outputs(self, images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, D) and logits (B, C) of some images."""
        known = [output for image in images if (output := self._outputs[image]) is not None]
        assert len(known) == len(images)
        return torch.stack([latent for latent, _ in known]), torch.stack([logits for _, logits in known])

    def resolve(self, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> list[tuple[Scalar, ...]]:
        """The targets of some images, top-k ones replaced by their outputs."""
        # Only top-k must wait for the device.
        needed = any(isinstance(target, TopK) for asked in wanted for target in asked)
        logits = self.outputs(images)[1].cpu() if needed else [torch.zeros(0)] * len(images)
        return [targets.resolve(asked, row) for asked, row in zip(wanted, logits, strict=True)]

    def values(self, images: Sequence[int], resolved: Sequence[Sequence[Scalar]]) -> Tensor:
        """The values f of some images' targets, shape (B, K)."""
        return targets.values(resolved, *self.outputs(images))

    @cached_property
    def _whole_tail(self) -> Tail:
        assert self.trunk is not None
        return make_tail(self.vit, self.trunk)
