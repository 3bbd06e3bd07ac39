"""A timm Vision Transformer, split at the input of its last attention.

The split mirrors three small pieces of timm: how a family of models embeds its input, how its last block adds
attention and MLP to the residual stream, and how its head reads the result. A model whose code differs from what is
mirrored is refused, never guessed at; `tests/reference` compares every family with a backward pass through the
untouched model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple, cast

import torch
from timm.models import beit, eva, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from cdam_engine.attention import check_known, combine, is_changed, is_code_of, position_bias, project, weights
from cdam_engine.errors import UnsupportedArchitectureError, UnsupportedMethodError
from cdam_engine.pauses import pause


class Grid(NamedTuple):
    """A patch grid: patches down, patches across."""

    h: int
    w: int


class Readout(StrEnum):
    """How the latent is read out of the tokens that leave the last block."""

    CLS_TOKEN = "cls_token"
    CLS_AND_DISTILLATION_TOKENS = "cls_and_distillation_tokens"
    AVERAGE_POOL = "average_pool"
    MAX_POOL = "max_pool"
    ATTENTION_POOL = "attention_pool"


@dataclass(frozen=True, eq=False)
class TrunkOutput:
    """What the trunk leaves for the tail.

    Attributes:
        residual: The last block's input, shape (B, N, D): the residual stream, constant to CDAM.
        tokens: T, the output of the last block's first LayerNorm, shape (B, N, D).
        grid: The patch grid; N = prefix tokens + grid.h * grid.w.
        attention_arguments: What else the last attention is called with (rotary or relative positions).
    """

    residual: Tensor
    tokens: Tensor
    grid: Grid
    attention_arguments: Mapping[str, Any]

    def take(self, images: Sequence[int]) -> TrunkOutput:
        """The same of some images, in the order of their indices; an index may occur more than once."""
        rows = torch.as_tensor(images, device=self.tokens.device)
        return replace(self, residual=self.residual[rows], tokens=self.tokens[rows])

    def part(self, image: int) -> TrunkOutput:
        """The same of one image; a view."""
        one = slice(image, image + 1)
        return replace(self, residual=self.residual[one], tokens=self.tokens[one])


class Embedded(NamedTuple):
    """What enters the first block: tokens (B, N, D), the arguments of each block, and the patch grid."""

    tokens: Tensor
    arguments: tuple[Mapping[str, Any], ...]
    grid: Grid


class TailOutput(NamedTuple):
    """What the tail makes of the tokens: latent (B, D) and logits (B, C)."""

    latent: Tensor
    logits: Tensor


class SplitViT:
    """A timm ViT as trunk and tail; the model itself is neither changed nor hooked.

    Args:
        model: Any `timm` VisionTransformer, Eva (EVA-02, DINOv3, RoPE ViTs) or Beit, in eval mode.

    Raises:
        UnsupportedArchitectureError: CDAM is not defined for the model, or its code is not known here.
        ValueError: The model is in training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._embed = _family_embedding(model)
        self.model = model
        _require_pre_norm_block(self.blocks[-1])
        self._check_mode()
        self.num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 1))
        self.num_outputs = _num_outputs(model)
        self.latent_size = int(cast("int", model.num_features))
        self.readout = _readout(model)
        self.width = int(cast("int", model.embed_dim))
        self._patch_embed = cast("Any", model.patch_embed)
        # Pixels between neighbouring tokens; a convolutional stem has no patches, but a stride all the same.
        self.patch_size: tuple[int, int] = tuple(self._patch_embed.feat_ratio(as_scalar=False))
        self.flexible_input_size = bool(getattr(model, "dynamic_img_size", False))

    @property
    def blocks(self) -> Sequence[Any]:
        """The model's blocks."""
        return cast("Sequence[Any]", self.model.blocks)

    @property
    def input_size(self) -> tuple[int, int]:
        """The model's own input size, (height, width) in pixels."""
        return tuple(self._patch_embed.img_size or (224, 224))

    def grid(self, input_size: tuple[int, int]) -> Grid:
        """The patch grid of an input of (height, width) pixels.

        Raises:
            ValueError: The model does not take inputs of this size.
        """
        size, patch = tuple(input_size), self.patch_size
        if size != self.input_size and not self.flexible_input_size:
            raise ValueError(f"this model takes {_times(self.input_size)} pixels only, not {_times(size)}")
        pads = bool(getattr(self._patch_embed, "dynamic_img_pad", False))
        if min(size) < 1 or (not pads and (size[0] % patch[0] or size[1] % patch[1])):
            raise ValueError(f"{_times(size)} pixels is not a multiple of the patch size {_times(patch)}")
        return Grid(-(-size[0] // patch[0]), -(-size[1] // patch[1]))

    def trunk(self, pixels: Tensor) -> TrunkOutput:
        """Run everything before the last attention.

        Args:
            pixels: Normalised input, shape (B, 3, H, W), in the model's dtype and on its device. Gradients flow if
                the caller's grad mode lets them.

        Raises:
            ValueError: The model does not take inputs of this size, or is in training mode.
        """
        embedded = self.embed(pixels)
        x = embedded.tokens
        for block, arguments in zip(self.blocks[:-1], embedded.arguments[:-1], strict=True):
            x = block(x, **arguments)
            pause(x.device, brief=True)
        return TrunkOutput(x, self.blocks[-1].norm1(x), embedded.grid, embedded.arguments[-1])

    def embed(self, pixels: Tensor) -> Embedded:
        """What enters the first block.

        Args:
            pixels: Normalised input, shape (B, 3, H, W).

        Raises:
            ValueError: The model does not take inputs of this size, is in training mode, or has hooks on its last block.
        """
        self._check_mode()
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        x, arguments = self._embed(self.model, pixels)
        if x.shape[1] != self.num_prefix_tokens + grid.h * grid.w:
            raise RuntimeError(f"{x.shape[1]} tokens, but {self.num_prefix_tokens} prefix tokens and a {grid} grid")
        return Embedded(x, tuple(arguments), grid)

    def tail(self, trunk: TrunkOutput, tokens: Tensor) -> TailOutput:
        """Run the last attention, residual, MLP, final norm, pooling and head as a function of the tokens.

        Args:
            trunk: What the trunk left.
            tokens: T or a variation of it, shape (B, N, D). Gradients flow if the caller's grad mode lets them.
        """
        return self.read_out(self.finish(trunk.residual, self.blocks[-1].attn(tokens, **trunk.attention_arguments)))

    def tail_of_values(self, trunk: TrunkOutput, tokens: Tensor) -> TailOutput:
        """`tail` as a function of the values alone: the attention's weights are held constant.

        Raises:
            UnsupportedMethodError: The last attention can't be taken apart.
        """
        attention, arguments = self.blocks[-1].attn, trunk.attention_arguments
        check_known(attention)
        projected = project(attention, tokens, arguments)
        a = weights(projected, position_bias(attention, arguments)).detach()
        return self.read_out(self.finish(trunk.residual, combine(attention, a, projected.values, tokens)))

    def attend(
        self, block: int, x: Tensor, arguments: Mapping[str, Any], bias: Tensor | None, rows: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A block's output (B, M, D) and its attention weights (B, H, M, N), the one a function of the other.

        Args:
            block: Index of the block.
            x: Its input, the residual stream, shape (B, N, D).
            arguments: What else its attention is called with.
            bias: See `attention.position_bias`.
            rows: M, how many tokens ask, the first ones; None: all.
        """
        its = self.blocks[block]
        tokens = its.norm1(x)
        projected = project(its.attn, tokens, arguments)
        a = weights(projected, bias, rows)
        return self._after_attention(its, x[:, :rows], combine(its.attn, a, projected.values, tokens)), a

    def position_bias(self, block: int, arguments: Mapping[str, Any]) -> Tensor | None:
        """What a block adds to the products of its queries and keys; see `attention.position_bias`."""
        return position_bias(self.blocks[block].attn, arguments)

    def check_attend(self) -> None:
        """Refuse a model whose blocks can't all be taken apart.

        Raises:
            UnsupportedMethodError: With the reason.
        """
        for block in self.blocks:
            if not is_code_of(block, "forward", _BLOCKS) or is_changed(block):
                raise UnsupportedMethodError("UNKNOWN_BLOCK", f"{type(block).__name__} can't be taken apart")
            check_known(block.attn)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """From the last attention's output to the final norm's, token by token.

        Args:
            residual: The residual stream of some tokens, shape (B, M, D).
            attended: The last attention's output for them, shape (B, M, D).
        """
        return self.final_norm(self._after_attention(self.blocks[-1], residual, attended))

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after the last block."""
        return cast("Tensor", cast("Any", self.model).norm(x))

    def read_out(self, x: Tensor) -> TailOutput:
        """Pooling and head on the final norm's output (B, N, D)."""
        model = cast("Any", self.model)
        latent = model.forward_head(x, pre_logits=True)
        if not self.num_outputs:
            return TailOutput(latent, latent[:, :0])
        # DeiT's two heads read two tokens; the latent is their mean, the logits are not a function of it.
        two_heads = self.readout is Readout.CLS_AND_DISTILLATION_TOKENS
        return TailOutput(latent, model.forward_head(x) if two_heads else model.head(latent))

    def readout_weights(self, tokens: Tensor) -> Tensor:
        """rho: the share of each of N tokens in the readout, shape (N,), in the dtype and on the device of `tokens`.

        Args:
            tokens: Any tensor of shape (..., N, D).

        Raises:
            UnsupportedMethodError: The readout is no average of tokens.
        """
        self.check_readout()
        rho = tokens.new_zeros(tokens.shape[-2])
        if self.readout is Readout.AVERAGE_POOL:
            rho[0 if getattr(self.model, "pool_include_prefix", False) else self.num_prefix_tokens :] = 1.0
        else:
            rho[: self.num_readout_tokens] = 1.0
        return rho / rho.sum()

    def check_readout(self) -> None:
        """Refuse a model whose readout is no average of tokens.

        Raises:
            UnsupportedMethodError: With the reason.
        """
        if self.readout in {Readout.MAX_POOL, Readout.ATTENTION_POOL}:
            raise UnsupportedMethodError(
                "NO_READOUT_TOKEN",
                f"its readout ({self.readout}) is no average of tokens whose attention could be read",
            )

    @property
    def num_heads(self) -> int:
        """How many heads the last attention has."""
        return int(self.blocks[-1].attn.num_heads)

    @property
    def num_readout_tokens(self) -> int:
        """How many prefix tokens are read out: 1, 2 with DeiT's distillation token, else 0."""
        return {Readout.CLS_TOKEN: 1, Readout.CLS_AND_DISTILLATION_TOKENS: 2}.get(self.readout, 0)

    @property
    def rows_read(self) -> int | None:
        """How many rows of the last attention matter, the first ones; None if all do.

        Only the tokens that are read out do, if nothing after the attention mixes tokens; of a module that is neither
        timm's nor torch's nobody knows.
        """
        block, none = self.blocks[-1], nn.Identity()
        names = ("norm2", "mlp", "ls1", "ls2", "drop_path1", "drop_path2")
        after = [getattr(block, name, none) for name in names]
        after += [getattr(block.attn, name, none) for name in ("norm", "proj", "proj_drop")]
        parts = [part for module in (*after, cast("Any", self.model).norm) for part in module.modules()]
        token_wise = all(
            type(part).__module__.split(".")[0] in {"timm", "torch"}
            and type(part) not in _MIXES
            and not is_changed(part)
            for part in parts
        )
        return self.num_readout_tokens or None if token_wise else None

    def _after_attention(self, block: Any, residual: Tensor, attended: Tensor) -> Tensor:
        x = residual + block.drop_path1(layer_scale(block, 1, attended))
        return cast("Tensor", x + block.drop_path2(layer_scale(block, 2, block.mlp(block.norm2(x)))))

    def _check_mode(self) -> None:
        pending: list[Any] = [self.model]
        training = False
        while pending and not training:  # in a tenth of the time of `modules()`, which also looks for names
            module = pending.pop()
            training = module is not None and module.training
            pending += () if module is None else module._modules.values()  # noqa: SLF001
        if is_changed(self.blocks[-1]) or is_changed(self.model.blocks):
            raise ValueError("explanations would pass by the hooks on the last block, or on all blocks: remove them")
        if training:
            raise ValueError("the model is in training mode, where outputs are random: call model.eval() first")


# What a family does before its first block: (model, pixels) -> (tokens, arguments of each block).
_Embedding = Callable[[Any, Tensor], tuple[Tensor, list[dict[str, Any]]]]


def _embed_vit(model: Any, pixels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))  # noqa: SLF001
    return x, [{}] * len(model.blocks)


def _embed_eva(model: Any, pixels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    x, rope = model._pos_embed(model.patch_embed(pixels))  # noqa: SLF001
    x = model.norm_pre(x)
    # "Mixed" rotary positions are learned block by block.
    ropes = rope if getattr(model, "rope_mixed", False) else [rope] * len(model.blocks)
    return x, [{"rope": rope} for rope in ropes]


def _embed_beit(model: Any, pixels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    x = model.patch_embed(pixels)
    x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
    if model.pos_embed is not None:
        x = x + model.pos_embed
    bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
    return model.pos_drop(x), [{"shared_rel_pos_bias": bias}] * len(model.blocks)


_FAMILIES: Mapping[type[nn.Module], _Embedding] = {
    vision_transformer.VisionTransformer: _embed_vit,
    eva.Eva: _embed_eva,
    beit.Beit: _embed_beit,
}
_MIXES = (nn.Softmax, nn.LogSoftmax)  # of torch's modules, what may work across tokens
_BLOCKS: tuple[type[nn.Module], ...] = (vision_transformer.Block, eva.EvaBlock, beit.Block)


def _family_embedding(model: nn.Module) -> _Embedding:
    for family, embed in _FAMILIES.items():
        if isinstance(model, family):
            heads = (VisionTransformerDistilled,) if isinstance(model, VisionTransformerDistilled) else (family,)
            mirrored = {"forward": (family,), "forward_features": (family,), "forward_head": heads}
            if all(is_code_of(model, method, classes) for method, classes in mirrored.items()):
                return embed
    raise UnsupportedArchitectureError(
        "UNKNOWN_ARCHITECTURE",
        f"{type(model).__name__} is not one of the Vision Transformers that can be split at their last attention: "
        f"timm's {', '.join(family.__name__ for family in _FAMILIES)}, with their own forward pass",
    )


def _require_pre_norm_block(block: nn.Module) -> None:
    if not isinstance(block, _BLOCKS) or not is_code_of(block, "forward", _BLOCKS):
        raise UnsupportedArchitectureError(
            "NO_NORMALISED_TOKENS",
            f"CDAM differentiates the normalised tokens that only the last attention reads, and {type(block).__name__} "
            "has none: its norm comes after the attention, or several branches share it",
        )
    if not isinstance(getattr(block, "attn", None), nn.Module):
        raise UnsupportedArchitectureError("NO_ATTENTION", "the last block has no attention to explain")


def layer_scale(block: Any, branch: int, x: Tensor) -> Tensor:
    """The branch's output, scaled as the block does it: a LayerScale module (VisionTransformer) or a gamma."""
    if hasattr(block, f"ls{branch}"):
        return cast("Tensor", getattr(block, f"ls{branch}")(x))
    gamma = getattr(block, f"gamma_{branch}")
    return x if gamma is None else gamma * x


def _readout(model: nn.Module) -> Readout:
    if isinstance(model, VisionTransformerDistilled):
        return Readout.CLS_AND_DISTILLATION_TOKENS
    if getattr(model, "attn_pool", None) is not None:
        return Readout.ATTENTION_POOL
    pools = {
        "token": Readout.CLS_TOKEN,
        "avg": Readout.AVERAGE_POOL,
        "avgmax": Readout.MAX_POOL,
        "max": Readout.MAX_POOL,
    }
    pool = str(model.global_pool)
    if pool not in pools:
        raise UnsupportedArchitectureError("NO_READOUT", f"the model's pooling {pool!r} leaves no latent to explain")
    return pools[pool]


def _num_outputs(model: Any) -> int:
    """From the head itself: `num_classes` is easily left behind when somebody puts in another one."""
    if isinstance(model.head, nn.Linear):
        return model.head.out_features
    return 0 if isinstance(model.head, nn.Identity) else int(model.num_classes)


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
