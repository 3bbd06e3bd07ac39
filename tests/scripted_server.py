# ruff: noqa: N802 - the generated base class sets names
"""A server of the API without a model: it does what a test tells it, and remembers what it was asked."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from cdam.v1 import common_pb2, concept_pb2, explain_pb2, explainer_service_pb2_grpc, model_pb2, target_pb2

GRID = 2, 3


@dataclass
class Failure:
    """A status to answer with, and its details."""

    code: grpc.StatusCode
    message: str = "as told"
    details: Sequence[Message] = ()
    trailers: tuple[tuple[str, str | bytes], ...] = ()


SOON = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1_000_000))
UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE, details=(SOON,))


@dataclass
class Script(explainer_service_pb2_grpc.ExplainerServiceServicer):
    """What to do, call by call, and what was asked."""

    failures: list[Failure] = field(default_factory=list)  # each fails one call
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    seconds_left: list[float] = field(default_factory=list)
    delay: float = 0.0
    address: str = ""
    hasty: bool = False  # whether uploads are answered without their end
    created: bool = True  # what registrations are told
    unknown_models: tuple[str, ...] = ()
    concepts: dict[str, concept_pb2.Concept] = field(default_factory=dict)  # by name
    uploads: list[list[Any]] = field(default_factory=list)  # the messages of each ConceptRegisterStream but the end

    def Explain(self, request: Any, context: Any) -> Any:
        self._heed(request, context)
        return answer(request)

    def ListModels(self, request: Any, context: Any) -> Any:
        self._heed(request, context)
        first = not request.page_token
        return model_pb2.ListModelsResponse(
            models=[model("first", is_default=True) if first else model("second")],
            next_page_token="more" if first else "",
        )

    def GetModel(self, request: Any, context: Any) -> Any:
        self._heed(request, context)
        if request.name in self.unknown_models:
            info = error_details_pb2.ResourceInfo(resource_type="cdam.v1.model", resource_name=request.name)
            fail(context, Failure(grpc.StatusCode.NOT_FOUND, f"there is no model {request.name!r}", [info]))
        return model_pb2.GetModelResponse(model=model(request.name or "first"))

    def ConceptRegister(self, request: Any, context: Any) -> Any:
        self._heed(request, context)
        stored = self._store(request.spec, request.examples, request.negatives)
        return concept_pb2.ConceptRegisterResponse(concept=stored, created=self.created)

    def ConceptRegisterStream(self, request_iterator: Any, context: Any) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        self.seconds_left.append(context.time_remaining())
        self.uploads.append([])
        ends = []
        for request in self.take(request_iterator, context):
            (ends if request.HasField("end") else self.uploads[-1]).append(request)
        # What is given up looks like what has ended.
        if not self.hasty and [end.end.image_count for end in ends] != [len(self.uploads[-1]) - 1]:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "end: is missing, or wrong")
        kinds = [(request.WhichOneof("payload"), request) for request in self.uploads[-1]]
        stored = self._store(
            kinds[0][1].spec,
            [request.example for kind, request in kinds if kind == "example"],
            [request.negative for kind, request in kinds if kind == "negative"],
        )
        return concept_pb2.ConceptRegisterStreamResponse(concept=stored, created=self.created)

    def take(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        """The messages of an upload that are heard; a test may fail it here."""
        return requests

    def GetConcept(self, request: Any, context: Any) -> Any:
        self._heed(request, context)
        for concept in self.concepts.values():
            if request.name == concept.name or request.id == concept.id:
                return concept_pb2.GetConceptResponse(concept=concept)
        return fail(context, not_found(request.name or request.id))

    def ListConcepts(self, request: Any, context: Any) -> Any:
        self._heed(request, context)
        names = sorted(self.concepts)
        begin = int(request.page_token or 0)
        end = begin + (request.page_size or 2)
        response = concept_pb2.ListConceptsResponse(next_page_token=str(end) if end < len(names) else "")
        for name in names[begin:end]:
            response.concepts.add().CopyFrom(self.concepts[name])
            for long in ("vector", "examples", "negatives"):
                response.concepts[-1].ClearField(long)
        return response

    def DeleteConcept(self, request: Any, context: Any) -> Any:
        self._heed(request, context)
        if request.name not in self.concepts:
            fail(context, not_found(request.name))
        return concept_pb2.DeleteConceptResponse(concept=self.concepts.pop(request.name))

    def _store(self, spec: Any, examples: Sequence[Any], negatives: Sequence[Any]) -> concept_pb2.Concept:
        if not self.created and spec.name in self.concepts:
            return self.concepts[spec.name]
        version = self.concepts[spec.name].version + 1 if spec.name in self.concepts else 1
        self.concepts[spec.name] = concept(spec, examples, negatives, version)
        return self.concepts[spec.name]

    def _heed(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.seconds_left.append(context.time_remaining())
        time.sleep(self.delay)
        if self.failures:
            fail(context, self.failures.pop(0))


@dataclass
class StreamScript(Script):
    """Streams that each behave as told, the last way for all that follow; and what they were asked."""

    behaviours: list[Callable[[Iterator[Any], Any], Iterator[Any]]] = field(default_factory=list)
    streams: list[list[Any]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def open(self, context: Any) -> int:
        """The number of one more stream."""
        self.streams.append([])
        self.finished.append(False)
        self.metadata.append(dict(context.invocation_metadata()))
        self.seconds_left.append(context.time_remaining())
        return len(self.streams) - 1

    def behave(self, number: int, items: Iterator[Any], context: Any, told: Any) -> Iterator[Any]:
        """What the stream's behaviour makes of its items, and of what it is told."""

        def heard() -> Iterator[Any]:
            for item in items:
                self.streams[number].append(item)
                self.arrived.set()
                yield item
            self.finished[number] = True

        returned = False

        def ended() -> None:
            if not returned:
                self.cancelled.set()

        if not context.add_callback(ended):  # it is over already
            ended()
        yield from self.behaviours[min(number, len(self.behaviours) - 1)](heard(), told)
        returned = True


def item_error(code: grpc.StatusCode, *reasons: Message) -> common_pb2.ItemError:
    error = common_pb2.ItemError(code=code.value[0], message="as told")
    for reason in reasons:
        error.details.add().Pack(reason)
    return error


def fail(context: Any, failure: Failure) -> None:
    """End a call with a status and google.rpc details."""
    status = status_pb2.Status(code=failure.code.value[0], message=failure.message)
    for detail in failure.details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    details = (("grpc-status-details-bin", status.SerializeToString()),) if failure.details else ()
    context.set_trailing_metadata((*details, *failure.trailers))
    context.abort(failure.code, failure.message)


def scores(seed: int) -> np.ndarray:
    """The map that `answer` gives to the seed-th pair of method and target."""
    return np.random.default_rng(seed).standard_normal(GRID).astype(np.float32)


def tensor(array: np.ndarray) -> common_pb2.FloatTensor:
    return common_pb2.FloatTensor(shape=array.shape, data=array.astype("<f4").tobytes())


def answer(request: explain_pb2.ExplainRequest) -> explain_pb2.ExplainResponse:
    """An answer such as a server gives: made-up scores, all fields set, an image of 60 x 40 pixels."""
    response = explain_pb2.ExplainResponse(
        request_id=request.request_id or "made",
        model=request.model or "first",
        model_fingerprint="f00d",
        geometry=explain_pb2.MapGeometry(
            patch_grid=common_pb2.Size(height=GRID[0], width=GRID[1]),
            region=common_pb2.Region(left=0, top=0, right=60, bottom=40),
            image_size=common_pb2.Size(height=40, width=60),
            input_size=common_pb2.Size(height=32, width=48),
        ),
        token_cache_hit=True,
    )
    response.timing.total.FromMilliseconds(12)
    response.timing.trunk.FromMilliseconds(1500)
    response.timing.batch_size = 4
    for index, target in enumerate(request.targets):
        if target.WhichOneof("kind") != "top_k":
            _add(response, target, index)
        for rank in range(target.top_k.k):
            _add(response, target_pb2.Target(output=target_pb2.OutputTarget(index=rank)), index)
    for method in range(max(len(request.methods), 1)):
        for target in range(len(response.targets)):
            response.maps.add(method_index=method, target_index=target, scores=tensor(scores(len(response.maps))))
    return response


def _add(response: explain_pb2.ExplainResponse, target: target_pb2.Target, index: int) -> None:
    label = _label(target)
    explained = response.targets.add(target=target, request_index=index, label=label, value=1.5 + len(response.targets))
    if target.WhichOneof("kind") == "output":
        explained.output_index, explained.probability = target.output.index, 0.25


def _label(target: target_pb2.Target | target_pb2.ScalarTarget) -> str:
    match target.WhichOneof("kind"):
        case "output":
            return target.output.name or str(target.output.index)
        case "contrast":
            return f"{_label(target.contrast.positive)} - {_label(target.contrast.negative)}"
    concept = target.concept
    name = concept.name or concept.id[:12] or "concept"
    return f"{name} (cosine)" if concept.similarity == target_pb2.SIMILARITY_COSINE else name


def model(name: str, *, is_default: bool = False) -> model_pb2.Model:
    return model_pb2.Model(
        name=name,
        is_default=is_default,
        architecture="vit_tiny",
        fingerprint="f00d",
        task=model_pb2.TASK_MULTI_CLASS,
        output_names=["cat", "dog"],
        output_count=2,
        input_size=common_pb2.Size(height=32, width=48),
        patch_size=common_pb2.Size(height=16, width=16),
        patch_grid=common_pb2.Size(height=2, width=3),
        prefix_tokens=1,
        latent_size=8,
        readout=model_pb2.READOUT_CLS_TOKEN,
        precision=model_pb2.PRECISION_FP32,
        methods=[
            model_pb2.MethodSupport(method="METHOD_KIND_CDAM", supported=True),
            model_pb2.MethodSupport(method="METHOD_KIND_SMOOTH_CDAM", reason="not yet"),
        ],
    )


def not_found(name: str) -> Failure:
    """No such concept."""
    info = error_details_pb2.ResourceInfo(resource_type="cdam.v1.concept", resource_name=name)
    return Failure(grpc.StatusCode.NOT_FOUND, f"no concept {name!r}", [info])


def concept(spec: Any, examples: Sequence[Any], negatives: Sequence[Any], version: int = 1) -> concept_pb2.Concept:
    """A concept as a server stores it, of a made-up vector; each example fits a little worse than the one before."""
    made = concept_pb2.Concept(
        id=hashlib.sha256(spec.name.encode()).hexdigest(),
        name=spec.name,
        version=version,
        model=spec.model or "first",
        model_fingerprint="f00d",
        description=spec.description,
        labels=spec.labels,
        content_digest="d1",
        vector=spec.vector if spec.HasField("vector") else tensor(np.arange(1, 9, dtype=np.float32)),
        imported=spec.HasField("origin"),
    )
    made.create_time.FromJsonString("2024-05-06T07:08:09.5Z")
    for images, described in ((examples, made.examples), (negatives, made.negatives)):
        for position, image in enumerate(images):
            raw = image.raw
            pixels = f"{raw.height} {raw.width} {raw.channels}\n".encode() + raw.data
            digest = hashlib.sha256(image.encoded or pixels).hexdigest()
            described.add(digest=digest, cosine=1 - position / 100)
    made.examples.extend(spec.origin.examples)
    made.negatives.extend(spec.origin.negatives)
    made.example_count, made.negative_count = len(made.examples), len(made.negatives)
    if made.examples:
        made.spread = sum(example.cosine for example in made.examples) / len(made.examples)
        made.preprocessing.resize_mode = spec.preprocessing.resize_mode or common_pb2.RESIZE_MODE_MODEL
        its_own = common_pb2.Size(height=32, width=48)
        its = spec.preprocessing.input_size if spec.preprocessing.HasField("input_size") else its_own
        made.preprocessing.input_size.CopyFrom(its)
    return made


@contextmanager
def serving(script: Script, address: str = "127.0.0.1:0", credentials: Any = None) -> Iterator[Script]:
    """A server that follows the script; its address is the script's."""
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    explainer_service_pb2_grpc.add_ExplainerServiceServicer_to_server(script, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    script.address = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    server.start()
    try:
        yield script
    finally:
        server.stop(None).wait()
