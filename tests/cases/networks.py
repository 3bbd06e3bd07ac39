"""Small networks for the cases, and the truth about them: a backward pass through the whole, untouched model."""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from cdam_engine import Explainer, Output
from reference.models import blocks, randomise

SIZE = (48, 32)


def network(name: str = "vit_tiny_patch16_224", *, seed: int = 0, **options: Any) -> nn.Module:
    """A small ViT in float64 and eval mode, with weights in which nothing is trivially zero or one."""
    settings = {"img_size": SIZE, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5, **options}
    model: nn.Module = timm.create_model(name, **settings)
    randomise(model, seed)
    return model.double().eval()


def noise(count: int = 2, channels: int = 3, size: tuple[int, int] = SIZE) -> Tensor:
    """Normalised images `(count, channels, H, W)` in float64."""
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1)).double()


def truth(model: nn.Module, pixels: Tensor, output: int) -> tuple[Tensor, Tensor]:
    """Scores of all tokens `(B, N)` for an output, and the model's outputs `(B, C)`.

    Heard by a hook on the last block's first norm, whatever else hooks into the model.
    """
    seen: list[Tensor] = []
    handle = blocks(model)[-1].norm1.register_forward_hook(lambda _module, _given, out: seen.append(out))
    with torch.enable_grad():
        outputs = model(pixels.clone().requires_grad_())
    handle.remove()
    (gradient,) = torch.autograd.grad(outputs[:, output].sum(), seen[-1])
    return (gradient * seen[-1]).sum(dim=-1).detach().reshape(len(pixels), -1), outputs.detach()


def assert_right(model: nn.Module, output: int = 1, tolerance: float = 1e-10) -> None:
    """The explainer's maps and logits are those of the whole model."""
    explainer = Explainer(model)
    pixels = noise(2, explainer.vit.channels, explainer.vit.input_size).to(next(model.parameters()).dtype)
    scores, outputs = truth(model, pixels, output)
    for found, its, row in zip(explainer.explain(pixels, [[Output(output)]] * 2), scores, outputs, strict=True):
        patches = its[explainer.vit.num_prefix_tokens :].numpy()
        np.testing.assert_allclose(found.maps[0].scores.ravel(), patches, rtol=0, atol=tolerance * abs(its).max())
        np.testing.assert_allclose(found.logits, row.numpy(), rtol=0, atol=tolerance * abs(row).max())
