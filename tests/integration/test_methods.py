"""Every method, and every kind of target, through the service: equal to the engine called directly."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cdam_engine as engine
from calls import SAMPLES, Stub, array, contrast, method, output, request, vector, violated
from cdam.v1 import common_pb2, explain_pb2, method_pb2, target_pb2
from cdam_server.demo import model as demo_model

LATENT = 128
CONCEPT = np.random.default_rng(1).standard_normal(LATENT).astype(np.float32)
METHODS: list[tuple[method_pb2.Method, engine.Method]] = [
    (method("cdam"), engine.Cdam()),
    (method("cdam", parts=True), engine.Cdam(parts=True)),
    (method("smooth_cdam"), engine.SmoothCdam()),
    (
        method("smooth_cdam", samples=3, noise=method_pb2.Noise(relative=0.2), seed=7),
        engine.SmoothCdam(samples=3, noise=engine.Noise(0.2), seed=7),
    ),
    (method("smooth_cdam", samples=1, noise=method_pb2.Noise(relative=0)), engine.Cdam()),
    (method("integrated_cdam"), engine.IntegratedCdam()),
    (
        method("integrated_cdam", steps=2, quadrature="QUADRATURE_GAUSS_LEGENDRE", tolerance=1e-3),
        engine.IntegratedCdam(steps=2, quadrature="gauss_legendre", tolerance=1e-3),
    ),
    (method("attention"), engine.Attention()),
    (method("attention", heads=[1, 0]), engine.Attention(heads=(1, 0))),
    (method("attention_rollout"), engine.AttentionRollout()),
    (method("relevance_propagation"), engine.RelevancePropagation()),
    (method("partial_lrp"), engine.PartialLrp()),
    (method("input_x_gradient"), engine.InputXGradient()),
    (
        method("smooth_grad", samples=3, noise=method_pb2.Noise(absolute=0.5), seed=2**64 - 1),
        engine.SmoothGrad(samples=3, noise=engine.Noise(0.5, relative=False), seed=2**64 - 1),
    ),
    (method("integrated_gradients", steps=4), engine.IntegratedGradients(steps=4)),
    (method("token_ablation"), engine.TokenAblation()),
    (method("patch_mask_prediction"), engine.PatchMaskPrediction()),
]


@pytest.fixture(scope="module")
def explainer() -> engine.Explainer:
    return engine.Explainer(demo_model.load())


def _scene(number: int) -> bytes:
    return (SAMPLES / f"scene{number}.png").read_bytes()


def _pixels(scene: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(scene)) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))[None]


def _assert_equal(answer: explain_pb2.ExplainResponse, truth: engine.Explanation) -> None:
    """Every number of an answer is the engine's."""
    assert [item.value for item in answer.targets] == pytest.approx([item.value for item in truth.targets], abs=1e-3)
    assert [item.request_index for item in answer.targets] == [item.request_index for item in truth.targets]
    assert len(answer.maps) == len(truth.maps)
    for found, expected in zip(answer.maps, truth.maps, strict=True):
        assert found.method_index == expected.method_index
        assert _optional(found, "target_index") == expected.target_index
        assert _optional(found, "steps") == expected.steps
        _assert_close(array(found.scores), expected.scores)
        for field, value in (
            ("standard_error", expected.standard_error),
            ("value", expected.value_part),
            ("key", expected.key_part),
        ):
            holder = found if field == "standard_error" else found.parts
            assert holder.HasField(field) == (value is not None)
            if value is not None:
                _assert_close(array(getattr(holder, field)), value, np.abs(expected.scores).max())
        for field in ("prefix_share", "completeness_residual"):
            value = getattr(expected, field)
            assert _optional(found, field) == (None if value is None else pytest.approx(value, rel=1e-2, abs=2e-4))


def _optional(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _assert_close(found: np.ndarray, expected: np.ndarray, scale: float | None = None) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5 * (scale or np.abs(expected).max()))


@pytest.mark.parametrize(("asked", "meant"), METHODS, ids=[str(meant) for _, meant in METHODS])
def test_a_method_is_the_engines(
    stub: Stub, explainer: engine.Explainer, asked: method_pb2.Method, meant: engine.Method
) -> None:
    targets = [engine.Output(3), engine.Contrast(engine.Output(7), engine.Output(1))]
    answer = stub.Explain(request(_scene(1), output(3), contrast(7, 1), methods=[asked]))
    (truth,) = explainer.explain(_pixels(_scene(1)), [targets], [[meant]])
    if asked.smooth_cdam.samples == 1:  # one draw without noise is the map itself, with nothing to say about spread
        assert not answer.maps[0].HasField("standard_error")
    _assert_equal(answer, truth)


def test_every_method_of_the_api_is_compared() -> None:
    assert {asked.WhichOneof("kind") for asked, _ in METHODS} == set(engine.METHODS)
    assert set(engine.METHODS) == {field.name for field in method_pb2.Method.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("similarity", "name"),
    [
        (target_pb2.SIMILARITY_UNSPECIFIED, "dot"),
        (target_pb2.SIMILARITY_DOT, "dot"),
        (target_pb2.SIMILARITY_COSINE, "cosine"),
        (target_pb2.SIMILARITY_L2, "l2"),
    ],
)
def test_a_concept_whose_vector_travels_along(
    stub: Stub, explainer: engine.Explainer, similarity: int, name: Any
) -> None:
    answer = stub.Explain(request(_scene(2), vector(CONCEPT, similarity)))
    (truth,) = explainer.explain(_pixels(_scene(2)), [[engine.Concept(torch.from_numpy(CONCEPT), name)]])
    _assert_equal(answer, truth)
    (target,) = answer.targets
    latent = truth.latent.astype(float)
    value = {
        "dot": latent @ CONCEPT,
        "cosine": latent @ CONCEPT / np.linalg.norm(latent) / np.linalg.norm(CONCEPT),
        "l2": -0.5 * np.square(latent - CONCEPT).sum(),
    }[name]
    assert target.value == pytest.approx(value, rel=1e-4)
    assert target.label == f"concept ({name})"
    assert not target.HasField("probability")
    assert not target.HasField("output_index")
    assert target.target.concept.similarity == (similarity or target_pb2.SIMILARITY_DOT)
    assert target.target.concept.WhichOneof("selector") is None


def test_contrasts_by_name_and_of_a_concept(stub: Stub, explainer: engine.Explainer) -> None:
    answer = stub.Explain(request(_scene(3), contrast("7", "1"), contrast(3, vector(CONCEPT)), output(7), output(1)))
    concept = engine.Concept(torch.from_numpy(CONCEPT))
    seven, one, three = map(engine.Output, (7, 1, 3))
    targets = [engine.Contrast(seven, one), engine.Contrast(three, concept), seven, one]
    (truth,) = explainer.explain(_pixels(_scene(3)), [targets])
    _assert_equal(answer, truth)
    assert [target.label for target in answer.targets] == ["7 - 1", "3 - concept (dot)", "7", "1"]
    sides = answer.targets[0].target.contrast
    assert (sides.positive.output.index, sides.negative.output.index) == (7, 1)
    difference, _, *scores = (array(item.scores) for item in answer.maps)
    _assert_close(difference, scores[0] - scores[1], np.abs(scores).max())  # CDAM is linear in the target


def test_methods_that_need_no_target(stub: Stub) -> None:
    methods = [method("attention"), method("attention_rollout")]
    answer = stub.Explain(request(_scene(1), methods=methods))
    assert (len(answer.targets), [item.method_index for item in answer.maps]) == (0, [0, 1])
    assert not any(item.HasField("target_index") for item in answer.maps)
    mixed = stub.Explain(request(_scene(1), output(0), output(1), methods=[methods[0], method("cdam")]))
    assert [(item.method_index, _optional(item, "target_index")) for item in mixed.maps] == [(0, None), (1, 0), (1, 1)]
    np.testing.assert_allclose(array(mixed.maps[0].scores), array(answer.maps[0].scores), rtol=1e-5)


def test_a_batch_of_many_methods_answers_each_as_if_it_were_alone(stub: Stub, explainer: engine.Explainer) -> None:
    asked = [
        (i % 6 + 1, output(i % 10), engine.Output(i % 10), *METHODS[i % len(METHODS)]) for i in range(2 * len(METHODS))
    ]
    futures = [stub.Explain.future(request(_scene(scene), what, methods=[how])) for scene, what, _, how, _ in asked]
    answers = [future.result() for future in futures]
    assert max(answer.timing.batch_size for answer in answers) > 4
    for answer, (scene, _, target, _, meant) in zip(answers, asked, strict=True):
        _assert_equal(answer, explainer.explain(_pixels(_scene(scene)), [[target]], [[meant]])[0])


def test_a_second_question_about_an_image_does_not_run_the_trunk(stub: Stub) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)).save(picture, "PNG")
    first = stub.Explain(request(picture.getvalue(), output(3)))
    second = stub.Explain(request(picture.getvalue(), output(3), output(4)))
    assert (first.token_cache_hit, second.token_cache_hit) == (False, True)
    np.testing.assert_allclose(array(second.maps[0].scores), array(first.maps[0].scores), rtol=1e-4, atol=1e-6)


NAN, INFINITY = math.nan, math.inf


@pytest.mark.parametrize(
    ("kind", "parameters", "field"),
    [
        *[
            (kind, wrong, next(iter(wrong)))
            for kind in ("smooth_cdam", "smooth_grad")
            for wrong in ({"samples": 0}, {"samples": 501})
        ],
        *[
            (kind, {"noise": method_pb2.Noise(**{level: value})}, f"noise.{level}")
            for kind in ("smooth_cdam", "smooth_grad")
            for level in ("relative", "absolute")
            for value in (-0.1, NAN, INFINITY, 1e300)
        ],
        *[
            (kind, wrong, next(iter(wrong)))
            for kind in ("integrated_cdam", "integrated_gradients")
            for wrong in ({"steps": 0}, {"steps": 501}, {"quadrature": 9})
        ],
        *[("integrated_cdam", {"tolerance": value}, "tolerance") for value in (0, -1, NAN, INFINITY)],
        ("attention", {"heads": [1, 1]}, "heads"),
        ("attention", {"heads": [0, 2]}, "heads"),
        ("attention", {"heads": [2**32 - 1]}, "heads"),
    ],
)
def test_a_bad_parameter_is_named(stub: Stub, kind: str, parameters: dict[str, Any], field: str) -> None:
    methods = [method("cdam"), method(kind, **parameters)]
    assert violated(partial(stub.Explain, request(_scene(1), output(0), methods=methods))) == (
        f"methods[1].{kind}.{field}"
    )


def _concept(shape: Sequence[int], data: bytes, **fields: Any) -> target_pb2.Target:
    tensor = common_pb2.FloatTensor(shape=shape, data=data)
    return target_pb2.Target(concept=target_pb2.ConceptTarget(vector=tensor, **fields))


ZEROS = np.zeros(LATENT, np.float32)


@pytest.mark.parametrize(
    ("target", "field"),
    [
        (target_pb2.Target(concept=target_pb2.ConceptTarget()), "concept"),
        (_concept([], b"\0" * 4), "concept.vector"),
        (_concept([LATENT, 1], ZEROS.tobytes()), "concept.vector"),
        (_concept([LATENT], ZEROS.tobytes()[:-1]), "concept.vector"),
        (_concept([2**32 - 1], b""), "concept.vector"),
        (vector(ZEROS[1:]), "concept.vector"),
        (vector([]), "concept.vector"),
        (vector(ZEROS + NAN), "concept.vector"),
        (vector(ZEROS - INFINITY), "concept.vector"),
        (vector(ZEROS + 1e30), "concept.vector"),
        (vector(ZEROS, target_pb2.SIMILARITY_COSINE), "concept.vector"),
        (_concept([LATENT], ZEROS.tobytes(), similarity=9), "concept.similarity"),
        (target_pb2.Target(contrast=target_pb2.ContrastTarget()), "contrast.positive"),
        (
            target_pb2.Target(
                contrast=target_pb2.ContrastTarget(
                    positive=target_pb2.ScalarTarget(output=target_pb2.OutputTarget(index=0)),
                    negative=target_pb2.ScalarTarget(output=target_pb2.OutputTarget()),
                )
            ),
            "contrast.negative.output",
        ),
        (contrast(0, "x" * 300), "contrast.negative.output.name"),
        (contrast(0, vector(ZEROS[1:])), "contrast.negative.concept.vector"),
        (contrast(vector(ZEROS + NAN), 0), "contrast.positive.concept.vector"),
    ],
)
def test_a_bad_target_is_named(stub: Stub, target: target_pb2.Target, field: str) -> None:
    assert violated(partial(stub.Explain, request(_scene(1), output(0), target))) == f"targets[1].{field}"


def test_large_numbers_that_are_let_in_give_an_answer(stub: Stub) -> None:
    large = ZEROS + 1e15
    targets = [vector(large), vector(large, target_pb2.SIMILARITY_COSINE), vector(large, target_pb2.SIMILARITY_L2)]
    noise = [method(kind, samples=2, noise=method_pb2.Noise(relative=1e6)) for kind in ("smooth_cdam", "smooth_grad")]
    assert len(stub.Explain(request(_scene(1), *targets, methods=[method("cdam"), *noise])).maps) == 9
