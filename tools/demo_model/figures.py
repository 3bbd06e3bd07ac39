"""Held-out figures of a demo model: does it see the digits, and do its CDAM maps point at the right ones?

`tools/demo_figures.py` measures the shipped weights on scenes of test sources only, and their concepts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models import VisionTransformer
from torch import Tensor

from cdam_engine import Explainer, Output
from cdam_server.demo.scenes import Scene, Split, draw_scene

SEED = 1_000_000
"""Of the first scene of each kind."""

_BATCH = 50


@dataclass(frozen=True)
class Figures:
    """Fractions between 0 and 1, on scenes of one split's source digits.

    Attributes:
        split: whose sources were used.
        single_scenes, pair_scenes, triple_scenes: how many scenes of one, two and three digits.
        single_top1: the digit is the first class.
        pair_top2: both digits are the first two classes.
        triple_top3: all three digits are the first three classes.
        map_right_digits: (scene, digit) pairs whose CDAM map sums higher inside its own mask than in the other's.
        map_right_scenes: two-digit scenes in which both maps do.
        map_signed_digits: (scene, digit) pairs whose map sums above zero inside its own mask and not above zero
            inside the other's.
        map_signed_scenes: two-digit scenes in which both maps do.
    """

    split: str
    single_scenes: int
    pair_scenes: int
    triple_scenes: int
    single_top1: float
    pair_top2: float
    triple_top3: float
    map_right_digits: float
    map_right_scenes: float
    map_signed_digits: float
    map_signed_scenes: float


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """(B, 64, 64, 3) uint8 images as the model's (B, 3, 64, 64) float32 input in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def patch_weights(mask: NDArray[np.bool_], side: int) -> NDArray[np.float32]:
    """Share of each patch that a (64, 64) mask covers, over the (side, side) patch grid."""
    cell = mask.shape[0] // side
    share: NDArray[np.float32] = mask.reshape(side, cell, side, cell).mean((1, 3), dtype=np.float32)
    return share


def cdam_maps(model: VisionTransformer, inputs: Tensor, classes: Tensor) -> NDArray[np.float32]:
    """CDAM maps of k classes per image.

    Args:
        model: a ViT in eval mode.
        inputs: (B, 3, H, W).
        classes: (B, k) int64, the classes to explain.

    Returns:
        (B, k, h, w) signed maps.
    """
    explanations = Explainer(model).explain(inputs, [[Output(c) for c in row] for row in classes.tolist()])
    return np.stack([[relevance.scores for relevance in item.maps] for item in explanations]).astype(np.float32)


def top_rate(model: VisionTransformer, scenes: Sequence[Scene]) -> float:
    """Fraction of scenes whose n digits are exactly the model's first n classes."""
    hits = 0
    for batch in batches(scenes):
        with torch.no_grad():
            logits = model(to_input(np.stack([s.image for s in batch])))
        for row, scene in zip(logits, batch, strict=True):
            best = row.topk(len(scene.labels)).indices.tolist()
            hits += set(best) == set(scene.labels)
    return hits / len(scenes)


def map_sums(model: VisionTransformer, scenes: Sequence[Scene]) -> NDArray[np.float32]:
    """(n, 2, 2): for two-digit scenes, the sum of digit i's CDAM map inside the mask of digit j."""
    side = model.patch_embed.grid_size[0]
    sums = []
    for batch in batches(scenes):
        classes = torch.tensor([s.labels for s in batch])
        maps = cdam_maps(model, to_input(np.stack([s.image for s in batch])), classes)
        masks = np.stack([[patch_weights(o.mask, side) for o in s.objects] for s in batch])
        sums.append(np.einsum("bihw,bjhw->bij", maps, masks))
    return np.concatenate(sums).astype(np.float32)


def measure(
    model: VisionTransformer, split: Split = "test", singles: int = 2000, pairs: int = 1000, triples: int = 500
) -> Figures:
    """Measures a model in eval mode on freshly drawn scenes of one split.

    Raises:
        ImportError: if scikit-learn is not installed (extra `demo`).
    """
    one, two, three = (
        [draw_scene(split, SEED + i, digits) for i in range(count)]
        for digits, count in ((1, singles), (2, pairs), (3, triples))
    )
    sums = map_sums(model, two)
    own, other = np.stack([sums[:, 0, 0], sums[:, 1, 1]], 1), np.stack([sums[:, 0, 1], sums[:, 1, 0]], 1)
    right, signed = own > other, (own > 0) & (other <= 0)
    return Figures(
        split=split,
        single_scenes=singles,
        pair_scenes=pairs,
        triple_scenes=triples,
        single_top1=top_rate(model, one),
        pair_top2=top_rate(model, two),
        triple_top3=top_rate(model, three),
        map_right_digits=float(right.mean()),
        map_right_scenes=float(right.all(1).mean()),
        map_signed_digits=float(signed.mean()),
        map_signed_scenes=float(signed.all(1).mean()),
    )


def batches(scenes: Sequence[Scene]) -> Iterator[Sequence[Scene]]:
    """The scenes, so many at a time as are explained at once."""
    for start in range(0, len(scenes), _BATCH):
        yield scenes[start : start + _BATCH]
