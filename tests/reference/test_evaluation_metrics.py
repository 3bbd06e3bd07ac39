"""Every metric of the engine equals its reference, whatever the architecture, the options, the targets and the company.

In double precision to the last digits. In single precision the references work in double precision on the engine's own
map, because rankings of nearly equal scores depend on the map's last bits; the rest is the rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import every
from cdam_engine import (
    Attention,
    Cdam,
    Concept,
    Contrast,
    Explainer,
    InputXGradient,
    IntegratedCdam,
    Noise,
    Output,
    SmoothCdam,
    SmoothGrad,
    TokenAblation,
)
from cdam_engine.evaluation import (
    METRICS,
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Evaluator,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Measured,
    Metric,
    Protocol,
    Randomisation,
    Sample,
    SampleError,
    Sparseness,
)
from reference.evaluation_expectations import (
    Expectation,
    Key,
    Setting,
    in_uint8,
    measure,
    numbers_of,
    sample,
    setting,
)
from reference.evaluation_references import Number
from reference.method_expectations import Target, concept

# Of fp32: logits of about 1 carry errors of 1e-6, areas are a hundred times that; a correlation of small differences of
# logits loses some more.
EXACT, SINGLE, SINGLE_CORRELATION = 1e-9, 1e-4, 2e-3

DISCRIMINATION = ClassDiscrimination(Fidelity(points=5), BoxSensitivity(boxes=12))
ALL_METRICS = every.metrics(BoxSensitivity(boxes=20), DISCRIMINATION)


def test_no_metric_is_without_a_reference() -> None:
    assert {type(metric) for metric in ALL_METRICS} == set(METRICS.values())


OPTIONS: tuple[Metric, ...] = (
    Fidelity(unit="patch"),
    Fidelity(unit="patch", points=4, blur_sigma=40, enlargement="nearest"),
    Fidelity(enlargement="nearest", points=2),
    Fidelity(points=8, blur_sigma=3),
    BoxSensitivity((1, 3, 10), boxes=15),
    BoxSensitivity((7,), boxes=2, enlargement="nearest"),
    BoxSensitivity(boxes=12, blur_sigma=40),
    ClassDiscrimination(
        Fidelity(unit="patch", points=3, blur_sigma=30),
        BoxSensitivity((5, 9), boxes=8, blur_sigma=6, enlargement="nearest"),
    ),
    Compactness(0.3),
    Compactness(absolute=True),
    Compactness(0.0),
    MaskAgreement("nearest"),
    Localisation(enlargement="nearest"),
    Localisation(threshold=0.7, iou=0.3, points=7),
    Localisation("min_max", threshold=0.4),
    Localisation(threshold=1.0, iou=0.2, points=1, all_components=True),
    Localisation("min_max", iou=0.7, points=400, all_components=True, enlargement="nearest"),
    InsertionDeletion(unit="patch"),
    InsertionDeletion(unit="patch", steps=4, activation="sigmoid"),
    InsertionDeletion(steps=5, blur_sigma=11, enlargement="nearest", activation="identity"),
    Randomisation(absolute=True),
)


def check(its: Setting, protocol: Protocol, samples: Sequence[Sample]) -> None:
    found = measure(its, protocol, samples)
    for given, numbers in zip(samples, found, strict=True):
        compare(its, protocol, numbers, Expectation(its, protocol, given).numbers())


def compare(its: Setting, protocol: Protocol, found: dict[Key, Number], expected: dict[Key, Number]) -> None:
    assert found.keys() == expected.keys()
    for key, number in found.items():
        truth, tolerance = expected[key], EXACT
        if its.dtype == torch.float32:
            tolerance = SINGLE_CORRELATION if "box" in key[2] else SINGLE
        # Areas over 0 to 100 percent are differences of a hundred times the ordinates.
        scale = 100 * tolerance if "_mif" in key[2] or "_lif" in key[2] else tolerance
        where = (protocol.methods[key[0]], protocol.metrics[key[1]], key[2])
        assert number.value == pytest.approx(truth.value, rel=tolerance, abs=scale), where
        assert (number.curve is None) == (truth.curve is None), where
        if number.curve is not None and truth.curve is not None:
            assert number.curve.shape == truth.curve.shape, where
            assert number.curve[0] == pytest.approx(truth.curve[0], rel=1e-12), where
            assert number.curve[1] == pytest.approx(truth.curve[1], rel=tolerance, abs=tolerance), where


def targets(its: Setting) -> list[Target]:
    vector = concept(its.model, 2)
    return [
        Contrast(Output(0), Output(its.outputs - 1)),
        Concept(vector, "cosine"),
        Contrast(Concept(vector, "l2"), Output(1)),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    "name",
    [
        "eight_outputs",
        "patch_oblong",
        "deit_distilled",
        "dinov2_registers",
        "average_pool_register",
        "beitv2_shared_bias",
        "eva02",
        "rope_mixed",
        "patch_4_one_row",
        "padded",
        "cait",
        "relative_positions",
        "one_channel",
    ],
)
def test_all_metrics(name: str, dtype: torch.dtype) -> None:
    its = setting(name, dtype)
    check(its, Protocol((Cdam(), Anchor.RANDOM), ALL_METRICS, seed=5), [sample(its, 1)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("metric", OPTIONS, ids=str)
def test_options(metric: Metric, dtype: torch.dtype) -> None:
    its = setting("patch_8", dtype)
    check(its, Protocol((Cdam(), Anchor.MASK), (metric,), seed=2**64 - 1), [sample(its, 2)])


@pytest.mark.parametrize("name", ["patch_8", "padded"])
def test_methods_and_anchors_mixed(name: str) -> None:
    its = setting(name)
    methods = (
        Anchor.INVERTED_MASK,
        Cdam(),
        SmoothCdam(3, Noise(0.1), seed=4),
        Attention(),
        Anchor.MASK,
        IntegratedCdam(3),
        TokenAblation(),
        InputXGradient(),
        SmoothGrad(2, seed=1),
        Anchor.RANDOM,
        Cdam(),
    )
    metrics = (Fidelity(points=3), ClassDiscrimination(Fidelity(points=3), BoxSensitivity(boxes=5)), Randomisation())
    check(its, Protocol(methods, metrics), [sample(its, 3)])


@pytest.mark.parametrize("index", range(3))
def test_targets(index: int) -> None:
    its = setting("deit3")
    target = targets(its)[index]
    protocol = Protocol((Cdam(), Anchor.RANDOM), ALL_METRICS)
    check(its, protocol, [sample(its, 4, target=target, wrong_target=targets(its)[index - 1])])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_uint8_images(dtype: torch.dtype) -> None:
    its = setting("patch_8", dtype)
    check(its, Protocol((Cdam(), Anchor.MASK), ALL_METRICS), [in_uint8(sample(its, 5))])


def test_demo_model() -> None:
    its = setting("demo", torch.float32)
    metrics = (
        Fidelity(points=6),
        BoxSensitivity(boxes=4),
        Compactness(),
        MaskAgreement(),
        Localisation(),
        InsertionDeletion(steps=5),
        Counterfactual(),
    )
    check(its, Protocol((Cdam(), Anchor.MASK), metrics), [in_uint8(sample(its, 6))])


def test_company_and_batches_change_nothing() -> None:
    """Samples with targets of other kinds, one of them twice under another id, in chunks that end anywhere."""
    its = setting("patch_8")
    metrics = (
        Fidelity(),
        BoxSensitivity(boxes=6),
        ClassDiscrimination(Fidelity(points=3), BoxSensitivity((4,), boxes=5)),
        MaskAgreement(),
        InsertionDeletion(unit="patch", steps=9),
        Randomisation(),
        Counterfactual(),
    )
    protocol = Protocol((SmoothCdam(2), Anchor.RANDOM), metrics, seed=9)
    several = [sample(its, 7), sample(its, 8, target=targets(its)[1]), in_uint8(sample(its, 9)), sample(its, 10)]
    several.append(replace(several[0], id="again"))
    together = measure(its, protocol, several)
    for given, numbers in zip(several, together, strict=True):
        compare(its, protocol, numbers, Expectation(its, protocol, given).numbers())
        (alone,) = measure(its, protocol, [given])
        compare(its, protocol, numbers, alone)
    for batch_size in (1, 7):
        for numbers, again in zip(together, measure(its, protocol, several, batch_size), strict=True):
            compare(its, protocol, numbers, again)


@pytest.mark.parametrize(
    ("name", "metrics"),
    [("demo", (Compactness(), MaskAgreement(), Sparseness())), ("patch_8", (MaskAgreement(), Randomisation()))],
)
def test_maps_are_bit_identical_in_company(name: str, metrics: tuple[Metric, ...]) -> None:
    """In single precision, where a map's last bits decide the ranking: what is made of it alone is equal, bit by bit."""
    its = setting(name, torch.float32)
    protocol = Protocol((Cdam(), Attention(), SmoothGrad(2)), metrics)
    several = [in_uint8(sample(its, number)) for number in range(4)]
    together = measure(its, protocol, several, batch_size=3)
    for given, numbers in zip(several, together, strict=True):
        (alone,) = measure(its, protocol, [given])
        assert [number.value for number in numbers.values()] == [number.value for number in alone.values()]


def test_full_size() -> None:
    """224 x 224 in single precision, of an outer shape that models are used in."""
    its = setting("vit_tiny", torch.float32)
    metrics = (Fidelity(points=3), BoxSensitivity(boxes=2), MaskAgreement(), InsertionDeletion(steps=2))
    check(its, Protocol((Cdam(),), metrics), [in_uint8(sample(its, 14))])


def test_model_without_outputs() -> None:
    """Concepts are all that can be asked for; after the blocks there is a norm alone to draw anew."""
    its = setting("headless")
    target, wrong = Concept(concept(its.model, 1)), Concept(concept(its.model, 2), "l2")
    metrics = (Fidelity(points=3), InsertionDeletion(steps=3), Randomisation(), DISCRIMINATION)
    check(its, Protocol((Cdam(), Anchor.RANDOM), metrics), [sample(its, 15, target=target, wrong_target=wrong)])


def test_no_samples() -> None:
    its = setting("eight_outputs")
    assert Evaluator(Explainer(its.model), Protocol((Cdam(),), ALL_METRICS)).evaluate([]) == []


def test_bad_samples_leave_their_neighbours_alone() -> None:
    its = setting("patch_8")
    protocol = Protocol((Cdam(),), (Fidelity(points=3), MaskAgreement()))
    good = [sample(its, 11), sample(its, 12)]
    bad = sample(its, 13, mask=None)
    answers = Evaluator(Explainer(its.model), protocol, batch_size=4).evaluate([good[0], bad, good[1]])
    assert isinstance(answers[1], SampleError)
    assert answers[1].field == "mask"
    for given, answer in zip(good, (answers[0], answers[2]), strict=True):
        assert isinstance(answer, Measured)
        compare(its, protocol, numbers_of(protocol, answer), Expectation(its, protocol, given).numbers())
