"""What must hold of every metric, whatever the map; and what becomes of samples that are bad or strange."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import every
from cdam_engine import (
    Attention,
    AttentionRollout,
    Cdam,
    Concept,
    Contrast,
    Explainer,
    Method,
    Output,
    PartialLrp,
    UnsupportedMethodError,
)
from cdam_engine.batch import Batch
from cdam_engine.evaluation import (
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Evaluated,
    Evaluator,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Metric,
    Protocol,
    Randomisation,
    Sample,
    SampleError,
    Sparseness,
)
from cdam_engine.methods.base import Scores
from cdam_engine.targets import Target
from evaluations import engine_sample
from reference.evaluation_expectations import Setting, measure, numbers_of, sample, setting

QUICK = tuple(
    metric
    for metric in every.metrics(
        Fidelity(unit="patch", points=5), BoxSensitivity(boxes=10), InsertionDeletion(unit="patch", steps=4)
    )
    # These compare maps, and maps that are given do not depend on what they are of.
    if not isinstance(metric, ClassDiscrimination | Randomisation)
)


@dataclass(frozen=True)
class Given(Method):
    """A map that is given, whatever the image and the target."""

    kind: ClassVar[str] = "given"
    needs_target: ClassVar[bool] = False

    scores: tuple[float, ...]

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        scores = torch.tensor(self.scores, dtype=batch.pixels.dtype)
        return Scores(scores.expand(len(images), 1, -1), has_prefix=False)


def given(scores: NDArray[np.float64]) -> Given:
    return Given(tuple(scores.ravel().tolist()))


def noise(its: Setting, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(its.grid)


def ask(
    its: Setting, methods: Sequence[Evaluated], metrics: Sequence[Metric], one: Sample, seed: int = 0
) -> list[dict[str, float]]:
    """The numbers of a sample, one dict a method."""
    (found,) = measure(its, Protocol(tuple(methods), tuple(metrics), seed), [one])
    return [
        {name: number.value for (i, _, name), number in found.items() if i == index} for index in range(len(methods))
    ]


# Maps.


@pytest.mark.parametrize("name", ["eight_outputs", "eva02"])
def test_target_free_maps_discriminate_nothing(name: str) -> None:
    its = setting(name, torch.float32)
    metric = ClassDiscrimination(Fidelity(points=4), BoxSensitivity(boxes=10))
    for numbers in ask(its, (Attention(), AttentionRollout(), given(noise(its))), (metric,), sample(its)):
        assert list(numbers.values()) == [0] * 5


def test_discrimination_changes_its_sign_with_the_maps() -> None:
    """Anchors show masks: with the masks exchanged, what was right is wrong."""
    its = setting("patch_8")
    one = sample(its)
    other = replace(one, mask=one.wrong_mask, wrong_mask=one.mask)
    metrics = (ClassDiscrimination(Fidelity(points=4), BoxSensitivity(boxes=10)),)
    (numbers,), (exchanged,) = (ask(its, (Anchor.MASK,), metrics, its_sample) for its_sample in (one, other))
    assert all(number != 0 for number in numbers.values())
    assert exchanged == pytest.approx({name: -number for name, number in numbers.items()}, rel=1e-9)


def test_monotone_transformation_leaves_fidelity_unchanged() -> None:
    its = setting("patch_8")
    scores = noise(its)
    metrics = (Fidelity(unit="patch"), Fidelity(enlargement="nearest"))
    maps = [given(scores), given(np.exp(scores)), given(scores**3 - 5), given(np.argsort(np.argsort(scores, None)))]
    first, *others = ask(its, maps, metrics, sample(its))
    assert others == [first] * 3
    affine, (plain,) = (
        ask(its, [given(4 * scores)], (Fidelity(),), sample(its)),
        ask(its, [given(scores)], (Fidelity(),), sample(its)),
    )
    assert affine == [plain]


def test_negation_swaps_most_and_least_important() -> None:
    its = setting("patch_8")
    plain, negated = ask(its, (given(noise(its)), given(-noise(its))), (Fidelity(unit="patch"),), sample(its))
    assert negated["a_mif"] == plain["a_lif"] != plain["a_mif"]
    assert negated["a_lif"] == plain["a_mif"]
    assert negated["mean_mif"] == plain["mean_lif"]
    assert negated["a_lif_mif"] == -plain["a_lif_mif"]


def test_scale_changes_nothing_but_what_the_map_tells() -> None:
    its = setting("patch_8")
    scores = noise(its)
    maps = [given(scores), given(1e-6 * scores), given(1e6 * scores)]
    plain, *others = ask(its, maps, QUICK, sample(its))
    for factor, numbers in zip((1e-6, 1e6), others, strict=True):
        assert numbers.pop("map_change") == pytest.approx(factor * plain["map_change"], rel=1e-9)
        assert numbers == pytest.approx({key: plain[key] for key in numbers}, rel=1e-9, abs=1e-12)


def test_sign_of_the_map() -> None:
    its = setting("patch_8")
    plain, negated = ask(its, (given(noise(its)), given(-noise(its))), QUICK, sample(its))
    assert negated["box_mean"] == pytest.approx(-plain["box_mean"], rel=1e-9)
    assert negated["auroc"] == pytest.approx(1 - plain["auroc"], rel=1e-9)
    assert negated["map_change"] == -plain["map_change"]
    assert negated["sign_agreement"] == 1 - plain["sign_agreement"]
    assert negated["gini"] == plain["gini"]


def test_absolute_scores() -> None:
    its = setting("patch_8")
    scores = noise(its)
    metrics = (Compactness(absolute=True), Randomisation(absolute=True))
    plain, negated = ask(its, (given(scores), given(-scores)), metrics, sample(its))
    assert plain == negated


def test_map_of_zeros() -> None:
    its = setting("patch_8")
    one = sample(its)
    assert one.mask is not None
    (numbers,) = ask(its, (given(np.zeros(its.grid)),), (*QUICK, Randomisation()), one)
    assert numbers["a_mif"] == numbers["a_lif"]  # raster order, both ways
    assert numbers["a_lif_mif"] == 0
    assert numbers["box_mean"] == numbers["box_area"] == 0
    assert numbers["compactness"] == 0
    assert numbers["energy"] == 0
    assert numbers["pointing_game"] == pytest.approx(one.mask.mean())
    assert numbers["auroc"] == 0.5
    assert numbers["gini"] == 0
    assert numbers["corloc"] == numbers["box_iou"] == numbers["box_acc"] == 0
    assert numbers["pixel_ap"] == pytest.approx(one.mask.mean())
    assert numbers["map_change"] == 0
    assert numbers["sign_agreement"] == 0.5
    assert numbers["randomisation_mean"] == numbers["randomisation_all"] == 0


@pytest.mark.parametrize("height", [1.0, -0.3])
def test_constant_map(height: float) -> None:
    its = setting("patch_8")
    one = sample(its)
    assert one.mask is not None
    (numbers,) = ask(its, (given(np.full(its.grid, height)),), (*QUICK, Randomisation(absolute=True)), one)
    assert numbers["a_lif_mif"] == 0
    assert numbers["box_mean"] == numbers["box_area"] == 0
    assert numbers["compactness"] == 0
    assert numbers["energy"] == pytest.approx(one.mask.mean() if height > 0 else 0)
    rows, columns = (np.flatnonzero(one.mask.any(axis)) for axis in (1, 0))
    whole_image = len(rows) * len(columns) / one.mask.size  # the mask is a box
    assert numbers["box_iou"] == pytest.approx(whole_image if height > 0 else 0)
    assert numbers["corloc"] == (height > 0 and whole_image >= 0.5)
    assert numbers["pixel_ap"] == pytest.approx(one.mask.mean())
    assert numbers["auroc"] == 0.5
    assert numbers["gini"] == pytest.approx(0, abs=1e-12)
    assert numbers["randomisation_mean"] == 0


def test_what_does_not_depend_on_the_model_survives_randomisation() -> None:
    its = setting("eight_outputs")
    maps = (given(noise(its)), Anchor.RANDOM, Anchor.MASK)
    for numbers in ask(its, maps, (Randomisation(),), sample(its)):
        assert numbers == pytest.approx({"randomisation_mean": 1, "randomisation_all": 1})


def test_curves_begin_and_end_where_they_must() -> None:
    its = setting("patch_8")
    metrics = (Fidelity(points=4), InsertionDeletion(steps=3, activation="identity"))
    (found,) = measure(its, Protocol((Cdam(), Anchor.RANDOM), metrics), [sample(its)])
    curves = {(i, name): number.curve for (i, _, name), number in found.items() if number.curve is not None}
    starts, ends = ({key: float(curve[1, at]) for key, curve in curves.items()} for at in (0, -1))
    whole = starts[0, "a_mif"]
    assert all(starts[i, name] == whole for i in (0, 1) for name in ("a_mif", "a_lif", "deletion"))
    assert ends[0, "insertion"] == ends[1, "insertion"] == whole
    assert len({ends[i, name] for i in (0, 1) for name in ("a_mif", "a_lif")}) == 1
    assert starts[0, "insertion"] == starts[1, "insertion"]
    assert ends[0, "deletion"] == ends[1, "deletion"]


# Anchors, on scenes with objects.


def over_scenes(methods: tuple[Evaluated, ...], metrics: tuple[Metric, ...], count: int) -> list[dict[str, Any]]:
    """Every number of all scenes, one dict of arrays a method."""
    protocol = Protocol(methods, metrics, seed=1)
    samples = [engine_sample(5_000_000 + number) for number in range(count)]
    found = measure(setting("demo", torch.float32), protocol, samples)
    return [
        {name: np.array([its[i, j, name].value for its in found]) for i, j, name in found[0] if i == index}
        for index in range(len(methods))
    ]


HIGHER = (
    *("a_lif", "a_lif_mif", "mean_lif", "box_mean", "box_area", "energy", "pointing_game", "auroc", "patch_iou"),
    *("delta_a_lif", "delta_a_lif_mif", "delta_box_mean", "delta_box_area", "sign_agreement", "map_change"),
    *("insertion", "insertion_deletion", "box_acc", "corloc", "box_iou", "pixel_ap"),
)
LOWER = ("a_mif", "mean_mif", "delta_a_mif", "deletion")


def test_objects_beat_noise() -> None:
    """In the mean over 30 scenes of two digits, by every quantity that has a better and a worse."""
    boxes = BoxSensitivity((16, 24), boxes=6)
    metrics = (
        Fidelity(points=4),
        boxes,
        ClassDiscrimination(Fidelity(points=4), boxes),
        MaskAgreement(),
        Localisation(),
        InsertionDeletion(unit="patch", steps=4),
        Counterfactual(),
    )
    mask, random = over_scenes((Anchor.MASK, Anchor.RANDOM), metrics, 30)
    assert mask.keys() - {"true_change"} == {*HIGHER, *LOWER}
    for name in (*HIGHER, *LOWER):
        better = mask[name].mean() - random[name].mean()
        assert (better < 0) if name in LOWER else (better > 0), name


def test_boxes_of_objects_are_theirs() -> None:
    """The mask's map is a mask of patches: at half of its largest score its box is the object's, in almost every scene."""
    methods = (Anchor.MASK, Anchor.RANDOM, Anchor.INVERTED_MASK)
    mask, random, inverted = over_scenes(methods, (Localisation(threshold=0.5),), 30)
    assert mask["corloc"].mean() > 0.95  # the thinnest strokes have no patch of which they cover half
    assert mask["box_iou"].mean() > 0.8
    assert mask["pixel_ap"].mean() > 0.9
    assert random["corloc"].mean() < 0.1
    assert random["pixel_ap"].mean() < 0.2
    assert inverted["corloc"].mean() < 0.1
    assert inverted["pixel_ap"].mean() < 0.1


def test_the_lowest_level_is_the_whole_image() -> None:
    its = setting("patch_8")
    mask = np.zeros(its.size, bool)
    mask[:-2] = True
    metric = Localisation("min_max", points=5)
    (found,) = measure(its, Protocol((given(noise(its)),), (metric,)), [sample(its, mask=mask)])
    curve = found[0, 0, "box_acc"].curve
    assert curve is not None
    assert curve[0] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert curve[1, 0] == 1


def test_boxes_know_0_or_not() -> None:
    """From its minimum a map is the same with any offset and scale; by its maximum with any scale."""
    its = setting("patch_8")
    scores = np.round(64 * noise(its))  # whole numbers: exact
    maps = given(scores), given(4 * scores), given(4 * scores + 1024)
    plain, scaled, moved = ask(its, maps, (Localisation("min_max", points=64),), sample(its))
    assert plain == scaled == pytest.approx(moved)
    plain, scaled, moved = ask(its, maps, (Localisation("max", points=64),), sample(its))
    assert plain == scaled
    assert moved["box_iou"] != plain["box_iou"]


@pytest.mark.parametrize("normalisation", ["max", "min_max"])
def test_the_fixed_level_is_a_point_of_the_curve(normalisation: Any) -> None:
    """So the best level is at least as good as it, whatever the methods."""
    its, mask = setting("patch_8"), np.zeros((40, 64), bool)
    mask[:30, :50] = True
    assert its.size == mask.shape
    metrics = [Localisation(normalisation, points=10, threshold=k / 10) for k in range(1, 10)]
    (found,) = measure(its, Protocol((given(noise(its, 3)),), tuple(metrics)), [sample(its, mask=mask)])
    curve = found[0, 0, "box_acc"].curve
    assert curve is not None
    assert curve[1, 1:].tolist() == [found[0, index, "corloc"].value for index in range(9)]
    assert set(curve[1]) == {0, 1}


def test_one_of_several_objects_is_enough() -> None:
    its = setting("patch_8")
    (height, width), (down, across) = its.size, its.patch
    mask = np.zeros(its.size, bool)
    mask[:down, :across] = mask[height - 2 * down :, width - 2 * across :] = True
    scores = np.zeros(its.grid)
    scores[0, 0] = 1
    metric = Localisation(enlargement="nearest")
    first, anchor = ask(its, (given(scores), Anchor.MASK), (metric,), sample(its, mask=mask))
    assert first["box_iou"] == anchor["box_iou"] == first["corloc"] == 1
    assert first["box_acc"] == anchor["box_acc"] == pytest.approx(0.99)  # but for the whole image


def test_surroundings_lose_to_objects() -> None:
    metrics = (Fidelity(unit="patch", points=3), MaskAgreement("nearest"))
    mask, inverted = over_scenes((Anchor.MASK, Anchor.INVERTED_MASK), metrics, 6)
    assert (mask["a_mif"] < inverted["a_mif"]).all()
    assert inverted["auroc"] == pytest.approx(1 - mask["auroc"])
    assert (inverted["energy"] < mask["energy"]).all()


def test_noise_says_nothing() -> None:
    """By symmetry the mean is 0 of what compares two ends of a random order, or a random map with anything.

    Within four standard errors over 200 samples: by chance one such test in 16 000 would fail; draws are fixed.
    """
    its = setting("patch_8")
    boxes, fidelity = BoxSensitivity((16,), boxes=4), Fidelity(unit="patch", points=3)
    metrics = (fidelity, boxes, ClassDiscrimination(fidelity, boxes), MaskAgreement("nearest"))
    found = measure(its, Protocol((Anchor.RANDOM,), metrics), [sample(its, number) for number in range(200)])
    centres = {"a_lif_mif": 0, "box_mean": 0, "delta_a_mif": 0, "delta_a_lif_mif": 0, "delta_box_mean": 0, "auroc": 0.5}
    for name, centre in centres.items():
        values = np.array(
            [number.value for its in found for (_, _, quantity), number in its.items() if quantity == name]
        )
        assert len(values) == 200
        assert values.std() > 0
        assert abs(values.mean() - centre) < 4 * values.std(ddof=1) / math.sqrt(len(values)), name


# Draws.


def test_seed_and_id_key_the_draws() -> None:
    its = setting("eight_outputs")
    metrics = (Fidelity(unit="patch"), BoxSensitivity(boxes=5), Randomisation())
    methods = (Anchor.RANDOM, Cdam(), Cdam())
    one = sample(its)

    def numbers(seed: int, its_sample: Sample) -> list[dict[str, float]]:
        return ask(its, methods, metrics, its_sample, seed)

    first = numbers(0, one)
    assert numbers(0, one) == first
    assert first[1] == first[2]  # the same boxes for every method
    renamed, reseeded = numbers(0, replace(one, id="renamed")), numbers(1, one)
    for other in (renamed, reseeded):
        assert other[0]["a_mif"] != first[0]["a_mif"]
        assert other[1]["box_mean"] != first[1]["box_mean"]
        assert other[1]["a_mif"] == pytest.approx(first[1]["a_mif"], rel=1e-9)
    assert renamed[1]["randomisation_mean"] == pytest.approx(first[1]["randomisation_mean"])
    assert reseeded[1]["randomisation_mean"] != first[1]["randomisation_mean"]


def test_boxes_do_not_depend_on_the_target() -> None:
    """The mask's sums in the boxes stay the same; with f the other way around, r is."""
    its = setting("patch_8")
    ahead, back = (
        ask(its, (Anchor.MASK,), (BoxSensitivity(boxes=8),), sample(its, target=Contrast(*outputs)))[0]
        for outputs in ((Output(0), Output(1)), (Output(1), Output(0)))
    )
    assert back["box_mean"] == pytest.approx(-ahead["box_mean"], rel=1e-9)


def test_of_a_plain_image_no_box_says_anything() -> None:
    """Whatever is blurred, f moves by no more than rounding; in fp32 that would correlate with anything by chance."""
    its = setting("patch_8", torch.float32)
    plain = sample(its, image=torch.full((3, *its.size), 0.7))
    (found,) = ask(its, (Anchor.RANDOM,), (BoxSensitivity(boxes=20),), plain)
    assert found["box_mean"] == found["box_area"] == 0


# The model.


def test_model_is_left_as_it_was() -> None:
    its = setting("dinov2_registers")
    model: Any = copy.deepcopy(its.model)
    for index, weight in enumerate(model.parameters()):
        weight.requires_grad_(index % 2 == 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wants = [weight.requires_grad for weight in model.parameters()]
    identities = [id(weight) for weight in model.parameters()]
    protocol = Protocol((Cdam(), Attention()), (Randomisation(), Fidelity(points=2)))
    evaluator = Evaluator(Explainer(model), protocol)
    answers = evaluator.evaluate([sample(its), sample(its, target=Output(99)), sample(its, 1)])
    assert [isinstance(answer, SampleError) for answer in answers] == [False, True, False]
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())
    assert [id(weight) for weight in model.parameters()] == identities
    assert [weight.requires_grad for weight in model.parameters()] == wants
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_images_are_left_as_they_were() -> None:
    its = setting("eight_outputs")
    one = sample(its)
    assert isinstance(one.image, Tensor)
    image = one.image.clone()
    ask(its, (Cdam(),), QUICK, one)
    assert (one.image == image).all()


def test_callers_modes_make_no_difference() -> None:
    its = setting("eight_outputs", torch.float32)
    (plain,) = ask(its, (Cdam(),), QUICK, sample(its))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (found,) = ask(its, (Cdam(),), QUICK, sample(its))
    assert found == plain


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_chunks_are_no_larger_than_asked_and_passes_are_as_told(batch_size: int) -> None:
    its = setting("patch_8")
    explainer = Explainer(its.model)  # which asks the model, too
    seen: list[int] = []
    handle = its.model.get_submodule("patch_embed").register_forward_hook(
        lambda module, args, out: seen.append(len(args[0]))
    )
    try:
        methods = (Cdam(), Anchor.RANDOM)
        protocol = Protocol(methods, (Fidelity(), BoxSensitivity(boxes=10), InsertionDeletion(), Randomisation()))
        evaluator = Evaluator(explainer, protocol, batch_size=batch_size)
        evaluator.evaluate([sample(its, 0), sample(its, 1)])
    finally:
        handle.remove()
    assert max(seen) <= batch_size
    assert 0.7 < sum(seen) / 2 / evaluator.passes() < 1.3


# What no sample can change.


def test_protocols_that_a_model_cannot_serve() -> None:
    its = setting("average_pool_register")
    explainer = Explainer(its.model)
    with pytest.raises(UnsupportedMethodError):
        Evaluator(explainer, Protocol((PartialLrp(),), (Sparseness(),)))
    with pytest.raises(ValueError, match="box_sizes"):
        Evaluator(explainer, Protocol((Cdam(),), (BoxSensitivity((33,)),)))
    with pytest.raises(ValueError, match="box_sizes"):
        Evaluator(explainer, Protocol((Cdam(),), (ClassDiscrimination(box_sensitivity=BoxSensitivity((33,))),)))
    with pytest.raises(ValueError, match="48 x 48"):
        Evaluator(explainer, Protocol((Cdam(),), (Sparseness(),)), input_size=(48, 48))


# Strange samples.


def test_object_of_one_pixel() -> None:
    its = setting("patch_8")
    mask = np.zeros(its.size, bool)
    mask[17, 42] = True
    peak = np.zeros(its.grid)
    peak[17 // 8, 42 // 8] = 1
    metrics = (MaskAgreement("nearest"), Counterfactual())
    one = sample(its, mask=mask)
    assert isinstance(one.image, Tensor)
    without = one.image.clone()
    without[1, 17, 42] += 1
    at, off, anchor = ask(
        its, (given(peak), given(1 - peak), Anchor.MASK), metrics, replace(one, counterfactual=without)
    )
    assert at["patch_iou"] == anchor["patch_iou"] == 1
    assert at["energy"] == at["pointing_game"] == pytest.approx(1 / 64)
    assert off["energy"] == off["pointing_game"] == off["patch_iou"] == 0
    assert at["auroc"] > 0.98
    assert off["auroc"] < 0.02
    assert at["map_change"] == pytest.approx(1 / 64)


def test_object_of_all_but_one_pixel() -> None:
    its = setting("patch_8")
    mask = np.ones(its.size, bool)
    mask[0, 0] = False
    (numbers,) = ask(its, (given(np.ones(its.grid)),), (MaskAgreement(),), sample(its, mask=mask))
    assert numbers == {"energy": pytest.approx(2559 / 2560), "pointing_game": 2559 / 2560, "auroc": 0.5, "patch_iou": 1}


def test_uniform_image() -> None:
    """The blur takes nothing away: f never changes, and what does not vary correlates with nothing."""
    its = setting("patch_8", torch.float32)
    image = torch.full((3, *its.size), 0.7)
    (numbers,) = ask(its, (Anchor.RANDOM,), (Fidelity(), BoxSensitivity()), sample(its, image=image))
    assert numbers["a_mif"] == pytest.approx(100 * numbers["mean_mif"], rel=1e-5)
    assert numbers["a_lif_mif"] == pytest.approx(0, abs=1e-3)
    assert abs(numbers["box_mean"]) <= 1


def bad_samples(its: Setting) -> dict[str, tuple[str, Sample]]:
    """What is wrong, the field that must be named, and the sample."""
    one = sample(its)
    assert isinstance(one.image, Tensor)
    nan, infinite = one.image.clone(), one.image.clone()
    nan[1, 2, 3], infinite[0, 0, 0] = math.nan, math.inf
    small = np.zeros((4, 4), bool)
    short = torch.ones(5)
    pixels = np.zeros((*its.size, 3), np.uint8)
    bad: dict[str, tuple[str, dict[str, Any]]] = {
        "nan": ("image", {"image": nan}),
        "inf": ("image", {"image": infinite}),
        "size": ("image", {"image": one.image[:, :-1]}),
        "channels": ("image", {"image": one.image[:1]}),
        "uint8_size": ("image", {"image": pixels[1:], "counterfactual": pixels[1:]}),
        "output": ("target", {"target": Output(its.outputs)}),
        "negative_output": ("target", {"target": Output(-1)}),
        "contrast": ("target", {"target": Contrast(Output(0), Output(999))}),
        "concept": ("target", {"target": Concept(short)}),
        "no_wrong_target": ("wrong_target", {"wrong_target": None}),
        "wrong_output": ("wrong_target", {"wrong_target": Output(999)}),
        "no_mask": ("mask", {"mask": None}),
        "mask_shape": ("mask", {"mask": small}),
        "empty_mask": ("mask", {"mask": np.zeros(its.size, bool)}),
        "full_mask": ("mask", {"mask": np.ones(its.size, bool)}),
        "no_counterfactual": ("counterfactual", {"counterfactual": None}),
        "same_counterfactual": ("counterfactual", {"counterfactual": one.image.clone()}),
        "nan_counterfactual": ("counterfactual", {"counterfactual": nan}),
        "counterfactual_shape": ("counterfactual", {"counterfactual": one.image[:, :, :-1]}),
        "counterfactual_kind": ("counterfactual", {"counterfactual": pixels}),
        "no_wrong_mask": ("wrong_mask", {"wrong_mask": None}),
        "wrong_mask_shape": ("wrong_mask", {"wrong_mask": small}),
    }
    return {name: (field, replace(one, id=name, **changes)) for name, (field, changes) in bad.items()}


@pytest.mark.parametrize("batch_size", [3, 32])
def test_bad_samples_fail_alone_and_say_why(batch_size: int) -> None:
    its = setting("eight_outputs")
    metrics = (*QUICK, ClassDiscrimination(Fidelity(points=2), BoxSensitivity((4,), boxes=3)))
    protocol = Protocol((Cdam(), Anchor.MASK), metrics)
    bad = bad_samples(its)
    samples = [sample(its, 1)]
    for number, (_, its_sample) in enumerate(bad.values()):
        samples += [its_sample, sample(its, number + 2)]
    evaluator = Evaluator(Explainer(its.model), protocol, batch_size=batch_size)
    answers = evaluator.evaluate(samples)
    assert len(answers) == len(samples)
    for (name, (field, _)), answer in zip(bad.items(), answers[1::2], strict=True):
        assert isinstance(answer, SampleError), name
        assert answer.field == field, name
        assert answer.reason, name
        assert str(answer) == f"{field}: {answer.reason}"
    for good, answer in zip(samples[::2], answers[::2], strict=True):
        (alone,) = measure(its, protocol, [good])
        found = numbers_of(protocol, answer)
        assert [its.value for its in found.values()] == pytest.approx([its.value for its in alone.values()], rel=1e-9)


@pytest.mark.parametrize(
    ("method", "metric", "field", "needer"),
    [
        (Cdam(), MaskAgreement(), "mask", "mask_agreement"),
        (Cdam(), Localisation(), "mask", "localisation"),
        (Cdam(), Counterfactual(), "counterfactual", "counterfactual"),
        (Cdam(), ClassDiscrimination(), "wrong_target", "class_discrimination"),
        (Anchor.MASK, Sparseness(), "mask", "mask"),
        (Anchor.INVERTED_MASK, Sparseness(), "mask", "inverted_mask"),
    ],
)
def test_what_is_required_is_said(method: Evaluated, metric: Metric, field: str, needer: str) -> None:
    its = setting("eight_outputs")
    bare = Sample("bare", sample(its).image, Output(0))
    (answer,) = Evaluator(Explainer(its.model), Protocol((method,), (metric,))).evaluate([bare])
    assert isinstance(answer, SampleError)
    assert (answer.field, answer.reason) == (field, f"is required by {needer}")


def test_what_is_not_required_may_be_missing() -> None:
    its = setting("eight_outputs")
    bare = Sample("bare", sample(its).image, Output(0))
    metrics = (Fidelity(), BoxSensitivity(boxes=3), Compactness(), InsertionDeletion(), Sparseness(), Randomisation())
    (found,) = ask(its, (Cdam(),), metrics, bare)
    assert all(map(math.isfinite, found.values()))


def test_outputs_that_are_not_finite() -> None:
    """An image that the model makes nothing of is refused; its neighbours are measured."""
    its = setting("eight_outputs", torch.float32)
    huge = sample(its, 1, image=torch.full((3, *its.size), 3e38))
    answers = Evaluator(Explainer(its.model), Protocol((Cdam(),), (Fidelity(),))).evaluate(
        [sample(its), huge, sample(its)]
    )
    assert isinstance(answers[1], SampleError)
    assert answers[1].field == "image"
    assert "not finite" in answers[1].reason
    assert not isinstance(answers[0], SampleError)
    assert not isinstance(answers[2], SampleError)


def test_one_patch() -> None:
    """The smallest grid: every map is constant."""
    its = setting("one_patch")
    metrics = (*QUICK, Randomisation())
    for numbers in ask(its, (Cdam(), Anchor.RANDOM, given(np.ones(its.grid))), metrics, sample(its)):
        assert numbers["a_lif_mif"] == numbers["box_mean"] == numbers["gini"] == numbers["randomisation_mean"] == 0
        assert numbers["patch_iou"] == 1
