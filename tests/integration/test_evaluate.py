"""Evaluate from end to end: real servers, raw stubs."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

import in_this_process
from calls import SAMPLES, Stub, array, method, output, refused, request, vector, violated
from cdam.statistics import Table
from cdam.v1 import common_pb2, evaluation_pb2, explainer_service_pb2_grpc, method_pb2, target_pb2
from cdam_engine import Attention, Cdam, Explainer
from cdam_engine.evaluation import (
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
    Protocol,
    Randomisation,
    Sparseness,
)
from cdam_server.demo import model as demo_model
from evaluations import (
    CDAM,
    Answers,
    Talk,
    engine_sample,
    evaluate,
    metric,
    png,
    protocol,
    raw,
    requests,
    sample,
    scene,
    statistics,
    values,
    violation,
)

SCENE = (SAMPLES / "scene1.png").read_bytes()
QUICK = protocol(metric("fidelity", points=3, unit=evaluation_pb2.PERTURBATION_UNIT_PATCH), metric("sparseness"))
# Of everything a little.
BOXES = {"box_sizes": [8, 20], "boxes": 4}
PATCH = evaluation_pb2.PERTURBATION_UNIT_PATCH
ALL = protocol(
    metric("fidelity", points=3),
    metric("box_sensitivity", **BOXES),
    metric(
        "class_discrimination",
        fidelity=evaluation_pb2.FidelityMetric(points=2, unit=PATCH),
        box_sensitivity=evaluation_pb2.BoxSensitivityMetric(**BOXES),
    ),
    metric("compactness", absolute=True),
    metric("mask_agreement", enlargement=evaluation_pb2.ENLARGEMENT_NEAREST),
    metric("localisation", points=30, iou=0.3),
    metric("insertion_deletion", steps=3),
    metric("sparseness"),
    metric("randomisation"),
    metric("counterfactual"),
    methods=[
        CDAM,
        evaluation_pb2.EvaluatedMethod(method=method("attention", heads=[1])),
        evaluation_pb2.EvaluatedMethod(anchor=evaluation_pb2.ANCHOR_RANDOM),
        evaluation_pb2.EvaluatedMethod(anchor=evaluation_pb2.ANCHOR_INVERTED_MASK),
    ],
    seed=3,
)
ALL_OF_THE_ENGINE = Protocol(
    (Cdam(), Attention(heads=(1,)), Anchor.RANDOM, Anchor.INVERTED_MASK),
    (
        Fidelity(points=3),
        BoxSensitivity((8, 20), boxes=4),
        ClassDiscrimination(Fidelity(unit="patch", points=2), BoxSensitivity((8, 20), boxes=4)),
        Compactness(absolute=True),
        MaskAgreement("nearest"),
        Localisation(points=30, iou=0.3),
        InsertionDeletion(steps=3),
        Sparseness(),
        Randomisation(),
        Counterfactual(),
    ),
    seed=3,
)
# Minutes a sample, on two cores.
ENDLESS = protocol(metric("box_sensitivity", boxes=4999))


def test_every_metric_is_the_engines(stub: Stub) -> None:
    answers = evaluate(stub, ALL, map(sample, range(3)))
    expected = Evaluator(Explainer(demo_model.load()), ALL_OF_THE_ENGINE).evaluate(list(map(engine_sample, range(3))))
    assert len(answers.results) == 3
    for result in answers.results:
        truth = expected[int(result.sample_id.removeprefix("scene "))]
        assert isinstance(truth, Measured)
        assert len(result.measured.values) == len(truth.values)
        for ours, its in zip(result.measured.values, truth.values, strict=True):
            key = (its.method_index, its.metric_index, its.quantity)
            assert (ours.method_index, ours.metric_index, ours.quantity) == key
            assert ours.value == pytest.approx(its.value, rel=1e-4, abs=1e-4), key
            assert ours.HasField("curve") == (its.curve is not None), key
            if its.curve is not None:
                np.testing.assert_allclose(array(ours.curve), its.curve, rtol=1e-4, atol=1e-4)


def test_the_table_is_what_the_results_come_to(stub: Stub) -> None:
    answers = evaluate(stub, ALL, [*map(sample, range(3)), sample(3, image=None)])
    assert answers.table is not None
    assert (answers.table.samples, answers.table.failures) == (3, 1)
    made = statistics(answers.values(), curves=answers.curves(), methods=4, seed=3, failures=1).table()
    same(answers.table, made)
    assert {row.quantity for row in answers.table.rows} >= {"a_mif", "change_correlation", "max_box_acc"}


def same(table: evaluation_pb2.EvaluationTable, expected: Table) -> None:
    """Every number, but for rounding."""
    assert (table.samples, table.failures) == (expected.samples, expected.failures)
    for ours, theirs in ((table.rows, expected.rows), (table.comparisons, expected.comparisons)):
        for row, truth in zip(ours, theirs, strict=True):
            for name, value in vars(truth).items():
                if value is None:
                    assert not row.HasField(name), (row, name)
                elif isinstance(value, float):
                    assert getattr(row, name) == pytest.approx(value, rel=1e-6, abs=1e-6), (row, name)
                else:
                    assert getattr(row, name) == value, (row, name)


def test_the_protocol_comes_back_with_every_choice_made(stub: Stub) -> None:
    kinds = [field.name for field in method_pb2.Method.DESCRIPTOR.fields]
    methods = [evaluation_pb2.EvaluatedMethod(method=method(kind)) for kind in kinds]
    metrics = [metric(field.name) for field in evaluation_pb2.Metric.DESCRIPTOR.fields]
    started = evaluate(stub, protocol(*metrics, methods=methods, expected_samples=7), []).started
    assert started is not None
    assert (started.model, len(started.model_fingerprint)) == ("demo", 64)
    made = started.protocol
    assert [item.method.WhichOneof("kind") for item in made.methods] == kinds
    assert (made.seed, made.bootstrap_resamples, made.expected_samples) == (0, 1000, 7)
    assert made.preprocessing.resize_mode == common_pb2.RESIZE_MODE_MODEL
    assert (made.preprocessing.input_size.height, made.preprocessing.input_size.width) == (64, 64)
    assert list(made.metrics[1].box_sensitivity.box_sizes) == [8, 16, 24, 32]
    assert made.metrics[5].insertion_deletion.steps == 256
    unset = [
        (item, field.name)
        for item in [*(getattr(each, each.WhichOneof("kind")) for each in made.metrics)]
        for field in item.DESCRIPTOR.fields
        if field.has_presence and not item.HasField(field.name)
    ]
    assert unset == []
    again = evaluate(stub, made, []).started
    assert again == started


def test_nothing_to_measure(stub: Stub) -> None:
    answers = evaluate(stub, QUICK, [])
    assert (answers.results, answers.table) == ([], evaluation_pb2.EvaluationTable())


def test_without_resamples_there_are_no_intervals(stub: Stub) -> None:
    plan = evaluation_pb2.EvaluationProtocol()
    plan.CopyFrom(QUICK)
    plan.bootstrap_resamples = 0
    table = evaluate(stub, plan, map(sample, range(2))).table
    assert table is not None
    for row in table.rows:
        assert row.HasField("standard_error")
        assert not row.HasField("interval_low")
    assert not any(item.HasField("interval_high") for item in table.comparisons)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sample_id": ""}, "sample.sample_id"),
        ({"sample_id": "a\nb"}, "sample.sample_id"),
        ({"sample_id": "x" * 257}, "sample.sample_id"),
        ({"image": None}, "sample.image"),
        ({"image": common_pb2.Image(encoded=SCENE[:100])}, "sample.image.encoded"),
        ({"image": common_pb2.Image()}, "sample.image.source"),
        ({"target": None}, "sample.target"),
        ({"target": target_pb2.Target()}, "sample.target"),
        ({"target": target_pb2.Target(top_k=target_pb2.TopKTarget(k=1))}, "sample.target.top_k"),
        ({"target": vector([1.0, 2.0])}, "sample.target.concept.vector"),
        ({"wrong_target": None}, "sample.wrong_target"),
        ({"mask": None}, "sample.mask"),
        ({"mask": raw(np.ones((64, 32), np.uint8))}, "sample.mask"),
        ({"mask": raw(np.zeros((64, 64), np.uint8))}, "sample.mask"),
        ({"mask": raw(np.ones((64, 64), np.uint8))}, "sample.mask"),
        ({"wrong_mask": raw(np.ones((1, 1), np.uint8))}, "sample.wrong_mask"),
        ({"counterfactual": raw(np.ones((64, 63, 3), np.uint8))}, "sample.counterfactual"),
        ({"counterfactual": raw(scene(0).image)}, "sample.counterfactual"),
        ({"counterfactual": None}, "sample.counterfactual"),
    ],
)
def test_a_bad_sample_fails_alone(stub: Stub, changes: dict[str, Any], field: str) -> None:
    bad = sample(0, **{"sample_id": "bad", **changes})
    needs_all = protocol(
        metric("mask_agreement"),
        metric("counterfactual"),
        metric(
            "class_discrimination",
            fidelity=evaluation_pb2.FidelityMetric(points=2, unit=PATCH),
            box_sensitivity=evaluation_pb2.BoxSensitivityMetric(boxes=2, box_sizes=[8]),
        ),
        methods=[CDAM, evaluation_pb2.EvaluatedMethod(anchor=evaluation_pb2.ANCHOR_MASK)],
    )
    answers = evaluate(stub, needs_all, [sample(1), bad, sample(2)])
    assert set(answers.values()) == {"scene 1", "scene 2"}
    ((_, error),) = answers.errors().items()
    assert violation(error) == field
    assert answers.table is not None
    assert (answers.table.samples, answers.table.failures) == (2, 1)


def test_what_nothing_asks_for_is_not_looked_at(stub: Stub) -> None:
    one_pixel = raw(np.ones((1, 1), np.uint8))
    unasked = {"mask": one_pixel, "wrong_mask": one_pixel, "counterfactual": one_pixel, "wrong_target": vector([1.0])}
    answers = evaluate(stub, protocol(metric("sparseness")), [sample(1, **unasked)])
    assert set(answers.values()) == {"scene 1"}


def test_an_unknown_output_fails_alone(stub: Stub) -> None:
    answers = evaluate(stub, QUICK, [sample(0, target=output("unicorn")), sample(1)])
    (error,) = answers.errors().values()
    assert error.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert "sample.target.output.name" in error.message
    assert set(answers.values()) == {"scene 1"}


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        (evaluation_pb2.EvaluationProtocol(), "protocol.methods"),
        (protocol(), "protocol.metrics"),
        (
            protocol(metric("sparseness"), metric("box_sensitivity", box_sizes=[8, 65])),
            "protocol.metrics[1].box_sensitivity.box_sizes",
        ),
        (
            protocol(
                metric("class_discrimination", box_sensitivity=evaluation_pb2.BoxSensitivityMetric(box_sizes=[65]))
            ),
            "protocol.metrics[0].class_discrimination.box_sensitivity.box_sizes",
        ),
        (protocol(metric("box_sensitivity", box_sizes=list(range(8, 20)), boxes=10_000)), "protocol.metrics"),
        (protocol(*[metric("box_sensitivity", boxes=10_000)] * 32), "protocol.metrics"),
        (protocol(*[metric("fidelity")] * 32, bootstrap_resamples=10_000), "protocol.bootstrap_resamples"),
        (protocol(metric("localisation", points=1000), bootstrap_resamples=2000), "protocol.bootstrap_resamples"),
        (protocol(*[metric("localisation", points=1000)] * 11, bootstrap_resamples=0), "protocol.metrics"),
        (
            protocol(
                metric("sparseness"),
                methods=[CDAM, evaluation_pb2.EvaluatedMethod(method=method("attention", heads=[99]))],
            ),
            "protocol.methods[1].method.attention.heads",
        ),
        (
            protocol(
                metric("sparseness"),
                preprocessing=common_pb2.Preprocessing(input_size=common_pb2.Size(height=63, width=64)),
            ),
            "protocol.preprocessing.input_size",
        ),
    ],
)
def test_a_bad_protocol_is_refused_at_once(stub: Stub, plan: evaluation_pb2.EvaluationProtocol, field: str) -> None:
    assert violated(lambda: list(stub.Evaluate(requests(plan, []), timeout=60))) == field


def test_an_unknown_model(stub: Stub) -> None:
    plan = protocol(metric("sparseness"), model="unicorn")
    code, _, _ = refused(lambda: list(stub.Evaluate(requests(plan, []))), error_details_pb2.ResourceInfo)
    assert code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "first", [None, evaluation_pb2.EvaluateRequest(), evaluation_pb2.EvaluateRequest(sample=sample(0))]
)
def test_the_protocol_comes_first(stub: Stub, first: evaluation_pb2.EvaluateRequest | None) -> None:
    messages = [] if first is None else [first]
    assert violated(lambda: list(stub.Evaluate(iter(messages)))) == "protocol"


@pytest.mark.parametrize(
    ("second", "field"),
    [
        (evaluation_pb2.EvaluateRequest(protocol=QUICK), "protocol"),
        (evaluation_pb2.EvaluateRequest(), "payload"),
    ],
)
def test_what_does_not_belong_ends_the_stream_once_the_rest_is_answered(
    stub: Stub, second: evaluation_pb2.EvaluateRequest, field: str
) -> None:
    talk = Talk(stub, QUICK)
    talk.send(sample(0), sample(1))
    talk.send_request(second)
    assert {talk.result().sample_id for _ in range(2)} == {"scene 0", "scene 1"}
    assert violated(lambda: list(talk.call)) == field
    talk.end()


def test_ids_are_unique_among_the_unanswered(stub: Stub) -> None:
    talk = Talk(stub, ENDLESS)
    talk.send(sample(0), sample(0))
    result = talk.result()
    assert result.sample_id == "scene 0"
    assert violation(result.error) == "sample.sample_id"
    talk.call.cancel()
    talk.end()


def test_progress(stub: Stub) -> None:
    plan = evaluation_pb2.EvaluationProtocol()
    plan.CopyFrom(QUICK)
    plan.expected_samples = 3
    talk = Talk(stub, plan)
    talk.send(sample(0), sample(1))
    while not (talk.answers.progress and talk.answers.progress[-1].done == 2):
        talk.answers.take(next(talk.call))
    report = talk.answers.progress[-1]
    assert report.received == 2
    assert report.rate > 0
    assert report.remaining.ToNanoseconds() == pytest.approx(1e9 / report.rate, rel=0.01)
    talk.send(sample(2))
    talk.end()
    assert talk.drain() is grpc.StatusCode.OK
    assert talk.answers.table is not None
    assert talk.answers.table.samples == 3


def test_masks_and_images_go_the_same_way(stub: Stub) -> None:
    """Encoded, coloured, at three times the size: what reaches the engine is what a small sample says."""
    drawn = scene(0)
    large = [
        np.kron(item, np.ones((3, 3) + (1,) * (item.ndim - 2), item.dtype))
        for item in (drawn.image, drawn.objects[0].mask)
    ]
    coloured = np.zeros((192, 192, 3), np.uint8)
    coloured[large[1]] = 0, 1, 0
    plan = protocol(
        metric("mask_agreement"), methods=[evaluation_pb2.EvaluatedMethod(anchor=evaluation_pb2.ANCHOR_MASK)]
    )
    changes = {"image": raw(large[0]), "counterfactual": None, "wrong_mask": None}
    answers = evaluate(
        stub,
        plan,
        [
            sample(0, sample_id="small"),
            sample(0, sample_id="large", mask=png(coloured), **changes),
            sample(0, sample_id="alpha", mask=png(transparent(large[1])), **changes),
        ],
    )
    found = answers.values()
    assert 0.5 < found["small"][0, 0, "energy"] < 1
    for name in ("large", "alpha"):
        assert found[name][0, 0, "energy"] == pytest.approx(found["small"][0, 0, "energy"], abs=0.02)


def transparent(mask: np.ndarray) -> np.ndarray:
    """White all over, and transparent outside of the mask."""
    return np.dstack([np.full((*mask.shape, 3), 255, np.uint8), np.where(mask, 255, 0).astype(np.uint8)])


def test_an_explanation_does_not_wait_for_an_evaluation(stub: Stub) -> None:
    talk = Talk(stub, ENDLESS)
    talk.send(*map(sample, range(8)))
    wait_until_received(talk, 4)
    for _ in range(5):
        assert stub.Explain(request(SCENE, output(3)), timeout=60).maps
    assert talk.answers.results == []
    talk.call.cancel()
    talk.end()


def wait_until_received(talk: Talk, count: int) -> None:
    """Until the server has read so many samples."""
    while not (talk.answers.progress and talk.answers.progress[-1].received >= count):
        talk.answers.take(next(talk.call))


async def test_an_evaluation_never_fills_the_queue() -> None:
    """Its samples cost far more than all requests together may."""
    async with (
        in_this_process.application(max_pending=2, max_pending_passes=4) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub: Any = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
        call = stub.Evaluate()
        for message in requests(ENDLESS, map(sample, range(4))):
            await call.write(message)
        while (await call.read()).progress.received < 4:
            pass
        for _ in range(5):  # two at a time, which is as many as there may be
            answers = await asyncio.gather(*(stub.Explain(request(SCENE, output(k)), timeout=60) for k in range(2)))
            assert all(answer.maps for answer in answers)
        call.cancel()
        quick = stub.Evaluate(requests(QUICK, map(sample, range(5))), timeout=240)  # and samples may cost more, too
        results = [answer async for answer in quick if answer.HasField("result")]
        assert sorted(answer.result.sample_id for answer in results) == [f"scene {seed}" for seed in range(5)]


async def test_too_many_evaluations() -> None:
    async with (
        in_this_process.application(max_pending=8) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub: Any = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
        first = stub.Evaluate()
        await first.write(evaluation_pb2.EvaluateRequest(protocol=QUICK))
        assert (await first.read()).HasField("started")
        second = stub.Evaluate(requests(QUICK, []))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await second.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await first.done_writing()
        while not (await first.read()).HasField("table"):
            pass
        assert await first.code() is grpc.StatusCode.OK
        third = stub.Evaluate(requests(QUICK, []))
        assert (await third.read()).HasField("started")
        third.cancel()


def test_evaluations_take_turns(stub: Stub) -> None:
    long, short = Talk(stub, protocol(metric("box_sensitivity", boxes=25))), Talk(stub, QUICK)
    long.send(*map(sample, range(12)))
    wait_until_received(long, 8)
    short.send(*map(sample, range(3)))
    short.end()
    assert short.drain() is grpc.StatusCode.OK
    assert short.answers.table is not None
    wait_for_progress = len(long.answers.progress)
    while len(long.answers.progress) == wait_for_progress:
        long.answers.take(next(long.call))
    assert long.answers.progress[-1].done < 12
    long.call.cancel()
    long.end()


def test_what_is_cut_goes_on_elsewhere_with_the_same_result(stub: Stub) -> None:
    plan = protocol(metric("fidelity", points=3), metric("box_sensitivity", boxes=4), metric("counterfactual"))
    whole = evaluate(stub, plan, map(sample, range(6)))
    cut = Talk(stub, plan)
    cut.send(*map(sample, range(6)))
    some = [cut.result() for _ in range(2)]
    cut.call.cancel()
    cut.end()
    got = {item.sample_id: values(item) for item in some}
    rest = evaluate(stub, plan, [sample(seed) for seed in reversed(range(6)) if f"scene {seed}" not in got])
    together = got | rest.values()
    assert set(together) == set(whole.values())
    for sample_id, numbers in whole.values().items():
        assert together[sample_id] == pytest.approx(numbers, rel=1e-6, abs=1e-6)
    assert whole.table is not None
    same(whole.table, statistics(together).table())


async def test_a_cancelled_evaluation_leaves_nothing_behind() -> None:
    async with in_this_process.application() as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
        before = in_this_process.tasks()
        call = stub.Evaluate()
        for message in requests(ENDLESS, map(sample, range(8))):
            await call.write(message)
        while (await call.read()).progress.received < 4:
            pass
        assert in_this_process.tasks() - before
        call.cancel()
        while in_this_process.tasks() - before:  # noqa: ASYNC110 - the test's own time limit is the bound
            await asyncio.sleep(0.05)
        assert (await stub.Explain(request(SCENE, output(3)))).maps
        answers = Answers()
        async for answer in stub.Evaluate(requests(QUICK, [sample(0)]), timeout=120):
            answers.take(answer)
        assert answers.table is not None
