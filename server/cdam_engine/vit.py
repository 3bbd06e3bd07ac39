"""A timm Vision Transformer, split at the input of its last attention.

What differs between architectures stands in `cdam_engine.families`; here is what all have in common. A model whose code
is not mirrored there is refused, never guessed at, and for every model that is taken `cdam_engine.proof` compares the
split with the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from cdam_engine.attention import check_known, combine, hooks_on, is_changed, position_bias, project, weights
from cdam_engine.errors import UnsupportedArchitectureError
from cdam_engine.families import Embedded, Grid, Readout, TailOutput, TrunkOutput, family_of
from cdam_engine.pauses import pause
from cdam_engine.preprocess import input_channels
from cdam_engine.sizes import InputSizes
from cdam_engine.token_wise import is_token_wise
from cdam_engine.tree import Tree

OWN_CODE: Final = ("forward", "forward_features", "forward_head")
"""Methods of the model in whose place an instance may have got others."""


class SplitViT:
    """A timm ViT as trunk and tail; the model itself is neither changed nor hooked.

    Args:
        model: A model of one of `cdam_engine.families`, in eval mode.

    Attributes:
        model: The model.
        family: What is particular about its architecture.

    Raises:
        UnsupportedArchitectureError: CDAM is not defined for the model, or its code is not known here.
        ValueError: The model is in training mode, or was made in torch's inference mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tree = Tree(model)
        self.family = family_of(model)
        self.family.check_last_block()
        self._check_weights()
        self.check_mode()
        self._patch_embed = cast("Any", model.patch_embed)
        self.channels = input_channels(model)
        self.width = int(cast("int", model.embed_dim))
        self.num_prefix_tokens = self.family.num_prefix_tokens
        # Pixels between neighbouring tokens; a convolutional stem has no patches, but a stride all the same.
        self.patch_size: tuple[int, int] = tuple(self._patch_embed.feat_ratio(as_scalar=False))
        self.flexible_input_size = self.family.flexible_input_size
        self.readout = self.family.readout

    @property
    def latent_size(self) -> int:
        """D, the length of the latent."""
        return self._sizes[0]

    @property
    def num_outputs(self) -> int:
        """C, the number of outputs; 0 without a head."""
        return self._sizes[1]

    @property
    def blocks(self) -> Sequence[Any]:
        """The model's blocks."""
        return self.family.blocks

    @property
    def input_size(self) -> tuple[int, int]:
        """The model's own input size, (height, width) in pixels."""
        return tuple(self._patch_embed.img_size or (224, 224))

    @property
    def sizes(self) -> InputSizes:
        """Which inputs the model takes."""
        pads = bool(getattr(self._patch_embed, "dynamic_img_pad", False))
        return InputSizes(self.input_size, self.patch_size, self.flexible_input_size, pads)

    def grid(self, input_size: tuple[int, int]) -> Grid:
        """The patch grid of an input of (height, width) pixels.

        Raises:
            ValueError: The model does not take inputs of this size.
        """
        return self.sizes.grid(input_size)

    def trunk(self, pixels: Tensor) -> TrunkOutput:
        """Run everything before the last attention.

        Args:
            pixels: Normalised input, shape (B, C, H, W), in the model's dtype and on its device. Gradients flow if
                the caller's grad mode lets them.

        Raises:
            ValueError: The model does not take inputs of this size, or is in training mode.
        """
        x, arguments, grid = self.embed(pixels)
        for index in range(len(self.blocks) - 1):
            x = self.family.run(index, x, arguments[index], grid)
            pause(x.device, brief=True)
        return TrunkOutput(x, self.blocks[-1].norm1(x), grid, arguments[-1])

    def embed(self, pixels: Tensor) -> Embedded:
        """What enters the first block.

        Args:
            pixels: Normalised input, shape (B, C, H, W).

        Raises:
            ValueError: The model does not take inputs of this size, is in training mode, or has hooks on its last block.
        """
        self.check_mode()
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        x, arguments = self.family.embed(pixels)
        if x.shape[1] != self.num_prefix_tokens + grid.h * grid.w:
            raise RuntimeError(f"{x.shape[1]} tokens, but {self.num_prefix_tokens} prefix tokens and a {grid} grid")
        return Embedded(x, tuple(arguments), grid)

    def tail(self, trunk: TrunkOutput, tokens: Tensor) -> TailOutput:
        """Run the last attention, residual, MLP, final norm, pooling and head as a function of the tokens.

        Args:
            trunk: What the trunk left.
            tokens: T or a variation of it, shape (B, N, D). Gradients flow if the caller's grad mode lets them.
        """
        return self.read_out(self.leave(trunk, tokens))

    def leave(self, trunk: TrunkOutput, tokens: Tensor) -> Tensor:
        """The same up to the final norm's output, shape (B, N, D)."""
        attended = self.family.attend(tokens, trunk.attention_arguments, trunk.grid)
        return self.finish(trunk.residual, attended, trunk.grid)

    def tail_of_values(self, trunk: TrunkOutput, tokens: Tensor) -> TailOutput:
        """`tail` as a function of the values alone: the attention's weights are held constant.

        Raises:
            UnsupportedMethodError: The last attention can't be taken apart.
        """
        attention, arguments = self.blocks[-1].attn, trunk.attention_arguments
        check_known(attention)
        projected = project(attention, tokens, arguments)
        a = weights(projected, position_bias(attention, arguments)).detach()
        attended = combine(attention, a, projected.values, tokens)
        return self.read_out(self.finish(trunk.residual, attended, trunk.grid))

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
        return self.family.add(its, x[:, :rows], combine(its.attn, a, projected.values, tokens)), a

    def position_bias(self, block: int, arguments: Mapping[str, Any]) -> Tensor | None:
        """What a block adds to the products of its queries and keys; see `attention.position_bias`."""
        return position_bias(self.blocks[block].attn, arguments)

    def check_attend(self) -> None:
        """Refuse a model whose blocks can't all be taken apart.

        Raises:
            UnsupportedMethodError: With the reason.
        """
        self.family.check_attend()

    def finish(self, residual: Tensor, attended: Tensor, grid: Grid) -> Tensor:
        """From the last attention's output to the final norm's.

        Args:
            residual: The residual stream of some tokens, shape (B, N, D).
            attended: The last attention's output, shape (B, M, D), for the first M of them; the others stay.
            grid: The patch grid.
        """
        count = attended.shape[1]
        x = self.family.add(self.blocks[-1], residual[:, :count], attended)
        if count < residual.shape[1]:
            x = torch.cat((x, residual[:, count:]), dim=1)
        return self.final_norm(x, grid)

    def final_norm(self, x: Tensor, grid: Grid) -> Tensor:
        """What comes between the last block and the pooling: the norm, for most."""
        return self.family.final_norm(x, grid)

    def read_out(self, x: Tensor) -> TailOutput:
        """Pooling and head on the final norm's output (B, N, D)."""
        latent = self.family.latent(x)
        return TailOutput(latent, self.family.logits(x, latent) if self.num_outputs else latent[:, :0])

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
        self.family.check_readout()

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
        """How many rows of the last attention matter, the first ones; None if all may.

        Only the tokens that are read out do, if every module after the attention is known to work token by token.
        """
        token_wise = all(is_token_wise(module) for module in self.family.after_attention)
        return self.num_readout_tokens or None if token_wise else None

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        """What the model calls and the split does not, with names: hooks on these are passed by."""
        yield "the model", self.model
        for container in self.family.containers:
            yield "its list of blocks", container
        yield "its last block", self.blocks[-1]

    def place_of(self, name: str) -> int:
        """Which block a tensor of the model's state dict belongs to; see `Family`."""
        return self.family.place_of(name)

    def is_of_trunk(self, name: str) -> bool:
        """Whether a tensor of the model's state dict has a part in T, or may have; see `Family`."""
        return self.family.is_of_trunk(name)

    def parts(self) -> tuple[object, ...]:
        """What a proof is about and the split would not notice: other hooks on the whole, another head, other blocks.

        Equal for as long as the same objects are there.

        Raises:
            UnsupportedArchitectureError: The model has got a pooling that leaves no latent.
        """
        parts: list[object] = [self.family.head, *self.blocks, *self.family.after_attention]
        parts += [self.family.readout, self.family.num_prefix_tokens, getattr(self.blocks[-1].attn, "scale", None)]
        for _, module in self.bypassed():
            parts += [module, type(module), *map(vars(module).get, OWN_CODE), *hooks_on(module)]
        return (*parts, *torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values())  # noqa: SLF001

    def refresh(self) -> None:
        """Look at pooling and head, again if somebody has put in others.

        Raises:
            UnsupportedArchitectureError: They give an image no latent, or no row of outputs; or the model has got code that
                is not known here.
        """
        family_of(self.model)
        self.family.check_last_block()
        self.readout = self.family.readout
        self._sizes = self._ask_the_head()

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        return self._ask_the_head()

    def _ask_the_head(self) -> tuple[int, int]:
        """Sizes of latent and logits, from the head itself: `num_classes` is easily left behind.

        Raises:
            UnsupportedArchitectureError: What comes out is not one vector an image.
        """
        grid = self.grid(self.input_size)
        weight = next(self.model.parameters())
        with torch.inference_mode(mode=False), torch.no_grad():
            x = weight.new_zeros((2, self.num_prefix_tokens + grid.h * grid.w, self._width_read()))
            latent = self.family.latent(x)
            if latent.ndim != 2:
                raise UnsupportedArchitectureError(
                    "NO_READOUT", f"its pooling gives a latent of shape {tuple(latent.shape)}, not (images, size)"
                )
            if isinstance(self.family.head, nn.Identity):
                return latent.shape[1], 0
            logits = self.family.logits(x, latent)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UnsupportedArchitectureError(
                "NO_OUTPUTS", f"its head gives {shape} for 2 images, not one row of outputs for each"
            )
        return latent.shape[1], logits.shape[1]

    def _width_read(self) -> int:
        """The width of what the pooling reads: of the final norm's output."""
        return int(getattr(self.model, "num_features", self.width))

    def _check_weights(self) -> None:
        tensors = (*self.model.parameters(), *self.model.buffers())
        if any(tensor.is_inference() for tensor in tensors):
            raise ValueError(
                "the model's weights were made under torch.inference_mode, and autograd refuses such tensors: make or "
                "load the model outside of it"
            )

    def check_mode(self) -> None:
        """Refuse a model that is not in the state in which it can be explained.

        Raises:
            ValueError: It is in training mode, or there are hooks on its last block or on all blocks.
        """
        if is_changed(self.blocks[-1]) or any(map(is_changed, self.family.containers)):
            raise ValueError("explanations would pass by the hooks on the last block, or on all blocks: remove them")
        if self._tree.any_training():
            names = [name or "all of it" for name, part in self.model.named_modules() if part.training]
            which = "" if names[0] == "all of it" else f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            raise ValueError(f"the model is in training mode{which}, where outputs are random: call model.eval() first")
