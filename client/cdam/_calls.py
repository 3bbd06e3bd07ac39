"""What both clients do with unary calls: all decisions, and all translation between the API and the caller."""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cdam._channel import SERVICE
from cdam._concept_file import load_concept, save_concept
from cdam._concepts import RegisteredConcept
from cdam._decode import decode_concept, decode_explanation, decode_model
from cdam._encode import encode_import
from cdam._errors import Unavailable, Unimplemented
from cdam._explanation import Explanation
from cdam._methods import Method
from cdam._models import Model
from cdam._numbers import whole
from cdam._targets import Concept, Target
from cdam._transport import Calls
from cdam.v1 import concept_pb2, explain_pb2, model_pb2

_SERVING = b"\x08\x01"  # HealthCheckResponse(status=SERVING)
_PAUSE_SECONDS = 0.1


async def explain(
    calls: Calls, request: explain_pb2.ExplainRequest, methods: tuple[Method, ...], asked: Sequence[Target] = ()
) -> Explanation:
    """Explain one image."""
    response = await calls("Explain", request, explain_pb2.ExplainResponse)
    return decode_explanation(response, methods, request, asked)


async def models(calls: Calls) -> tuple[Model, ...]:
    """List all models, page by page."""
    found: list[Model] = []
    page_token = ""
    while True:
        request = model_pb2.ListModelsRequest(page_token=page_token)
        page = await calls("ListModels", request, model_pb2.ListModelsResponse)
        found += map(decode_model, page.models)
        page_token = page.next_page_token
        if not page_token:
            return tuple(found)


async def model(calls: Calls, name: str) -> Model:
    """Get one model."""
    response = await calls("GetModel", model_pb2.GetModelRequest(name=name), model_pb2.GetModelResponse)
    return decode_model(response.model)


async def concept(calls: Calls, name: str | None, concept_id: str | None, model_name: str) -> RegisteredConcept:
    """Get one concept, by its name or its id.

    Raises:
        ValueError: if neither is given, or both are, or a model with an id.
    """
    if (name is None) == (concept_id is None):
        raise ValueError("a concept goes by exactly one of name and id")
    if concept_id is not None and model_name:
        raise ValueError("an id goes without a model: it is that of one model already")
    request = concept_pb2.GetConceptRequest(model=model_name)
    if name is not None:
        request.name = name
    if concept_id is not None:
        request.id = concept_id
    response = await calls("GetConcept", request, concept_pb2.GetConceptResponse)
    return decode_concept(response.concept)


async def export_concept(
    calls: Calls, source: str | Concept | RegisteredConcept, model_name: str, path: str | os.PathLike[str]
) -> Path:
    """Write a concept with its vector to a file."""
    found = await _whole_concept(calls, source, model_name)
    return await calls.transport.work(partial(save_concept, found, path))


async def _whole_concept(calls: Calls, source: str | Concept | RegisteredConcept, model_name: str) -> RegisteredConcept:
    match source:
        case RegisteredConcept(vector=None):
            # The id may have come to other names since; those of this concept stay.
            found = await concept(calls, None, source.id, "")
            return dataclasses.replace(source, vector=found.vector, examples=found.examples, negatives=found.negatives)
        case RegisteredConcept():
            return source
        case Concept(id=str() as concept_id):
            return await concept(calls, None, concept_id, "")
        case Concept(name=str() as name) | (str() as name):
            return await concept(calls, name, None, model_name)
        case Concept():
            raise ValueError("a vector alone is no registered concept")


async def concept_page(
    calls: Calls, request: concept_pb2.ListConceptsRequest
) -> tuple[tuple[RegisteredConcept, ...], str]:
    """Get a page of concepts, and the token of the next, empty if there is none."""
    response = await calls("ListConcepts", request, concept_pb2.ListConceptsResponse)
    return tuple(map(decode_concept, response.concepts)), response.next_page_token


async def delete_concept(calls: Calls, name: str, model_name: str, expected_version: int | None) -> RegisteredConcept:
    """Free a concept's name."""
    if not model_name:
        model_name = (await model(calls, "")).name
    request = concept_pb2.DeleteConceptRequest(name=name, model=model_name)
    if expected_version is not None:
        request.expected_version = whole(expected_version, "expected_version")
    response = await calls("DeleteConcept", request, concept_pb2.DeleteConceptResponse)
    return decode_concept(response.concept)


async def import_concept(
    calls: Calls, source: str | os.PathLike[str] | RegisteredConcept, **changes: Any
) -> RegisteredConcept:
    """Register what an export says; if no model is named, with one that it is of, best the one of the same name.

    Args:
        calls: Where to.
        source: The export, or its file.
        changes: What of it is to be another; None: as it is.
    """
    found = (
        source if isinstance(source, RegisteredConcept) else await calls.transport.work(partial(load_concept, source))
    )
    spec = encode_import(found, **{name: value for name, value in changes.items() if value is not None})
    if not spec.model:
        fitting = [known.name for known in await models(calls) if known.fingerprint == spec.model_fingerprint]
        # If none fits, the server says what is wrong with its default one.
        spec.model = found.model if found.model in fitting else next(iter(fitting), "")
    request = concept_pb2.ConceptRegisterRequest(spec=spec)
    response = await calls("ConceptRegister", request, concept_pb2.ConceptRegisterResponse)
    return decode_concept(response.concept, created=response.created)


async def wait_until_ready(calls: Calls) -> None:
    """Ask for the server's health until it serves; a server that knows no health is ready when it answers."""
    # Both health messages are short enough to write by hand, which saves a dependency.
    request = b"\x0a" + bytes([len(SERVICE)]) + SERVICE.encode()  # HealthCheckRequest(service=SERVICE)
    while True:
        try:
            status = await calls.raw("/grpc.health.v1.Health/Check", request, bytes, wait_for_ready=True)
        except Unimplemented:
            return
        except Unavailable:
            status = b""
        if status == _SERVING:
            return
        await calls.transport.pause(_PAUSE_SECONDS)
