"""An evaluation's messages: what they mean, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from calls import method, output
from cdam.v1 import common_pb2, evaluation_pb2, method_pb2
from cdam_engine import Output, SmoothCdam
from cdam_engine.evaluation import (
    METRICS,
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Fidelity,
    InsertionDeletion,
    Localisation,
    Metric,
    Randomisation,
)
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc import decode_evaluation
from cdam_server.rpc.decode import Limits
from cdam_server.rpc.images import ImageLimits, decode_mask
from evaluations import CDAM, RANDOM, metric, png, protocol, raw, sample

LIMITS = Limits(ImageLimits(), max_targets=100, max_samples=500, max_concept_images=10)
BOXES = evaluation_pb2.BoxSensitivityMetric
CURVES = evaluation_pb2.FidelityMetric


def command(message: evaluation_pb2.EvaluationProtocol) -> decode_evaluation.EvaluateCommand:
    return decode_evaluation.evaluate_command(message, LIMITS, "somebody")


def refused_field(message: evaluation_pb2.EvaluationProtocol) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        command(message)
    return caught.value.field


def test_what_is_not_said_is_the_engines_default() -> None:
    kinds = [field.name for field in evaluation_pb2.Metric.DESCRIPTOR.fields]
    assert kinds == list(METRICS)
    made = command(protocol(*map(metric, kinds)))
    assert made.protocol.metrics == tuple(METRICS[kind]() for kind in kinds)
    assert (made.protocol.seed, made.resamples, made.input_size, made.resize) == (0, 1000, None, "model")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            metric("fidelity", unit=2, blur_sigma=3.5, points=1001, enlargement=2),
            Fidelity(unit="patch", blur_sigma=3.5, points=1001, enlargement="nearest"),
        ),
        (
            metric("box_sensitivity", box_sizes=[1, 7], boxes=10_000, blur_sigma=1.0, enlargement=1),
            BoxSensitivity((1, 7), 10_000, 1.0, "bilinear"),
        ),
        (
            metric("class_discrimination", fidelity=CURVES(points=2), box_sensitivity=BOXES(boxes=2)),
            ClassDiscrimination(Fidelity(points=2), BoxSensitivity(boxes=2)),
        ),
        (metric("compactness", threshold=0.0, absolute=True), Compactness(0.0, absolute=True)),
        (
            metric(
                "localisation", normalisation=2, threshold=1.0, iou=0.3, points=1000, all_components=True, enlargement=2
            ),
            Localisation("min_max", 1.0, 0.3, 1000, all_components=True, enlargement="nearest"),
        ),
        (metric("insertion_deletion", unit=1, steps=9), InsertionDeletion(steps=9)),
        (metric("randomisation", absolute=True), Randomisation(absolute=True)),
    ],
)
def test_what_is_said_counts(message: evaluation_pb2.Metric, expected: Metric) -> None:
    assert command(protocol(message, message)).protocol.metrics == (expected, expected)


def test_methods_and_anchors_mix() -> None:
    smooth = evaluation_pb2.EvaluatedMethod(method=method("smooth_cdam", samples=3))
    made = command(
        protocol(metric("sparseness"), methods=[RANDOM, smooth, smooth], seed=2**64 - 1, bootstrap_resamples=0)
    )
    assert made.protocol.methods == (Anchor.RANDOM, SmoothCdam(samples=3), SmoothCdam(samples=3))
    assert (made.protocol.seed, made.resamples, made.caller) == (2**64 - 1, 0, "somebody")
    assert hash(made.protocol) == hash(
        command(protocol(metric("sparseness"), methods=[RANDOM, smooth, smooth], seed=2**64 - 1)).protocol
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"methods": []}, "protocol.methods"),
        ({"methods": [CDAM] * 33}, "protocol.methods"),
        ({"metrics": []}, "protocol.metrics"),
        ({"metrics": [metric("sparseness")] * 33}, "protocol.metrics"),
        ({"methods": [CDAM, evaluation_pb2.EvaluatedMethod()]}, "protocol.methods[1]"),
        ({"methods": [evaluation_pb2.EvaluatedMethod(anchor=0)]}, "protocol.methods[0].anchor"),
        ({"methods": [evaluation_pb2.EvaluatedMethod(anchor=9)]}, "protocol.methods[0].anchor"),
        ({"methods": [evaluation_pb2.EvaluatedMethod(method=method_pb2.Method())]}, "protocol.methods[0].method"),
        (
            {"methods": [evaluation_pb2.EvaluatedMethod(method=method("smooth_cdam", samples=501))]},
            "protocol.methods[0].method.smooth_cdam.samples",
        ),
        ({"metrics": [metric("sparseness"), evaluation_pb2.Metric()]}, "protocol.metrics[1]"),
        ({"bootstrap_resamples": 10_001}, "protocol.bootstrap_resamples"),
        ({"model": "x" * 257}, "protocol.model"),
        ({"preprocessing": common_pb2.Preprocessing(resize_mode=7)}, "protocol.preprocessing.resize_mode"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], field: str) -> None:
    assert (
        refused_field(
            evaluation_pb2.EvaluationProtocol(**{"methods": [CDAM], "metrics": [metric("sparseness")], **fields})
        )
        == field
    )


@pytest.mark.parametrize(
    ("kind", "parameters", "field"),
    [
        ("fidelity", {"points": 1}, "points"),
        ("fidelity", {"points": 1002}, "points"),
        ("fidelity", {"unit": 3}, "unit"),
        ("fidelity", {"enlargement": 3}, "enlargement"),
        ("fidelity", {"blur_sigma": 0.0}, "blur_sigma"),
        ("fidelity", {"blur_sigma": float("nan")}, "blur_sigma"),
        ("fidelity", {"blur_sigma": float("inf")}, "blur_sigma"),
        ("box_sensitivity", {"boxes": 1}, "boxes"),
        ("box_sensitivity", {"boxes": 10_001}, "boxes"),
        ("box_sensitivity", {"box_sizes": [0]}, "box_sizes"),
        ("box_sensitivity", {"box_sizes": [2, 1]}, "box_sizes"),
        ("box_sensitivity", {"box_sizes": [2, 2]}, "box_sizes"),
        ("box_sensitivity", {"box_sizes": list(range(1, 66))}, "box_sizes"),
        ("class_discrimination", {"fidelity": CURVES(points=1)}, "fidelity.points"),
        ("class_discrimination", {"box_sensitivity": BOXES(blur_sigma=-1.0)}, "box_sensitivity.blur_sigma"),
        ("compactness", {"threshold": 1.0}, "threshold"),
        ("compactness", {"threshold": float("nan")}, "threshold"),
        ("mask_agreement", {"enlargement": 9}, "enlargement"),
        ("localisation", {"threshold": 0.0}, "threshold"),
        ("localisation", {"threshold": 1.1}, "threshold"),
        ("localisation", {"iou": 0.0}, "iou"),
        ("localisation", {"iou": float("nan")}, "iou"),
        ("localisation", {"points": 0}, "points"),
        ("localisation", {"points": 1001}, "points"),
        ("localisation", {"enlargement": 9}, "enlargement"),
        ("localisation", {"normalisation": 9}, "normalisation"),
        ("insertion_deletion", {"steps": 0}, "steps"),
        ("insertion_deletion", {"steps": 10_001}, "steps"),
        ("insertion_deletion", {"unit": 9}, "unit"),
    ],
)
def test_a_bad_parameter_is_named(kind: str, parameters: dict[str, Any], field: str) -> None:
    message = protocol(metric("sparseness"), metric("sparseness"), metric(kind, **parameters))
    assert refused_field(message) == f"protocol.metrics[2].{kind}.{field}"


def test_a_sample() -> None:
    sample_command = decode_evaluation.sample(sample(0, sample_id="été 1"), LIMITS)
    assert (sample_command.id, sample_command.open_image().size) == ("été 1", (64, 64))
    assert isinstance(sample_command.target, Output)
    assert None not in (
        sample_command.wrong_target,
        sample_command.open_mask,
        sample_command.open_counterfactual,
        sample_command.open_wrong_mask,
    )
    least = evaluation_pb2.EvaluationSample(sample_id="x", image=raw(np.zeros((2, 2), np.uint8)), target=output(1))
    sample_command = decode_evaluation.sample(least, LIMITS)
    assert (
        sample_command.wrong_target,
        sample_command.open_mask,
        sample_command.open_counterfactual,
        sample_command.open_wrong_mask,
    ) == (None,) * 4


@pytest.mark.parametrize(
    "kind", ["raw grey", "raw colour", "grey", "16 bits", "palette", "alpha", "palette alpha", "jpeg"]
)
def test_a_mask_is_what_is_neither_black_nor_transparent(kind: str) -> None:
    inside = np.zeros((16, 24), bool)
    inside[8:, :16] = True
    one = inside.astype(np.uint8)
    colour = np.dstack([0 * one, 0 * one, one])
    palette = Image.fromarray(one)
    palette.putpalette([0, 0, 0, 0, 128, 0])
    see_through = Image.fromarray(one)
    see_through.putpalette([255, 255, 255, 0, 128, 0])
    alpha = Image.fromarray(np.dstack([np.full((16, 24, 3), 255, np.uint8), 7 * one]))
    messages = {
        "raw grey": lambda: raw(one),
        "raw colour": lambda: raw(colour),
        "grey": lambda: png(one),
        "16 bits": lambda: png(one.astype(np.uint16)),
        "palette": lambda: png(palette),
        "alpha": lambda: png(alpha),
        "palette alpha": lambda: png(see_through, transparency=0),
        "jpeg": lambda: png(255 * one, "JPEG"),
    }
    mask = decode_mask(messages[kind](), ImageLimits(), "sample.mask")
    assert mask.mode == "L"
    np.testing.assert_array_equal(np.asarray(mask), 255 * one)


@pytest.mark.parametrize("sample_id", ["at 1.02.03\u202fPM.png", "\u3000", "a\u00a0b", "\U0001f469\u200d\U0001f52c"])
def test_a_file_name_is_an_id(sample_id: str) -> None:
    assert decode_evaluation.sample(sample(0, sample_id=sample_id), LIMITS).id == sample_id
