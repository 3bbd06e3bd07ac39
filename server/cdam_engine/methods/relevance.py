"""Relevance that is propagated back through the model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from cdam_engine import attention
from cdam_engine.batch import Batch
from cdam_engine.chunks import Limit, chunks
from cdam_engine.errors import UnsupportedMethodError
from cdam_engine.families import Readout, layer_scale
from cdam_engine.methods.base import Method, Scores
from cdam_engine.pauses import pause
from cdam_engine.targets import Scalar, Target, values
from cdam_engine.transfer import pick
from cdam_engine.vit import SplitViT

_MAX_WEIGHTS: Final = Limit(cpu=1 << 25, gpu=1 << 28)  # kept for a backward pass: 128 MiB in float32; 1 GiB
_EPSILON: Final = 1e-9


@dataclass(frozen=True)
class RelevancePropagation(Method):
    """R <- R + E_h[(df/dA * A)^+] R from R = I through all blocks; the readout's row rho^T R.

    Source: Chefer, Gur and Wolf, "Generic Attention-model Explainability" (ICCV 2021), Eq. 5 and 6. The product is
    taken from the readout down, a row at a time: O(L N^2), not O(L N^3). Each image's gradients are its own.
    """

    kind: ClassVar[str] = "relevance_propagation"
    reads_tokens: ClassVar[bool] = False

    def check(self, vit: SplitViT) -> None:
        vit.check_readout()
        vit.check_attend()

    def passes(self, targets: int, patches: int) -> int:
        return targets

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        vit = batch.vit
        at_once = _MAX_WEIGHTS.on(batch.pixels.device) // (batch.tokens**2 * vit.num_heads * len(vit.blocks))
        found = [self._propagate(batch, list(images[some]), wanted[some]) for some in chunks(len(images), at_once)]
        return Scores(torch.cat(found))

    def _propagate(self, batch: Batch, images: list[int], wanted: Sequence[Sequence[Target]]) -> Tensor:
        vit = batch.vit
        embedded = vit.embed(pick(batch.pixels, images))
        last = len(vit.blocks) - 1
        with torch.enable_grad():
            x, weights = embedded.tokens.detach().requires_grad_(), []
            for index, arguments in enumerate(embedded.arguments):
                bias = vit.position_bias(index, arguments)
                x, a = vit.attend(index, x, arguments, bias, vit.rows_read if index == last else None)
                weights.append(a)
                pause(x.device, brief=True)
            output = vit.read_out(vit.final_norm(x, embedded.grid))
        batch.learn(images, *output)
        targets = batch.resolve(images, wanted)
        rho = vit.readout_weights(embedded.tokens).expand(len(images), 1, -1)
        found = []
        for row in zip(*targets, strict=True):
            with torch.enable_grad():
                total = values([[f] for f in row], *output).sum()
                gradients = torch.autograd.grad(total, weights, retain_graph=True)
            pause(rho.device)
            relevance = rho
            for a, gradient in zip(reversed(weights), reversed(gradients), strict=True):
                positive = (a.detach() * gradient).clamp_(min=0).mean(dim=1)
                relevance = relevance + relevance[..., : positive.shape[1]] @ positive
            found.append(relevance)
        return torch.cat(found, dim=1) if found else rho[:, :0]


@dataclass(frozen=True)
class PartialLrp(Method):
    """Layer-wise relevance of the last block's attention weights in the [CLS] row, its positive part, mean over heads.

    Relevance 1 starts at the target, a linear unit on the latent (where it is none, its gradient there), and goes down:
    linear layers by the alpha-1 beta-0 rule without bias; norms, activations and LayerScale pass it on; the residual
    sum shares it out in proportion; A V gives half of it to A. Sums are those of one image.

    Source: Voita et al., "Analyzing Multi-Head Self-Attention" (ACL 2019), as Chefer, Gur and Wolf (CVPR 2021) take it
    for ViT, their baseline "partial LRP" (there one of the rule's two denominators counts a term twice; not here).
    """

    kind: ClassVar[str] = "partial_lrp"

    def check(self, vit: SplitViT) -> None:
        block = vit.blocks[-1]
        if vit.readout is not Readout.CLS_TOKEN:
            raise UnsupportedMethodError("NO_CLS_READOUT", f"partial LRP starts at [CLS], its readout is {vit.readout}")
        attention.check_known(block.attn)
        if not (
            attention.is_plain(block.mlp, Mlp)
            and all(attention.is_plain(part, nn.Linear) for part in (block.mlp.fc1, block.mlp.fc2, block.attn.proj))
            and getattr(block.attn, "gate", None) is None
            and (not vit.num_outputs or attention.is_plain(vit.family.head, nn.Linear))
        ):
            raise UnsupportedMethodError("NO_LRP_RULE", "partial LRP has rules for a plain MLP and linear layers only")

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        assert batch.trunk is not None
        self.check(batch.vit)
        targets = batch.resolve(images, wanted)
        vit, trunk = batch.vit, batch.trunk.take(images)
        block = vit.blocks[-1]
        # Forward, the [CLS] row alone: (B, 1, ...) throughout, to go with K targets.
        projected = attention.project(block.attn, trunk.tokens, trunk.attention_arguments)
        a = attention.weights(projected, vit.position_bias(-1, trunk.attention_arguments), 1)  # (B, H, 1, N)
        heads = (a @ projected.values).transpose(1, 2).flatten(2)
        normed = attention.inner_norm(block.attn)(heads)
        attended = layer_scale(block, 1, attention.project_out(block.attn, normed))
        x1 = trunk.residual[:, :1] + attended
        entering = block.norm2(x1)
        hidden = block.mlp.norm(block.mlp.act(block.mlp.fc1(entering)))
        out = layer_scale(block, 2, block.mlp.fc2(hidden))
        x2 = x1 + out
        latent = vit.read_out(vit.final_norm(x2, trunk.grid)).latent
        # And back: R has shape (B, K, ...).
        r = _linear_unit(latent[:, None], _gradients(vit, targets, latent))
        r1, r_out = _share(x1, x2, r), _share(out, x2, r)
        r1 = r1 + _linear(entering, block.mlp.fc1.weight, _linear(hidden, block.mlp.fc2.weight, r_out))
        r = _linear(normed, block.attn.proj.weight, _share(attended, x1, r1))
        ratio = torch.unflatten(_divide(r, heads), -1, (vit.num_heads, -1)).transpose(1, 2)  # (B, H, K, d)
        relevance = 0.5 * a * (ratio @ projected.values.transpose(-2, -1))  # (B, H, K, N)
        return Scores(relevance.clamp(min=0).mean(dim=1))


def _gradients(vit: SplitViT, targets: Sequence[Sequence[Scalar]], latent: Tensor) -> Tensor:
    """df/dlatent, shape (B, K, D)."""
    with torch.enable_grad():
        leaf = latent.detach().requires_grad_()
        logits = vit.family.head(leaf) if vit.num_outputs else leaf[:, :0]
        rows = [
            torch.autograd.grad(values([[f] for f in row], leaf, logits).sum(), leaf, retain_graph=True)[0]
            for row in zip(*targets, strict=True)
        ]
    return torch.stack(rows, dim=1) if rows else leaf.detach()[:, None][:, :0]


def _linear_unit(x: Tensor, weight: Tensor) -> Tensor:
    """How a relevance of 1 at a linear unit with weights (B, K, D) goes to its inputs (B, 1, D): shape (B, K, D)."""
    contributions = x.clamp(min=0) * weight.clamp(min=0) + x.clamp(max=0) * weight.clamp(max=0)
    return _divide(contributions, contributions.sum(dim=-1, keepdim=True))


def _linear(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """How the relevance (B, K, out) of a linear layer's outputs goes to its inputs (B, 1, in): shape (B, K, in)."""
    signs = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
    ratio = _divide(relevance, torch.stack([part @ its.T for part, its in signs]).sum(dim=0))
    return torch.stack([part * (ratio @ its) for part, its in signs]).sum(dim=0)


def _share(part: Tensor, total: Tensor, relevance: Tensor) -> Tensor:
    """The share of a summand in its sum's relevance."""
    return part * _divide(relevance, total)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Divide a by b, stabilised; 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == -_EPSILON, _EPSILON, b + _EPSILON))
