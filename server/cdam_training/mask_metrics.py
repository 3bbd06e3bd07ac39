"""How good maps of probabilities over patches are, against masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cdam_training.masks import PatchMask
from cdam_training.metrics import Scores, measure_ratios
from cdam_training.ranking import Floats, average_precision

_ABSENT: Final = "no mask shows it"
_UNDEFINED: Final = {
    "mask_average_precision": _ABSENT,
    "mask_share": _ABSENT,
    "mask_iou": _ABSENT,
    "mask_brier": "no mask decides it",
    "class_iou": "neither a mask nor a map shows it",
}


def measure_masks(
    outputs: Sequence[str],
    maps: Iterable[tuple[PatchMask, Floats]],
    clusters: NDArray[np.int64],
    *,
    seed: int = 0,
) -> Scores:
    """What is reported of maps, over pixels: each has its patch's probability. Undecided pixels don't count.

    - `mask_average_precision`: of an output's map of an image that shows it, pixels inside against those outside; the
      mean over images. Its chance level is `mask_share`, the share of the pixels that are inside.
    - `mask_iou`: intersection over union of mask and pixels with a probability of more than .5; the mean over the same.
    - `class_iou`: the same with intersections and unions added up over all images, also those that do not show the output.
    - `mask_brier`: the mean over decided pixels of the squared error of the probability, all images added up.

    Each is given by output, and as `mean_...` the mean over outputs.

    Args:
        outputs: Names of all C.
        maps: Of each image the mask, and the probabilities of its k outputs at P patches, (k, P).
        clusters: Of the images.
        seed: Of the bootstrap.

    Raises:
        ValueError: There is no image.

    Source: Everingham et al. 2010, sections 4.1 and 4.3, for average precision and class IoU; Brier 1950.
    """
    rows: list[Mapping[str, tuple[float, float]]] = []
    its_output: list[int] = []
    its_image: list[int] = []
    images = 0
    for image, (mask, probabilities) in enumerate(maps):
        for output, inside, its in zip(mask.outputs.tolist(), mask.inside, probabilities, strict=True):
            rows.append(_of_map(its.astype(np.float64), inside.astype(np.float64), mask.decided.astype(np.float64)))
            its_output.append(output)
            its_image.append(image)
        images += 1
    ratios = {
        name: tuple(np.array([row[name][side] for row in rows], np.float64) for side in (0, 1)) for name in _UNDEFINED
    }
    return measure_ratios(
        outputs,
        np.array(its_output, np.int64),
        {name: (above, below) for name, (above, below) in ratios.items()},
        _UNDEFINED,
        clusters=clusters[its_image],
        rows=images,
        seed=seed,
    )


def _of_map(its: Floats, inside: Floats, decided: Floats) -> dict[str, tuple[float, float]]:
    """One map of one output: what is added up above and below."""
    outside = decided - inside
    marked = its > 0.5
    both = float(inside[marked].sum())
    either = float(inside.sum() + outside[marked].sum())
    error = float((inside * (1 - its) ** 2 + outside * its**2).sum())
    total, there = float(decided.sum()), float(inside.sum() > 0)
    return {
        "mask_average_precision": (pixel_average_precision(its, inside, decided) if there else 0.0, there),
        "mask_share": (float(inside.sum()) / total if there else 0.0, there),
        "mask_iou": (both / either if there else 0.0, there),
        "mask_brier": (error, total),
        "class_iou": (both, either),
    }


def pixel_average_precision(scores: Floats, inside: Floats, decided: Floats) -> float:
    """Average precision over pixels, of which each has its patch's score.

    Args:
        scores: Of patches, (P,).
        inside: How many of a patch's pixels are inside, (P,).
        decided: How many count at all, (P,).

    Returns:
        NaN where nothing is inside.
    """
    both = np.concatenate([scores, scores])
    positive = np.repeat([True, False], len(scores))
    weights = np.concatenate([inside, decided - inside])
    return float(average_precision(both, positive, weights[None])[0])
