"""The service as any gRPC client sees it: raw stubs against a real server of the demo model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image

from calls import SAMPLES, Stub, array, output, refused, request
from cdam.v1 import (
    common_pb2,
    explain_pb2,
    method_pb2,
    model_pb2,
    target_pb2,
)
from cdam_engine import Explainer, Output
from cdam_engine.preprocess import DataConfig, normalise
from cdam_server.demo import model as demo_model


@pytest.fixture(scope="module")
def channel(server_address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server_address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> Stub:
    return Stub(channel)


@pytest.fixture(scope="module")
def scene() -> bytes:
    return (SAMPLES / "scene1.png").read_bytes()


def test_a_map_is_the_engines_map_of_the_same_image(stub: Stub, scene: bytes) -> None:
    answer = stub.Explain(request(scene, output(3), output("7"), request_id="mine"))
    model = demo_model.load()
    pixels = np.array(Image.open(io.BytesIO(scene)).convert("RGB"))
    inputs = normalise(torch.from_numpy(pixels)[None], DataConfig.from_timm(model), torch.float32)
    (expected,) = Explainer(model).explain(inputs, [[Output(3), Output(7)]])
    assert answer.request_id == "mine"
    assert [(item.target_index, item.method_index) for item in answer.maps] == [(0, 0), (1, 0)]
    for relevance, truth in zip(answer.maps, expected.maps, strict=True):
        np.testing.assert_allclose(array(relevance.scores), truth.scores, atol=1e-5 * np.abs(truth.scores).max())
        assert relevance.prefix_share == pytest.approx(truth.prefix_share, abs=1e-4)
    assert [item.value for item in answer.targets] == pytest.approx([item.value for item in expected.targets], abs=1e-3)
    probabilities = torch.softmax(torch.from_numpy(expected.logits), 0)
    assert [item.probability for item in answer.targets] == pytest.approx(
        [float(probabilities[3]), float(probabilities[7])], abs=1e-4
    )
    assert [item.label for item in answer.targets] == ["3", "7"]


def test_geometry_and_timing(stub: Stub, scene: bytes) -> None:
    unseen = io.BytesIO()
    Image.open(io.BytesIO(scene)).rotate(90).save(unseen, "PNG")
    answer = stub.Explain(request(unseen.getvalue(), output(0)))
    geometry = answer.geometry
    assert (geometry.patch_grid.height, geometry.patch_grid.width) == (16, 16)
    assert (geometry.region.left, geometry.region.top, geometry.region.right, geometry.region.bottom) == (0, 0, 64, 64)
    assert list(answer.maps[0].scores.shape) == [16, 16]
    timing = answer.timing
    stages = [timing.decode, timing.queue, timing.trunk, timing.tail]
    assert all(stage.ToNanoseconds() > 0 for stage in stages)
    assert sum(stage.ToNanoseconds() for stage in stages) <= timing.total.ToNanoseconds()
    assert timing.batch_size == 1
    assert answer.request_id


def test_top_k_stands_for_its_outputs_highest_first(stub: Stub, scene: bytes) -> None:
    answer = stub.Explain(request(scene, output(5), target_pb2.Target(top_k=target_pb2.TopKTarget(k=3))))
    assert [item.request_index for item in answer.targets] == [0, 1, 1, 1]
    assert answer.targets[0].output_index == 5
    values = [item.value for item in answer.targets[1:]]
    assert values == sorted(values, reverse=True)
    digits = {item["label"] for item in json.loads((SAMPLES / "samples.json").read_text())["samples"][0]["objects"]}
    assert digits <= {item.label for item in answer.targets[1:]}


def test_every_method_asked_for_gives_its_maps(stub: Stub, scene: bytes) -> None:
    cdam = method_pb2.Method(cdam=method_pb2.CdamMethod())
    answer = stub.Explain(request(scene, output(1), output(2), methods=[cdam, cdam]))
    assert [(item.method_index, item.target_index) for item in answer.maps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    np.testing.assert_array_equal(array(answer.maps[0].scores), array(answer.maps[2].scores))


def test_other_input_sizes_and_squash(stub: Stub) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), (90, 120, 60)).save(buffer, "PNG")
    preprocessing = common_pb2.Preprocessing(
        resize_mode=common_pb2.RESIZE_MODE_SQUASH, input_size=common_pb2.Size(height=48, width=96)
    )
    answer = stub.Explain(request(buffer.getvalue(), output(1), preprocessing=preprocessing))
    assert list(answer.maps[0].scores.shape) == [12, 24]
    region = answer.geometry.region
    assert (region.left, region.top, region.right, region.bottom) == (0, 0, 200, 100)
    cropped = stub.Explain(request(buffer.getvalue(), output(1))).geometry.region
    assert (cropped.left, cropped.top, cropped.right, cropped.bottom) == (50, 0, 150, 100)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"image": None}, "image"),
        ({"image": common_pb2.Image()}, "image.source"),
        ({"image": common_pb2.Image(encoded=b"")}, "image.encoded"),
        ({"image": common_pb2.Image(encoded=b"no image")}, "image.encoded"),
        (
            {"image": common_pb2.Image(raw=common_pb2.RawImage(height=2, width=2, channels=3, data=b"1"))},
            "image.raw.data",
        ),
        ({"targets": []}, "targets"),
        ({"targets": [target_pb2.Target()]}, "targets[0]"),
        ({"targets": [target_pb2.Target(output=target_pb2.OutputTarget())]}, "targets[0].output"),
        ({"targets": [target_pb2.Target(top_k=target_pb2.TopKTarget(k=0))]}, "targets[0].top_k.k"),
        ({"targets": [target_pb2.Target(top_k=target_pb2.TopKTarget(k=11))]}, "targets[0].top_k.k"),
        ({"targets": [output(0)] * 101}, "targets"),
        ({"methods": [method_pb2.Method()]}, "methods[0]"),
        ({"methods": [method_pb2.Method(cdam=method_pb2.CdamMethod())] * 17}, "methods"),
        ({"request_id": "\n"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"priority": 9}, "priority"),
        ({"preprocessing": common_pb2.Preprocessing(resize_mode=7)}, "preprocessing.resize_mode"),
        (
            {"preprocessing": common_pb2.Preprocessing(input_size=common_pb2.Size(height=65, width=64))},
            "preprocessing.input_size",
        ),
        (
            {"preprocessing": common_pb2.Preprocessing(input_size=common_pb2.Size())},
            "preprocessing.input_size",
        ),
        (
            {"preprocessing": common_pb2.Preprocessing(input_size=common_pb2.Size(height=4096, width=4096))},
            "preprocessing.input_size",
        ),
    ],
)
def test_a_bad_field_is_named(stub: Stub, scene: bytes, change: dict[str, object], field: str) -> None:
    fields = {"image": common_pb2.Image(encoded=scene), "targets": [output(0)], **change}
    code, message, (detail,) = refused(
        lambda: stub.Explain(explain_pb2.ExplainRequest(**fields)), error_details_pb2.BadRequest
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in detail.field_violations] == [field]
    assert field in message


@pytest.mark.parametrize(
    ("change", "kind", "name"),
    [
        ({"model": "nobody"}, "cdam.v1.model", "nobody"),
        ({"targets": [output(10)]}, "cdam.v1.output", "10"),
        ({"targets": [output("ten")]}, "cdam.v1.output", "ten"),
        ({"targets": [output("")]}, "cdam.v1.output", ""),
    ],
)
def test_what_does_not_exist_is_named(
    stub: Stub, scene: bytes, change: dict[str, object], kind: str, name: str
) -> None:
    fields = {"image": common_pb2.Image(encoded=scene), "targets": [output(0)], "request_id": "r1", **change}
    code, _, (detail, about) = refused(
        lambda: stub.Explain(explain_pb2.ExplainRequest(**fields)),
        error_details_pb2.ResourceInfo,
        error_details_pb2.RequestInfo,
    )
    assert code is grpc.StatusCode.NOT_FOUND
    assert (detail.resource_type, detail.resource_name) == (kind, name)
    assert about.request_id == "r1"


def test_models(stub: Stub) -> None:
    (model,) = stub.ListModels(model_pb2.ListModelsRequest()).models
    assert model == stub.GetModel(model_pb2.GetModelRequest(name="demo")).model
    assert model.is_default
    assert list(model.output_names) == list("0123456789")
    assert (model.patch_grid.height, model.patch_grid.width, model.prefix_tokens) == (16, 16, 1)
    assert model.readout == model_pb2.READOUT_CLS_TOKEN
    assert len(model.methods) == len(method_pb2.MethodKind.values()) - 1
    assert all(item.supported and not item.reason for item in model.methods)
    assert model.precision == model_pb2.PRECISION_FP32
    assert (list(model.input.mean), list(model.input.std)) == ([0.5] * 3, [0.5] * 3)
    assert model.input.interpolation == common_pb2.INTERPOLATION_BICUBIC
    assert (model.input.crop_mode, model.input.crop_fraction) == (common_pb2.CROP_MODE_CENTER, 1.0)
    assert not model.resampled
    code, _, _ = refused(lambda: stub.ListModels(model_pb2.ListModelsRequest(page_token="x")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_an_answer_says_how_its_image_was_preprocessed(stub: Stub, scene: bytes) -> None:
    (model,) = stub.ListModels(model_pb2.ListModelsRequest()).models
    asked = request(scene, output(3))
    for wanted, applied in (
        (common_pb2.RESIZE_MODE_UNSPECIFIED, common_pb2.RESIZE_MODE_MODEL),
        (common_pb2.RESIZE_MODE_SQUASH, common_pb2.RESIZE_MODE_SQUASH),
    ):
        asked.preprocessing.resize_mode = wanted
        told = stub.Explain(asked).preprocessing
        assert (told.resize_mode, told.model_input) == (applied, model.input)
        assert (told.input_size.height, told.input_size.width) == (64, 64)


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "cdam.v1.ExplainerService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert "cdam.v1.ExplainerService" in services


def test_requests_at_once_are_batched_and_equal_to_requests_alone(stub: Stub, scene: bytes) -> None:
    images = [(SAMPLES / f"scene{i}.png").read_bytes() for i in range(1, 7)]
    alone = [stub.Explain(request(image, output(i))) for i, image in enumerate(images)]
    futures = [
        (i, stub.Explain.future(request(image, *([output(9)] * (i % 3)), output(i))))
        for _ in range(4)
        for i, image in enumerate(images)
    ]
    answers = [(i, future.result()) for i, future in futures]
    assert max(answer.timing.batch_size for _, answer in answers) > 1
    for i, answer in answers:
        expected = array(alone[i].maps[0].scores)
        np.testing.assert_allclose(array(answer.maps[-1].scores), expected, atol=2e-5 * np.abs(expected).max())
