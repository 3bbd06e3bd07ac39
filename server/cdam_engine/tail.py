"""The tail under autograd: the reference for every faster way, and the way for every architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from cdam_engine.targets import Scalar
from cdam_engine.vit import SplitViT, TrunkOutput


class AutogradTail:
    """One forward pass of the tail over a batch, kept for any number of backward passes.

    Attributes:
        tokens: T, shape (B, N, D).
        latent: Shape (B, D), detached.
        logits: Shape (B, C), detached.
    """

    def __init__(self, vit: SplitViT, trunk: TrunkOutput) -> None:
        with torch.enable_grad():
            self._tokens = trunk.tokens.detach().requires_grad_()
            self._output = vit.tail(trunk, self._tokens)
        self.tokens = self._tokens.detach()
        self.latent = self._output.latent.detach()
        self.logits = self._output.logits.detach()

    def gradients(self, targets: Sequence[Sequence[Scalar]]) -> Iterator[Tensor]:
        """Gradients df/dT, shape (B, N, D): first of every image's first target, then of every second one, ...

        No image depends on another, so the gradient of a sum over images is each image's own gradient; one backward
        pass serves as many targets as there are images. Where an image has no further target its gradient is zero.

        Args:
            targets: The targets of each image, B sequences of any lengths.
        """
        for row in zip_longest(*targets):
            with torch.enable_grad():
                total = torch.stack(
                    [
                        target(self._output.latent[b], self._output.logits[b])
                        for b, target in enumerate(row)
                        if target is not None
                    ]
                ).sum()
                (gradient,) = torch.autograd.grad(total, self._tokens, retain_graph=True)
            yield gradient
