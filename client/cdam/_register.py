"""Registering concepts, written once for both clients: in one message, or as a stream if it would be a large one.

As in `cdam._flow`, the flow yields what is to be done and gets back what came of it.
"""

import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from cdam._concepts import RegisteredConcept
from cdam._decode import decode_concept
from cdam._errors import CdamError, MalformedResponse, RpcError
from cdam._flow import SERVICE, Call, Pause, unary
from cdam._images import ImageLike, encode_image, fit
from cdam._stream import Work, passes, pause
from cdam.v1 import common_pb2, concept_pb2

T = TypeVar("T")

PATH = f"/{SERVICE}/ConceptRegisterStream"

Images: TypeAlias = Iterable[ImageLike] | AsyncIterable[ImageLike]

# What travels in one message, and can be repeated whatever it came from.
_MOST_IMAGES = 64
_MOST_BYTES = 4 * 1024 * 1024
_WRAPPING = 16  # bytes that an image weighs more in a message than alone, at most


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What is to be registered, and how.

    Attributes:
        spec: All but the images.
        examples: Images that show the concept.
        negatives: Images that don't.
        retries: How often in a row a broken stream is taken up again.
        max_message_bytes: Largest request.
        progress: Called with the number of images that were sent.
    """

    spec: concept_pb2.ConceptSpec
    examples: Images
    negatives: Images
    retries: int
    max_message_bytes: int
    progress: Callable[[int], object] | None

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ValueError(f"retries is at least 0, got {self.retries}")
        for name in ("examples", "negatives"):
            images = getattr(self, name)
            alone = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
            # The rows of an image would each pass for a grey one.
            if alone or (isinstance(images, np.ndarray) and images.ndim < 4):
                if isinstance(images, str | os.PathLike) and Path(images).is_dir():
                    raise TypeError(f"{name} are images: of a folder, give Path({os.fspath(images)!r}).glob('*.jpg')")
                raise TypeError(f"{name} are several images: put a single one, or an array of them, in a list")


# --- what a client is asked to do, beside calls, pauses and work


@dataclass(frozen=True)
class Take:
    """Take the next of the caller's images: a tuple of it, empty if there are no more.

    An exception of the caller's own iterable is no business of the flow's.
    """

    images: Iterator[ImageLike] | AsyncIterator[ImageLike]


@dataclass(frozen=True)
class Begin:
    """Begin an upload; the one before, if any, has ended."""


@dataclass(frozen=True)
class Send:
    """Send a message of the upload as soon as there is room for it; False if the server has ended the call instead."""

    message: bytes


@dataclass(frozen=True)
class Finish:
    """Nothing more will be sent: wait for the answer."""


Step: TypeAlias = Call | Pause | Work | Take | Begin | Send | Finish
RegisterFlow: TypeAlias = Generator[Step, Any, T]


@dataclass(frozen=True)
class _Picture:
    field: str  # of ConceptRegisterStreamRequest
    image: common_pb2.Image
    size: int

    def wrapped(self) -> bytes:
        request = concept_pb2.ConceptRegisterStreamRequest()
        getattr(request, self.field).CopyFrom(self.image)
        return request.SerializeToString()


def register(registration: Registration) -> RegisterFlow[RegisteredConcept]:
    """Register a concept, in one call if it is small enough, else on as many streams as it takes."""
    flow = _Flow(registration)
    if (yield from flow.gather()):
        response = yield flow.call()
        flow.tell()
    else:
        response = yield from _uploaded(flow, registration.retries)
    return decode_concept(response.concept, created=response.created)


def _uploaded(flow: "_Flow", retries: int) -> RegisterFlow[concept_pb2.ConceptRegisterStreamResponse]:
    failures = 0
    while True:
        try:
            return (yield from flow.upload())
        except RpcError as error:
            failures += 1
            if failures > retries or not passes(error) or not flow.rewind():
                raise
            yield Pause(pause(error, failures))


class _Flow:
    """What is known of a registration, from stream to stream."""

    def __init__(self, registration: Registration) -> None:
        self._its = registration
        self._sides = [_Side("example", registration.examples), _Side("negative", registration.negatives)]
        self._head: list[_Picture] = []
        self._beyond_head = False

    def gather(self) -> RegisterFlow[bool]:
        """Take images until there are none, or more than one message should hold; whether these are all.

        Raises:
            ValueError: if they make no concept.
        """
        most = min(_MOST_BYTES, self._its.max_message_bytes - self._its.spec.ByteSize())
        whole = False
        while sum(picture.size for picture in self._head) <= most and len(self._head) <= _MOST_IMAGES:
            picture = yield from self._next()
            if picture is None:
                whole = True
                break
            self._head.append(picture)
        fields = {picture.field for picture in self._head}
        if self._its.spec.HasField("vector"):
            if fields:
                raise ValueError("a concept is made of images or of a vector, not of both")
        elif "example" not in fields:
            raise ValueError("a concept is made of at least one example, or of a vector")
        return whole

    def call(self) -> Call:
        """The call for images that fit into it."""
        request = concept_pb2.ConceptRegisterRequest(
            spec=self._its.spec,
            examples=[picture.image for picture in self._head if picture.field == "example"],
            negatives=[picture.image for picture in self._head if picture.field == "negative"],
        )
        return unary("ConceptRegister", request, concept_pb2.ConceptRegisterResponse)

    def upload(self) -> RegisterFlow[concept_pb2.ConceptRegisterStreamResponse]:
        """One stream, from its opening to its answer.

        Raises:
            RpcError: if it broke, or the server refuses.
            MalformedResponse: if it answers before it has seen everything.
        """
        yield Begin()
        request = concept_pb2.ConceptRegisterStreamRequest(spec=self._its.spec)
        going = yield Send(request.SerializeToString())
        count = 0
        while going:
            picture = yield from self._at(count)
            if picture is None:
                break
            going = yield Send(picture.wrapped())
            if going:
                count += 1
                self.tell(count)
        if going:
            end = concept_pb2.ConceptRegisterStreamRequest(end=concept_pb2.ConceptRegisterEnd(image_count=count))
            going = yield Send(end.SerializeToString())
        response: concept_pb2.ConceptRegisterStreamResponse = yield Finish()
        if not going:
            raise MalformedResponse("an answer before all images were sent")
        return response

    def rewind(self) -> bool:
        """Begin again with the first image, if that can be done."""
        if not self._beyond_head:
            return True
        if not all(side.repeatable for side in self._sides):
            return False
        self._head, self._beyond_head = [], False
        for side in self._sides:
            side.rewind()
        return True

    def tell(self, count: int | None = None) -> None:
        """Tell the caller how many images were sent."""
        if self._its.progress is not None:
            self._its.progress(len(self._head) if count is None else count)

    def _at(self, count: int) -> RegisterFlow[_Picture | None]:
        """The image after so many."""
        if count < len(self._head):
            return self._head[count]
        picture = yield from self._next()
        self._beyond_head |= picture is not None
        return picture

    def _next(self) -> RegisterFlow[_Picture | None]:
        for side in self._sides:
            position, taken = yield from side.take()
            for image in taken:
                work = partial(_encode, side.field, position, image, self._its.max_message_bytes)
                picture: _Picture = yield Work(work)
                return picture
        return None


class _Side:
    """The examples or the negatives, which can be gone through again where that needs no memory for images.

    Attributes:
        field: The field of ConceptRegisterStreamRequest that holds one.
        repeatable: Whether they can.
    """

    def __init__(self, field: str, images: Images) -> None:
        self.field = field
        self.repeatable = True
        self._images = images
        self._source = _iterator(images)
        self._one_shot = self._source is images
        self._paths: list[ImageLike] = []  # taken from what can be gone through only once
        self._position = 0
        self._exhausted = False

    def take(self) -> Generator[Take, Any, tuple[int, tuple[ImageLike, ...]]]:
        """The position of the next image, from 0, and the image, if there is one."""
        position = self._position
        taken: tuple[ImageLike, ...] = tuple(self._paths[position : position + 1])
        if not taken and not self._exhausted:
            taken = yield Take(self._source)
            self._exhausted = not taken
            if taken and self._one_shot:
                if isinstance(taken[0], str | os.PathLike):
                    self._paths += taken
                else:
                    self.repeatable = False
        self._position += len(taken)
        return position, taken

    def rewind(self) -> None:
        """Begin again with the first."""
        self._position = 0
        if not self._one_shot:
            self._source, self._exhausted = _iterator(self._images), False


def _iterator(images: Images) -> Iterator[ImageLike] | AsyncIterator[ImageLike]:
    return aiter(images) if isinstance(images, AsyncIterable) else iter(images)


def _encode(field: str, position: int, image: ImageLike, max_message_bytes: int) -> _Picture:
    try:
        message = encode_image(image)
        fit(message, [message], max_message_bytes)
    except (CdamError, OSError, TypeError, ValueError) as error:
        error.add_note(f"{field}s[{position}]")
        raise
    return _Picture(field, message, message.ByteSize() + _WRAPPING)
