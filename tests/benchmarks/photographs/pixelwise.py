"""Maps over pixels of the methods that differentiate for them, as the papers rank them; the engine's are sums over patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.photographs.choice import Chosen, sample
from benchmarks.photographs.measuring import BOXES, DISCRIMINATION, FIDELITY, Measuring, Sigmas
from benchmarks.sheets import as_lists
from cdam_engine import Explainer, InputXGradient, IntegratedGradients, Method, Noise, Output, SmoothGrad
from cdam_engine.evaluation import Compactness, Protocol, Sample
from cdam_engine.evaluation.perturbation import MapOf
from cdam_engine.evaluation.subject import Subject
from cdam_engine.methods.draws import draws
from cdam_engine.methods.quadrature import nodes

_STEPS: Final = 50  # and draws, as in the paper's integrated gradients
_AT_ONCE: Final = 25  # images in a backward pass


def protocol(sigmas: Sigmas) -> Protocol:
    """Of X_multi, both classes of each photograph."""
    methods = (
        InputXGradient(),
        SmoothGrad(samples=_STEPS, noise=Noise(sigmas.smooth_grad)),
        IntegratedGradients(steps=_STEPS),
    )
    return Protocol(methods, (FIDELITY, BOXES, Compactness(), DISCRIMINATION))


def record(measuring: Measuring, explainer: Explainer, chosen: Chosen) -> dict[str, Any]:
    """A journal's line of a photograph: both turns measured with sums over patches, and with scores of pixels."""
    its = sample(chosen, explainer.data_config)
    with torch.inference_mode(mode=False), torch.no_grad():
        patches = measuring.measure(its)
        pixels = PixelMeasuring(explainer, measuring.evaluator.protocol).measure(its)
    return {
        "id": its.id,
        "classes": list(chosen.classes),
        "patches": [as_lists(turn) for turn in patches],
        "pixels": [as_lists(turn) for turn in pixels],
    }


class PixelMeasuring(Measuring):
    """Measures the scores of pixels in the place of their sums over patches."""

    def prepared(self, its: Sample) -> Subject:
        """See `Measuring`."""
        subject = super().prepared(its)
        for name in subject.maps:
            assert isinstance(name.evaluated, Method)
            target = its.wrong_target if name.wrong else its.target
            assert isinstance(target, Output)
            (scores,) = pixel_maps(self.explainer, subject.pixels, [target.index], name.evaluated)
            put_pixels(subject, name, scores)
        return subject


def put_pixels(subject: Subject, name: MapOf, scores: Tensor) -> None:
    """Rank and sum by the scores of pixels, shape (H, W), whatever a metric would enlarge."""
    subject.maps[name] = scores.double().cpu().numpy()
    subject._enlarged[name, "bilinear"] = subject.maps[name]


def pixel_maps(explainer: Explainer, x: Tensor, outputs: Sequence[int], method: Method) -> list[Tensor]:
    """The scores of pixels, summed over channels, shape (H, W), of each output.

    Args:
        explainer: Of the model.
        x: The normalised image, (C, H, W).
        outputs: Whose logits are explained.
        method: One that differentiates for pixels.
    """
    match method:
        case InputXGradient():
            (gradients,) = _gradients(explainer, x[None], outputs, [1.0])
            return [(x * gradient).sum(0) for gradient in gradients]
        case IntegratedGradients(steps, quadrature):
            points, weights = nodes(quadrature, steps)
            path = x * torch.tensor(points, dtype=x.dtype, device=x.device)[:, None, None, None]
            parts = _gradients(explainer, path, outputs, list(weights))
            return [(x * sum(of_one)).sum(0) for of_one in zip(*parts, strict=True)]
        case SmoothGrad(samples, noise, seed):
            sigma = noise.sigma(x[None])[0]
            noisy = torch.cat([x + sigma * some for some in draws(seed, samples, _AT_ONCE, x)])
            parts = _gradients(explainer, noisy, outputs, [1 / samples] * samples)
            return [sum(of_one).sum(0) for of_one in zip(*parts, strict=True)]
    raise TypeError(f"{method} does not differentiate for pixels")


def _gradients(
    explainer: Explainer, images: Tensor, outputs: Sequence[int], weights: Sequence[float]
) -> list[list[Tensor]]:
    """The weighted sum of the gradients for images (n, C, H, W), of each output, in parts of so many at once."""
    found = []
    for some, factors in zip(images.split(_AT_ONCE), torch.tensor(weights).split(_AT_ONCE), strict=True):
        with torch.enable_grad():
            leaf = some.detach().requires_grad_()
            logits = explainer.vit.model(leaf)
            each = [torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)[0] for k in outputs]
        found.append([torch.einsum("n,nchw->chw", factors.to(some), gradient) for gradient in each])
    return found
