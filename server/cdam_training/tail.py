"""The part of a model that is trained: its last blocks, and a linear head."""

from __future__ import annotations

import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from cdam_engine import SplitViT, UnsupportedMethodError
from cdam_engine.families import Readout, TailOutput, TrunkOutput
from cdam_engine.methods.prediction import read_out_alone
from cdam_server.settings.load_error import LoadError


class Tail(nn.Module):
    """A model's last blocks, final norm, pooling and linear head, as a function of what enters them.

    What enters is the residual stream before the first of these blocks, shape (B, N, D); for no block at all, the
    latent, shape (B, D).

    Args:
        vit: The model, with a linear head.
        head: The head, one of the model's own modules.
        blocks: How many of the last blocks are trained; 0: the head alone.
        dropout: Probability in these blocks' own dropout layers after the attention's projection and in the MLP.
        token_dropout: Share of the patch tokens that are left out in training.

    Attributes:
        vit: The model.
        head: The head.
        blocks: How many blocks are trained.
        tuned: What is trained besides the head, by its names in the model's state dict.

    Raises:
        LoadError: The model has not as many blocks, or its tokens can't be left out.
    """

    def __init__(
        self, vit: SplitViT, head: nn.Linear, *, blocks: int = 0, dropout: float = 0.0, token_dropout: float = 0.0
    ) -> None:
        super().__init__()
        if blocks > len(vit.blocks) - 1:
            raise LoadError("train-blocks", f"the model has {len(vit.blocks)} blocks: at most all but the first")
        self.vit = vit
        self.blocks = blocks
        self.first = len(vit.blocks) - blocks
        self.head = head
        self.parts = nn.ModuleList(vit.blocks[self.first :])
        with torch.no_grad():
            empty = next(vit.model.parameters()).new_zeros((1, vit.channels, *vit.input_size))
            _, self._arguments, self._grid = vit.embed(empty)
        if token_dropout and (self._grid_matters or not blocks):
            raise LoadError(
                "token-dropout",
                "no block is trained" if not blocks else "this architecture's blocks need every token at its place",
            )
        self._drop = PatchDropout(token_dropout, vit.num_prefix_tokens) if token_dropout else nn.Identity()
        for name, module in self.parts.named_modules() if dropout else ():
            if isinstance(module, nn.Dropout) and not name.endswith(
                "attn_drop"
            ):  # of attention's weights: see `attend`
                module.p = dropout
        self._rows = self._rows_read()
        own = {id(parameter) for parameter in head.parameters()}
        self.tuned = {
            name: parameter
            for name, parameter in vit.model.named_parameters()
            if blocks and id(parameter) not in own and vit.place_of(name) >= self.first
        }
        vit.model.requires_grad_(requires_grad=False)
        for parameter in (*head.parameters(), *self.tuned.values()):
            parameter.requires_grad_()

    @property
    def parameters_trained(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in (*self.head.parameters(), *self.tuned.values()))

    @property
    def drops(self) -> dict[str, float]:
        """Of what the trained blocks drop, by the module's name, as the options and the model's own settings have it."""
        found: dict[str, float] = {}
        for name, module in self.parts.named_modules():
            match module:
                case nn.Dropout(p=rate) | DropPath(drop_prob=rate) if rate:
                    found[name] = rate
        return found

    @property
    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The head's, by names of their own."""
        return dict(self.head.named_parameters(prefix="head"))

    @property
    def entering_shape(self) -> tuple[int, ...]:
        """Of what `entering` makes of one image."""
        if not self.blocks:
            return (self.vit.latent_size,)
        return (self.vit.num_prefix_tokens + self._grid.h * self._grid.w, self.vit.width)

    @property
    def _grid_matters(self) -> bool:
        return any(self._arguments) or not self.vit.num_prefix_tokens

    def entering(self, pixels: Tensor) -> Tensor:
        """What the trunk makes of normalised input (B, C, H, W) for `forward`; without a gradient."""
        with torch.no_grad():
            if not self.blocks:
                trunk = self.vit.trunk(pixels)
                return self.vit.tail(trunk, trunk.tokens).latent
            x, arguments, grid = self.vit.embed(pixels)
            for index in range(self.first):
                x = self.vit.family.run(index, x, arguments[index], grid)
            return x

    def forward(self, x: Tensor) -> TailOutput:
        """Latent (B, D) and logits (B, C)."""
        if not self.blocks:
            return TailOutput(x, self.head(x))
        x = self._drop(x)
        if self._rows is None:
            return self.vit.read_out(self.leave(x))
        # Of the last block only the tokens that are read out matter.
        last = len(self.vit.blocks) - 1
        read, _ = self.vit.attend(last, self._run(x), self._arguments[-1], self._bias(), self._rows)
        return self.vit.read_out(self.vit.final_norm(read, self._grid))

    def with_patches(self, x: Tensor) -> tuple[TailOutput, Tensor]:
        """The same, and what the classifier says of each patch's token alone, shape (B, patches, C)."""
        left = self.leave(x)
        return self.vit.read_out(left), read_out_alone(self.vit, left).logits

    def leave(self, x: Tensor) -> Tensor:
        """The final norm's output, shape (B, N, D), of what enters the first trained block."""
        x = self._run(x)
        tokens = self.vit.blocks[-1].norm1(x)
        return self.vit.leave(TrunkOutput(x, tokens, self._grid, self._arguments[-1]), tokens)

    def _run(self, x: Tensor) -> Tensor:
        """What enters the last block."""
        for index in range(self.first, len(self.vit.blocks) - 1):
            x = self.vit.family.run(index, x, self._arguments[index], self._grid)
        return x

    def _bias(self) -> Tensor | None:
        return self.vit.position_bias(len(self.vit.blocks) - 1, self._arguments[-1])

    def _rows_read(self) -> int | None:
        """How many of the last block's tokens matter, the first ones; None if all may, or if nobody knows."""
        try:
            self.vit.check_attend()
        except UnsupportedMethodError:
            return None
        return self.vit.rows_read if self.vit.readout is Readout.CLS_TOKEN else None
