"""The service's RPCs; each one decodes, makes one call, and encodes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any, TypeAlias

import grpc
import structlog

from cdam.v1 import common_pb2, concept_pb2, evaluation_pb2, explain_pb2, explainer_service_pb2_grpc, model_pb2
from cdam_server.compute.facts import Models
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc import decode, decode_concepts, decode_evaluation, encode, fields
from cdam_server.rpc.caller import identity
from cdam_server.rpc.evaluation import EvaluationStream
from cdam_server.rpc.stream import Exchange, StreamServer
from cdam_server.usecases.concepts import ConceptUseCase
from cdam_server.usecases.evaluate import EvaluateUseCase
from cdam_server.usecases.explain import ExplainUseCase
from cdam_server.usecases.registration import RegisterUseCase

_PAGE_TOKEN = re.compile(r"[0-9]{0,9}")
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ExplainerServicer(explainer_service_pb2_grpc.ExplainerServiceServicer):
    """`cdam.v1.ExplainerService`.

    Args:
        models: The models.
        explain: The Explain use case.
        concepts: What can be done with concepts that are stored.
        register: The ConceptRegister use case.
        evaluate: The Evaluate use case.
        limits: Limits of a request.
        streams: What serves streams.
        evaluations: What serves the streams of evaluations, which get in nobody else's way.
    """

    def __init__(
        self,
        models: Models,
        explain: ExplainUseCase,
        concepts: ConceptUseCase,
        register: RegisterUseCase,
        evaluate: EvaluateUseCase,
        limits: decode.Limits,
        streams: StreamServer,
        evaluations: StreamServer,
    ) -> None:
        self._models = models
        self._explain = explain
        self._concepts = concepts
        self._register = register
        self._limits = limits
        self._streams = streams
        self._evaluate = evaluate
        self._evaluations = evaluations

    async def Explain(self, request: explain_pb2.ExplainRequest, context: _Context) -> explain_pb2.ExplainResponse:
        """Explain one image."""
        return await self._answer(request, context)

    async def ExplainStream(
        self, request_iterator: AsyncIterator[explain_pb2.ExplainStreamRequest], context: _Context
    ) -> AsyncIterator[explain_pb2.ExplainStreamResponse]:
        """Explain many images; answers come in any order."""

        async def answer(item: explain_pb2.ExplainStreamRequest) -> explain_pb2.ExplainStreamResponse:
            response = await self._answer(item.request, context)
            return explain_pb2.ExplainStreamResponse(request_id=item.request.request_id, response=response)

        # Answers are written, not yielded: whatever happens meanwhile then happens in here, where the items are.
        await self._streams.serve(
            request_iterator, context.write, Exchange(_item_id, answer, _item_failure, _item_size)
        )
        return
        yield  # type: ignore[unreachable]  # makes this a generator, as the shape of the RPC demands

    async def _answer(self, request: explain_pb2.ExplainRequest, context: _Context) -> explain_pb2.ExplainResponse:
        started = perf_counter()
        request_id = decode.request_id(request)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        command = decode.explain_command(request, self._limits, context.time_remaining(), identity(context))
        model = command.model or self._models.default.name
        methods = [method.kind for method in command.methods]
        structlog.contextvars.bind_contextvars(model=model, targets=len(command.targets), methods=methods)
        with fields.named(fields.of_explain):
            explained = await self._explain(command)
        return encode.explain_response(explained, request_id, perf_counter() - started)

    async def ListModels(
        self,
        request: model_pb2.ListModelsRequest,
        context: _Context,
    ) -> model_pb2.ListModelsResponse:
        """List the models, a page at a time; a page's token is the index of its first model."""
        if not _PAGE_TOKEN.fullmatch(request.page_token):
            raise InvalidArgumentError("page_token", "is not one that this server gave out")
        models = [encode.model(model, is_default=model is self._models.default) for model in self._models]
        first = int(request.page_token or 0)
        last = first + (request.page_size or len(models))
        return model_pb2.ListModelsResponse(
            models=models[first:last], next_page_token=str(last) if last < len(models) else ""
        )

    async def GetModel(
        self,
        request: model_pb2.GetModelRequest,
        context: _Context,
    ) -> model_pb2.GetModelResponse:
        """Describe one model."""
        decode.check_name(request.name, "name")
        model = self._models.get(request.name)
        return model_pb2.GetModelResponse(model=encode.model(model, is_default=model is self._models.default))

    async def ConceptRegister(
        self, request: concept_pb2.ConceptRegisterRequest, context: _Context
    ) -> concept_pb2.ConceptRegisterResponse:
        """Register a concept from the images, or the vector, of one message."""
        caller, held = identity(context), request.ByteSize()
        command = decode_concepts.register_command(request.spec, self._limits, context.time_remaining(), caller, held)
        images = decode_concepts.images(request, self._limits)
        with fields.named(fields.of_registration):
            stored, created = await self._register(command, images)
        return concept_pb2.ConceptRegisterResponse(concept=encode.concept(stored), created=created)

    async def ConceptRegisterStream(
        self, request_iterator: AsyncIterator[concept_pb2.ConceptRegisterStreamRequest], context: _Context
    ) -> concept_pb2.ConceptRegisterStreamResponse:
        """Register a concept from images that come one by one."""
        # Until something is answered, gRPC keeps on the client's side what was sent, to be able to repeat it.
        await context.send_initial_metadata(())
        requests = self._streams.messages(request_iterator)
        first = await anext(requests, concept_pb2.ConceptRegisterStreamRequest())
        if first.WhichOneof("payload") != "spec":
            raise InvalidArgumentError("spec", "is required, in the first message")
        command = decode_concepts.register_command(
            first.spec, self._limits, context.time_remaining(), identity(context)
        )
        images = decode_concepts.streamed_images(requests, self._limits)
        with fields.named(fields.of_registration):
            stored, created = await self._register(command, images)
        return concept_pb2.ConceptRegisterStreamResponse(concept=encode.concept(stored), created=created)

    async def GetConcept(
        self, request: concept_pb2.GetConceptRequest, context: _Context
    ) -> concept_pb2.GetConceptResponse:
        """Return one concept."""
        stored = await self._concepts.get(decode_concepts.selector(request))
        return concept_pb2.GetConceptResponse(concept=encode.concept(stored))

    async def ListConcepts(
        self, request: concept_pb2.ListConceptsRequest, context: _Context
    ) -> concept_pb2.ListConceptsResponse:
        """List concepts, a page at a time."""
        decode.check_name(request.model, "model")
        labels = decode_concepts.labels(request.labels, "labels")
        with fields.named(fields.of_page):
            page = await self._concepts.page(
                model=request.model, labels=labels, size=request.page_size, token=request.page_token
            )
        concepts = map(encode.concept_version, page.versions)
        return concept_pb2.ListConceptsResponse(concepts=concepts, next_page_token=page.next_token)

    async def DeleteConcept(
        self, request: concept_pb2.DeleteConceptRequest, context: _Context
    ) -> concept_pb2.DeleteConceptResponse:
        """Free a name."""
        version = await self._concepts.delete(*decode_concepts.deletion(request))
        return concept_pb2.DeleteConceptResponse(concept=encode.concept_version(version))

    async def Evaluate(
        self, request_iterator: AsyncIterator[evaluation_pb2.EvaluateRequest], context: _Context
    ) -> AsyncIterator[evaluation_pb2.EvaluateResponse]:
        """Measure samples; answers come in any order, progress in between, a table at the end."""
        first = await self._evaluations.first(request_iterator)
        if first is None or first.WhichOneof("payload") != "protocol":
            raise InvalidArgumentError("protocol", "is required, in the first message")
        command = decode_evaluation.evaluate_command(first.protocol, self._limits, identity(context))
        async with AsyncExitStack() as stack:
            with fields.named(fields.of_protocol):
                evaluation = await stack.enter_async_context(self._evaluate.begin(command))
            stream = EvaluationStream(evaluation, context.write, self._limits, first.protocol.expected_samples)
            await stream.serve(request_iterator, self._evaluations)
        return
        yield  # type: ignore[unreachable]  # makes this a generator, as the shape of the RPC demands


def _item_id(item: explain_pb2.ExplainStreamRequest) -> str:
    return item.request.request_id


def _item_size(item: explain_pb2.ExplainStreamRequest) -> int:
    return item.ByteSize()


def _item_failure(item_id: str, error: common_pb2.ItemError) -> explain_pb2.ExplainStreamResponse:
    return explain_pb2.ExplainStreamResponse(request_id=item_id, error=error)
