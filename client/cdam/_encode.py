"""From the caller's words to the API's messages."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from numpy.typing import NDArray

from cdam._concepts import ConceptExample, RegisteredConcept
from cdam._images import ImageLike, encode_image, fit
from cdam._methods import Cdam, Method, MethodLike, Noise, as_methods
from cdam._metrics import BoxSensitivity, Fidelity
from cdam._numbers import whole
from cdam._targets import Concept, Contrast, Output, Target, TargetLike, TopK, as_target, as_targets
from cdam.v1 import common_pb2, concept_pb2, evaluation_pb2, explain_pb2, method_pb2, target_pb2

Resize: TypeAlias = Literal["model", "squash"]
"""Which part of an image the model sees: its centre, as the model was evaluated, or all of it, stretched."""

Priority: TypeAlias = Literal["low", "normal", "high"]
"""How urgent a request is among those waiting."""

# What fields of methods and metrics are, by name, if they are no plain values.
ENUMS: Mapping[str, tuple[Any, str]] = {
    "quadrature": (method_pb2.Quadrature, "QUADRATURE"),
    "unit": (evaluation_pb2.PerturbationUnit, "PERTURBATION_UNIT"),
    "enlargement": (evaluation_pb2.Enlargement, "ENLARGEMENT"),
    "normalisation": (evaluation_pb2.MapNormalisation, "MAP_NORMALISATION"),
}
NESTED: Mapping[str, type[Any]] = {"noise": Noise, "fidelity": Fidelity, "box_sensitivity": BoxSensitivity}
REPEATED = frozenset({"heads", "box_sizes"})
_WHOLE = frozenset(
    {
        FieldDescriptor.CPPTYPE_INT32,
        FieldDescriptor.CPPTYPE_INT64,
        FieldDescriptor.CPPTYPE_UINT32,
        FieldDescriptor.CPPTYPE_UINT64,
    }
)


def encode_explain(
    image: ImageLike,
    targets: TargetLike | Sequence[TargetLike] = (),
    *,
    methods: MethodLike | Sequence[MethodLike] = (),
    model: str = "",
    resize: Resize | None = None,
    input_size: tuple[int, int] | None = None,
    request_id: str = "",
    priority: Priority | None = None,
    max_message_bytes: int | None = None,
) -> explain_pb2.ExplainRequest:
    """The request that `Client.explain` sends, for those who send it themselves: load generators, recorders, gateways.

    Arguments are those of `Client.explain`, and the largest size of the request: an image too large for it as pixels
    travels as PNG.

    Raises:
        OSError: if a path can't be read.
        ImageError: if the image is none.
        ResourceExhausted: if it is too large all the same.
        ValueError: if there is no target and a method needs one, or a word is none that the API knows.
    """
    whats, hows = as_targets(targets), as_methods(methods)
    if not whats and (needy := [how.kind for how in hows or (Cdam(),) if how.needs_target]):
        raise ValueError(
            f"{needy[0]} needs a target, such as an output's name or index, or TopK(1) for the highest output"
        )
    request = explain_pb2.ExplainRequest(
        model=model,
        image=encode_image(image),
        targets=[encode_target(what) for what in whats],
        methods=[encode_method(how) for how in hows],
        request_id=request_id,
        priority=enum_value(explain_pb2.Priority, "PRIORITY", priority),
    )
    encode_preprocessing(request.preprocessing, resize, input_size)
    if max_message_bytes is not None:
        fit(request, [request.image], max_message_bytes)
    return request


def encode_spec(
    name: str,
    *,
    vector: Sequence[float] | NDArray[Any] | None = None,
    model: str = "",
    description: str = "",
    labels: Mapping[str, str] | None = None,
    resize: str | None = None,
    input_size: tuple[int, int] | None = None,
    replace: bool = False,
    expected_version: int | None = None,
    model_fingerprint: str = "",
) -> concept_pb2.ConceptSpec:
    """What to register, apart from images.

    Raises:
        ValueError: if the vector is none, or a word is none that the API knows.
    """
    spec = concept_pb2.ConceptSpec(
        name=name,
        model=model,
        description=description,
        labels=labels,
        replace=replace,
        expected_version=None if expected_version is None else whole(expected_version, "expected_version"),
        vector=None if vector is None else encode_vector(vector),
        model_fingerprint=model_fingerprint,
    )
    encode_preprocessing(spec.preprocessing, resize, input_size)
    return spec


def encode_import(concept: RegisteredConcept, **changes: Any) -> concept_pb2.ConceptSpec:
    """What to register so that a concept is there again.

    Args:
        concept: A concept with its vector.
        changes: Arguments of `encode_spec` that are not to be the concept's.

    Raises:
        ValueError: if it has no vector.
    """
    if concept.vector is None:
        raise ValueError(f"{concept!r} comes without its vector, as from a list: get it by its id")
    given: dict[str, Any] = {
        "name": concept.name,
        "vector": concept.vector,
        "description": concept.description,
        "labels": concept.labels,
        "resize": concept.resize,
        "input_size": concept.input_size,
        "model_fingerprint": concept.model_fingerprint,
    }
    spec = encode_spec(**given | changes)
    if concept.examples:
        spec.origin.examples.extend(map(_example, concept.examples))
        spec.origin.negatives.extend(map(_example, concept.negatives))
    return spec


def encode_vector(vector: Sequence[float] | NDArray[Any]) -> common_pb2.FloatTensor:
    """The message for a vector.

    Raises:
        ValueError: if it has more axes than one.
    """
    array = np.asarray(vector, "<f4")
    if array.ndim != 1:
        raise ValueError(f"a concept vector has one axis, got shape {array.shape}")
    return common_pb2.FloatTensor(shape=array.shape, data=array.tobytes())


def encode_target(target: Target) -> target_pb2.Target:
    """The message for a target."""
    match target:
        case Output():
            return target_pb2.Target(output=_output(target))
        case TopK():
            return target_pb2.Target(top_k=target_pb2.TopKTarget(k=target.k))
        case Concept():
            return target_pb2.Target(concept=_concept(target))
        case Contrast():
            return target_pb2.Target(
                contrast=target_pb2.ContrastTarget(positive=_scalar(target.positive), negative=_scalar(target.negative))
            )


def encode_method(method: Method) -> method_pb2.Method:
    """The message for a method."""
    message = method_pb2.Method()
    encode_settings(getattr(message, method.kind), method, method.kind)
    return message


def encode_settings(message: Any, settings: Any, kind: str) -> None:
    """Say what a dataclass does: fields have the same names on both sides, and None is left unset."""
    message.SetInParent()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None:
            continue
        if field.name in NESTED and isinstance(value, NESTED[field.name]):
            encode_settings(getattr(message, field.name), value, kind)
        elif field.name in ENUMS and isinstance(value, str):
            setattr(message, field.name, enum_value(*ENUMS[field.name], value))
        else:
            try:
                if field.name in REPEATED:
                    getattr(message, field.name).extend(_number(message, field.name, each) for each in value)
                else:
                    setattr(message, field.name, _number(message, field.name, value))
            except (TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{kind}: {field.name} can't be {value!r}") from error


def _number(message: Any, name: str, value: Any) -> Any:
    """The value, as an int where the field is of whole numbers; protobuf would take a bool, and no tensor."""
    kind = message.DESCRIPTOR.fields_by_name[name].cpp_type
    return whole(value, name) if kind in _WHOLE else value


def encode_preprocessing(
    message: common_pb2.Preprocessing, resize: str | None, input_size: tuple[int, int] | None
) -> None:
    """Say how images are brought to the model's input; nothing that isn't given is set."""
    if resize is not None:
        message.resize_mode = enum_value(common_pb2.ResizeMode, "RESIZE_MODE", resize)
    if input_size is not None:
        height, width = (whole(side, "a side of input_size") for side in input_size)
        message.input_size.CopyFrom(common_pb2.Size(height=height, width=width))


def enum_value(enum: Any, prefix: str, name: str | None) -> Any:
    """The enum's value for a short name: "model" is RESIZE_MODE_MODEL; None is unspecified."""
    try:
        return enum.Value(f"{prefix}_{(name or 'unspecified').upper()}")
    except ValueError:
        names = ", ".join(repr(short_name(enum, prefix, value)) for value in enum.values() if value)
        raise ValueError(f"{prefix.lower()}: {name!r} is none of {names}") from None


def short_name(enum: Any, prefix: str, value: int) -> str:
    """The short name for an enum's value; "unknown" for one that a newer server made."""
    return enum.Name(value).removeprefix(f"{prefix}_").lower() if value in enum.values() else "unknown"


def _output(target: Output) -> target_pb2.OutputTarget:
    if isinstance(target.selector, str):
        return target_pb2.OutputTarget(name=target.selector)
    return target_pb2.OutputTarget(index=target.selector)


def _concept(target: Concept) -> target_pb2.ConceptTarget:
    message = target_pb2.ConceptTarget(similarity=enum_value(target_pb2.Similarity, "SIMILARITY", target.similarity))
    if target.name is not None:
        message.name = target.name
    elif target.id is not None:
        message.id = target.id
    elif target.vector is not None:
        message.vector.CopyFrom(encode_vector(target.vector))
    return message


def _example(example: ConceptExample) -> concept_pb2.ConceptExample:
    return concept_pb2.ConceptExample(digest=example.digest, cosine=example.cosine)


def _scalar(target: int | str | Output | Concept | RegisteredConcept) -> target_pb2.ScalarTarget:
    side = as_target(target)
    if isinstance(side, Concept):
        return target_pb2.ScalarTarget(concept=_concept(side))
    return target_pb2.ScalarTarget(output=_output(side))
