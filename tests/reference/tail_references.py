"""The CDAM family the slow, plain way: the whole model, one image and one target at a time.

S_i = sum_j T_ij df/dT_ij with T the normalised tokens that enter the last attention; the residual stream around that
attention is constant.

Source of all three: Brocki, Binda and Chung, "Class-Discriminative Attention Maps for Vision Transformers", TMLR 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference.whole_model import (
    Function,
    ReferenceMap,
    draws,
    gradient,
    mean_and_error,
    over_tokens,
    quadrature_rule,
    run,
)


def cdam(model: nn.Module, image: Tensor, f: Function, *, parts: bool = False) -> ReferenceMap:
    """Eq. 2 (outputs) and Eq. 3 and 4 (concepts).

    With `parts` also what remains of it with the attention weights held constant (the value part) and the difference
    (the key part: queries and keys).
    """
    scores = _scores(model, image, f, None)
    if not parts:
        return over_tokens(model, image, scores)
    value = _scores(model, image, f, None, constant_weights=True)
    return over_tokens(model, image, scores, value_part=value, key_part=scores - value)


def smooth_cdam(
    model: nn.Module, image: Tensor, f: Function, samples: int, level: float, *, relative: bool, seed: int
) -> ReferenceMap:
    """The mean of CDAM at noisy tokens T' = T + sigma * eps, each multiplied by its own T'.

    `relative`: sigma is `level` times the range of T.
    """
    tokens = run(model, image).tokens[0].detach()
    sigma = level * (tokens.max() - tokens.min()) if relative else level
    noisy = [tokens + sigma * noise for noise in draws(tuple(tokens.shape), samples, seed, tokens.dtype)]
    mean, error = mean_and_error([_scores(model, image, f, shaken) for shaken in noisy])
    return over_tokens(model, image, mean, standard_error=error)


def integrated_cdam(
    model: nn.Module, image: Tensor, f: Function, steps: int, quadrature: str, tolerance: float | None = None
) -> ReferenceMap:
    """Integrated gradients of the tail from T = 0: T times the mean of df/dT along the straight line.

    The sum over all tokens should be f(T) - f(0): Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep
    Networks", ICML 2017, Prop. 1. With a tolerance the steps are doubled until it is, or would exceed 1024.
    """
    start = run(model, image)
    tokens = start.tokens[0].detach()
    nothing = run(model, image, tokens=torch.zeros_like(tokens))
    change = (f(start.latent, start.logits) - f(nothing.latent, nothing.logits)).detach()
    while True:
        total = torch.zeros_like(tokens)
        for point, weight in zip(*quadrature_rule(quadrature, steps), strict=True):
            there = run(model, image, tokens=point * tokens)
            (slope,) = gradient(f(there.latent, there.logits), there.tokens)
            total += weight * slope[0]
        scores = (tokens * total).sum(dim=1)
        residual = float(scores.sum() - change)
        if tolerance is None or abs(residual) <= tolerance or 2 * steps > 1024:
            return over_tokens(model, image, scores, completeness_residual=residual, steps=steps)
        steps *= 2


def _scores(
    model: nn.Module, image: Tensor, f: Function, tokens: Tensor | None, *, constant_weights: bool = False
) -> Tensor:
    """S of all tokens, `(N,)`, at T or at other tokens in its place."""
    there = run(model, image, tokens=tokens, constant_weights=constant_weights)
    (slope,) = gradient(f(there.latent, there.logits), there.tokens)
    return (there.tokens * slope)[0].sum(dim=1).detach()
