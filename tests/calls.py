"""Requests of the API in few words, and what came of them, for tests that talk to a real server with raw stubs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2_grpc, method_pb2, target_pb2

Stub = explainer_service_pb2_grpc.ExplainerServiceStub
SAMPLES = files("cdam_server.demo") / "assets" / "samples"


def output(selector: int | str) -> target_pb2.Target:
    """The target for an output by index or name."""
    return target_pb2.Target(output=_output(selector))


def vector(values: Sequence[float] | np.ndarray, similarity: Any = 0) -> target_pb2.Target:
    """The target for a concept whose vector travels along."""
    array = np.asarray(values, "<f4")
    tensor = common_pb2.FloatTensor(shape=array.shape, data=array.tobytes())
    return target_pb2.Target(concept=target_pb2.ConceptTarget(vector=tensor, similarity=similarity))


def contrast(positive: int | str | target_pb2.Target, negative: int | str | target_pb2.Target) -> target_pb2.Target:
    """The target for a difference of outputs or concepts."""
    return target_pb2.Target(contrast=target_pb2.ContrastTarget(positive=_side(positive), negative=_side(negative)))


def method(kind: str, **parameters: Any) -> method_pb2.Method:
    """The method of this name."""
    message = method_pb2.Method()
    settings = getattr(message, kind)
    settings.SetInParent()
    settings.MergeFrom(type(settings)(**parameters))
    return message


def request(image: bytes, *targets: target_pb2.Target, **fields: Any) -> explain_pb2.ExplainRequest:
    """A request to explain an encoded image."""
    return explain_pb2.ExplainRequest(image=common_pb2.Image(encoded=image), targets=targets, **fields)


def array(tensor: common_pb2.FloatTensor) -> np.ndarray:
    """The array that a message holds."""
    return np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)


def refused(call: Callable[[], object], *details: type) -> tuple[grpc.StatusCode, str, list[Any]]:
    """The status, message and details of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata.get("grpc-status-details-bin", b""))
    unpacked = []
    for kind in details:
        packed: AnyMessage = next(item for item in status.details if item.Is(kind.DESCRIPTOR))
        detail = kind()
        packed.Unpack(detail)
        unpacked.append(detail)
    return error.code(), error.details(), unpacked


def violated(call: Callable[[], object]) -> str:
    """The field that a call is refused for."""
    code, message, (detail,) = refused(call, error_details_pb2.BadRequest)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = detail.field_violations
    assert violation.field in message
    return str(violation.field)


def _output(selector: int | str) -> target_pb2.OutputTarget:
    by: dict[str, Any] = {"index": selector} if isinstance(selector, int) else {"name": selector}
    return target_pb2.OutputTarget(**by)


def _side(side: int | str | target_pb2.Target) -> target_pb2.ScalarTarget:
    if isinstance(side, target_pb2.Target):
        return target_pb2.ScalarTarget(concept=side.concept)
    return target_pb2.ScalarTarget(output=_output(side))
