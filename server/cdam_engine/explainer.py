"""From a batch of inputs to maps: trunk, tail, scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cdam_engine.methods.cdam import cdam
from cdam_engine.tail import AutogradTail
from cdam_engine.targets import Target, resolve
from cdam_engine.vit import Grid, SplitViT


@dataclass(frozen=True, eq=False)
class ExplainedTarget:
    """A target and the model's answer to it.

    Attributes:
        index: The output's index.
        value: Its logit or regression value.
    """

    index: int
    value: float


@dataclass(frozen=True, eq=False)
class RelevanceMap:
    """Signed relevance of each patch for one target.

    Attributes:
        scores: Shape (h, w), raw; float32, or float64 if the model is.
        prefix_share: sum |score| over prefix tokens / sum |score| over all tokens, 0 if all are zero.
    """

    scores: NDArray[np.floating]
    prefix_share: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """Everything about one image.

    Attributes:
        grid: The patch grid.
        logits: Shape (C,).
        targets: The targets, top-k ones replaced by their outputs.
        maps: One for each of them.
        trunk_seconds: Time that the batch spent in the trunk.
        tail_seconds: Time that the batch spent in the tail, gradients included.
    """

    grid: Grid
    logits: NDArray[np.floating]
    targets: tuple[ExplainedTarget, ...]
    maps: tuple[RelevanceMap, ...]
    trunk_seconds: float
    tail_seconds: float


class Explainer:
    """CDAM of a timm ViT.

    Safe to call from several threads; leaves no hook, no grad mode and no gradient on the model.

    Args:
        model: A timm ViT in eval mode; see `SplitViT` for which.

    Raises:
        UnsupportedArchitectureError: CDAM is not defined for the model, or its code is not known here.
        ValueError: The model is in training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.vit = SplitViT(model)

    def explain(self, pixels: Tensor, targets: Sequence[Sequence[Target]]) -> list[Explanation]:
        """Maps of a batch of images, each with its own targets.

        Args:
            pixels: Normalised input, shape (B, 3, H, W), in the model's dtype and on its device.
            targets: The targets of each image, B sequences of any lengths.

        Returns:
            One explanation for each image; equal to what the image gets alone, up to rounding.

        Raises:
            ValueError: The model does not take inputs of this size, or `targets` is not of length B.
            IndexError: A target names an output that the model does not have.
        """
        if pixels.ndim != 4:
            raise ValueError(f"pixels has shape {tuple(pixels.shape)}, not (B, 3, H, W)")
        if len(pixels) != len(targets):
            raise ValueError(f"{len(pixels)} images, but targets for {len(targets)}")
        with _own_modes(pixels.device):
            started = perf_counter()
            trunk = self.vit.trunk(pixels)
            _finish(pixels.device)
            trunk_done = perf_counter()
            tail = AutogradTail(self.vit, trunk)
            logits = _on_cpu(tail.logits)
            resolved = [resolve(wanted, row) for wanted, row in zip(targets, logits, strict=True)]
            scores = _on_cpu(cdam(tail, resolved))
            tail_done = perf_counter()
        prefix = self.vit.num_prefix_tokens
        return [
            Explanation(
                grid=trunk.grid,
                logits=row.numpy(),
                targets=tuple(ExplainedTarget(int(output.index), float(row[output.index])) for output in outputs),
                maps=tuple(_relevance_map(item, prefix, trunk.grid) for item in items[: len(outputs)]),
                trunk_seconds=trunk_done - started,
                tail_seconds=tail_done - trunk_done,
            )
            for row, outputs, items in zip(logits, resolved, scores, strict=True)
        ]


def _relevance_map(scores: Tensor, prefix: int, grid: Grid) -> RelevanceMap:
    """The map of one image and target from the scores of all its tokens, shape (N,)."""
    total = float(scores.abs().sum())
    share = float(scores[:prefix].abs().sum()) / total if total else 0.0
    return RelevanceMap(scores[prefix:].reshape(grid).numpy(), share)


@contextmanager
def _own_modes(device: torch.device) -> Iterator[None]:
    """No mode of the caller's: inference mode would forbid the tail's gradients, autocast change the arithmetic."""
    with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _on_cpu(values: Tensor) -> Tensor:
    """As numpy can take them: it knows no bfloat16."""
    half = values.dtype in (torch.bfloat16, torch.float16)
    return values.float().cpu() if half else values.cpu()


def _finish(device: torch.device) -> None:
    """Wait for the device, so that the time is booked where it was spent."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
