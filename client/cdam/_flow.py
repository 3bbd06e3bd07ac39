"""What a client does, written once for both clients.

A flow yields what is to be done and gets back what came of it; `Client` and `AsyncClient` each do the waiting in
their own way. All decisions, and all translation, stand in the flow.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import Message

from cdam._decode import decode_explanation, decode_model
from cdam._errors import Unavailable, Unimplemented
from cdam._explanation import Explanation
from cdam._methods import Method
from cdam._models import Model
from cdam.v1 import explain_pb2, model_pb2

T = TypeVar("T")

SERVICE = "cdam.v1.ExplainerService"

_SERVING = b"\x08\x01"  # HealthCheckResponse(status=SERVING)
_PAUSE = 0.1


@dataclass(frozen=True)
class Call:
    """A unary call.

    Attributes:
        path: The method's full path.
        request: The request, serialised.
        decode: Makes the answer of its bytes.
        patient: Wait for the connection instead of failing without one.
    """

    path: str
    request: bytes
    decode: Callable[[bytes], Any]
    patient: bool = False


@dataclass(frozen=True)
class Pause:
    """Wait for a while.

    Attributes:
        seconds: How long.
    """

    seconds: float


Flow: TypeAlias = Generator[Call | Pause, Any, T]
"""Yields calls and pauses, gets answers (errors are thrown into it), returns the result."""


def explain(request: explain_pb2.ExplainRequest, methods: tuple[Method, ...]) -> Flow[Explanation]:
    """Explain one image."""
    response = yield _call("Explain", request, explain_pb2.ExplainResponse)
    return decode_explanation(response, methods, request)


def models() -> Flow[tuple[Model, ...]]:
    """List all models, page by page."""
    found: list[Model] = []
    page_token = ""
    while True:
        request = model_pb2.ListModelsRequest(page_token=page_token)
        page = yield _call("ListModels", request, model_pb2.ListModelsResponse)
        found += map(decode_model, page.models)
        page_token = page.next_page_token
        if not page_token:
            return tuple(found)


def model(name: str) -> Flow[Model]:
    """Get one model."""
    response = yield _call("GetModel", model_pb2.GetModelRequest(name=name), model_pb2.GetModelResponse)
    return decode_model(response.model)


def wait_until_ready() -> Flow[None]:
    """Ask for the server's health until it serves; a server that knows no health is ready when it answers."""
    # Both health messages are short enough to write by hand, which saves a dependency.
    request = b"\x0a" + bytes([len(SERVICE)]) + SERVICE.encode()  # HealthCheckRequest(service=SERVICE)
    check = Call("/grpc.health.v1.Health/Check", request, decode=lambda status: status == _SERVING, patient=True)
    while True:
        try:
            if (yield check):
                return
        except Unimplemented:
            return
        except Unavailable:
            pass
        yield Pause(_PAUSE)


def _call(method: str, request: Message, response: type[Message]) -> Call:
    return Call(f"/{SERVICE}/{method}", request.SerializeToString(), response.FromString)
