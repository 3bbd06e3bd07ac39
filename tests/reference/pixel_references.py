"""Gradients at the pixels the slow, plain way: the whole model, one image and one target at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference.whole_model import (
    Function,
    ReferenceMap,
    draws,
    gradient,
    mean_and_error,
    over_patches,
    quadrature_rule,
    run,
)


def input_x_gradient(model: nn.Module, image: Tensor, f: Function) -> ReferenceMap:
    """x * df/dx: Shrikumar, Greenside, Shcherbina and Kundaje, "Not Just a Black Box", 2016, section 2."""
    return ReferenceMap(over_patches(model, image, image * _slope(model, image, f)))


def smooth_grad(
    model: nn.Module, image: Tensor, f: Function, samples: int, level: float, *, relative: bool, seed: int
) -> ReferenceMap:
    """The mean of df/dx at noisy pixels: Smilkov, Thorat, Kim, Viegas and Wattenberg, "SmoothGrad", 2017, section 2.

    `relative`: sigma is `level` times the range of the pixels.
    """
    sigma = level * (image.max() - image.min()) if relative else level
    noisy = [image + sigma * noise for noise in draws(tuple(image.shape), samples, seed, image.dtype)]
    sums = [over_patches(model, image, _slope(model, shaken, f)) for shaken in noisy]
    mean, error = mean_and_error(sums)
    return ReferenceMap(mean, standard_error=error)


def integrated_gradients(model: nn.Module, image: Tensor, f: Function, steps: int, quadrature: str) -> ReferenceMap:
    """Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", ICML 2017, Eq. 1; baseline zero."""
    total = torch.zeros_like(image)
    for point, weight in zip(*quadrature_rule(quadrature, steps), strict=True):
        total += weight * _slope(model, point * image, f)
    end, start = run(model, image), run(model, torch.zeros_like(image))
    change = (f(end.latent, end.logits) - f(start.latent, start.logits)).detach()
    residual = float((image * total).sum() - change)
    return ReferenceMap(over_patches(model, image, image * total), completeness_residual=residual, steps=steps)


def _slope(model: nn.Module, image: Tensor, f: Function) -> Tensor:
    there = run(model, image)
    (slope,) = gradient(f(there.latent, there.logits), there.pixels)
    return slope
