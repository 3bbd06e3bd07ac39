"""A batch of images while it is being explained: what is known of each, and what has been computed so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from cdam_engine import targets
from cdam_engine.families import Grid, TrunkOutput
from cdam_engine.tail import Tail, make_tail
from cdam_engine.targets import Scalar, Target, TopK
from cdam_engine.vit import SplitViT


class Batch:
    """Images of one size, all different.

    Args:
        vit: The model.
        grid: The patch grid.
        count: Number of images.
        load: Makes the normalised input (B, C, H, W) of all images, on the model's device; called if a method needs it.

    Attributes:
        trunk: What the trunk left of the images; None if no method starts from there.
    """

    def __init__(self, vit: SplitViT, grid: Grid, count: int, load: Callable[[], Tensor]) -> None:
        self.vit = vit
        self.grid = grid
        self.trunk: TrunkOutput | None = None
        self._load = load
        self._tail: Tail | None = None
        self._top: dict[tuple[int, TopK], tuple[Scalar, ...]] = {}
        self._outputs: list[tuple[Tensor, Tensor] | None] = [None] * count

    @cached_property
    def pixels(self) -> Tensor:
        """Normalised input, shape (B, C, H, W)."""
        return self._load()

    @property
    def tokens(self) -> int:
        """N, prefix tokens and patches."""
        return self.vit.num_prefix_tokens + self.grid.h * self.grid.w

    def tail(self, images: Sequence[int]) -> Tail:
        """The tail of some images, by their indices."""
        assert self.trunk is not None
        if self._tail is not None and list(images) == list(range(len(self._outputs))):
            return self._tail
        return make_tail(self.vit, self.trunk.take(images))

    def start_from(self, trunk: TrunkOutput, tail: Tail | None = None) -> Tail:
        """Take the trunk's output of all images, and their tail if it is known; learn their latents and logits."""
        self.trunk = trunk
        self._tail = tail or make_tail(self.vit, trunk)
        self.learn(range(len(self._outputs)), self._tail.latent, self._tail.logits)
        return self._tail

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
        return [
            tuple(scalar for target in asked for scalar in self._scalars(image, target))
            for image, asked in zip(images, wanted, strict=True)
        ]

    def _scalars(self, image: int, target: Target) -> tuple[Scalar, ...]:
        if not isinstance(target, TopK):
            return (target,)
        if (image, target) not in self._top:  # the only targets that must wait for the device
            logits = self.outputs([image])[1][0].cpu()
            self._top[image, target] = targets.resolve([target], logits)
        return self._top[image, target]

    def values(self, images: Sequence[int], resolved: Sequence[Sequence[Scalar]]) -> Tensor:
        """The values f of some images' targets, shape (B, K)."""
        return targets.values(resolved, *self.outputs(images))
