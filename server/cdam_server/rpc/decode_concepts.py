"""From the messages about concepts to the use cases' words; every complaint names the field."""

import hashlib
from collections.abc import AsyncIterator, Mapping
from functools import partial

from cdam.v1 import common_pb2, concept_pb2
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc.decode import Limits, check_name, concept_name, digest, float_vector, input_size, resize
from cdam_server.rpc.images import ImageLimits, decode_image
from cdam_server.store import Example
from cdam_server.usecases.concepts import ConceptId, ConceptName
from cdam_server.usecases.registration import ExampleImage, ReadyVector, RegisterCommand

_MAX_DESCRIPTION = 4096
_MAX_LABELS = 64
_MAX_LABEL_KEY = 128
_MAX_LABEL_VALUE = 1024


def register_command(
    spec: concept_pb2.ConceptSpec, limits: Limits, timeout: float | None, caller: str, held: int = 0
) -> RegisterCommand:
    """What is to be registered, apart from the images.

    Args:
        spec: What the request says.
        limits: Limits of a request.
        timeout: Seconds that the caller will still wait, or None.
        caller: Who asks.
        held: Bytes that the request holds until it is answered.

    Raises:
        InvalidArgumentError: A field is missing or wrong.
    """
    check_name(spec.model, "spec.model")
    return RegisterCommand(
        name=concept_name(spec.name, "spec.name"),
        model=spec.model,
        description=_text(spec.description, _MAX_DESCRIPTION, "spec.description"),
        labels=labels(spec.labels, "spec.labels"),
        resize=resize(spec.preprocessing, "spec.preprocessing"),
        input_size=input_size(spec.preprocessing),
        replace=spec.replace,
        expected_version=_expected_version(spec, "spec.expected_version"),
        model_fingerprint=spec.model_fingerprint and digest(spec.model_fingerprint, "spec.model_fingerprint"),
        vector=_vector(spec, limits),
        timeout=timeout,
        caller=caller,
        bytes=held,
    )


def images(request: concept_pb2.ConceptRegisterRequest, limits: Limits) -> list[ExampleImage]:
    """The images of a request that has them all.

    Raises:
        InvalidArgumentError: There are too many.
    """
    _check_count(len(request.examples) + len(request.negatives), limits, "examples")
    examples = [_image(item, limits.image, f"examples[{i}]", negative=False) for i, item in enumerate(request.examples)]
    negatives = [
        _image(item, limits.image, f"negatives[{i}]", negative=True) for i, item in enumerate(request.negatives)
    ]
    return examples + negatives


async def streamed_images(
    requests: AsyncIterator[concept_pb2.ConceptRegisterStreamRequest], limits: Limits
) -> AsyncIterator[ExampleImage]:
    """The images of a stream, behind the specification.

    Raises:
        InvalidArgumentError: Something else came, too much, or the end is missing.
    """
    counts = {"example": 0, "negative": 0}
    ended = False
    async for request in requests:
        kind = request.WhichOneof("payload")
        if ended:
            raise InvalidArgumentError(kind or "payload", "comes after the end")
        match kind:
            case "example" | "negative":
                # The path that it would have in a message that has them all: a count is what tells one from another.
                _check_count(sum(counts.values()) + 1, limits, "examples")
                field, negative = f"{kind}s[{counts[kind]}]", kind == "negative"
                yield _image(getattr(request, kind), limits.image, field, negative=negative, size=request.ByteSize())
                counts[kind] += 1
            case "end":
                sent = sum(counts.values())
                if request.end.image_count != sent:
                    raise InvalidArgumentError(
                        "end.image_count", f"is {request.end.image_count}, but {sent} images came"
                    )
                ended = True
            case "spec":
                raise InvalidArgumentError("spec", "is for the first message alone")
            case _:
                raise InvalidArgumentError("payload", "is empty: set example, negative or end")
    if not ended:
        raise InvalidArgumentError("end", "is required, in the last message")


def selector(request: concept_pb2.GetConceptRequest) -> ConceptName | ConceptId:
    """Which concept is meant.

    Raises:
        InvalidArgumentError: The request does not say.
    """
    check_name(request.model, "model")
    match request.WhichOneof("selector"):
        case "name":
            return ConceptName(concept_name(request.name, "name"), request.model)
        case "id":
            return ConceptId(digest(request.id, "id"))
        case _:
            raise InvalidArgumentError("selector", "is empty: set name or id")


def deletion(request: concept_pb2.DeleteConceptRequest) -> tuple[ConceptName, int | None]:
    """What is to be deleted, and the version that it must have.

    Raises:
        InvalidArgumentError: A field is missing or wrong.
    """
    if not request.model:
        raise InvalidArgumentError("model", "is required: what is deleted must not depend on the server's default")
    check_name(request.model, "model")
    name = ConceptName(concept_name(request.name, "name"), request.model)
    return name, _expected_version(request, "expected_version")


def labels(given: Mapping[str, str], field: str) -> dict[str, str]:
    """Labels.

    Raises:
        InvalidArgumentError: There are too many, or one is too long or can't be stored.
    """
    if len(given) > _MAX_LABELS:
        raise InvalidArgumentError(field, f"{len(given)} labels; at most {_MAX_LABELS} are allowed")
    for key, value in given.items():
        if not key:
            raise InvalidArgumentError(field, "a label's key is empty")
        _text(key, _MAX_LABEL_KEY, f"{field} (a key)")
        _text(value, _MAX_LABEL_VALUE, f"{field}[{key!r}]")
    return dict(given)


def _text(text: str, longest: int, field: str) -> str:
    if len(text) > longest:
        raise InvalidArgumentError(field, f"has {len(text)} characters; at most {longest} are allowed")
    if "\0" in text:  # which not every database can store
        raise InvalidArgumentError(field, "holds a NUL character")
    return text


def _expected_version(message: concept_pb2.ConceptSpec | concept_pb2.DeleteConceptRequest, field: str) -> int | None:
    if not message.HasField("expected_version"):
        return None
    if message.expected_version >= 1 << 63:
        raise InvalidArgumentError(field, f"{message.expected_version} is no version")
    return message.expected_version


def _check_count(count: int, limits: Limits, field: str) -> None:
    if count > limits.max_concept_images:
        message = f"more than {limits.max_concept_images} images, negatives counted in; a mean gains nothing by them"
        raise InvalidArgumentError(field, message)


def _vector(spec: concept_pb2.ConceptSpec, limits: Limits) -> ReadyVector | None:
    if not spec.HasField("vector"):
        if spec.HasField("origin"):
            raise InvalidArgumentError("spec.origin", "says what spec.vector was made of, which is missing")
        return None
    values = float_vector(spec.vector, "spec.vector")
    if not spec.HasField("origin"):
        if spec.HasField("preprocessing"):
            raise InvalidArgumentError("spec.preprocessing", "is for images; with spec.vector it needs spec.origin")
        return ReadyVector(values)
    if not spec.model_fingerprint:
        raise InvalidArgumentError("spec.model_fingerprint", "is required with spec.origin")
    if not spec.origin.examples:
        raise InvalidArgumentError("spec.origin.examples", "at least one is required")
    _check_count(len(spec.origin.examples) + len(spec.origin.negatives), limits, "spec.origin")
    return ReadyVector(
        values,
        tuple(_example(item, f"spec.origin.examples[{i}]") for i, item in enumerate(spec.origin.examples)),
        tuple(_example(item, f"spec.origin.negatives[{i}]") for i, item in enumerate(spec.origin.negatives)),
    )


def _example(example: concept_pb2.ConceptExample, field: str) -> Example:
    if not -1 <= example.cosine <= 1:
        raise InvalidArgumentError(f"{field}.cosine", f"must be from -1 to 1, not {example.cosine:g}")
    return Example(digest(example.digest, f"{field}.digest"), example.cosine)


def _image(image: common_pb2.Image, limits: ImageLimits, field: str, *, negative: bool, size: int = 0) -> ExampleImage:
    return ExampleImage(
        open_image=partial(decode_image, image, limits, field),
        digest=partial(_digest, image),
        negative=negative,
        bytes=size,
    )


def _digest(image: common_pb2.Image) -> str:
    """As `ConceptExample.digest` says."""
    if image.WhichOneof("source") == "encoded":
        return hashlib.sha256(image.encoded).hexdigest()
    raw = image.raw
    state = hashlib.sha256(f"{raw.height} {raw.width} {raw.channels}\n".encode())
    state.update(raw.data)
    return state.hexdigest()
