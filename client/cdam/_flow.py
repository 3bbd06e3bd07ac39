"""What a client does, written once for both clients.

A flow yields what is to be done and gets back what came of it; `Client` and `AsyncClient` each do the waiting in
their own way. All decisions, and all translation, stand in the flow.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import Message

from cdam._concepts import RegisteredConcept
from cdam._decode import decode_concept, decode_explanation, decode_model
from cdam._errors import Unavailable, Unimplemented
from cdam._explanation import Explanation
from cdam._methods import Method
from cdam._models import Model
from cdam._numbers import whole
from cdam._targets import Concept, Target
from cdam.v1 import concept_pb2, explain_pb2, model_pb2

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


def explain(
    request: explain_pb2.ExplainRequest, methods: tuple[Method, ...], asked: Sequence[Target] = ()
) -> Flow[Explanation]:
    """Explain one image."""
    response = yield unary("Explain", request, explain_pb2.ExplainResponse)
    return decode_explanation(response, methods, request, asked)


def models() -> Flow[tuple[Model, ...]]:
    """List all models, page by page."""
    found: list[Model] = []
    page_token = ""
    while True:
        request = model_pb2.ListModelsRequest(page_token=page_token)
        page = yield unary("ListModels", request, model_pb2.ListModelsResponse)
        found += map(decode_model, page.models)
        page_token = page.next_page_token
        if not page_token:
            return tuple(found)


def model(name: str) -> Flow[Model]:
    """Get one model."""
    response = yield unary("GetModel", model_pb2.GetModelRequest(name=name), model_pb2.GetModelResponse)
    return decode_model(response.model)


def concept_of(request: concept_pb2.GetConceptRequest) -> Flow[RegisteredConcept]:
    """Get one concept."""
    response = yield unary("GetConcept", request, concept_pb2.GetConceptResponse)
    return decode_concept(response.concept)


def whole_concept(concept: str | Concept | RegisteredConcept, model_name: str) -> Flow[RegisteredConcept]:
    """Get a concept with its vector."""
    match concept:
        case RegisteredConcept(vector=None):
            # The id may have come to other names since; those of this concept stay.
            found = yield from concept_of(concept_pb2.GetConceptRequest(id=concept.id))
            return dataclasses.replace(concept, vector=found.vector, examples=found.examples, negatives=found.negatives)
        case RegisteredConcept():
            return concept
        case Concept(id=str() as concept_id):
            return (yield from concept_of(concept_pb2.GetConceptRequest(id=concept_id)))
        case Concept(name=str() as name) | (str() as name):
            return (yield from concept_of(concept_pb2.GetConceptRequest(name=name, model=model_name)))
        case Concept():
            raise ValueError("a vector alone is no registered concept")


def concept_page(request: concept_pb2.ListConceptsRequest) -> Flow[tuple[tuple[RegisteredConcept, ...], str]]:
    """Get a page of concepts, and the token of the next, empty if there is none."""
    response = yield unary("ListConcepts", request, concept_pb2.ListConceptsResponse)
    return tuple(map(decode_concept, response.concepts)), response.next_page_token


def delete_concept(name: str, model_name: str, expected_version: int | None) -> Flow[RegisteredConcept]:
    """Free a concept's name."""
    if not model_name:
        model_name = (yield from model("")).name
    request = concept_pb2.DeleteConceptRequest(name=name, model=model_name)
    if expected_version is not None:
        request.expected_version = whole(expected_version, "expected_version")
    response = yield unary("DeleteConcept", request, concept_pb2.DeleteConceptResponse)
    return decode_concept(response.concept)


def import_concept(spec: concept_pb2.ConceptSpec, its_model: str) -> Flow[RegisteredConcept]:
    """Register what an export says; if no model is named, with one that it is of, best the one of the same name."""
    if not spec.model:
        fitting = [found.name for found in (yield from models()) if found.fingerprint == spec.model_fingerprint]
        # If none fits, the server says what is wrong with its default one.
        spec.model = its_model if its_model in fitting else next(iter(fitting), "")
    request = concept_pb2.ConceptRegisterRequest(spec=spec)
    response = yield unary("ConceptRegister", request, concept_pb2.ConceptRegisterResponse)
    return decode_concept(response.concept, created=response.created)


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


def unary(method: str, request: Message, response: type[Message]) -> Call:
    """A call of a method of this API."""
    return Call(f"/{SERVICE}/{method}", request.SerializeToString(), response.FromString)
