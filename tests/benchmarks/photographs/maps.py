"""Maps that the engine has no method for: by gradients with respect to unnormalised tokens, and recorded ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from cdam_engine import Explainer, Method, Target
from cdam_engine.batch import Batch
from cdam_engine.methods.base import Scores
from cdam_engine.targets import values


@dataclass(frozen=True)
class UnnormalisedCdam(Method):
    """S_i = sum_j Y_ij df/dX_ij, X the input of the last block: what CDAM's authors say is far worse than theirs.

    Source: Brocki, Binda and Chung (TMLR 2024), section 3.1, where the normalised tokens are said to be far better.

    Attributes:
        times_normalised: Whether Y is the normalised tokens, T. If not it is X, and then the map is nearly zero: the
            norm undoes any change of a token's length, so that f does not change along X (Euler's theorem), but for the
            norm's epsilon.
    """

    kind: ClassVar[str] = "unnormalised_cdam"

    times_normalised: bool = False

    def gradients(self, targets: int) -> int:
        """See `Method`."""
        return targets

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        """See `Method`."""
        assert batch.trunk is not None
        trunk = batch.trunk.take(images)
        targets = batch.resolve(images, wanted)
        with torch.enable_grad():
            x = trunk.residual.detach().requires_grad_()
            tokens = batch.vit.blocks[-1].norm1(x)
            output = batch.vit.tail(replace(trunk, residual=x, tokens=tokens), tokens)
            found = values(targets, output.latent, output.logits)  # (B, K)
            gradients = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in found.T]
        factor = (tokens if self.times_normalised else x).detach()
        return Scores(torch.stack([(factor * gradient).sum(-1) for gradient in gradients], dim=1))


@dataclass(frozen=True)
class Recorded(Method):
    """A map of a journal.

    Attributes:
        name: Its name there.
    """

    kind: ClassVar[str] = "recorded"

    name: str = ""

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        """Nothing can be computed of it."""
        raise NotImplementedError


def norms(explainer: Explainer, pixels: Tensor) -> Tensor:
    """The norm of each patch's token where it enters the last block, (B, h * w), of normalised input (B, C, H, W)."""
    with torch.no_grad():
        trunk = explainer.vit.trunk(pixels)
    found: Tensor = torch.linalg.vector_norm(trunk.residual[:, explainer.vit.num_prefix_tokens :], dim=-1)
    return found
