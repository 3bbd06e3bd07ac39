"""Small requests that would cost a lot are refused before they do, and each is answered, logged and counted."""

from __future__ import annotations

import io
import struct
import zlib
from importlib.resources import files

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

from calls import method, vector
from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2_grpc, method_pb2, model_pb2, target_pb2
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc.images import ImageLimits, decode_image

SCENE = (files("cdam_server.demo") / "assets" / "samples" / "scene1.png").read_bytes()
TARGET = target_pb2.Target(output=target_pb2.OutputTarget(index=3))


def _violated(error: grpc.RpcError) -> str:
    """The field of the error's BadRequest."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    detail = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(detail)
    return detail.field_violations[0].field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"methods": [method_pb2.Method(cdam=method_pb2.CdamMethod())] * 10_000}, "methods"),
        ({"targets": [TARGET] * 200_000}, "targets"),
        ({"model": "x" * 5000}, "model"),
        ({"targets": [target_pb2.Target(output=target_pb2.OutputTarget(name="x" * 5000))]}, "targets[0].output.name"),
        ({"request_id": "x" * 10_000}, "request_id"),
        ({"methods": [method("smooth_grad", samples=2**32 - 1)]}, "methods[0].smooth_grad.samples"),
        ({"methods": [method("integrated_cdam", steps=2**32 - 1)]}, "methods[0].integrated_cdam.steps"),
        ({"methods": [method("attention", heads=[0] * 1_000_000)]}, "methods[0].attention.heads"),
        ({"targets": [vector([0.0] * 1_000_000)]}, "targets[0].concept.vector"),
        ({"targets": [TARGET] * 100, "methods": [method("smooth_grad", samples=51)]}, "methods"),
        ({"methods": [method("integrated_gradients", steps=500)] * 11}, "methods"),
        ({"targets": [TARGET] * 100, "methods": [method("smooth_grad")] * 16}, "methods"),
        (
            {
                "methods": [method("token_ablation")] * 3,
                "preprocessing": common_pb2.Preprocessing(input_size=common_pb2.Size(height=200, width=200)),
            },
            "methods",
        ),
        (
            {"preprocessing": common_pb2.Preprocessing(input_size=common_pb2.Size(height=512, width=512))},
            "preprocessing.input_size",
        ),
    ],
)
def test_costly_fields(server_address: str, change: dict[str, object], field: str) -> None:
    fields = {"image": common_pb2.Image(encoded=SCENE), "targets": [TARGET], **change}
    with grpc.insecure_channel(server_address) as channel:
        stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Explain(explain_pb2.ExplainRequest(**fields), timeout=30)
        stub.Explain(explain_pb2.ExplainRequest(image=common_pb2.Image(encoded=SCENE), targets=[TARGET]), timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert _violated(refused.value) == field


def test_bytes_that_are_no_message(server_address: str) -> None:
    with grpc.insecure_channel(server_address) as channel:
        call = channel.unary_unary("/cdam.v1.ExplainerService/Explain", None, None)
        with pytest.raises(grpc.RpcError) as refused:
            call(b"\xff\xff\xff\xff", timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert _violated(refused.value) == "request"


@pytest.mark.parametrize("token", ["9" * 5000, "٣", "-1"])
def test_page_tokens(server_address: str, token: str) -> None:
    with grpc.insecure_channel(server_address) as channel:
        stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListModels(model_pb2.ListModelsRequest(page_token=token), timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_errors_carry_the_id_that_the_server_made(server_address: str) -> None:
    with grpc.insecure_channel(server_address) as channel:
        stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Explain(explain_pb2.ExplainRequest(), timeout=30)
    status = status_pb2.Status.FromString(dict(refused.value.trailing_metadata())["grpc-status-details-bin"])
    about = error_details_pb2.RequestInfo()
    assert any(detail.Unpack(about) for detail in status.details)
    assert len(about.request_id) == 32


def _jpeg_of_many_scans(scans: int) -> bytes:
    """A sequential JPEG whose scans are all empty but the first: each makes the decoder pass over the picture."""
    buffer = io.BytesIO()
    Image.new("L", (6000, 6000)).save(buffer, "JPEG")
    data = buffer.getvalue()
    end = data.rindex(b"\xff\xd9")
    scan = b"\xff\xda" + struct.pack(">H", 8) + bytes([1, 1, 0, 0, 63, 0])
    return data[:end] + scan * scans + data[end:]


def _png_of_many_chunks(chunks: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    data = buffer.getvalue()
    chunk = struct.pack(">I", 0) + b"teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    return data[:33] + chunk * chunks + data[33:]


def _jpeg_of_many_segments(segments: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    return data[:2] + b"\xff\xe1\x00\x02" * segments + data[2:]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_jpeg_of_many_scans(3000), id="jpeg_scans"),
        pytest.param(_jpeg_of_many_segments(1_000_000), id="jpeg_segments"),
        pytest.param(_png_of_many_chunks(500_000), id="png_chunks"),
    ],
)
def test_files_that_take_for_ever(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match=r"image\.encoded: is (made of more than|a JPEG of)"):
        decode_image(common_pb2.Image(encoded=data), ImageLimits())


def test_a_file_of_fill_bytes() -> None:
    with pytest.raises(InvalidArgumentError, match=r"image\.encoded: is not a JPEG"):
        decode_image(common_pb2.Image(encoded=b"\xff\xd8" + b"\xff" * 30_000_000), ImageLimits())


def test_a_large_picture_of_pixels_is_bounded_by_its_pixels() -> None:
    raw = common_pb2.RawImage(height=3000, width=4000, channels=3, data=bytes(36_000_000))
    assert decode_image(common_pb2.Image(raw=raw), ImageLimits()).size == (4000, 3000)
