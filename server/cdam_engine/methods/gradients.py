"""Gradients with respect to the model's input, summed over each patch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from cdam_engine.batch import Batch
from cdam_engine.chunks import Limit, chunks
from cdam_engine.families import TailOutput
from cdam_engine.methods.base import Method, Noise, Quadrature, Scores, at_least_one, check_seed
from cdam_engine.methods.draws import Moments, draws, mean_scores
from cdam_engine.methods.quadrature import nodes
from cdam_engine.pauses import pause
from cdam_engine.targets import Scalar, Target, values
from cdam_engine.transfer import pick, send

# Of what a backward pass needs: 192 MiB in float32, where more is not faster and rests are rarer; 2 GiB.
_MAX_ELEMENTS: Final = Limit(cpu=3 << 24, gpu=1 << 29)


@dataclass(frozen=True)
class InputXGradient(Method):
    """x df/dx, x the normalised input.

    Source: Shrikumar et al., "Not Just a Black Box" (2016).
    """

    kind: ClassVar[str] = "input_x_gradient"
    reads_tokens: ClassVar[bool] = False

    def passes(self, targets: int, patches: int) -> int:
        return targets

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        found = []
        for some in chunks(len(images), _at_once(batch)):
            chosen = list(images[some])
            x, output = _forward(batch, pick(batch.pixels, chosen))
            batch.learn(chosen, *output)
            targets = batch.resolve(chosen, wanted[some])
            found.append(_stack([_by_patch(batch, x.detach() * g) for g in _gradients(x, output, targets)], x))
        return Scores(torch.cat(found), has_prefix=False)


@dataclass(frozen=True)
class SmoothGrad(Method):
    """Mean over draws of df/dx at x + N(0, sigma^2), signed.

    Source: Smilkov et al., "SmoothGrad" (2017).

    Attributes:
        samples: Number of draws.
        noise: sigma; relative to max x - min x of the image.
        seed: Seed of the draws; the same seed gives the same map, alone or in any batch.
    """

    kind: ClassVar[str] = "smooth_grad"

    samples: int = 50
    noise: Noise = field(default_factory=lambda: Noise(0.15))
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one("samples", self.samples)
        check_seed(self.seed)

    def passes(self, targets: int, patches: int) -> int:
        return self.samples * targets

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        targets = batch.resolve(images, wanted)
        sigma = self.noise.sigma(batch.pixels)
        moments = [Moments() for _ in images]
        for noise in draws(self.seed, self.samples, _at_once(batch), batch.pixels[0]):
            for row, image in enumerate(images):
                x, output = _forward(batch, batch.pixels[image] + sigma[image] * noise)
                gradients = _gradients(x, output, [targets[row]] * len(noise))
                found = _stack([_by_patch(batch, gradient) for gradient in gradients], x)
                moments[row].add(found[:, None])
        return mean_scores(moments, batch.pixels, has_prefix=False)


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """x times the integral over 0..1 of df/dx at alpha x: from the mean-colour image, 0 in the normalised input, to x.

    Source: Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks" (ICML 2017), Eq. 1.

    Attributes:
        steps: Number of points on the path.
        quadrature: "riemann_right" or "gauss_legendre".
    """

    kind: ClassVar[str] = "integrated_gradients"

    steps: int = 50
    quadrature: Quadrature = "riemann_right"

    def __post_init__(self) -> None:
        at_least_one("steps", self.steps)
        nodes(self.quadrature, 1)

    def passes(self, targets: int, patches: int) -> int:
        return self.steps * targets

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        targets = batch.resolve(images, wanted)
        points, weights = (
            send(numbers, batch.pixels.device, batch.pixels.dtype) for numbers in nodes(self.quadrature, self.steps)
        )
        baseline = _outputs(batch, torch.zeros_like(batch.pixels[:1]))
        maps, residuals = [], []
        for row, image in enumerate(images):
            pixels, asked = batch.pixels[image], targets[row]
            total: Tensor | float = 0.0
            for some in chunks(self.steps, _at_once(batch)):
                x, output = _forward(batch, points[some, None, None, None] * pixels)
                gradients = _gradients(x, output, [asked] * len(x))
                total = total + _stack([torch.einsum("n,nchw->chw", weights[some], g)[None] for g in gradients], x)[0]
            maps.append(_by_patch(batch, pixels * total))
            change = batch.values([image], [asked]) - values([asked], *baseline)
            residuals.append(maps[-1].sum(dim=-1) - change[0])
        return Scores(
            torch.stack(maps),
            has_prefix=False,
            residual=torch.stack(residuals),
            steps=[[self.steps] * len(row) for row in targets],
        )


def _at_once(batch: Batch) -> int:
    """How many images a backward pass through the whole model may take."""
    vit = batch.vit
    return max(1, _MAX_ELEMENTS.on(batch.pixels.device) // (20 * batch.tokens * vit.width * len(vit.blocks)))


def _forward(batch: Batch, pixels: Tensor) -> tuple[Tensor, TailOutput]:
    """The input as a leaf, and what the model makes of it, with a graph from the one to the other."""
    with torch.enable_grad():
        x = pixels.detach().requires_grad_()
        return x, _outputs(batch, x)


def _outputs(batch: Batch, pixels: Tensor) -> TailOutput:
    trunk = batch.vit.trunk(pixels)
    return batch.vit.tail(trunk, trunk.tokens)


def _gradients(x: Tensor, output: TailOutput, targets: Sequence[Sequence[Scalar]]) -> Iterator[Tensor]:
    """df/dx, shape of x: first of every image's first target, then of every second one, ..."""
    for row in zip(*targets, strict=True):
        with torch.enable_grad():
            total = values([[f] for f in row], *output).sum()
            (gradient,) = torch.autograd.grad(total, x, retain_graph=True)
        pause(x.device)
        yield gradient


def _by_patch(batch: Batch, values: Tensor) -> Tensor:
    """Sums over channels and each patch's pixels: (..., C, H, W) to (..., h * w)."""
    summed = values.sum(dim=-3)
    down, across = batch.vit.patch_size
    missing = batch.grid.h * down - summed.shape[-2], batch.grid.w * across - summed.shape[-1]
    padded = F.pad(summed, (0, missing[1], 0, missing[0]))  # where the model pads its input to whole patches
    columns = torch.unflatten(padded, -1, (batch.grid.w, across))
    tiles = torch.unflatten(columns, -3, (batch.grid.h, down))
    return tiles.sum(dim=(-3, -1)).flatten(-2)


def _stack(per_target: Sequence[Tensor], like: Tensor) -> Tensor:
    """(B, K, ...) of K tensors (B, ...)."""
    return torch.stack(list(per_target), dim=1) if per_target else like.detach().new_zeros((len(like), 0, 1))
