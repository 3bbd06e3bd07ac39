"""Class-discriminative attention maps (CDAM), vanilla, Smooth and Integrated.

Source: Brocki, Binda and Chung, "Class-Discriminative Attention Maps for Vision Transformers" (TMLR 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from cdam_engine.attention import check_known
from cdam_engine.batch import Batch
from cdam_engine.chunks import Limit, chunks, is_wide
from cdam_engine.methods.base import Method, Noise, Quadrature, Scores, at_least_one, check_seed
from cdam_engine.methods.draws import Moments, draws, mean_scores
from cdam_engine.methods.quadrature import nodes
from cdam_engine.pauses import pause
from cdam_engine.tail import ClsTail, Tail, make_tail
from cdam_engine.targets import Scalar, Target
from cdam_engine.transfer import fetch, send
from cdam_engine.vit import SplitViT

MAX_STEPS: Final = 1024
# Noisy numbers at a time. On a GPU the closed form holds some three times as many: 384 MiB in float32; autograd thirty
# times: 480 MiB.
_DRAWN: Final = Limit(cpu=1 << 21, gpu=1 << 25)
_DRAWN_WITH_GRAPH: Final = Limit(cpu=1 << 21, gpu=1 << 22)


@dataclass(frozen=True)
class Cdam(Method):
    """S_i = sum_j T_ij df/dT_ij, T the normalised tokens that enter the last attention (Eq. 2; 3 and 4 for concepts).

    Attributes:
        parts: Also tell the part that goes through the attention's values, its weights held constant. The rest goes
            through the weights: the keys, and the queries of the tokens that are read out.
    """

    kind: ClassVar[str] = "cdam"

    parts: bool = False

    @property
    def variant(self) -> str:
        return "parts" if self.parts else ""

    @classmethod
    def variants(cls) -> Sequence[Method]:
        return cls(), cls(parts=True)

    def check(self, vit: SplitViT) -> None:
        if self.parts:
            check_known(vit.blocks[-1].attn)

    def gradients(self, targets: int) -> int:
        return targets * (2 if self.parts else 1)

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        found = batch.tail(images).scores(batch.resolve(images, wanted), parts=self.parts)
        return Scores(found.scores, value=found.value)


@dataclass(frozen=True)
class SmoothCdam(Method):
    """Mean over draws of sum_j T'_ij df(T')/dT'_ij with T' = T + N(0, sigma^2); the residual stream stays as it is.

    Attributes:
        samples: Number of draws.
        noise: sigma; relative to max T - min T of the image.
        seed: Seed of the draws; the same seed gives the same map, alone or in any batch.
    """

    kind: ClassVar[str] = "smooth_cdam"

    samples: int = 50
    noise: Noise = field(default_factory=lambda: Noise(0.05))
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one("samples", self.samples)
        check_seed(self.seed)

    def gradients(self, targets: int) -> int:
        return targets * self.samples

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        assert batch.trunk is not None
        targets = batch.resolve(images, wanted)
        tokens = batch.trunk.tokens
        sigma = self.noise.sigma(tokens)[:, None, None, None]
        closed = ClsTail.fits(batch.vit, batch.trunk)
        most = (_DRAWN if closed else _DRAWN_WITH_GRAPH).on(tokens.device) // tokens[0].numel()
        at_once = min(self.samples, max(1, most))
        groups = list(chunks(len(images), most // at_once if is_wide(tokens.device) else 1))
        moments = [Moments() for _ in groups]
        # Fresh memory would cost more than the sum.
        buffer = tokens.new_empty((groups[0].stop, at_once, *tokens.shape[1:]))
        for noise in draws(self.seed, self.samples, at_once, tokens[0]):
            for moment, some in zip(moments, groups, strict=True):
                rows = send(images[some], tokens.device)
                out = buffer[: len(rows), : len(noise)]
                torch.addcmul(tokens[rows][:, None], noise, sigma[rows], out=out)
                read = batch.trunk.residual[rows, : batch.vit.num_readout_tokens if closed else None]
                noisy = replace(
                    batch.trunk,
                    residual=read.repeat_interleave(len(noise), dim=0),
                    tokens=out.flatten(0, 1),
                )
                asked = [wanted for wanted in targets[some] for _ in range(len(noise))]
                scores = make_tail(batch.vit, noisy).scores(asked).scores
                moment.add(torch.unflatten(scores, 0, (len(rows), len(noise))).transpose(0, 1))
                pause(tokens.device)
        return mean_scores(moments, tokens, has_prefix=True)


@dataclass(frozen=True)
class IntegratedCdam(Method):
    """sum_j (T - T0)_ij * integral over 0..1 of df/dT_ij at T0 + alpha (T - T0), T0 = 0; the residual stream stays.

    Interpolating the block's input instead would be degenerate, because the norm undoes it.

    Attributes:
        steps: Number of points on the path.
        quadrature: "riemann_right", the paper's sum, or "gauss_legendre".
        tolerance: Double the steps, up to 1024, until |completeness residual| is at most this for every target; None:
            leave them as they are.
    """

    kind: ClassVar[str] = "integrated_cdam"

    steps: int = 50
    quadrature: Quadrature = "riemann_right"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        at_least_one("steps", self.steps)
        nodes(self.quadrature, 1)
        if self.tolerance is not None and not 0 < self.tolerance < float("inf"):
            raise ValueError(f"a tolerance is positive and finite, not {self.tolerance}")

    def gradients(self, targets: int) -> int:
        return targets * (self.steps if self.tolerance is None else 2 * MAX_STEPS)  # at worst

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        targets = batch.resolve(images, wanted)
        tail = batch.tail(images)
        start = tail.values(targets, 0.0)
        change = tail.values(targets, 1.0) - start
        found = self._integrate(tail, targets, change, self.steps)
        steps = [[self.steps] * len(row) for row in targets]
        if self.tolerance is not None:
            for row, image in enumerate(images):
                self._refine(batch.tail([image]), targets[row], change[row], found, steps[row], row)
        return Scores(found.scores, residual=found.residual, steps=steps)

    def _integrate(self, tail: Tail, targets: Sequence[Sequence[Scalar]], change: Tensor, steps: int) -> _Integral:
        scores = tail.scores(targets, *nodes(self.quadrature, steps)).scores
        return _Integral(scores, scores.sum(dim=-1) - change)

    def _refine(
        self,
        tail: Tail,
        targets: Sequence[Scalar],
        change: Tensor,
        found: _Integral,
        steps: list[int],
        row: int,
    ) -> None:
        """Double the steps of one image's maps that are not yet within the tolerance; none depends on another."""
        assert self.tolerance is not None
        number = self.steps
        pending = list(range(len(targets)))
        while 2 * number <= MAX_STEPS:
            (residual,) = fetch([found.residual[row]])
            pending = [k for k in pending if abs(float(residual[k])) > self.tolerance]
            if not pending:
                return
            number *= 2
            finer = self._integrate(tail, [[targets[k] for k in pending]], change[pending], number)
            found.scores[row, pending], found.residual[row, pending] = finer.scores[0], finer.residual[0]
            for k in pending:
                steps[k] = number


class _Integral(NamedTuple):
    """Scores (B, K, N) and completeness residuals (B, K)."""

    scores: Tensor
    residual: Tensor
