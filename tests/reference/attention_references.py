"""Attention, rollout, relevance propagation and partial LRP the slow, plain way, from attention weights overheard."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.models import blocks
from reference.whole_model import Function, ReferenceMap, gradient, over_tokens, readout_weights, run, written_out

EPSILON = 1e-9


def attention(model: nn.Module, image: Tensor, heads: tuple[int, ...] = ()) -> ReferenceMap:
    """What the readout's tokens attend to in the last block, mean over heads.

    For [CLS] that is what Caron et al. show ("Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021).
    """
    last = run(model, image, attention=True).attention[-1][0].detach()
    chosen = heads or range(len(last))
    scores = torch.zeros_like(last[0, 0])
    asking = last.shape[1]  # [CLS] alone where it is the only one that attends
    for token, weight in enumerate(readout_weights(model, last.shape[-1])[:asking]):
        for head in chosen:
            scores += weight * last[head, token] / len(chosen)
    return over_tokens(model, image, scores)


def attention_rollout(model: nn.Module, image: Tensor) -> ReferenceMap:
    """Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, Eq. 1 with A = (W + I) / 2."""
    rollout = None
    for weights in run(model, image, attention=True).attention:
        mixed = weights[0].detach().mean(dim=0)
        mixed = (mixed + torch.eye(len(mixed), dtype=mixed.dtype)) / 2
        rollout = mixed if rollout is None else mixed @ rollout
    assert rollout is not None
    return over_tokens(model, image, readout_weights(model, len(rollout)) @ rollout)


def relevance_propagation(model: nn.Module, image: Tensor, f: Function) -> ReferenceMap:
    """Chefer, Gur and Wolf, "Generic Attention-model Explainability", ICCV 2021, Eq. 5 and 6 for self-attention.

    R = I; for every block R <- R + Abar R with Abar the mean over heads of the positive part of (df/dA) * A.
    """
    there = run(model, image, attention=True)
    slopes = gradient(f(there.latent, there.logits), *there.attention)
    relevance = torch.eye(slopes[0].shape[-1], dtype=slopes[0].dtype)
    for weights, slope in zip(there.attention, slopes, strict=True):
        product = (slope * weights)[0].detach()
        positive = torch.where(product > 0, product, torch.zeros_like(product))
        relevance = relevance + positive.mean(dim=0) @ relevance
    return over_tokens(model, image, readout_weights(model, len(relevance)) @ relevance)


def partial_lrp(model: nn.Module, image: Tensor, f: Function) -> ReferenceMap:
    """Layer-wise relevance propagation from the target, 1, down to the last attention's weights.

    Voita et al., "Analyzing Multi-Head Self-Attention", ACL 2019, with the rules for ViT of Chefer, Gur and Wolf,
    "Transformer Interpretability Beyond Attention Visualization", CVPR 2021, Eq. 3 to 8 (with the residual sum's
    relevance shared in proportion, not normalised again as in Eq. 9 and 10): linear layers share relevance in
    proportion to same-signed products x_i w_ij; norms, activations and layer scales pass it on; a product of matrices
    gives half to either. Only [CLS]'s row of the attention is followed, for only it reaches the target. The target is
    a linear unit on the latent, as an output is; one that is not linear is replaced by its gradient there.
    """
    block = blocks(model)[-1]
    attn, mlp = block.attn, block.mlp
    seen = _inputs(
        model,
        image,
        {
            "norm1": block.norm1,
            "norm2": block.norm2,
            "fc1": mlp.fc1,
            "fc2": mlp.fc2,
            "proj": attn.proj,
            "end": model.norm,
        },
    )
    latent = run(model, image).latent.detach().requires_grad_()
    (unit,) = gradient(f(latent, model.head(latent)), latent)
    relevance = _through_linear(latent.detach(), unit[None], torch.ones_like(unit[:1]))

    middle = seen["norm2"][0, 0]
    skipped, through = _shares(middle, seen["end"][0, 0] - middle, relevance)
    through = _through_linear(seen["fc2"][0, 0], mlp.fc2.weight, through)
    through = _through_linear(seen["fc1"][0, 0], mlp.fc1.weight, through)
    relevance = skipped + through

    entering = seen["norm1"][0, 0]
    _, through = _shares(entering, middle - entering, relevance)
    through = _through_linear(seen["proj"][0, 0], attn.proj.weight, through)

    weights = run(model, image, attention=True).attention[-1][0].detach()
    values = _values(attn, run(model, image).tokens[0].detach())
    heads, _, width = values.shape
    through = through.reshape(heads, width)
    scores = torch.zeros_like(weights[0, 0])
    for head in range(heads):
        attended = weights[head, 0] @ values[head]
        for token in range(len(scores)):
            share = (values[head, token] * _divide(through[head], attended)).sum()
            scores[token] += (weights[head, 0, token] * share / 2).clamp(min=0) / heads
    return over_tokens(model, image, scores)


def _through_linear(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of a linear layer's input `(I,)` from that of its output `(O,)`: the alpha = 1, beta = 0 rule."""
    shared = torch.zeros_like(x)
    for row, amount in zip(weight.detach(), relevance, strict=True):
        same_sign = x.clamp(min=0) * row.clamp(min=0) + x.clamp(max=0) * row.clamp(max=0)
        shared += same_sign * _divide(amount, same_sign.sum())
    return shared


def _shares(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """The relevance of either summand of a + b."""
    unit = _divide(relevance, a + b)
    return a * unit, b * unit


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Division that gives 0 for x / 0, and moves a denominator by a hair, as Chefer et al. do."""
    return torch.where(denominator == 0, torch.zeros_like(denominator), numerator / (denominator + EPSILON))


def _values(attn: nn.Module, tokens: Tensor) -> Tensor:
    """V, `(heads, N, head width)`, from the tokens `(N, D)` that enter the attention."""
    if getattr(attn, "qkv", None) is None:
        flat = (attn.v if hasattr(attn, "v") else attn.v_proj)(tokens)
        groups = attn.num_heads // getattr(attn, "num_kv_heads", attn.num_heads)
    else:
        rows = attn.qkv.weight.shape[0] // 3
        bias = attn.qkv.bias[2 * rows :] if attn.qkv.bias is not None else getattr(attn, "v_bias", None)
        flat = F.linear(tokens, attn.qkv.weight[2 * rows :], bias)
        groups = 1
    heads = attn.num_heads // groups
    return flat.detach().reshape(len(tokens), heads, -1).transpose(0, 1).repeat_interleave(groups, dim=0)


@torch.no_grad()
def _inputs(model: nn.Module, image: Tensor, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What each module was first called with."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Any, ...]) -> None:
        seen.setdefault(name, args[0])

    with contextlib.ExitStack() as stack:
        stack.enter_context(written_out(model))
        for name, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(lambda _module, args, name=name: keep(name, args)))
        model(image[None])
    return seen
