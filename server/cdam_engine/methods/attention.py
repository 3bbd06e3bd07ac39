"""Maps of attention alone: they need no target, and tell nothing about one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from cdam_engine import attention
from cdam_engine.batch import Batch
from cdam_engine.chunks import Limit, chunks
from cdam_engine.errors import UnsupportedMethodError
from cdam_engine.methods.base import Method, Scores
from cdam_engine.pauses import pause
from cdam_engine.targets import Target
from cdam_engine.transfer import pick
from cdam_engine.vit import SplitViT

_MAX_ELEMENTS: Final = Limit(cpu=1 << 25, gpu=1 << 28)  # attention weights kept at a time: 128 MiB in float32; 1 GiB


@dataclass(frozen=True)
class Attention(Method):
    """Attention of the readout in the last block: sum_r rho_r mean_h A_h,r,i.

    rho is the share of each token in the readout: all on [CLS], half on each of DeiT's two, even under average pooling.

    Attributes:
        heads: The heads to average, from 0; empty: all.
    """

    kind: ClassVar[str] = "attention"
    needs_target: ClassVar[bool] = False

    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.heads)) < len(self.heads) or min(self.heads, default=0) < 0:
            raise ValueError(f"heads are different numbers from 0, not {self.heads}")

    def check(self, vit: SplitViT) -> None:
        vit.check_readout()
        attention.check_known(vit.blocks[-1].attn)
        if max(self.heads, default=0) >= vit.num_heads:
            raise UnsupportedMethodError(
                "NO_SUCH_HEAD", f"the last block has heads 0 to {vit.num_heads - 1}, not {max(self.heads)}"
            )

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        assert batch.trunk is not None
        trunk, vit = batch.trunk.take(images), batch.vit
        rho = vit.readout_weights(trunk.tokens)
        # Of a prefix token's readout one row is enough.
        rows = vit.num_readout_tokens or len(rho)
        heads = list(self.heads) or slice(None)
        size = max(1, _MAX_ELEMENTS.on(rho.device) // (vit.num_heads * rows * len(rho)))
        found = []
        for some in chunks(len(images), size):
            part = trunk.take(range(some.start, some.stop))
            projected = attention.project(vit.blocks[-1].attn, part.tokens, part.attention_arguments)
            a = attention.weights(projected, vit.position_bias(-1, part.attention_arguments), rows)
            found.append(torch.einsum("r,bri->bi", rho[:rows], a[:, heads].mean(dim=1)))
        return Scores(torch.cat(found)[:, None])


@dataclass(frozen=True)
class AttentionRollout(Method):
    """rho^T A'_L ... A'_1 with A'_l = (mean_h A_l + I) / 2, whose rows sum to 1.

    Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (ACL 2020), Eq. 1. The product is taken from
    the readout down, a row at a time: O(L N^2), not O(L N^3).
    """

    kind: ClassVar[str] = "attention_rollout"
    needs_target: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False

    def check(self, vit: SplitViT) -> None:
        vit.check_readout()
        vit.check_attend()

    def passes(self, targets: int, patches: int) -> int:
        return 1

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        vit = batch.vit
        found = []
        kept = batch.tokens**2 * max(vit.num_heads, len(vit.blocks))
        for some in chunks(len(images), _MAX_ELEMENTS.on(batch.pixels.device) // kept):
            chosen = list(images[some])
            embedded = vit.embed(pick(batch.pixels, chosen))
            x, means = embedded.tokens, []
            for index, arguments in enumerate(embedded.arguments):
                x, a = vit.attend(index, x, arguments, vit.position_bias(index, arguments))
                means.append(a.mean(dim=1))
                pause(x.device, brief=True)
            batch.learn(chosen, *vit.read_out(vit.final_norm(x, embedded.grid)))
            row = vit.readout_weights(x).expand(len(chosen), 1, -1)
            for mean in reversed(means):
                row = 0.5 * (row @ mean + row)
            found.append(row)
        return Scores(torch.cat(found))
