"""What an architecture has to say so that it can be split at the input of its last attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Final, NamedTuple, cast

from torch import Tensor, nn

from cdam_engine.attention import check_known, is_changed, is_code_of
from cdam_engine.errors import UnsupportedArchitectureError, UnsupportedMethodError
from cdam_engine.transfer import pick

# What timm has after the last block, by the first part of its name.
_AFTER_BLOCKS: Final = frozenset({"norm", "fc_norm", "attn_pool", "neck", "head", "head_dist"})
# By their names in timm's blocks, what comes after the attention.
_AFTER_ATTENTION: Final = ("norm2", "mlp", "ls1", "ls2", "drop_path", "drop_path1", "drop_path2")


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
    CLS_TOKEN_AND_AVERAGE_POOL = "cls_token_and_average_pool"


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
        return replace(self, residual=pick(self.residual, images), tokens=pick(self.tokens, images))

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


class Family:
    """One architecture's own part of the split.

    What stands here is timm's VisionTransformer and what most others share with it: blocks that add attention and MLP
    to a residual stream of tokens (B, N, D), a norm, and `forward_head`. A new family is a subclass in a file of its
    own, listed in `families.FAMILIES`: it names its classes, mirrors what comes before the first block in `embed`, and
    overrides what else is different. Whether the mirror is true is proven for each model: see `cdam_engine.proof`.

    Args:
        model: A model of the family.

    Attributes:
        model: The model.
    """

    model_class: ClassVar[type[nn.Module]]
    """timm's class; subclasses with the same code count."""
    block_classes: ClassVar[tuple[type[nn.Module], ...]]
    """The blocks whose norm comes before an attention that alone reads it."""
    head_classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Subclasses of `model_class` whose `forward_head` is known, too."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @classmethod
    def knows(cls, model: nn.Module) -> bool:
        """Whether the model is one of the family and runs the code that is mirrored here."""
        own = (cls.model_class,)
        return isinstance(model, cls.model_class) and all(
            is_code_of(model, method, classes)
            for method, classes in {
                "forward": own,
                "forward_features": own,
                "forward_head": (*own, *cls.head_classes),
            }.items()
        )

    # --- what it is made of

    @property
    def blocks(self) -> Sequence[Any]:
        """All blocks that end in a residual stream, in order; the last one holds the last attention."""
        return cast("Sequence[Any]", self.model.blocks)

    @property
    def containers(self) -> Sequence[nn.Module]:
        """What the model calls and the split does not: hooks on it would be passed by."""
        return (self.model.blocks,)

    @property
    def head(self) -> nn.Module:
        """What makes logits of the latent; an `nn.Identity` if there are none."""
        return cast("nn.Module", self.model.head)

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens come before those of the patches."""
        return int(getattr(self.model, "num_prefix_tokens", 1))

    @property
    def readout(self) -> Readout:
        """How the latent is read out.

        Raises:
            UnsupportedArchitectureError: There is no latent, or the last attention has no part in it.
        """
        pooling = getattr(self.model, "attn_pool", None)
        if pooling is not None:  # or another module in its place, which says what it is
            return Readout(getattr(pooling, "readout", Readout.ATTENTION_POOL))
        pools = {
            "token": Readout.CLS_TOKEN,
            "avg": Readout.AVERAGE_POOL,
            "avgmax": Readout.MAX_POOL,
            "max": Readout.MAX_POOL,
        }
        pool = str(self.model.global_pool)
        if pool not in pools:
            raise UnsupportedArchitectureError(
                "NO_READOUT", f"the model's pooling {pool!r} leaves no latent to explain"
            )
        return pools[pool]

    @property
    def flexible_input_size(self) -> bool:
        """Whether the model takes inputs of other sizes than its own."""
        return bool(getattr(self.model, "dynamic_img_size", False))

    @property
    def after_attention(self) -> Sequence[nn.Module]:
        """The modules between the last attention and what is read out, through which every token goes."""
        block = self.blocks[-1]
        its = [getattr(block, name, None) for name in _AFTER_ATTENTION]
        its += [getattr(block.attn, name, None) for name in ("norm", "proj", "proj_drop")]
        return [part for part in (*its, self.model.norm) if part is not None]

    def place_of(self, name: str) -> int:
        """Where a tensor of the model's state dict belongs: -1 before the first block, i in block i, L after the last of L."""
        if name.partition(".")[0] in _AFTER_BLOCKS:
            return len(self.blocks)
        names = {module: name for name, module in self.model.named_modules()}
        inside = (place for place, block in enumerate(self.blocks) if name.startswith(f"{names[block]}."))
        return next(inside, -1)

    def is_of_trunk(self, name: str) -> bool:
        """Whether a tensor of the model's state dict has a part in the last attention's tokens, or may have."""
        last = len(self.blocks) - 1
        return self.place_of(name) < last or (self.place_of(name) == last and ".norm1." in name)

    # --- what it does, in this order

    def embed(self, pixels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """From normalised input (B, C, H, W) to the first block's tokens (B, N, D) and what each block is called with."""
        raise NotImplementedError

    def run(self, index: int, x: Tensor, arguments: Mapping[str, Any], grid: Grid) -> Tensor:
        """A block as the model runs it, the last one excepted: from its input (B, N, D) to the next one's."""
        return cast("Tensor", self.blocks[index](x, **arguments))

    def attend(self, tokens: Tensor, arguments: Mapping[str, Any], grid: Grid) -> Tensor:
        """The last attention's output (B, M, D) for the M tokens that it changes, the first ones, from T (B, N, D)."""
        return cast("Tensor", self.blocks[-1].attn(tokens, **arguments))

    def add(self, block: Any, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of a block, token by token: both residual branches, from the attention's output (B, M, D)."""
        x = residual + block.drop_path1(layer_scale(block, 1, attended))
        return cast("Tensor", x + block.drop_path2(layer_scale(block, 2, block.mlp(block.norm2(x)))))

    def final_norm(self, x: Tensor, grid: Grid) -> Tensor:
        """What comes between the last block and the pooling, (B, N, D)."""
        return cast("Tensor", self.model.norm(x))

    def latent(self, x: Tensor) -> Tensor:
        """Pooling: from the final norm's output (B, N, D) to the latent."""
        return cast("Tensor", self.model.forward_head(x, pre_logits=True))

    def logits(self, x: Tensor, latent: Tensor) -> Tensor:
        """What the head makes of the latent; `x` is the final norm's output that it was read from."""
        return cast("Tensor", self.head(latent))

    # --- what methods want beyond that

    def check_attend(self) -> None:
        """Refuse a model whose blocks can't all be taken apart.

        Raises:
            UnsupportedMethodError: With the reason.
        """
        for block in self.blocks:
            if not is_code_of(block, "forward", self.block_classes) or is_changed(block):
                raise UnsupportedMethodError("UNKNOWN_BLOCK", f"{type(block).__name__} can't be taken apart")
            check_known(block.attn)

    def check_readout(self) -> None:
        """Refuse a model whose readout is no average of tokens.

        Raises:
            UnsupportedMethodError: With the reason.
        """
        if self.readout in {Readout.MAX_POOL, Readout.ATTENTION_POOL, Readout.CLS_TOKEN_AND_AVERAGE_POOL}:
            raise UnsupportedMethodError(
                "NO_READOUT_TOKEN",
                f"its readout ({self.readout}) is no average of tokens whose attention could be read",
            )

    def check_last_block(self) -> None:
        """Refuse a model whose last block has no normalised tokens that only its attention reads.

        Raises:
            UnsupportedArchitectureError: With the reason.
        """
        block = self.blocks[-1]
        if hasattr(block, "_orig_mod"):
            raise UnsupportedArchitectureError(
                "NO_NORMALISED_TOKENS", "the last block is compiled, so that nobody can look into it: give it as it was"
            )
        if not isinstance(block, self.block_classes) or not is_code_of(block, "forward", self.block_classes):
            raise UnsupportedArchitectureError(
                "NO_NORMALISED_TOKENS",
                "CDAM differentiates the normalised tokens that only the last attention reads, and "
                f"{type(block).__name__} has none: its norm comes after the attention, or several branches share it",
            )
        if not isinstance(getattr(block, "attn", None), nn.Module):
            raise UnsupportedArchitectureError("NO_ATTENTION", "the last block has no attention to explain")


def layer_scale(block: Any, branch: int, x: Tensor) -> Tensor:
    """The branch's output, scaled as the block does it: a LayerScale module (VisionTransformer) or a gamma."""
    if hasattr(block, f"ls{branch}"):
        return cast("Tensor", getattr(block, f"ls{branch}")(x))
    gamma = getattr(block, f"gamma_{branch}")
    return x if gamma is None else gamma * x
