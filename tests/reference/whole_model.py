"""The untouched timm model, run on one image and listened to: what the references of all methods are made of.

Nothing here is shared with the engine. A target is any function of one image's latent `(D,)` and outputs `(C,)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reference.cdam_reference import patch_grid
from reference.models import blocks

Function = Callable[[Tensor, Tensor], Tensor]


class ReferenceMap(NamedTuple):
    """One image's map for one target, in the model's dtype.

    Attributes:
        scores: `(h, w)`, one score per patch.
        prefix_share: the share of all absolute scores that falls on prefix tokens; None if they have no scores.
        value_part: the part of the scores that goes through the attention's values.
        key_part: the rest.
        standard_error: of the scores, for a mean over draws.
        completeness_residual: sum of all scores less what it should be, for a path integral.
        steps: points on the path.
    """

    scores: Tensor
    prefix_share: float | None = None
    value_part: Tensor | None = None
    key_part: Tensor | None = None
    standard_error: Tensor | None = None
    completeness_residual: float | None = None
    steps: int | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """What was heard in one forward pass; all of it on one autograd graph.

    Attributes:
        pixels: `(3, H, W)`, what the pass started from.
        tokens: T, `(1, N, D)`: the last block's first norm, or what was put in its place.
        attention: A of every block, `(heads, N, N)` each; empty unless asked for.
        final: `(N, D)`, the tokens that the readout reads.
        latent: `(D,)`.
        logits: `(C,)`.
    """

    pixels: Tensor
    tokens: Tensor
    attention: tuple[Tensor, ...]
    final: Tensor
    latent: Tensor
    logits: Tensor


def run(
    model: nn.Module,
    image: Tensor,
    *,
    tokens: Tensor | None = None,
    attention: bool = False,
    constant_weights: bool = False,
) -> Run:
    """Run the model on one image `(3, H, W)`.

    Args:
        tokens: Put in the place of T, `(N, D)`; the residual stream around the last attention stays what it was.
        attention: Whether to listen to the attention weights.
        constant_weights: Whether the last attention's weights are constants to autograd.
    """
    heard: dict[str, Tensor] = {}
    weights: list[Tensor] = []
    with contextlib.ExitStack() as stack:

        def listen(module: nn.Module, hook: Callable[..., Tensor | None]) -> None:
            stack.enter_context(module.register_forward_hook(hook))

        def at_norm1(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            # An alias, so that the gradient is the attention's alone even where the norm is an identity.
            heard["tokens"] = out.view_as(out) if tokens is None else tokens.detach().clone()[None].requires_grad_()
            return heard["tokens"]

        def at_norm(_module: nn.Module, _args: Any, out: Tensor) -> None:
            heard["final"] = out

        def at_weights(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            weights.append(out.detach() if constant_weights and len(weights) == len(blocks(model)) - 1 else out)
            return weights[-1]

        listen(blocks(model)[-1].norm1, at_norm1)
        listen(model.norm, at_norm)
        if attention or constant_weights:
            stack.enter_context(written_out(model))
            for block in blocks(model):
                listen(block.attn.attn_drop, at_weights)
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        pixels = image.detach().clone().requires_grad_()
        logits = model(pixels[None])
        latent = model.forward_head(heard["final"], pre_logits=True)
    assert len(weights) in (0, len(blocks(model)))
    return Run(
        pixels=pixels,
        tokens=heard["tokens"],
        attention=tuple(weights),
        final=heard["final"][0],
        latent=latent[0],
        logits=logits[0],
    )


def gradient(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """d value / d inputs; nothing is left on the model's weights. Zero for an input that the value does not read."""
    return torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


@contextlib.contextmanager
def written_out(model: nn.Module) -> Iterator[None]:
    """Attention written out by timm instead of fused, so that its dropout sees the weights."""
    fused = {module: module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module, value in fused.items():
            module.fused_attn = value


def readout_weights(model: nn.Module, count: int) -> Tensor:
    """rho `(N,)`: how much each of `count` final tokens weighs in what is read out, found by trying.

    Pooling is a function of the tokens; rho is its derivative, if that is the same wherever it is taken and in every
    feature.

    Raises:
        ValueError: The readout is no weighted mean of tokens (maximum, attention).
    """
    found = []
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        width = model.blocks[-1].norm1.weight.shape[0]
        dtype = next(model.parameters()).dtype
        tokens = torch.randn(count, width, generator=random).to(dtype).requires_grad_()
        read: list[Tensor] = []
        with contextlib.ExitStack() as stack, torch.enable_grad():
            if hasattr(model, "fc_norm"):
                stack.enter_context(
                    model.fc_norm.register_forward_pre_hook(lambda _module, args, read=read: read.append(args[0]))
                )
            out = model.forward_head(tokens[None], pre_logits=True)
            pooled = (read or [out])[0]
            for feature in range(0, width, max(1, width // 3)):
                (slope,) = gradient(pooled[0, feature], tokens)
                if slope.count_nonzero() != slope[:, feature].count_nonzero():
                    raise ValueError("the readout mixes features")
                found.append(slope[:, feature])
    if any(not torch.allclose(one, found[0]) for one in found) or not torch.isclose(
        found[0].sum(), found[0].new_ones(())
    ):
        raise ValueError("the readout is not a weighted mean")
    return found[0]


def over_tokens(model: nn.Module, image: Tensor, scores: Tensor, **more: Any) -> ReferenceMap:
    """The map of scores `(N,)` of all tokens; what else has one entry per token is cut likewise."""
    h, w = patch_grid(model, image)
    prefix = model.num_prefix_tokens
    assert scores.shape == (prefix + h * w,)
    total = scores.abs().sum()
    share = scores[:prefix].abs().sum() / total if total > 0 else total
    cut = {name: value[prefix:].reshape(h, w) if isinstance(value, Tensor) else value for name, value in more.items()}
    return ReferenceMap(scores[prefix:].reshape(h, w), float(share), **cut)


def over_patches(model: nn.Module, image: Tensor, pixels: Tensor) -> Tensor:
    """`(h, w)`: sums of `(3, H, W)` over the channels and the pixels of each patch."""
    h, w = patch_grid(model, image)
    down, across = model.patch_embed.patch_size
    sums = pixels.new_zeros(h, w)
    for row in range(h):
        for column in range(w):
            sums[row, column] = pixels[:, row * down : (row + 1) * down, column * across : (column + 1) * across].sum()
    return sums


def draws(shape: tuple[int, ...], count: int, seed: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Standard normal noise, `count` times, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)


def mean_and_error(samples: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Mean, and its standard error: sample standard deviation (n - 1) / sqrt(n)."""
    count = len(samples)
    mean = sum(samples[1:], samples[0]) / count
    if count == 1:
        return mean, None
    squares = [(sample - mean) ** 2 for sample in samples]
    return mean, (sum(squares[1:], squares[0]) / (count - 1) / count).sqrt()


def quadrature_rule(name: str, steps: int) -> tuple[list[float], list[float]]:
    """Points in 0..1 and weights.

    Gauss-Legendre after Golub and Welsch (Mathematics of Computation 1969): the points are the eigenvalues of the
    polynomials' recurrence matrix, the weights the squared first components of its eigenvectors.
    """
    if name == "riemann_right":
        return [k / steps for k in range(1, steps + 1)], [1 / steps] * steps
    recurrence = torch.zeros(steps, steps, dtype=torch.float64)
    for k in range(1, steps):
        recurrence[k, k - 1] = recurrence[k - 1, k] = k / (4 * k * k - 1) ** 0.5
    points, vectors = torch.linalg.eigh(recurrence)
    return ((1 + points) / 2).tolist(), (vectors[0] ** 2).tolist()


def activated(outputs: Tensor, activation: str) -> Tensor:
    """Outputs `(C,)` as probabilities, or as they are."""
    match activation:
        case "softmax":
            powers = torch.exp(outputs - outputs.max())
            return powers / powers.sum()
        case "sigmoid":
            return 1 / (1 + torch.exp(-outputs))
        case "identity":
            return outputs
    raise AssertionError(activation)
