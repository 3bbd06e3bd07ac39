"""A batch of images while it is being explained: what is known of each, and what has been computed so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from torch import Tensor

from cdam_engine import targets
from cdam_engine.families import Grid, TrunkOutput
from cdam_engine.tail import Tail, make_tail
from cdam_engine.targets import Output, Scalar, Target, TopK
from cdam_engine.transfer import fetch, pick, send
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
        self._count = count
        self._known: set[int] = set()
        self._outputs: tuple[Tensor, Tensor] | None = None  # of all images, whoever is known

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
        if self._tail is not None and list(images) == list(range(self._count)):
            return self._tail
        return make_tail(self.vit, self.trunk.take(images))

    def start_from(self, trunk: TrunkOutput, tail: Tail | None = None) -> Tail:
        """Take the trunk's output of all images, and their tail if it is known; learn their latents and logits."""
        self.trunk = trunk
        self._tail = tail or make_tail(self.vit, trunk)
        self.learn(range(self._count), self._tail.latent, self._tail.logits)
        return self._tail

    def learn(self, images: Sequence[int], latent: Tensor, logits: Tensor) -> None:
        """Keep latents (B, D) and logits (B, C) of some images, unless they are known."""
        new: dict[int, int] = {}
        for row, image in enumerate(images):
            if image not in self._known:
                new.setdefault(image, row)
        if not new:
            return
        latent, logits = latent.detach(), logits.detach()
        if list(images) == list(new) == list(range(self._count)):
            self._outputs = latent, logits
        else:
            if self._outputs is None:
                self._outputs = (
                    latent.new_empty(self._count, latent.shape[1]),
                    logits.new_empty(self._count, logits.shape[1]),
                )
            places, rows = send([list(new), list(new.values())], latent.device)
            for all_of_them, its in zip(self._outputs, (latent, logits), strict=True):
                all_of_them[places] = its[rows]
        self._known.update(new)

    def outputs(self, images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, D) and logits (B, C) of some images."""
        assert self._outputs is not None
        assert self._known.issuperset(images)
        latent, logits = self._outputs
        return pick(latent, images), pick(logits, images)

    def resolve(self, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> list[tuple[Scalar, ...]]:
        """The targets of some images, top-k ones replaced by their outputs."""
        self._find_top(
            {
                (image, target): None
                for image, asked in zip(images, wanted, strict=True)
                for target in asked
                if isinstance(target, TopK) and (image, target) not in self._top
            }
        )
        return [
            tuple(
                scalar
                for target in asked
                for scalar in (self._top[image, target] if isinstance(target, TopK) else (target,))
            )
            for image, asked in zip(images, wanted, strict=True)
        ]

    def _find_top(self, new: Iterable[tuple[int, TopK]]) -> None:
        """Learn which outputs top-k targets stand for: the only ones that must wait for the device, all of them at once."""
        asked = list(new)
        if not asked:
            return
        images = sorted({image for image, _ in asked})
        logits = self.outputs(images)[1]
        # Equal logits keep the order of their indices.
        order = logits.argsort(dim=1, descending=True, stable=True)[:, : max(target.k for _, target in asked)]
        (found,) = fetch([order])
        for image, target in asked:
            best = found[images.index(image), : target.k].tolist()
            self._top[image, target] = tuple(Output(index) for index in best)

    def values(self, images: Sequence[int], resolved: Sequence[Sequence[Scalar]]) -> Tensor:
        """The values f of some images' targets, shape (B, K)."""
        return targets.values(resolved, *self.outputs(images))
