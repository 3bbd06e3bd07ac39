"""The tail and its gradients: by autograd for every architecture, in closed form where a [CLS] token is read out.

Both answer the same question: at points alpha * T on the way from zero tokens to T, what is
sum_j T_ij df/dT_ij of every token i? At alpha = 1 that is CDAM; averaged over the way it is Integrated CDAM; with noisy
tokens in the place of T it is a draw of Smooth CDAM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cdam_engine import attention
from cdam_engine.chunks import is_wide
from cdam_engine.families import Readout, TailOutput, TrunkOutput
from cdam_engine.pauses import pause
from cdam_engine.targets import Concept, Contrast, Scalar, values
from cdam_engine.transfer import pick, send
from cdam_engine.vit import SplitViT

_MAX_ELEMENTS: Final = 1 << 23  # of a temporary: 32 MiB in float32


class PathScores(NamedTuple):
    """Scores of all tokens, shape (B, K, N), and the part of them that goes through the values, if asked for."""

    scores: Tensor
    value: Tensor | None


class Tail(Protocol):
    """The tail of B images.

    Attributes:
        latent: Shape (B, D).
        logits: Shape (B, C).
    """

    latent: Tensor
    logits: Tensor

    @property
    def bytes(self) -> int:
        """About how many bytes it holds, beside the trunk's output."""

    def scores(
        self,
        targets: Sequence[Sequence[Scalar]],
        points: Sequence[float] = (1.0,),
        weights: Sequence[float] = (1.0,),
        *,
        parts: bool = False,
    ) -> PathScores:
        """Weighted sum over points alpha of sum_j T_ij df/dT_ij at alpha * T, the residual stream held constant.

        Args:
            targets: K targets of each image.
            points: The points alpha.
            weights: The weight of each.
            parts: Whether to tell the part that goes through the values.
        """

    def values(self, targets: Sequence[Sequence[Scalar]], point: float) -> Tensor:
        """The values f at alpha * T, shape (B, K)."""


def make_tail(vit: SplitViT, trunk: TrunkOutput) -> Tail:
    """The fastest tail that is exact for the model as it is now."""
    return ClsTail(vit, trunk) if ClsTail.fits(vit, trunk) else AutogradTail(vit, trunk)


class AutogradTail:
    """The tail under autograd: the reference for the faster way, and the way for every architecture."""

    def __init__(self, vit: SplitViT, trunk: TrunkOutput) -> None:
        self._vit = vit
        self._trunk = trunk
        with torch.enable_grad():
            self._tokens = trunk.tokens.detach().requires_grad_()
            self._output = vit.tail(trunk, self._tokens)
        self.latent = self._output.latent.detach()
        self.logits = self._output.logits.detach()

    @property
    def bytes(self) -> int:
        """See `Tail`."""
        # What the way back through the whole block needs: some 30 times the tokens.
        return 30 * self._tokens.numel() * self._tokens.element_size()

    def scores(
        self,
        targets: Sequence[Sequence[Scalar]],
        points: Sequence[float] = (1.0,),
        weights: Sequence[float] = (1.0,),
        *,
        parts: bool = False,
    ) -> PathScores:
        """See `Tail`."""
        images, count, _ = self._tokens.shape
        shape = (images, len(targets[0]) if targets else 0, count)
        scores = self.latent.new_zeros(shape)
        value = self.latent.new_zeros(shape) if parts else None
        for point, weight in zip(points, weights, strict=True):
            for k, gradient in enumerate(self._gradients(targets, point, through_weights=True)):
                scores[:, k] += weight * (self._trunk.tokens * gradient).sum(dim=-1)
            if value is not None:
                for k, gradient in enumerate(self._gradients(targets, point, through_weights=False)):
                    value[:, k] += weight * (self._trunk.tokens * gradient).sum(dim=-1)
        return PathScores(scores, value)

    def values(self, targets: Sequence[Sequence[Scalar]], point: float) -> Tensor:
        """See `Tail`."""
        if point == 1:
            return values(targets, self.latent, self.logits)
        return values(targets, *self._vit.tail(self._trunk, point * self._trunk.tokens))

    def _gradients(
        self, targets: Sequence[Sequence[Scalar]], point: float, *, through_weights: bool
    ) -> Iterator[Tensor]:
        """df/dT at a point, shape (B, N, D): first of every image's first target, then of every second one, ...

        No image depends on another, so the gradient of a sum over images is each image's own gradient; one backward
        pass serves as many targets as there are images.
        """
        tokens, output = self._tokens, self._output
        with torch.enable_grad():
            if point != 1 or not through_weights:
                tokens = (point * self._trunk.tokens.detach()).requires_grad_()
                tail = self._vit.tail if through_weights else self._vit.tail_of_values
                output = tail(self._trunk, tokens)
            for row in zip(*targets, strict=True):
                total = values([[target] for target in row], *output).sum()
                (gradient,) = torch.autograd.grad(total, tokens, retain_graph=True)
                pause(tokens.device)
                yield gradient


class ClsTail:
    """The tail where only [CLS] (and DeiT's distillation token) is read out, without making K, nor V for a few targets.

    Let r be a token that is read out and h a head. Only row r of the attention matters, and keys and values enter it
    linearly:

        a_i = q_h . k_i = T_i . u_h + const,  u_h = W_K^hT q_h      (the constant leaves the softmax alone)
        o_h = W_V^h z_h + b_V^h,              z_h = sum_i A_i T_i

    so that O(N D) numbers are touched for each head, forward and backward, in place of O(N D^2). With G_h = df/dz_h from
    autograd through the rest, which only row r passes,

        value part   sum_h A_i T_i . G_h
        key part     sum_h da_i T_i . u_h,       da_i = A_i (T_i . G_h - sum_m A_m T_m . G_h)
        query part   sum_h sum_i da_i T_i . u1_h for token r alone, u1_h = W_K^hT W_Q^h T_r

    At alpha * T the logits are alpha^2 T_i . u1_h + alpha T_i . u0_h with u0_h = W_K^hT b_Q^h: no point projects T again.
    Further targets share everything but G. Where points and targets are many, T_i . G_h = V_i . df/do_h with V made once
    costs less than a G for each.
    """

    def __init__(self, vit: SplitViT, trunk: TrunkOutput) -> None:
        self.vit = self._vit = vit
        self._tokens = trunk.tokens
        self._grid = trunk.grid
        self._rows = rows = vit.num_readout_tokens
        self._attention = vit.blocks[-1].attn
        self._heads = heads = int(self._attention.num_heads)
        w_q, w_k, self._w_v, b_q, self._b_v = _projections(self._attention)
        images, _, width = trunk.tokens.shape

        with torch.no_grad():
            # Queries of every row that is read out, and b_Q, the query of zero tokens: (H, B R + 1, d).
            queries = torch.matmul(trunk.tokens[:, :rows].reshape(1, -1, width), w_q.transpose(1, 2))
            zero = queries.new_zeros(heads, queries.shape[-1]) if b_q is None else b_q
            u = torch.matmul(torch.cat((queries, zero[:, None]), dim=1) * float(self._attention.scale), w_k)
            u1 = torch.unflatten(u[:, :-1], 1, (images, rows)).permute(1, 2, 0, 3).flatten(1, 2)
            products = torch.matmul(
                torch.cat((u1, u[:, -1].expand(images, -1, -1)), dim=1), trunk.tokens.transpose(1, 2)
            )
            # T_i . u1_h and T_i . u0_h, shapes (B, 1, R, H, N) and (B, 1, 1, H, N)
            self._t_u1 = torch.unflatten(products[:, None, : rows * heads], 2, (rows, heads))
            self._t_u0 = products[:, None, None, rows * heads :]
            bias = attention.position_bias(self._attention, trunk.attention_arguments)
            # (1, 1, R, H, N); a copy, since a view would keep the biases of all rows alive
            self._bias = None if bias is None else bias[:, None, :, :rows].transpose(2, 3).contiguous()
            self._residual = trunk.residual[:, :rows]
            # V without its bias, (B, H, N, d): made when points times targets are so many (d) that it pays.
            self._v: Tensor | None = None
            self._a = self._attend([1.0])
            self._leaf, x = self._with_graph(self._heads_out(self._a, [1.0]))
            output = vit.read_out(x.detach())
        self._x = x
        self._read_out: dict[float, TailOutput] = {}
        self.latent = output.latent
        self.logits = output.logits

    @property
    def bytes(self) -> int:
        """See `Tail`."""
        # V, products and weights, and what the way back through the block needs: some 30 rows of the model's width.
        numbers = 2 * self._t_u1.numel() + self._t_u0.numel() + 30 * self._leaf.numel() + self.logits.numel()
        numbers += self._tokens.numel() + (0 if self._bias is None else self._bias.numel())
        return numbers * self.logits.element_size()

    @staticmethod
    def fits(vit: SplitViT, trunk: TrunkOutput | None = None) -> bool:
        """Whether the closed form is exact: nothing between tokens and logits but plain linear maps, and no hooks.

        Args:
            vit: The model.
            trunk: What its trunk made; without it, positions that are rotated are not looked for.
        """
        its = vit.blocks[-1].attn
        model = cast("Any", vit.model)
        heads = [vit.family.head] if vit.num_outputs else []
        if vit.readout is Readout.CLS_AND_DISTILLATION_TOKENS:
            heads = [*heads, model.head_dist] if vit.num_outputs else []
        return (
            vit.rows_read is not None
            and attention.is_plain(its, *attention.KNOWN)
            and (trunk is None or trunk.attention_arguments.get("rope") is None)
            and getattr(its, "num_kv_heads", its.num_heads) == its.num_heads
            and getattr(its, "gate", None) is None
            and all(attention.is_plain(getattr(its, name, _IDENTITY), nn.Identity) for name in ("q_norm", "k_norm"))
            and attention.is_plain(its.attn_drop, nn.Dropout)
            and all(attention.is_plain(part, nn.Linear) for part in (*attention.linear_parts(its), *heads))
        )

    def scores(
        self,
        targets: Sequence[Sequence[Scalar]],
        points: Sequence[float] = (1.0,),
        weights: Sequence[float] = (1.0,),
        *,
        parts: bool = False,
    ) -> PathScores:
        """See `Tail`."""
        images, count, width = self._tokens.shape
        total = len(targets[0]) if targets else 0
        scores, value = (self._tokens.new_zeros((images, total, count)) for _ in range(2))
        # Bound the temporaries: of size B n K R H D and B n K R H N.
        one = images * self._rows * self._heads * max(width, count)
        if self._v is None and len(points) * total >= self._w_v.shape[1]:
            v = nn.functional.linear(self._tokens, self._w_v.flatten(0, 1))
            self._v = torch.unflatten(v, -1, (self._heads, -1)).transpose(1, 2).contiguous()
        points_at_once = min(len(points), max(1, _MAX_ELEMENTS // one))
        targets_at_once = max(1, _MAX_ELEMENTS // (one * points_at_once))
        for first in range(0, len(points), points_at_once):
            some = slice(first, first + points_at_once)
            if list(points) == [1.0]:
                a, leaf, x = self._a, self._leaf, self._x
            else:
                a = self._attend(points[some])
                leaf, x = self._with_graph(self._heads_out(a, points[some]))
            for start in range(0, total, targets_at_once):
                chosen = slice(start, start + targets_at_once)
                part, value_part = self._score(
                    a, self._gradient([wanted[chosen] for wanted in targets], leaf, x), points[some], weights[some]
                )
                scores[:, chosen] += part
                value[:, chosen] += value_part
                if len(points) * total > 1:
                    pause(scores.device)
        return PathScores(scores, value if parts else None)

    def values(self, targets: Sequence[Sequence[Scalar]], point: float) -> Tensor:
        """See `Tail`."""
        if point == 1:
            return values(targets, self.latent, self.logits)
        if point not in self._read_out:
            x = self._rest(self._heads_out(self._attend([point]), [point]))
            self._read_out = {point: self._vit.read_out(x)}  # one is enough: paths start where they start
        return values(targets, *self._read_out[point])

    def _attend(self, points: Sequence[float]) -> Tensor:
        """A of the rows that are read out at every point, shape (B, n, R, H, N)."""
        if list(points) == [1.0]:
            logits = self._t_u1 + self._t_u0
        else:
            alpha = self._column(points)
            logits = alpha * (alpha * self._t_u1 + self._t_u0)
        return (logits if self._bias is None else logits + self._bias).softmax(dim=-1)

    def _heads_out(self, a: Tensor, points: Sequence[float]) -> Tensor:
        """The heads' outputs o at every point, shape (B n, R, H d)."""
        images, at, rows, heads, _ = a.shape
        if self._v is not None:
            out = torch.matmul(a.permute(0, 3, 1, 2, 4).flatten(2, 3), self._v).transpose(1, 2)  # (B, n R, H, d)
        else:
            z = torch.matmul(a.flatten(1, 3), self._tokens)  # (B, n R H, D)
            z = torch.unflatten(z, 1, (at * rows, heads)).permute(2, 0, 1, 3).flatten(1, 2)  # (H, B n R, D)
            out = torch.unflatten(torch.matmul(z, self._w_v.transpose(1, 2)).transpose(0, 1), 0, (images, at * rows))
        if list(points) != [1.0]:
            out = out * send(points, out.device, out.dtype).repeat_interleave(rows)[:, None, None]
        if self._b_v is not None:
            out = out + self._b_v
        return out.reshape(images * at, rows, -1)

    def _rest(self, out: Tensor) -> Tensor:
        """From the heads' outputs (B n, R, H d) to the final norm's, shape (B n, R, D)."""
        its = self._attention
        residual = self._residual
        if len(out) != len(residual):
            residual = residual.repeat_interleave(len(out) // len(residual), dim=0)
        return self._vit.finish(residual, attention.project_out(its, attention.inner_norm(its)(out)), self._grid)

    def _score(
        self, a: Tensor, gradient: Tensor, points: Sequence[float], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Scores and their value part, summed over points, shapes (B, K, N), from df/do, shape (B, n, K, R, H d)."""
        images, at, rows, heads, _ = a.shape
        total = gradient.shape[2]
        g = torch.unflatten(gradient, -1, (heads, -1))
        if self._v is not None:
            a_tg = torch.matmul(g.flatten(1, 3).transpose(1, 2), self._v.transpose(2, 3)).transpose(1, 2)
            a_tg = torch.unflatten(a_tg, 1, (at, total, rows))
        else:
            g = torch.matmul(g.flatten(0, 3).transpose(0, 1), self._w_v).transpose(0, 1)  # (B n K R, H, D)
            g = g.reshape(images, at * total * rows * heads, -1)
            a_tg = torch.unflatten(torch.matmul(g, self._tokens.transpose(1, 2)), 1, (at, total, rows, heads))
        a = a[:, :, None]
        a_tg.mul_(a)
        if list(weights) != [1.0]:
            a_tg.mul_(self._column(weights)[..., None])
        value = a_tg.sum(dim=(1, 3, 4))
        a_tg.sub_(a * a_tg.sum(dim=-1, keepdim=True))
        t_u, t_u1 = self._t_u1 + self._t_u0, self._t_u1
        if list(points) != [1.0]:
            alpha = self._column(points)
            a_tg.mul_(alpha[..., None])
            t_u, t_u1 = alpha * self._t_u1 + self._t_u0, alpha * self._t_u1
        scores = value + (a_tg * t_u[:, :, None]).sum(dim=(1, 3, 4))
        scores[..., :rows] += (a_tg * t_u1[:, :, None]).sum(dim=(1, 4, 5))
        return scores, value

    def _with_graph(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The heads' outputs as a leaf, and the final norm's output with a graph from the one to the other."""
        with torch.enable_grad():
            leaf = out.detach().requires_grad_()
            return leaf, self._rest(leaf)

    def _gradient(self, targets: Sequence[Sequence[Scalar]], leaf: Tensor, x: Tensor) -> Tensor:
        """df/do of every target at every point, shape (B, n, K, R, H d)."""
        images, at = len(targets), len(leaf) // len(targets)
        with torch.enable_grad():
            features = self._features(x)
        seeds = self._seeds(targets, torch.unflatten(features.detach(), 0, (images, at)))  # (B, n or 1, K, R, D)
        total = seeds.shape[2]
        seeds = seeds.expand(-1, at, -1, -1, -1).flatten(0, 1)  # (B n, K, R, D)
        if total > 1:
            # A row for each target: a batched backward pass would run norms and activations target by target.
            with _LinearOnce(total):
                leaf, x = self._with_graph(leaf.detach().repeat_interleave(total, dim=0))
                with torch.enable_grad():
                    features = self._features(x)
        (gradient,) = torch.autograd.grad(features, leaf, seeds.flatten(0, 1), retain_graph=True)
        return torch.unflatten(gradient, 0, (images, at, total))

    def _features(self, x: Tensor) -> Tensor:
        """What every target is a simple function of: the latents of the rows that are read out, (B n, R, D).

        The latent is their mean.
        """
        if self._rows == 1:
            return self._vit.family.latent(x)[:, None]
        return x

    def _seeds(self, targets: Sequence[Sequence[Scalar]], features: Tensor) -> Tensor:
        """df/dfeatures, shape (B, n, K, R, D), or with n = 1 if it is the same at every point."""
        # By column: the rows that ask for it. On a CPU each row alone, which makes the same bits in any batch.
        concepts: dict[tuple[object, ...], tuple[int, float, Concept, list[int]]] = {}
        together = is_wide(features.device)
        places: list[tuple[int, int]] = []
        indices, signs = [], []
        for b, wanted in enumerate(targets):
            for k, target in enumerate(wanted):
                for sign, side in _sides(target):
                    if isinstance(side, Concept):
                        key = (k, sign, id(side), 0 if together else b)
                        concepts.setdefault(key, (k, sign, side, []))[-1].append(b)
                    else:
                        places.append((b, k))
                        indices.append(side.index)
                        signs.append(sign)
        if not concepts and len(places) == len(targets) * len(targets[0]) and min(signs) > 0:  # outputs alone
            vectors = self._output_vectors(send(indices, features.device))
            return torch.unflatten(vectors, 0, (len(targets), 1, len(targets[0])))
        fixed = all(concept.similarity == "dot" for _, _, concept, _ in concepts.values())
        shape = (len(targets), 1 if fixed else features.shape[1], len(targets[0]), *features.shape[-2:])
        seeds = features.new_zeros(shape)
        if places:
            vectors = self._output_vectors(send(indices, seeds.device))
            signed = vectors * send(signs, seeds.device, seeds.dtype)[:, None, None]
            place = send(places, seeds.device).T
            seeds.transpose(1, 2).index_put_(
                tuple(place), signed[:, None].expand(-1, shape[1], -1, -1), accumulate=True
            )
        for k, sign, concept, rows in concepts.values():
            gradient = sign / self._rows * _concept_gradient(concept, pick(features, rows).mean(dim=2))[:, :, None]
            place = send(rows, seeds.device)
            seeds[:, :, k].index_add_(0, place, gradient.expand(-1, shape[1], self._rows, -1))
        return seeds

    def _output_vectors(self, index: Tensor) -> Tensor:
        """dlogit/dfeatures of outputs, shape (..., R, D)."""
        model = cast("Any", self._vit.model)
        if self._rows == 1:
            return cast("Tensor", cast("Any", self._vit.family.head).weight.detach()[index][:, None])
        return 0.5 * torch.stack((model.head.weight.detach()[index], model.head_dist.weight.detach()[index]), dim=1)

    def _column(self, numbers: Sequence[float]) -> Tensor:
        """Numbers for n points, to go with (B, n, R, H, N)."""
        return send(numbers, self._tokens.device, self._tokens.dtype).view(1, -1, 1, 1, 1)


class _LinearOnce(TorchFunctionMode):
    """Linear layers, most of the work, run forward once for rows that are known to be equal.

    Args:
        times: How many neighbours along the first axis are equal.
    """

    def __init__(self, times: int) -> None:
        super().__init__()
        self._times = times

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in the place of every function."""
        if func is nn.functional.linear and not kwargs:
            return _Once.apply(*args, self._times)
        return func(*args, **(kwargs or {}))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, times: int) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x[::times], weight, bias).repeat_interleave(times, dim=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None, None, None


_IDENTITY: Final = nn.Identity()


def _projections(its: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """W_Q, W_K, W_V, shape (H, d, D) each, and b_Q, b_V, shape (H, d) each."""
    heads = its.num_heads
    parts = attention.linear_parts(its)
    if len(parts) == 1:
        w = torch.unflatten(its.qkv.weight.detach(), 0, (3, heads, -1))
        b = its.qkv.bias
        if b is not None:
            b = torch.unflatten(b.detach(), 0, (3, heads, -1))
            return w[0], w[1], w[2], b[0], b[2]
        if getattr(its, "q_bias", None) is not None:
            return w[0], w[1], w[2], its.q_bias.detach().view(heads, -1), its.v_bias.detach().view(heads, -1)
        return w[0], w[1], w[2], None, None
    w_q, w_k, w_v = (torch.unflatten(part.weight.detach(), 0, (heads, -1)) for part in parts)
    b_q, b_v = (None if part.bias is None else part.bias.detach().view(heads, -1) for part in (parts[0], parts[2]))
    return w_q, w_k, w_v, b_q, b_v


def _sides(target: Scalar) -> tuple[tuple[float, Any], ...]:
    """A target as a signed sum."""
    if isinstance(target, Contrast):
        return ((1.0, target.positive), (-1.0, target.negative))
    return ((1.0, target),)


def _concept_gradient(concept: Concept, latent: Tensor) -> Tensor:
    """dg/dl of latents (B, n, D), shape (B, n, D), or (B, 1, D) if it is the same at every point."""
    match concept.similarity:
        case "dot":
            return concept.like(latent).expand_as(latent[:, :1])
        case "l2":
            return concept.like(latent) - latent
        case "cosine":
            length = torch.linalg.vector_norm(latent, dim=-1, keepdim=True)
            unit = latent / length
            other = concept.direction(latent)
            gradient: Tensor = (other - (unit @ other)[..., None] * unit) / length
            return gradient
