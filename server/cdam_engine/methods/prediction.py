"""The classifier, applied to every patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from cdam_engine.batch import Batch
from cdam_engine.errors import UnsupportedMethodError
from cdam_engine.families import Readout, TailOutput
from cdam_engine.methods.base import Method, Scores
from cdam_engine.targets import Target
from cdam_engine.vit import SplitViT

Activation = Literal["softmax", "sigmoid", "identity"]


@dataclass(frozen=True)
class PatchMaskPrediction(Method):
    """What the model's head says of each patch's token after the final norm, as if it were the readout.

    After Kang, Heo and Choe (2024), of which only the abstract is public: a reconstruction. Of a model that was not
    trained on with binary patch masks, as the abstract has it, the values are no probabilities of anything.

    Attributes:
        activation: What is made of an output's logit: its probability among all outputs ("softmax") or alone
            ("sigmoid"), or the logit itself ("identity").
    """

    kind: ClassVar[str] = "patch_mask_prediction"

    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise ValueError(f"an activation is one of {', '.join(get_args(Activation))}, not {self.activation!r}")

    def check(self, vit: SplitViT) -> None:
        if vit.readout is Readout.ATTENTION_POOL:
            raise UnsupportedMethodError(
                "ATTENTION_POOL", "its classifier reads what attention pooled, which no single patch token resembles"
            )

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        assert batch.trunk is not None
        vit, trunk = batch.vit, batch.trunk.take(images)
        latent, logits = read_out_alone(vit, vit.leave(trunk, trunk.tokens))
        said = activated(logits, self.activation)
        targets = batch.resolve(images, wanted)
        rows = [torch.stack([f(latent[b], said[b]) for f in its]) for b, its in enumerate(targets)]
        return Scores(torch.stack(rows), has_prefix=False)


def activated(logits: Tensor, activation: Activation) -> Tensor:
    """Logits (..., C), or probabilities."""
    match activation:
        case "softmax":
            return logits.softmax(dim=-1)
        case "sigmoid":
            return logits.sigmoid()
        case "identity":
            return logits


def read_out_alone(vit: SplitViT, x: Tensor) -> TailOutput:
    """What the readout would say of each patch's token alone: latents (B, patches, D) and logits (B, patches, C).

    Args:
        vit: The model.
        x: The final norm's output, shape (B, N, D). Gradients flow if the caller's grad mode lets them.
    """
    prefix = vit.num_prefix_tokens
    patches = x[:, prefix:]
    # A sequence that is the same token everywhere is pooled to that token, whatever the pooling.
    alone = patches.flatten(0, 1)[:, None].expand(-1, prefix + 1, -1)
    return TailOutput(*(torch.unflatten(part, 0, patches.shape[:2]) for part in vit.read_out(alone)))
