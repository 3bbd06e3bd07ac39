"""The references of the metrics, before the engine is compared with them: by hand, and by scipy and scikit-learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import sklearn.metrics
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cdam_engine import Concept, Contrast, Output
from reference import evaluation_references as references
from reference.method_expectations import concept, function
from reference.models import BY_ID, build, images
from reference.whole_model import run

Array = NDArray[np.float64]

GRID, PATCH, SIZE = (3, 4), (5, 3), (14, 12)  # the last row of patches is padded


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def linear(weights: Array, offset: float = 0.0) -> Callable[[Array], Array]:
    """f(x) = sum w x + b: what a curve must be can be said."""
    return lambda batch: (batch * weights).sum((1, 2, 3)) + offset


def value(found: references.Numbers) -> dict[str, float]:
    return {name: number.value for name, number in found.items()}


# Draws.


def test_draws_depend_on_every_text_and_where_it_ends() -> None:
    asked = [
        (0, "a", "b"),
        (1, "a", "b"),
        (0, "ab"),
        (0, "a", "b", ""),
        (0, "", "a", "b"),
        (0, "a", "c"),
        (0, "ä", "b"),
    ]
    firsts = [references.draws(seed, *rest).integers(2**63) for seed, *rest in asked]
    assert len(set(firsts)) == len(firsts)
    assert firsts == [references.draws(seed, *rest).integers(2**63) for seed, *rest in asked]


def test_boxes_lie_inside_and_reach_every_edge() -> None:
    found = references.boxes(3, "scene", 5, 2000, (9, 12))
    assert {top for top, _ in found} == set(range(5))
    assert {left for _, left in found} == set(range(8))


# Images and maps.


@pytest.mark.parametrize("name", ["eight_outputs", "deit_distilled", "average_pool_register", "siglip", "eva02"])
def test_values_are_what_the_run_model_says(name: str) -> None:
    model, pixels = build(BY_ID[name]), images(BY_ID[name], 2)
    vector = concept(model, 1)
    for target in (Output(1), Concept(vector, "cosine"), Contrast(Output(0), Concept(vector, "l2"))):
        f = function(target)
        heard = [run(model, image) for image in pixels]
        expected = [float(f(its.latent, its.logits).detach()) for its in heard]
        assert references.values(model, f)(pixels.numpy()) == pytest.approx(expected, rel=1e-12)
    for activation, torchs in (("softmax", torch.softmax), ("sigmoid", lambda logits, _: torch.sigmoid(logits))):
        found = references.values(model, function(Output(1)), activation)(pixels.numpy())
        assert found == pytest.approx(torchs(model(pixels).detach(), -1)[:, 1].numpy(), rel=1e-12)


@pytest.mark.parametrize(("size", "sigma"), [((14, 12), 14.0), ((30, 23), 5.0), ((8, 9), 60.0), ((1, 6), 40.0)])
def test_blur_is_scipys(size: tuple[int, int], sigma: float) -> None:
    """scipy truncates where it is told; "mirror" is its name for a reflection that doesn't repeat the edge."""
    image = noise(3, *size)
    pixels = sigma * math.sqrt(size[0] * size[1]) / 224
    expected = image
    for axis in (1, 2):
        radius = min(math.ceil(4 * pixels), size[axis - 1] - 1)
        expected = scipy.ndimage.gaussian_filter1d(expected, pixels, axis, mode="mirror", radius=radius)
    assert references.blur(image, sigma) == pytest.approx(expected, abs=1e-12)


def test_blur_leaves_a_plain_colour() -> None:
    plain = np.full((3, 10, 7), 0.3)
    assert references.blur(plain, 14) == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize("grid", [GRID, (1, 5), (6, 1), (1, 1)])
def test_bilinear_is_torchs(grid: tuple[int, int]) -> None:
    scores = noise(*grid)
    size = (grid[0] * PATCH[0], grid[1] * PATCH[1])
    expected = F.interpolate(torch.from_numpy(scores)[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    assert references.enlarge(scores, PATCH, size, "bilinear") == pytest.approx(expected.numpy(), abs=1e-12)
    cropped = references.enlarge(scores, PATCH, (size[0] - 2, size[1] - 1), "bilinear")
    assert cropped == pytest.approx(expected.numpy()[:-2, :-1], abs=1e-12)


def test_beyond_the_outermost_centres_scores_are_equal_to_the_last_bit() -> None:
    """Ties that rounding would break: the ranking of whole strips would hang on it."""
    scores = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    found = references.enlarge(scores, (8, 16), (40, 64), "bilinear")
    assert (found[:4] == found[:1]).all()
    assert (found[36:] == found[-1:]).all()
    assert (found[:, :8] == found[:, :1]).all()
    assert (found[:, 56:] == found[:, -1:]).all()


def test_nearest_is_numpys_repeat() -> None:
    scores = noise(*GRID)
    repeated = np.repeat(np.repeat(scores, PATCH[0], 0), PATCH[1], 1)[: SIZE[0], : SIZE[1]]
    assert (references.enlarge(scores, PATCH, SIZE, "nearest") == repeated).all()


def test_patches_partition_the_input() -> None:
    parts = references.patch_pixels(GRID, PATCH, SIZE)
    assert sorted(pixel for part in parts for pixel in part) == list(range(SIZE[0] * SIZE[1]))
    mask = noise(*SIZE) > 0
    padded = torch.from_numpy(np.pad(mask, ((0, 1), (0, 0))).astype(np.float64))[None, None]
    sums = F.avg_pool2d(padded, PATCH)[0, 0].numpy() * 15
    sums[:2] /= 15
    sums[2] /= 12  # four rows of its five are inside
    assert references.patch_share(mask, GRID, PATCH) == pytest.approx(sums, abs=1e-12)


def test_ranks() -> None:
    scores = np.array([[2.0, 1.0, 2.0], [1.0, 3.0, 1.0]])
    assert references.ranked(scores, most_first=True) == [4, 0, 2, 1, 3, 5]
    assert references.ranked(scores, most_first=False) == [1, 3, 5, 0, 2, 4]
    drawn = np.round(noise(200), 1)
    assert references.ranked(drawn, most_first=True) == np.argsort(-drawn, kind="stable").tolist()
    assert references.midranks(drawn) == scipy.stats.rankdata(drawn).tolist()


@pytest.mark.parametrize("steps", [1, 3, 10, 17])
@pytest.mark.parametrize("parts", [5, 20, 168])
def test_shares_are_rounded_half_up(parts: int, steps: int) -> None:
    """f counts the pixels that were replaced."""
    first, last = np.zeros((3, parts, 1)), np.ones((3, parts, 1))
    found = references.series(lambda batch: batch[:, 0].sum((1, 2)), first, last, [[i] for i in range(parts)], steps)
    assert found.tolist() == [math.floor(parts * k / steps + 0.5) for k in range(steps + 1)]


def test_correlations_are_scipys() -> None:
    one, other = noise(50), noise(50, seed=1)
    assert references.pearson(one, other) == pytest.approx(scipy.stats.pearsonr(one, other)[0], abs=1e-12)
    assert references.pearson(one, 1 + 1e-8 * other) == 0
    assert references.pearson(one, np.zeros(50)) == 0
    tied = np.round(one)
    assert references.spearman(tied, other) == pytest.approx(scipy.stats.spearmanr(tied, other)[0], abs=1e-12)
    absolute = scipy.stats.spearmanr(abs(tied), abs(other))[0]
    assert references.spearman(tied, other, absolute=True) == pytest.approx(absolute, abs=1e-12)
    assert references.spearman(np.ones(50), other) == 0


def test_trapezoid_is_numpys() -> None:
    x, y = np.sort(noise(9)), noise(9, seed=1)
    assert references.trapezoid(x, y) == pytest.approx(np.trapezoid(y, x), abs=1e-12)


# Metrics.


@pytest.mark.parametrize("unit", ["pixel", "patch"])
def test_fidelity_of_the_true_map_of_a_linear_model(unit: str) -> None:
    """Of f = sum w x, the map of what each part loses by the blur falls fastest first: none has a smaller a_mif."""
    image, weights = noise(3, 12, 12), noise(3, 12, 12, seed=1)
    lost = (weights * (image - references.blur(image, 14))).sum(0)
    best = lost if unit == "pixel" else lost.reshape(4, 3, 4, 3).sum((1, 3))
    patch = (1, 1) if unit == "pixel" else (3, 3)

    def measure(scores: Array) -> dict[str, float]:
        return value(references.fidelity(linear(weights), image, scores, patch, unit=unit, enlargement="nearest"))

    found = measure(best)
    others = [measure(noise(*best.shape, seed=seed)) for seed in range(20)]
    assert found["a_mif"] < min(its["a_mif"] for its in others)
    assert found["a_lif"] > max(its["a_lif"] for its in others)
    assert found["a_lif_mif"] == found["a_lif"] - found["a_mif"]


def test_fidelity_by_hand() -> None:
    """Four pixels, of which the blur takes away 4, 3, 2 and 1: f falls from 10 by these."""
    image = np.zeros((3, 2, 2))
    weights = np.zeros((3, 2, 2))
    image[0] = [[1, 2], [4, 8]]
    weights[0] = np.array([[1.0, 2.0], [3.0, 4.0]]) / (image - references.blur(image, 300))[0]
    f = linear(weights, offset=10 - float((weights * image).sum()))
    found = references.fidelity(f, image, np.array([[1.0, 2.0], [3.0, 4.0]]), (1, 1), blur_sigma=300, points=5)
    assert found["a_mif"].curve is not None
    assert found["a_mif"].curve[0].tolist() == [0, 25, 50, 75, 100]
    assert found["a_mif"].curve[1] == pytest.approx([10, 6, 3, 1, 0])
    assert found["a_mif"].value == pytest.approx(25 * (5 + 6 + 3 + 1))
    assert found["mean_mif"].value == pytest.approx(4)
    assert found["a_lif"].curve is not None
    assert found["a_lif"].curve[1] == pytest.approx([10, 9, 7, 4, 0])
    assert found["a_lif_mif"].value == pytest.approx(25 * (25 - 15))
    assert found["mean_lif"].value == pytest.approx(6)


def test_box_sensitivity_of_the_true_map_of_a_linear_model_is_1() -> None:
    image, weights = noise(3, 16, 12), noise(3, 16, 12, seed=1)
    lost = (weights * (image - references.blur(image, 14))).sum(0)
    found = references.box_sensitivity(linear(weights), image, lost, (1, 1), 0, "a", count=30)
    assert found["box_mean"].value == pytest.approx(1)
    assert found["box_area"].value == pytest.approx(1)
    assert found["box_area"].curve is not None
    assert found["box_area"].curve[0] == pytest.approx(
        [100 * side / 12 for side in (2, 3, 4, 6)]
    )  # 1.5 and 4.5 to even
    inverted = references.box_sensitivity(linear(weights), image, -lost, (1, 1), 0, "a", box_sizes=[5], count=30)
    assert inverted["box_area"].value == inverted["box_mean"].value == pytest.approx(-1)


def test_area_of_boxes_weighs_by_side() -> None:
    image, weights = noise(3, 12, 12), noise(3, 12, 12, seed=1)
    scores = noise(4, 4, seed=2)
    found = references.box_sensitivity(linear(weights), image, scores, (3, 3), 0, "a", box_sizes=[1, 2, 7], count=9)
    assert found["box_area"].curve is not None
    one, two, seven = found["box_area"].curve[1]
    assert found["box_area"].value == pytest.approx((one + two) / 2 / 6 + 5 * (two + seven) / 2 / 6)
    assert found["box_mean"].value == pytest.approx((one + two + seven) / 3)


def test_compactness_by_hand() -> None:
    scores = np.array([[1.0, 0.05, 0.06], [0.0, -0.5, -2.0]])
    assert references.compactness(scores)["compactness"].value == 4 / 6
    assert references.compactness(scores, absolute=True)["compactness"].value == 3 / 6
    assert references.compactness(scores, 0.0)["compactness"].value == 3 / 6
    assert references.compactness(-abs(scores))["compactness"].value == 0
    assert references.compactness(np.zeros((2, 2)), absolute=True)["compactness"].value == 0


def test_mask_agreement_by_hand() -> None:
    scores = np.array([[4.0, 1.0], [-2.0, 1.0]])
    mask = np.array([[True, False], [True, False]])
    found = value(references.mask_agreement(scores, mask, (1, 1)))
    assert found == {"energy": 4 / 6, "pointing_game": 1.0, "auroc": 0.5, "patch_iou": pytest.approx(1 / 3)}
    assert value(references.mask_agreement(-abs(scores), mask, (1, 1)))["energy"] == 0
    assert value(references.mask_agreement(np.ones((2, 2)), mask, (1, 1)))["pointing_game"] == 0.5


def test_auroc_is_scikit_learns() -> None:
    scores, mask = np.round(noise(*GRID), 1), noise(*SIZE, seed=1) > 0.4
    for how in ("nearest", "bilinear"):
        pixels = references.enlarge(scores, PATCH, SIZE, how).ravel()
        expected = sklearn.metrics.roc_auc_score(mask.ravel(), pixels)
        assert references.mask_agreement(scores, mask, PATCH, how)["auroc"].value == pytest.approx(expected, abs=1e-12)


def test_localisation_by_hand() -> None:
    """A map of single pixels: 8 and 9 beside one another on the object, a weaker and wider part elsewhere."""
    scores = np.array(
        [
            [8.0, 9.0, -1.0, -1.0],
            [-1.0, -1.0, -1.0, -1.0],
            [4.0, 4.0, 4.0, -1.0],
        ]
    )
    mask = np.zeros((3, 4), bool)
    mask[0, 0] = mask[0, 1] = True
    plain = references.localisation(scores, mask, (1, 1), points=10)
    # Levels of S / 9: to 0.4 the wider part is the largest, then the object, at 0.9 the 9 alone, which is half of it.
    assert plain["box_acc"].curve is not None
    assert plain["box_acc"].curve[1].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    plain = references.localisation(scores, mask, (1, 1), points=10, normalisation="min_max")
    # Levels of (S + 1) / 10: at 0 all is one box of twelve, to 0.5 the wider part is the largest, then the object.
    assert plain["box_acc"].curve is not None
    assert plain["box_acc"].curve[0] == pytest.approx([k / 10 for k in range(10)])
    assert plain["box_acc"].curve[1].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert value(plain) == {"box_acc": 0.4, "corloc": 0.0, "box_iou": 0.0, "pixel_ap": 1.0}
    tried = value(references.localisation(scores, mask, (1, 1), points=10, all_components=True))
    assert tried == {"box_acc": 1.0, "corloc": 1.0, "box_iou": 1.0, "pixel_ap": 1.0}
    strict = value(references.localisation(scores, mask, (1, 1), points=10, threshold=0.95))
    assert (strict["corloc"], strict["box_iou"]) == (1.0, 0.5)  # the 9 alone
    stricter = value(references.localisation(scores, mask, (1, 1), points=10, threshold=0.95, iou=0.51))
    assert (stricter["corloc"], stricter["box_iou"]) == (0.0, 0.5)
    mask[2, 0] = mask[2, 1] = True  # another object, which is as good
    assert value(references.localisation(scores, mask, (1, 1)))["box_iou"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("height", [0.0, -0.5, 2.0])
def test_localisation_of_a_constant_map(height: float) -> None:
    """By its maximum it is everywhere, or nowhere if it is not positive; from its minimum it is everywhere at level 0 alone."""
    mask = np.zeros((4, 5), bool)
    mask[1:, :4] = True
    flat = np.full((4, 5), height)
    found = value(references.localisation(flat, mask, (1, 1), points=4))
    place = float(height > 0)
    assert found == pytest.approx({"box_acc": place, "corloc": place, "box_iou": 0.6 * place, "pixel_ap": 0.6})
    found = value(references.localisation(flat, mask, (1, 1), points=4, normalisation="min_max"))
    assert found == pytest.approx({"box_acc": 0.25, "corloc": 0, "box_iou": 0, "pixel_ap": 0.6})


def test_object_smaller_than_half_a_patch() -> None:
    mask = np.zeros(SIZE, bool)
    mask[6, 4] = True
    scores = np.zeros(GRID)
    scores[1, 1] = 1
    assert references.mask_agreement(scores, mask, PATCH)["patch_iou"].value == 1
    assert references.mask_agreement(-scores, mask, PATCH)["patch_iou"].value == 0


def test_insertion_and_deletion_of_a_linear_model() -> None:
    """The deleted image is 0; what is inserted into a blurred image ends as the image."""
    image, weights = noise(3, 12, 12), noise(3, 12, 12, seed=1)
    f, scores = linear(weights, offset=2), noise(4, 4, seed=2)
    found = references.insertion_deletion(f, image, scores, (3, 3), unit="patch")
    whole = float(f(image[None])[0])
    inserted, deleted = found["insertion"].curve, found["deletion"].curve
    assert inserted is not None
    assert deleted is not None
    assert inserted.shape == deleted.shape == (2, 17)
    assert inserted[1, [0, -1]] == pytest.approx([float(f(references.blur(image, 5)[None])[0]), whole])
    assert deleted[1, [0, -1]] == pytest.approx([whole, 2])
    contributions = (weights * image).sum(0).reshape(4, 3, 4, 3).sum((1, 3)).ravel()
    order = np.argsort(-scores.ravel(), kind="stable")
    assert deleted[1] == pytest.approx(whole - np.concatenate([[0], np.cumsum(contributions[order])]))


def test_gini_is_the_mean_difference() -> None:
    """Half the mean absolute difference of all pairs, over the mean."""
    scores = noise(*GRID)
    sizes = abs(scores).ravel()
    expected = abs(sizes[:, None] - sizes).mean() / 2 / sizes.mean()
    assert references.sparseness(scores)["gini"].value == pytest.approx(expected, abs=1e-12)
    assert references.sparseness(np.full((2, 3), -4.0))["gini"].value == pytest.approx(0, abs=1e-12)
    assert references.sparseness(np.zeros((2, 3)))["gini"].value == 0
    one = np.zeros((2, 3))
    one[1, 1] = -1
    assert references.sparseness(one)["gini"].value == pytest.approx(5 / 6)


def test_redrawn_weights_keep_mean_and_deviation() -> None:
    weight = torch.from_numpy(3 + 2 * noise(300, 400))
    redrawn = references.redrawn(weight, 5, "blocks.0.mlp.fc1.weight")
    assert float(redrawn.mean()) == pytest.approx(float(weight.mean()), abs=0.03)
    assert float(redrawn.std()) == pytest.approx(float(weight.std()), rel=0.01)
    assert abs(float(np.corrcoef(weight.ravel(), redrawn.ravel())[0, 1])) < 0.02
    assert (redrawn != references.redrawn(weight, 6, "blocks.0.mlp.fc1.weight")).all()
    assert (redrawn != references.redrawn(weight, 5, "blocks.0.mlp.fc2.weight")).all()
    constant = torch.full((4,), 0.1, dtype=torch.float32)
    assert (references.redrawn(constant, 5, "bias") == constant).all()


@pytest.mark.parametrize("name", ["eight_outputs", "deit_distilled", "siglip", "beitv2_shared_bias", "rope_mixed"])
def test_cascade_starts_at_the_head_and_reaches_everything(name: str) -> None:
    case = BY_ID[name]
    model = build(case)
    before = copy.deepcopy(model.state_dict())
    changed: list[set[str]] = []
    for randomised in references.cascade(model, 0):
        found = dict(randomised.named_parameters())
        changed.append({name for name, weight in model.named_parameters() if (found[name] != weight).any()})
        assert all((old == randomised.get_buffer(name)).all() for name, old in model.named_buffers())
    assert len(changed) == len(model.blocks) + 2
    assert changed[0] == {key for key, _ in model.named_parameters() if key.split(".")[0] in references.HEAD}
    for index in range(1, len(model.blocks) + 1):
        prefix = f"blocks.{len(model.blocks) - index}."
        assert changed[index] - changed[index - 1] == {
            key for key, _ in model.named_parameters() if key.startswith(prefix)
        }
    assert changed[-1] == {key for key, _ in model.named_parameters()}
    assert all((before[key] == weight).all() for key, weight in model.state_dict().items())


def test_counterfactual_by_hand() -> None:
    """f = sum of the first channel; four pixels of ones go away, which the map says it would notice by halves."""
    image = np.zeros((3, 4, 4))
    image[:, 1:3, 1:3] = 1
    without = np.zeros((3, 4, 4))
    weights = np.zeros((3, 4, 4))
    weights[0] = 1
    differ = (image != without).any(0)
    scores = np.array([[1.0, 2.0], [3.0, -10.0]])
    found = value(references.counterfactual(linear(weights), image, without, differ, scores, (2, 2)))
    assert found == {"true_change": 4.0, "map_change": -1.0, "sign_agreement": 0.0}
    found = value(references.counterfactual(linear(-weights), image, without, differ, scores, (2, 2)))
    assert found["sign_agreement"] == 1
    found = value(references.counterfactual(linear(weights), image, without, differ, 0 * scores, (2, 2)))
    assert found["sign_agreement"] == 0.5
