"""What the model says without a patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from cdam_engine.batch import Batch
from cdam_engine.chunks import Limit, chunks
from cdam_engine.errors import UnsupportedMethodError
from cdam_engine.families import Embedded, TailOutput
from cdam_engine.methods.base import Method, Scores
from cdam_engine.pauses import pause
from cdam_engine.targets import Target, values
from cdam_engine.vit import SplitViT

# Of an MLP's hidden layer: 8 MiB in float32, where more is not faster and rests are rarer; 256 MiB.
_MAX_ELEMENTS: Final = Limit(cpu=1 << 21, gpu=1 << 26)


@dataclass(frozen=True)
class TokenAblation(Method):
    """f(all tokens) - f(all but patch i), the token taken away after the position encoding, before the first block.

    One forward pass for each patch, in batches of bounded memory; the last block is computed for the tokens that are
    read out alone. Its place in rotary tables and relative position biases goes with the token.
    """

    kind: ClassVar[str] = "token_ablation"

    def check(self, vit: SplitViT) -> None:
        vit.check_attend()

    def passes(self, targets: int, patches: int) -> int:
        return patches

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        vit = batch.vit
        patches = batch.grid.h * batch.grid.w
        if patches == 1 and not vit.num_readout_tokens:
            raise UnsupportedMethodError("NO_TOKENS_LEFT", "of a single patch nothing is left to read out without it")
        at_once = _MAX_ELEMENTS.on(batch.pixels.device) // (4 * vit.width * batch.tokens)
        maps = []
        for image, targets in zip(images, batch.resolve(images, wanted), strict=True):
            embedded = vit.embed(batch.pixels[image : image + 1])
            without = [
                values([targets] * (some.stop - some.start), *_without(vit, embedded, some))
                for some in chunks(patches, at_once)
            ]
            maps.append(batch.values([image], [targets])[0][:, None] - torch.cat(without).T)
        return Scores(torch.stack(maps), has_prefix=False)


def _without(vit: SplitViT, embedded: Embedded, patches: slice) -> TailOutput:
    """What the model makes of one image's tokens without each of some patches."""
    tokens = embedded.tokens[0]
    count = len(tokens)
    removed = torch.arange(patches.start, patches.stop, device=tokens.device)[:, None] + vit.num_prefix_tokens
    rest = torch.arange(count - 1, device=tokens.device)
    kept = rest + (rest >= removed)  # (variants, N - 1)
    x = tokens[kept]
    last = len(vit.blocks) - 1
    for index, its in enumerate(embedded.arguments):
        left = _without_rows(its, kept - vit.num_prefix_tokens)
        bias = vit.position_bias(index, its)
        if bias is not None:
            bias = bias[0][:, kept[:, :, None], kept[:, None, :]].transpose(0, 1)
        rows = vit.rows_read if index == last else None
        if bias is None and rows is None:
            x = vit.blocks[index](x, **left)  # the model's own, with its fused attention
        else:
            x, _ = vit.attend(index, x, left, bias, rows)
        pause(x.device, brief=index != last)
    return vit.read_out(vit.final_norm(x, embedded.grid))


def _without_rows(arguments: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
    """The arguments of a block for each variant: its rotary table holds a row for each patch that is left."""
    rope = arguments.get("rope")
    if rope is None:
        return {name: value for name, value in arguments.items() if not name.startswith("shared_rel_pos")}
    patches = kept[:, kept.shape[1] - (rope.shape[-2] - 1) :]
    table = rope[patches][:, None] if rope.ndim == 2 else rope[:, patches].transpose(0, 1)
    return {**arguments, "rope": table}
