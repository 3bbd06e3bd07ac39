"""From the API's messages to the caller's words."""

import dataclasses
import math
from collections.abc import Sequence
from datetime import UTC
from types import MappingProxyType
from typing import Any, TypeVar, cast

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from numpy.typing import NDArray

from cdam._concepts import ConceptExample, RegisteredConcept
from cdam._encode import ENUMS, NESTED, REPEATED, short_name
from cdam._errors import MalformedResponse, RpcError, error_from_status
from cdam._explanation import AppliedPreprocessing, ExplainedTarget, Explanation, Geometry, Parts, RelevanceMap, Timing
from cdam._methods import Cdam, Method
from cdam._models import Model, ModelInput
from cdam._overlay import Region
from cdam._targets import Concept, Contrast, Output, Similarity, Target
from cdam.v1 import common_pb2, concept_pb2, explain_pb2, method_pb2, model_pb2, target_pb2

T = TypeVar("T")

_SHORT_ID = 12  # digits of an id that stand for a concept in a label
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_SIMILARITIES: dict[int, Similarity] = {
    target_pb2.SIMILARITY_DOT: "dot",
    target_pb2.SIMILARITY_COSINE: "cosine",
    target_pb2.SIMILARITY_L2: "l2",
}


def decode_explanation(
    response: explain_pb2.ExplainResponse,
    methods: tuple[Method, ...],
    request: explain_pb2.ExplainRequest,
    asked: Sequence[Target] = (),
) -> Explanation:
    """The answer to a request with these methods, and these targets in the caller's words.

    Raises:
        MalformedResponse: if the answer contradicts itself or the request.
    """
    geometry = _geometry(response.geometry)
    targets = tuple(_explained_target(target, request.targets) for target in response.targets)
    if asked:
        targets = tuple(_named(target, asked[target.request_index]) for target in targets)
    return Explanation(
        request_id=response.request_id,
        model=response.model,
        fingerprint=response.model_fingerprint,
        geometry=geometry,
        targets=targets,
        maps=tuple(_map(m, methods or (Cdam(),), targets, geometry, request.image) for m in response.maps),
        timing=_timing(response.timing),
        token_cache_hit=response.token_cache_hit,
        preprocessing=_applied(response.preprocessing) if response.HasField("preprocessing") else None,
    )


def _applied(message: explain_pb2.AppliedPreprocessing) -> AppliedPreprocessing:
    return AppliedPreprocessing(
        resize=short_name(common_pb2.ResizeMode, "RESIZE_MODE", message.resize_mode),
        input_size=_size(message.input_size),
        model_input=_model_input(message.model_input),
    )


def decode_model(model: model_pb2.Model) -> Model:
    """The model that a message describes."""
    support = {short_name(method_pb2.MethodKind, "METHOD_KIND", m.method): m for m in model.methods}
    return Model(
        name=model.name,
        is_default=model.is_default,
        architecture=model.architecture,
        fingerprint=model.fingerprint,
        task=short_name(model_pb2.Task, "TASK", model.task),
        output_names=tuple(model.output_names),
        output_count=model.output_count,
        input_size=_size(model.input_size),
        flexible_input_size=model.flexible_input_size,
        patch_size=_size(model.patch_size),
        patch_grid=_size(model.patch_grid),
        prefix_tokens=model.prefix_tokens,
        latent_size=model.latent_size,
        readout=short_name(model_pb2.Readout, "READOUT", model.readout),
        precision=short_name(model_pb2.Precision, "PRECISION", model.precision),
        methods=tuple(kind for kind, m in support.items() if m.supported),
        unsupported=MappingProxyType({kind: m.reason for kind, m in support.items() if not m.supported}),
        input=_model_input(model.input) if model.HasField("input") else None,
        resampled=model.resampled,
        model_kwargs=MappingProxyType(MessageToDict(model.model_kwargs)),
    )


def _model_input(message: common_pb2.ModelInput) -> ModelInput:
    return ModelInput(
        mean=tuple(message.mean),
        std=tuple(message.std),
        interpolation=short_name(common_pb2.Interpolation, "INTERPOLATION", message.interpolation),
        crop_fraction=message.crop_fraction,
        crop_mode=short_name(common_pb2.CropMode, "CROP_MODE", message.crop_mode),
    )


def decode_concept(concept: concept_pb2.Concept, *, created: bool | None = None) -> RegisteredConcept:
    """The concept that a message describes.

    Raises:
        MalformedResponse: if it has neither id nor name, or its vector is none.
    """
    if not (concept.id and concept.name):
        raise MalformedResponse("a concept without id or name")
    prepared = concept.preprocessing if concept.HasField("preprocessing") else None
    return RegisteredConcept(
        id=concept.id,
        name=concept.name,
        version=concept.version,
        model=concept.model,
        model_fingerprint=concept.model_fingerprint,
        description=concept.description,
        labels=MappingProxyType(dict(concept.labels)),
        example_count=concept.example_count,
        negative_count=concept.negative_count,
        spread=concept.spread if concept.HasField("spread") else None,
        content_digest=concept.content_digest,
        create_time=concept.create_time.ToDatetime(UTC),
        vector=_vector(concept.vector) if concept.HasField("vector") else None,
        resize=short_name(common_pb2.ResizeMode, "RESIZE_MODE", prepared.resize_mode) if prepared else None,
        input_size=_size(prepared.input_size) if prepared and prepared.HasField("input_size") else None,
        examples=tuple(ConceptExample(example.digest, example.cosine) for example in concept.examples),
        negatives=tuple(ConceptExample(example.digest, example.cosine) for example in concept.negatives),
        imported=concept.imported,
        created=created,
    )


def decode_settings(message: Any, kind: type[T]) -> T:
    """The dataclass of which `encode_settings` makes such a message; what is unset is as the dataclass has it."""
    settings: dict[str, Any] = {}
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cast("Any", kind))
    for field in fields:
        descriptor = message.DESCRIPTOR.fields_by_name[field.name]
        if descriptor.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.name in NESTED:
            settings[field.name] = decode_settings(value, NESTED[field.name])
        elif field.name in ENUMS:
            settings |= {field.name: short_name(*ENUMS[field.name], value)} if value else {}
        else:
            settings[field.name] = tuple(value) if field.name in REPEATED else value
    return kind(**settings)


def decode_error(error: common_pb2.ItemError) -> RpcError:
    """The error of one item of a stream: what a call for it alone would have raised."""
    return error_from_status(_CODES.get(error.code, grpc.StatusCode.UNKNOWN), error.message, error.details)


def decode_tensor(tensor: common_pb2.FloatTensor, shape: tuple[int, ...] | None = None) -> NDArray[np.float32]:
    """The array, float32 and read-only.

    Raises:
        MalformedResponse: if its bytes don't fill its shape, or it hasn't the shape that it must have.
    """
    its_shape = tuple(tensor.shape)
    if len(tensor.data) != 4 * math.prod(its_shape):
        raise MalformedResponse(f"{len(tensor.data)} bytes of float32 don't fill the shape {its_shape}")
    if shape is not None and its_shape != shape:
        raise MalformedResponse(f"an array of shape {its_shape} where {shape} is due")
    array = np.frombuffer(tensor.data, "<f4").reshape(its_shape).astype(np.float32, copy=False)
    array.flags.writeable = False
    return array


def _vector(tensor: common_pb2.FloatTensor) -> NDArray[np.float32]:
    vector = decode_tensor(tensor)
    if vector.ndim != 1:
        raise MalformedResponse(f"a concept vector of shape {vector.shape}")
    return vector


def _geometry(geometry: explain_pb2.MapGeometry) -> Geometry:
    region = geometry.region
    decoded = Geometry(
        patch_grid=_size(geometry.patch_grid),
        region=Region(region.left, region.top, region.right, region.bottom),
        image_size=_size(geometry.image_size),
        input_size=_size(geometry.input_size),
    )
    if not (region.left < region.right and region.top < region.bottom and all(decoded.patch_grid + decoded.image_size)):
        raise MalformedResponse(f"maps that lie nowhere: {decoded}")
    return decoded


def _size(size: common_pb2.Size) -> tuple[int, int]:
    return size.height, size.width


def _explained_target(target: explain_pb2.ExplainedTarget, asked: Sequence[target_pb2.Target]) -> ExplainedTarget:
    if target.request_index >= len(asked):
        raise MalformedResponse(f"target {target.request_index} of {len(asked)} explained")
    return ExplainedTarget(
        target=_target(target.target, asked[target.request_index]),
        label=target.label,
        value=target.value,
        probability=target.probability if target.HasField("probability") else None,
        output_index=target.output_index if target.HasField("output_index") else None,
        request_index=target.request_index,
    )


def _target(target: target_pb2.Target, asked: target_pb2.Target) -> Output | Concept | Contrast:
    match target.WhichOneof("kind"):
        case "output":
            return _output(target.output)
        case "concept":
            return _concept(target.concept, asked.concept)
        case "contrast":
            found, wanted = target.contrast, asked.contrast
            return Contrast(_scalar(found.positive, wanted.positive), _scalar(found.negative, wanted.negative))
        case kind:
            raise MalformedResponse(f"an explained target of kind {kind}")


def _named(found: ExplainedTarget, asked: Target) -> ExplainedTarget:
    """With concepts called as the caller calls them, where the server knows them by their ids alone."""
    target, label = found.target, found.label
    match target, asked:
        case Concept(), Concept():
            its, own = _labels(asked)
            return dataclasses.replace(found, target=_labelled(target, asked), label=own if label == its else label)
        case Contrast(positive=positive, negative=negative), Contrast():
            its, own = _labels(asked.positive)
            if label.startswith(f"{its} - "):
                label = own + label.removeprefix(its)
            its, own = _labels(asked.negative)
            if label.endswith(f" - {its}"):
                label = label.removesuffix(its) + own
            both = Contrast(_labelled(positive, asked.positive), _labelled(negative, asked.negative))
            return dataclasses.replace(found, target=both, label=label)
        case _:
            return found


def _labelled(found: Any, asked: Any) -> Any:
    if isinstance(found, Concept) and found.id is not None and isinstance(asked, Concept):
        return Concept(id=found.id, similarity=found.similarity, label=asked.label)
    return found


def _labels(asked: Any) -> tuple[str, str]:
    """What the server and what the caller calls a concept that goes by its id."""
    if not isinstance(asked, Concept) or asked.id is None or asked.label is None:
        return "", ""
    measure = "" if asked.similarity == "dot" else f" ({asked.similarity})"
    return asked.id[:_SHORT_ID] + measure, asked.label + measure


def _scalar(target: target_pb2.ScalarTarget, asked: target_pb2.ScalarTarget) -> Output | Concept:
    if target.WhichOneof("kind") == "concept":
        return _concept(target.concept, asked.concept)
    return _output(target.output)


def _output(target: target_pb2.OutputTarget) -> Output:
    return Output(target.name if target.WhichOneof("selector") == "name" else target.index)


def _concept(target: target_pb2.ConceptTarget, asked: target_pb2.ConceptTarget) -> Concept:
    similarity = _SIMILARITIES.get(target.similarity, "dot")
    match target.WhichOneof("selector"):
        case "name":
            return Concept(name=target.name, similarity=similarity)
        case "id":
            return Concept(id=target.id, similarity=similarity)
        case _:  # the server does not send back a vector that it was given
            return Concept(vector=decode_tensor(asked.vector), similarity=similarity)


def _map(
    relevance: explain_pb2.RelevanceMap,
    methods: tuple[Method, ...],
    targets: tuple[ExplainedTarget, ...],
    geometry: Geometry,
    image: common_pb2.Image,
) -> RelevanceMap:
    if relevance.method_index >= len(methods):
        raise MalformedResponse(f"a map by method {relevance.method_index} of {len(methods)}")
    if relevance.HasField("target_index") and relevance.target_index >= len(targets):
        raise MalformedResponse(f"a map for target {relevance.target_index} of {len(targets)}")
    grid = geometry.patch_grid
    parts = relevance.parts
    return RelevanceMap(
        scores=decode_tensor(relevance.scores, grid),
        target=targets[relevance.target_index] if relevance.HasField("target_index") else None,
        method=methods[relevance.method_index],
        geometry=geometry,
        prefix_share=relevance.prefix_share if relevance.HasField("prefix_share") else None,
        parts=Parts(decode_tensor(parts.value, grid), decode_tensor(parts.key, grid))
        if relevance.HasField("parts")
        else None,
        standard_error=decode_tensor(relevance.standard_error, grid) if relevance.HasField("standard_error") else None,
        completeness_residual=relevance.completeness_residual if relevance.HasField("completeness_residual") else None,
        steps=relevance.steps if relevance.HasField("steps") else None,
        _image=image,
    )


def _timing(timing: explain_pb2.Timing) -> Timing:
    return Timing(
        decode=_seconds(timing.decode),
        queue=_seconds(timing.queue),
        trunk=_seconds(timing.trunk),
        tail=_seconds(timing.tail),
        total=_seconds(timing.total),
        batch_size=timing.batch_size,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
