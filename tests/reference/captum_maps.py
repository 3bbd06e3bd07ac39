"""The same methods by captum, as a second opinion: of the whole model, or of the part of it behind T.

Source: Kokhlikyan et al., "Captum: A unified and generic model interpretability library for PyTorch", 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor, nn

from reference.whole_model import Function, draws, over_patches, run

if TYPE_CHECKING:
    from reference.whole_model import Run


def of_pixels(model: nn.Module, f: Function) -> Callable[[Tensor], Tensor]:
    """Pixels `(B, 3, H, W)` to f `(B,)`."""

    def forward(pixels: Tensor) -> Tensor:
        final: list[Tensor] = []
        with model.norm.register_forward_hook(lambda _module, _args, out: final.append(out)):
            logits = model(pixels)
        return torch.stack(list(map(f, model.forward_head(final[0], pre_logits=True), logits)))

    return forward


def of_tokens(model: nn.Module, image: Tensor, f: Function) -> Callable[[Tensor], Tensor]:
    """T `(B, N, D)` of one image to f `(B,)`."""

    def forward(tokens: Tensor) -> Tensor:
        with model.blocks[-1].norm1.register_forward_hook(lambda *_: tokens):
            return of_pixels(model, f)(image.expand(len(tokens), -1, -1, -1))

    return forward


def cdam(model: nn.Module, image: Tensor, f: Function) -> Tensor:
    """`(N,)`, gradient times activation."""
    return InputXGradient(of_tokens(model, image, f)).attribute(_tokens(model, image))[0].sum(dim=1)


def integrated_cdam(model: nn.Module, image: Tensor, f: Function, steps: int, quadrature: str) -> Tensor:
    """`(N,)`."""
    method = IntegratedGradients(of_tokens(model, image, f))
    return method.attribute(_tokens(model, image), n_steps=steps, method=_NAMES[quadrature])[0].sum(dim=1)


def smooth_cdam(model: nn.Module, image: Tensor, f: Function, samples: int, sigma: float, seed: int) -> Tensor:
    """`(N,)`, gradient times activation under captum's noise tunnel."""
    method = NoiseTunnel(InputXGradient(of_tokens(model, image, f)))
    return _tunnel(method, _tokens(model, image), samples, sigma, seed)[0].sum(dim=1)


def input_x_gradient(model: nn.Module, image: Tensor, f: Function) -> Tensor:
    """`(h, w)`."""
    return over_patches(model, image, InputXGradient(of_pixels(model, f)).attribute(_leaf(image[None]))[0])


def smooth_grad(model: nn.Module, image: Tensor, f: Function, samples: int, sigma: float, seed: int) -> Tensor:
    """`(h, w)`, signed gradients under captum's noise tunnel."""
    method = NoiseTunnel(Saliency(of_pixels(model, f)))
    return over_patches(model, image, _tunnel(method, _leaf(image[None]), samples, sigma, seed, abs=False)[0])


def integrated_gradients(model: nn.Module, image: Tensor, f: Function, steps: int, quadrature: str) -> Tensor:
    """`(h, w)`."""
    method = IntegratedGradients(of_pixels(model, f))
    pixels = method.attribute(_leaf(image[None]), n_steps=steps, method=_NAMES[quadrature])[0]
    return over_patches(model, image, pixels)


_NAMES = {"riemann_right": "riemann_right", "gauss_legendre": "gausslegendre"}


def _tunnel(method: NoiseTunnel, start: Tensor, samples: int, sigma: float, seed: int, **more: Any) -> Tensor:
    """Captum draws from torch's global generator; here it is handed the noise of one seed, draw by draw."""
    noise: Iterator[Tensor] = draws(tuple(start.shape[1:]), samples, seed, start.dtype)

    def normal(_mean: float, deviation: Tensor) -> Tensor:
        # Captum's standard deviation is in single precision.
        assert deviation.shape == (samples, *start.shape[1:])
        assert deviation.flatten()[0].item() == pytest.approx(sigma, rel=1e-6)
        return sigma * torch.stack(list(noise))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "normal", normal)
        return method.attribute(start, nt_type="smoothgrad", nt_samples=samples, stdevs=sigma, **more)


def _tokens(model: nn.Module, image: Tensor) -> Tensor:
    there: Run = run(model, image)
    return _leaf(there.tokens)


def _leaf(x: Tensor) -> Tensor:
    """Captum warns when it has to ask for gradients itself."""
    return x.detach().clone().requires_grad_()
