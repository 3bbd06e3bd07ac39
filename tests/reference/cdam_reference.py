"""CDAM the slow, plain way: the whole model, one image at a time, one full backward pass per target.

Nothing here is shared with the engine; the fast code is compared with this one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Reference(NamedTuple):
    """One image's map for one target, in the model's dtype.

    Attributes:
        scores: `(h, w)`, one signed score per patch.
        prefix_share: the share of all absolute scores that falls on prefix tokens, 0 to 1.
        logits: `(C,)`, the model's outputs.
    """

    scores: Tensor
    prefix_share: float
    logits: Tensor


def cdam(model: nn.Module, image: Tensor, output: int) -> Reference:
    """The class-discriminative attention map of one image `(3, H, W)` for one of the model's outputs.

    With T the tokens that enter the last attention, normalised, and f the chosen logit, token i scores
    `S_i = sum_j T_ij * df/dT_ij`. The residual stream is held constant: f depends on T through the last attention
    (queries, keys and values) and all that comes after it.

    Source: Brocki, Binda, Chung, "Class-Discriminative Attention Maps for Vision Transformers", TMLR 2024,
    section 3, the equation that defines CDAM.
    """
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Any, ...], tokens: Tensor) -> None:
        tokens.retain_grad()
        kept.append(tokens)

    last = (getattr(model, "blocks_token_only", None) or model.blocks)[-1]  # class attention comes after all else
    handle = last.norm1.register_forward_hook(keep)
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            # A pixel that wants its gradient makes a graph even through a frozen model.
            logits = model(image.detach().clone()[None].requires_grad_())
            logits[0, output].backward()
    finally:
        handle.remove()
        model.zero_grad(set_to_none=True)

    (tokens,) = kept
    assert tokens.grad is not None
    scores = torch.zeros(tokens.shape[1], dtype=tokens.dtype)
    for i in range(tokens.shape[1]):
        scores[i] = (tokens[0, i].detach() * tokens.grad[0, i]).sum()

    h, w = patch_grid(model, image)
    prefix = model.num_prefix_tokens
    assert len(scores) == prefix + h * w
    share = scores[:prefix].abs().sum() / scores.abs().sum()
    return Reference(scores[prefix:].reshape(h, w), float(share), logits[0].detach())


def patch_grid(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Rows and columns of patches; a patch that the image fills only in part counts (timm pads it)."""
    height, width = image.shape[-2:]
    ph, pw = model.patch_embed.patch_size
    return math.ceil(height / ph), math.ceil(width / pw)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """`max|found - expected| / max|expected|`, in double precision."""
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())
