"""Class-discriminative attention maps (CDAM).

Source: Brocki, Binda and Chung, "Class-Discriminative Attention Maps for Vision Transformers" (TMLR 2024), Eq. 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdam_engine.tail import AutogradTail
from cdam_engine.targets import Scalar


def cdam(tail: AutogradTail, targets: Sequence[Sequence[Scalar]]) -> Tensor:
    """S_i = sum_j T_ij df/dT_ij for every token i, T the normalised tokens that enter the last attention.

    Args:
        tail: The tail of a batch of B images with N tokens each.
        targets: The targets f of each image; K is the largest number of them.

    Returns:
        Scores of all tokens, prefix tokens first, shape (B, K, N); zero where an image has fewer than K targets.
    """
    scores = [(tail.tokens * gradient).sum(dim=-1) for gradient in tail.gradients(targets)]
    if not scores:
        return tail.tokens.new_zeros((tail.tokens.shape[0], 0, tail.tokens.shape[1]))
    return torch.stack(scores, dim=1)
