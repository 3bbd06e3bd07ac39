"""Models of other libraries: random weights in which nothing is trivially zero or one, and CDAM by a full backward pass
through their own module. Nothing here is shared with the engine or with the conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter anew: weights of norms around 1, all else around 0; in eval mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64).to(parameter.dtype)
            is_scale = (
                parameter.ndim == 1 and ("norm" in name or ".ln_" in name or ".ln." in name) and "bias" not in name
            )
            if is_scale or "lambda" in name or name.endswith("gamma"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim > 1 and parameter.shape[0] > 1:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.5 * noise)
    return module.eval()


class Passed(NamedTuple):
    """What one forward and one backward pass gave.

    Attributes:
        outputs: `(B, C)`: logits or embeddings.
        scores: `(B, N)`: CDAM of every token for the asked scalar, see `cdam_reference`.
    """

    outputs: Tensor
    scores: Tensor


def cdam(
    model: nn.Module, norm1: nn.Module, forward: Callable[[Tensor], Tensor], pixels: Tensor, weights: Tensor
) -> Passed:
    """CDAM of all tokens for the scalar `outputs @ weights`, by a backward pass through the whole untouched model.

    Args:
        model: Theirs.
        norm1: The first LayerNorm of its last block.
        forward: From pixels to outputs.
        pixels: `(B, 3, H, W)`.
        weights: `(C,)`; one-hot for a logit, a concept's vector for an embedding.
    """
    heard: list[Tensor] = []

    def listen(_module: nn.Module, _args: Any, out: Tensor) -> None:
        out.retain_grad()
        heard.append(out)

    handle = norm1.register_forward_hook(listen)
    try:
        outputs = forward(pixels.clone().requires_grad_())
        (outputs @ weights).sum().backward()
    finally:
        handle.remove()
        model.zero_grad(set_to_none=True)
    (tokens,) = heard
    assert tokens.grad is not None
    return Passed(outputs.detach(), (tokens.detach() * tokens.grad).sum(-1))
