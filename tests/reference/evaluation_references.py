"""Every metric of an evaluation the slow, plain way: one sample, one map, one step after the other.

Nothing here is shared with the engine; the fast code is compared with this one. An image is `(3, H, W)`, normalised, in
double precision; a map `(h, w)`; a mask `(H, W)`; f takes images `(n, 3, H, W)` and returns n values.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import skimage.measure
import sklearn.metrics
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reference.whole_model import Function, activated

Array = NDArray[np.float64]
Values = Callable[[Array], Array]
Patch = tuple[int, int]
Size = tuple[int, int]

HEAD = ("norm", "fc_norm", "attn_pool", "head", "head_dist")
"""What timm's Vision Transformers have after their blocks."""


class Number(NamedTuple):
    """A quantity; with the curve that it is the area or the mean of, if it is one.

    Attributes:
        value: The number.
        curve: `(2, points)`, abscissae then ordinates.
    """

    value: float
    curve: Array | None = None


Numbers = dict[str, Number]


# Draws.


def draws(seed: int, sample: str, *purpose: str) -> np.random.Generator:
    """Random numbers that depend on the seed, the sample's id and the purpose alone."""
    digest = hashlib.sha256()
    for text in (str(seed), sample, *purpose):
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    key = int.from_bytes(digest.digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def boxes(seed: int, sample: str, side: int, count: int, size: Size) -> list[tuple[int, int]]:
    """Top left corners of the square boxes of a side, all inside the input."""
    draw = draws(seed, sample, "boxes", str(side))
    height, width = size
    tops = draw.integers(0, height - side + 1, count)
    lefts = draw.integers(0, width - side + 1, count)
    return [(int(top), int(left)) for top, left in zip(tops, lefts, strict=True)]


# Images, maps and masks.


def values(model: nn.Module, target: Function, activation: str = "identity", at_once: int = 64) -> Values:
    """The target's value of images, by the untouched model; of activated outputs, if asked for."""
    weight = next(model.parameters())

    @torch.no_grad()
    def f(images: Array) -> Array:
        found: list[float] = []
        for start in range(0, len(images), at_once):
            pixels = torch.from_numpy(np.stack(images[start : start + at_once])).to(weight.dtype)
            features = model.forward_features(pixels)
            latents = model.forward_head(features, pre_logits=True)
            for latent, outputs in zip(latents, model.forward_head(features), strict=True):
                found.append(float(target(latent, activated(outputs, activation))))
        return np.array(found, dtype=np.float64)

    return f


def blur(image: Array, sigma_at_224: float) -> Array:
    """Gaussian blur, first down, then across; beyond the edge the image is mirrored at its outermost pixels."""
    height, width = image.shape[-2:]
    sigma = sigma_at_224 * math.sqrt(height * width) / 224
    blurred = image
    for axis, side in ((1, height), (2, width)):
        radius = min(math.ceil(4 * sigma), side - 1)
        taps = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)]
        around = [(0, 0)] * 3
        around[axis] = (radius, radius)
        padded = np.pad(blurred, around, mode="reflect")
        total = np.zeros_like(blurred)
        for k, tap in enumerate(taps):
            total += tap / sum(taps) * np.take(padded, range(k, k + side), axis=axis)
        blurred = total
    return blurred


def enlarge(scores: NDArray[np.floating], patch: Patch, size: Size, how: str) -> Array:
    """The map over the input's pixels; what padding made of the last patches is not there.

    Bilinear: patches' centres have their scores, and beyond the outermost centres the score is theirs, to the last bit.
    """
    (h, w), (down, across), (height, width) = scores.shape, patch, size
    pixels = np.zeros(size)
    if how == "nearest":
        for y in range(height):
            for x in range(width):
                pixels[y, x] = scores[y // down, x // across]
        return pixels
    assert how == "bilinear"
    rows = np.zeros((height, w))
    for y in range(height):
        above, below, share = _between(y, down, h)
        for column in range(w):
            first, second = float(scores[above, column]), float(scores[below, column])
            rows[y, column] = first + share * (second - first)
    for x in range(width):
        left, right, share = _between(x, across, w)
        for y in range(height):
            pixels[y, x] = rows[y, left] + share * (rows[y, right] - rows[y, left])
    return pixels


def _between(pixel: int, side: int, patches: int) -> tuple[int, int, float]:
    """The patches whose centres a pixel's lies between, and how far from the first to the second."""
    place = min(max((pixel + 0.5) / side - 0.5, 0), patches - 1)
    first = math.floor(place)
    return first, min(first + 1, patches - 1), place - first


def patch_pixels(grid: Size, patch: Patch, size: Size) -> list[list[int]]:
    """The pixels of each patch that the input has, as indices in raster order."""
    (h, w), (down, across), (height, width) = grid, patch, size
    pixels: list[list[int]] = [[] for _ in range(h * w)]
    for y in range(height):
        for x in range(width):
            pixels[(y // down) * w + x // across].append(y * width + x)
    return pixels


def patch_share(mask: NDArray[np.bool_], grid: Size, patch: Patch) -> Array:
    """The share of each patch's pixels that lie in the mask, `(h, w)`."""
    inside = mask.ravel()
    shares = [float(np.mean([inside[i] for i in pixels])) for pixels in patch_pixels(grid, patch, mask.shape)]
    return np.array(shares).reshape(grid)


def ranked(scores: NDArray[np.floating], *, most_first: bool) -> list[int]:
    """Indices by score; equal scores keep raster order, either way around."""
    flat = scores.ravel().tolist()
    return sorted(range(len(flat)), key=lambda i: -flat[i] if most_first else flat[i])


def ranked_parts(
    scores: NDArray[np.floating], patch: Patch, size: Size, unit: str, enlargement: str, *, most_first: bool
) -> list[list[int]]:
    """What is perturbed one after the other: pixels by the enlarged map, or the pixels of whole patches."""
    if unit == "pixel":
        return [[i] for i in ranked(enlarge(scores, patch, size, enlargement), most_first=most_first)]
    assert unit == "patch"
    pixels = patch_pixels(scores.shape, patch, size)
    return [pixels[i] for i in ranked(scores, most_first=most_first)]


def series(f: Values, first: Array, last: Array, parts: Sequence[Sequence[int]], steps: int) -> Array:
    """f as `first` becomes `last`, part by part: `steps + 1` values, after equal shares of the parts, rounded half up."""
    images = []
    for k in range(steps + 1):
        count = (2 * len(parts) * k + steps) // (2 * steps)
        image = first.reshape(len(first), -1).copy()
        replaced = [pixel for part in parts[:count] for pixel in part]
        image[:, replaced] = last.reshape(len(last), -1)[:, replaced]
        images.append(image.reshape(first.shape))
    return f(np.stack(images))


def trapezoid(abscissae: Sequence[float] | Array, ordinates: Sequence[float] | Array) -> float:
    """The area under straight lines between the points."""
    area = 0.0
    for k in range(1, len(abscissae)):
        area += (abscissae[k] - abscissae[k - 1]) * (ordinates[k] + ordinates[k - 1]) / 2
    return float(area)


def pearson(one: Sequence[float] | Array, other: Sequence[float] | Array) -> float:
    """Pearson's correlation; 0 if either hardly varies: by a millionth of its largest size."""
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    for side in (a, b):
        if side.max() - side.min() <= 1e-6 * np.abs(side).max():
            return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def midranks(numbers: Sequence[float] | NDArray[np.floating]) -> list[float]:
    """Ranks from 1; equal numbers share the mean of theirs."""
    flat = np.ravel(np.asarray(numbers)).tolist()
    order = sorted(range(len(flat)), key=lambda i: flat[i])
    ranks = [0.0] * len(flat)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and flat[order[end]] == flat[order[start]]:
            end += 1
        for place in range(start, end):
            ranks[order[place]] = (start + 1 + end) / 2
        start = end
    return ranks


# Metrics.


def fidelity(
    f: Values,
    image: Array,
    scores: NDArray[np.floating],
    patch: Patch,
    *,
    unit: str = "pixel",
    blur_sigma: float = 14.0,
    points: int = 11,
    enlargement: str = "bilinear",
) -> Numbers:
    """The target's value as more and more of the image is blurred, most or least important parts first.

    Source: Brocki, Binda and Chung, "Class-Discriminative Attention Maps for Vision Transformers", TMLR 2024,
    section 4, correctness; after Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has
    Learned", IEEE TNNLS 2017.
    """
    size = image.shape[-2:]
    blurred = blur(image, blur_sigma)
    percent = np.array([100 * k / (points - 1) for k in range(points)])
    found = {}
    for name, most_first in (("mif", True), ("lif", False)):
        parts = ranked_parts(scores, patch, size, unit, enlargement, most_first=most_first)
        ordinates = series(f, image, blurred, parts, points - 1)
        found[f"a_{name}"] = Number(trapezoid(percent, ordinates), np.stack([percent, ordinates]))
        found[f"mean_{name}"] = Number(float(sum(ordinates) / points))
    found["a_lif_mif"] = Number(found["a_lif"].value - found["a_mif"].value)
    return found


def box_sensitivity(
    f: Values,
    image: Array,
    scores: NDArray[np.floating],
    patch: Patch,
    seed: int,
    sample: str,
    *,
    box_sizes: Sequence[int] = (),
    count: int = 100,
    blur_sigma: float = 14.0,
    enlargement: str = "bilinear",
) -> Numbers:
    """Pearson's r, over random boxes, of the sum of scores in a box and what f loses when the box is blurred.

    Source: Brocki, Binda and Chung, TMLR 2024, section 4, correctness; after sensitivity-n of Ancona et al., "Towards
    Better Understanding of Gradient-Based Attribution Methods for Deep Neural Networks", ICLR 2018.
    """
    size = image.shape[-2:]
    shorter = min(size)
    sides = list(box_sizes)
    if not sides:
        for eighths in (1, 2, 3, 4):
            side = max(1, round(shorter * eighths / 8))
            if side not in sides:
                sides.append(side)
    pixels = enlarge(scores, patch, size, enlargement)
    blurred = blur(image, blur_sigma)
    before = float(f(image[None])[0])
    correlations = []
    for side in sides:
        sums, changed = [], []
        for top, left in boxes(seed, sample, side, count, size):
            box = (slice(top, top + side), slice(left, left + side))
            perturbed = image.copy()
            perturbed[:, box[0], box[1]] = blurred[:, box[0], box[1]]
            changed.append(perturbed)
            sums.append(float(pixels[box].sum()))
        after = f(np.stack(changed))
        unmoved = after.max() - after.min() <= 1e-5 * np.abs(after).max()
        correlations.append(0.0 if unmoved else pearson(sums, before - after))
    area = trapezoid(sides, correlations) / (sides[-1] - sides[0]) if len(sides) > 1 else correlations[0]
    curve = np.array([[100 * side / shorter for side in sides], correlations])
    return {"box_mean": Number(float(np.mean(correlations))), "box_area": Number(area, curve)}


def class_discrimination(right: Numbers, wrong: Numbers) -> Numbers:
    """What fidelity and box sensitivity say of the map for the right target less what they say of that for the wrong one.

    Source: Brocki, Binda and Chung, TMLR 2024, section 4, class sensitivity.
    """
    names = ("a_mif", "a_lif", "a_lif_mif", "box_mean", "box_area")
    return {f"delta_{name}": Number(right[name].value - wrong[name].value) for name in names}


def compactness(scores: NDArray[np.floating], threshold: float = 0.05, *, absolute: bool = False) -> Numbers:
    """The share of patches that score at most a fraction of the largest score.

    Source: Brocki, Binda and Chung, TMLR 2024, section 4, compactness; one minus effective complexity of Nguyen and
    Rodriguez Martinez, "On Quantitative Aspects of Model Interpretability", 2020.
    """
    flat = [abs(score) if absolute else score for score in scores.ravel().tolist()]
    if max(flat) <= 0:
        return {"compactness": Number(0.0)}
    small = sum(score <= threshold * max(flat) for score in flat)
    return {"compactness": Number(small / len(flat))}


def mask_agreement(
    scores: NDArray[np.floating], mask: NDArray[np.bool_], patch: Patch, enlargement: str = "bilinear"
) -> Numbers:
    """Whether the map lies on the object.

    Sources: energy: Wang et al., "Score-CAM", CVPR workshops 2020. Pointing game: Zhang et al., "Top-Down Neural
    Attention by Excitation Backprop", ECCV 2016, here without tolerance. AUROC: the chance that a pixel inside scores
    higher than one outside, ties half (Mann and Whitney 1947).
    """
    pixels = enlarge(scores, patch, mask.shape, enlargement).ravel()
    inside = mask.ravel()
    positive = [max(pixel, 0.0) for pixel in pixels.tolist()]
    total = sum(positive)
    energy = sum(p for p, its in zip(positive, inside, strict=True) if its) / total if total > 0 else 0.0
    highest = [bool(its) for pixel, its in zip(pixels, inside, strict=True) if pixel == pixels.max()]
    ranks = midranks(pixels)
    n, m = int(inside.sum()), int((~inside).sum())
    wins = sum(rank for rank, its in zip(ranks, inside, strict=True) if its) - n * (n + 1) / 2
    shares = patch_share(mask, scores.shape, patch).ravel().tolist()
    object_patches = {i for i, share in enumerate(shares) if share >= 0.5}
    if not object_patches:
        object_patches = {i for i, share in enumerate(shares) if share == max(shares)}
    best = set(ranked(scores, most_first=True)[: len(object_patches)])
    return {
        "energy": Number(float(energy)),
        "pointing_game": Number(sum(highest) / len(highest)),
        "auroc": Number(float(wins / (n * m))),
        "patch_iou": Number(len(object_patches & best) / len(object_patches | best)),
    }


def localisation(
    scores: NDArray[np.floating],
    mask: NDArray[np.bool_],
    patch: Patch,
    *,
    normalisation: str = "max",
    threshold: float = 0.2,
    iou: float = 0.5,
    points: int = 100,
    all_components: bool = False,
    enlargement: str = "bilinear",
) -> Numbers:
    """Boxes around connected components of the map against those of the mask; the scores as a classifier of pixels.

    Sources: Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020, and, for
    several components, their "Evaluation for Weakly Supervised Object Localization", TPAMI 2022; the fixed level: Zhou et
    al., "Learning Deep Features for Discriminative Localization", CVPR 2016. Components are scikit-image's, average
    precision is scikit-learn's.
    """
    pixels = enlarge(scores, patch, mask.shape, enlargement)
    truths = [region.bbox for region in component_regions(mask)]

    def fit(chosen: NDArray[np.bool_]) -> float:
        regions = component_regions(chosen)
        if not all_components and regions:
            regions = [max(regions, key=lambda region: region.area)]  # the first of equal ones
        return max((box_iou(region.bbox, truth) for region in regions for truth in truths), default=0.0)

    low, high = float(pixels.min()), float(pixels.max())
    none = np.zeros(mask.shape, bool)

    def at_least(level: float) -> NDArray[np.bool_]:
        if normalisation == "max":
            return pixels / high >= level if high > 0 else none
        assert normalisation == "min_max"
        return (pixels - low) / (high - low) >= level if high > low else ~none if level <= 0 else none

    levels = [k / points for k in range(points)]
    hits = [float(fit(at_least(level)) >= iou) for level in levels]
    fixed = fit(at_least(threshold))
    return {
        "box_acc": Number(sum(hits) / points, np.array([levels, hits])),
        "corloc": Number(float(fixed >= iou)),
        "box_iou": Number(fixed),
        "pixel_ap": Number(float(sklearn.metrics.average_precision_score(mask.ravel(), pixels.ravel()))),
    }


def component_regions(mask: NDArray[np.bool_]) -> list[Any]:
    """Connected components, at edges and corners, from the top."""
    return list(skimage.measure.regionprops(skimage.measure.label(mask, connectivity=2)))


def box_iou(one: Sequence[int], other: Sequence[int]) -> float:
    """Intersection over union of two boxes (top, left, bottom, right), pixel by pixel."""
    cells = [{(y, x) for y in range(box[0], box[2]) for x in range(box[1], box[3])} for box in (one, other)]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


def insertion_deletion(
    probability: Values,
    image: Array,
    scores: NDArray[np.floating],
    patch: Patch,
    *,
    unit: str = "pixel",
    steps: int | None = None,
    blur_sigma: float = 5.0,
    enlargement: str = "bilinear",
) -> Numbers:
    """The target's probability as the most important parts come into a blurred image, or go.

    Source: Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018.
    """
    steps = steps or scores.size
    parts = ranked_parts(scores, patch, image.shape[-2:], unit, enlargement, most_first=True)
    shares = np.array([k / steps for k in range(steps + 1)])
    found = {}
    for name, first, last in (
        ("insertion", blur(image, blur_sigma), image),
        ("deletion", image, np.zeros_like(image)),
    ):
        ordinates = series(probability, first, last, parts, steps)
        found[name] = Number(trapezoid(shares, ordinates), np.stack([shares, ordinates]))
    found["insertion_deletion"] = Number(found["insertion"].value - found["deletion"].value)
    return found


def sparseness(scores: NDArray[np.floating]) -> Numbers:
    """Gini index of the absolute scores.

    Source: Chalasani et al., "Concise Explanations of Neural Networks using Adversarial Training", ICML 2020; the
    index after Hurley and Rickard, "Comparing Measures of Sparsity", 2009.
    """
    sizes = sorted(abs(score) for score in scores.ravel().tolist())
    n, total = len(sizes), sum(sizes)
    if total == 0:
        return {"gini": Number(0.0)}
    return {"gini": Number(sum((2 * i - n - 1) * size for i, size in enumerate(sizes, 1)) / (n * total))}


def spearman(one: NDArray[np.floating], other: NDArray[np.floating], *, absolute: bool = False) -> float:
    """Pearson's correlation of midranks; 0 if either map is constant."""
    maps = [np.abs(its) if absolute else its for its in (one, other)]
    if any(len(set(its.ravel().tolist())) == 1 for its in maps):
        return 0.0
    return pearson(midranks(maps[0]), midranks(maps[1]))


def randomisation(
    original: NDArray[np.floating], randomised: Sequence[NDArray[np.floating]], *, absolute: bool = False
) -> Numbers:
    """How much the map stays what it was, as more and more of the model's weights are drawn anew.

    Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, cascading randomisation.

    Args:
        original: The model's map.
        randomised: The maps of `cascade`'s models.
        absolute: Whether absolute values are taken first.
    """
    correlations = [spearman(original, its, absolute=absolute) for its in randomised]
    curve = np.array([range(1, len(correlations) + 1), correlations], dtype=np.float64)
    return {
        "randomisation_mean": Number(float(np.mean(correlations)), curve),
        "randomisation_all": Number(correlations[-1]),
    }


def cascade(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """Copies of the model, more and more of it drawn anew: what comes after the blocks, block by block, the rest."""
    randomised = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    after = [name for name in names if name.split(".")[0] in HEAD]
    # Class attention, where there is one, comes after the blocks of patches.
    places = [f"{rows}.{i}." for rows in ("blocks", "blocks_token_only") for i in range(len(getattr(model, rows, ())))]
    of_blocks = [[name for name in names if name.startswith(place)] for place in places]
    before = [name for name in names if name.split(".")[0] not in {*HEAD, "blocks", "blocks_token_only"}]
    assert len(after) + sum(map(len, of_blocks)) + len(before) == len(names)
    for part in (after, *reversed(of_blocks), before):
        for name in part:
            weight = randomised.get_parameter(name)
            weight.data = redrawn(weight.detach(), seed, name)
        yield randomised


def redrawn(weight: Tensor, seed: int, name: str) -> Tensor:
    """Normal noise of the weight's own mean and standard deviation."""
    numbers = weight.double().numpy()
    mean, deviation = numbers.mean(), numbers.std()
    noise = draws(seed, "", "weights", name).standard_normal(tuple(weight.shape))
    return torch.from_numpy(np.asarray(mean + deviation * noise)).to(weight.dtype)


def counterfactual(
    f: Values, image: Array, without: Array, differ: NDArray[np.bool_], scores: NDArray[np.floating], patch: Patch
) -> Numbers:
    """What f truly loses with the object, against what the scores where the images differ say.

    Args:
        f: The target's value.
        image: The image.
        without: The image without the object.
        differ: The pixels where they differ, as the images were given.
        scores: The image's map.
        patch: Height and width of a patch.
    """
    true_change = float(f(image[None])[0] - f(without[None])[0])
    shares = patch_share(differ, scores.shape, patch)
    map_change = 0.0
    for score, share in zip(scores.ravel().tolist(), shares.ravel().tolist(), strict=True):
        map_change += score * share
    product = math.copysign(1, true_change) * math.copysign(1, map_change)
    agreement = 0.5 if true_change == 0 or map_change == 0 else float(product > 0)
    return {
        "true_change": Number(true_change),
        "map_change": Number(map_change),
        "sign_agreement": Number(agreement),
    }


# Anchors.


def random_map(seed: int, sample: str, side: str, grid: Size) -> Array:
    """Scores that know nothing, for the right or the wrong target."""
    return draws(seed, sample, "map", side).standard_normal(grid)
