"""Registering concepts, for both clients: in one message, or as a stream if it would be a large one."""

import os
from collections.abc import AsyncIterable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from cdam._channel import SERVICE
from cdam._concepts import RegisteredConcept
from cdam._decode import decode_concept
from cdam._errors import CdamError, MalformedResponse, RpcError
from cdam._images import WRAPPING_BYTES, ImageLike, encode_image, fit
from cdam._stream import is_passing, pause_seconds
from cdam._transport import Answer, Calls, Ended, Transport
from cdam.v1 import common_pb2, concept_pb2

Images: TypeAlias = Iterable[ImageLike] | AsyncIterable[ImageLike]

_UPLOAD = f"/{SERVICE}/ConceptRegisterStream"

# What travels in one message, and can be repeated whatever it came from.
_MOST_IMAGES = 64
_MOST_BYTES = 4 * 1024 * 1024


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


@dataclass(frozen=True)
class _Picture:
    field: str  # of ConceptRegisterStreamRequest
    image: common_pb2.Image
    size: int

    def request(self) -> concept_pb2.ConceptRegisterStreamRequest:
        request = concept_pb2.ConceptRegisterStreamRequest()
        getattr(request, self.field).CopyFrom(self.image)
        return request


class Registering:
    """The registration of a concept: in one call if it is small enough, else on as many streams as it takes."""

    def __init__(self, registration: Registration, transport: Transport, timeout: float | None) -> None:
        self._registration = registration
        self._transport = transport
        self._calls = Calls(transport, timeout)
        request, response = concept_pb2.ConceptRegisterStreamRequest, concept_pb2.ConceptRegisterStreamResponse
        start = transport.start(_UPLOAD, request.SerializeToString, response.FromString, timeout)
        self._streams = transport.streams([start])
        images = {"example": registration.examples, "negative": registration.negatives}
        self._sources = [_ImageSource(field, given, transport) for field, given in images.items()]
        self._kept: list[_Picture] = []  # the first images, which can be sent again whatever they came from
        self._has_taken_more = False

    async def run(self) -> RegisteredConcept:
        """Register the concept.

        Raises:
            RpcError: if the server refuses, or can't be reached.
            ImageError, OSError, ValueError, TypeError: if the images make no concept.
        """
        response: concept_pb2.ConceptRegisterResponse | concept_pb2.ConceptRegisterStreamResponse
        if await self._gather():
            response = await self._calls("ConceptRegister", self._request(), concept_pb2.ConceptRegisterResponse)
            self._report(len(self._kept))
        else:
            try:
                response = await self._upload()
            finally:
                await self._streams.close()
        return decode_concept(response.concept, created=response.created)

    async def _gather(self) -> bool:
        """Take images until there are none, or more than one message should hold; whether these are all.

        Raises:
            ValueError: if they make no concept.
        """
        spec = self._registration.spec
        most = min(_MOST_BYTES, self._registration.max_message_bytes - spec.ByteSize())
        is_whole = False
        while sum(picture.size for picture in self._kept) <= most and len(self._kept) <= _MOST_IMAGES:
            picture = await self._next()
            if picture is None:
                is_whole = True
                break
            self._kept.append(picture)
        fields = {picture.field for picture in self._kept}
        if spec.HasField("vector"):
            if fields:
                raise ValueError("a concept is made of images or of a vector, not of both")
        elif "example" not in fields:
            raise ValueError("a concept is made of at least one example, or of a vector")
        return is_whole

    def _request(self) -> concept_pb2.ConceptRegisterRequest:
        """The request for images that fit into it."""
        return concept_pb2.ConceptRegisterRequest(
            spec=self._registration.spec,
            examples=[picture.image for picture in self._kept if picture.field == "example"],
            negatives=[picture.image for picture in self._kept if picture.field == "negative"],
        )

    async def _upload(self) -> concept_pb2.ConceptRegisterStreamResponse:
        failures = 0
        while True:
            response = await self._upload_once()
            if not isinstance(response, RpcError):
                return response
            failures += 1
            if failures > self._registration.retries or not is_passing(response) or not self._rewind():
                raise response
            await self._transport.pause(pause_seconds(response, failures))

    async def _upload_once(self) -> concept_pb2.ConceptRegisterStreamResponse | RpcError:
        """One stream, from its opening to its answer, or how it broke.

        Raises:
            MalformedResponse: if the server answers before it has seen everything.
        """
        await self._streams.open(0)
        request = concept_pb2.ConceptRegisterStreamRequest(spec=self._registration.spec)
        accepted = await self._streams.deliver(0, request)
        count = 0
        while accepted and (picture := await self._image_at(count)) is not None:
            accepted = await self._streams.deliver(0, picture.request())
            if accepted:
                count += 1
                self._report(count)
        if accepted:
            end = concept_pb2.ConceptRegisterEnd(image_count=count)
            accepted = await self._streams.deliver(0, concept_pb2.ConceptRegisterStreamRequest(end=end))
        self._streams.finish(0)
        return await self._response(is_whole=accepted)

    async def _response(self, *, is_whole: bool) -> concept_pb2.ConceptRegisterStreamResponse | RpcError:
        response: concept_pb2.ConceptRegisterStreamResponse | None = None
        while not isinstance(event := await self._streams.event(), Ended):
            if isinstance(event, Answer):
                response = event.message
        if event.error is not None:
            return event.error
        if response is None or not is_whole:
            raise MalformedResponse("no answer" if response is None else "an answer before all images were sent")
        return response

    def _rewind(self) -> bool:
        """Begin again with the first image, if that can be done."""
        if not self._has_taken_more:
            return True
        if not all(source.repeatable for source in self._sources):
            return False
        self._kept, self._has_taken_more = [], False
        for source in self._sources:
            source.rewind()
        return True

    def _report(self, count: int) -> None:
        """Tell the caller how many images were sent."""
        if self._registration.progress is not None:
            self._registration.progress(count)

    async def _image_at(self, count: int) -> _Picture | None:
        """The image after so many."""
        if count < len(self._kept):
            return self._kept[count]
        picture = await self._next()
        self._has_taken_more |= picture is not None
        return picture

    async def _next(self) -> _Picture | None:
        for source in self._sources:
            position, taken = await source.take()
            for image in taken:
                encode = partial(_encode, source.field, position, image, self._registration.max_message_bytes)
                return await self._transport.work(encode)
        return None


class _ImageSource:
    """The examples or the negatives, which can be gone through again where that needs no memory for images.

    Attributes:
        field: The field of ConceptRegisterStreamRequest that holds one.
        repeatable: Whether they can.
    """

    def __init__(self, field: str, images: Images, transport: Transport) -> None:
        self.field = field
        self.repeatable = True
        self._images = images
        self._transport = transport
        self._iterator = transport.iterator(images)
        self._one_shot = self._iterator is images
        self._paths: list[ImageLike] = []  # taken from what can be gone through only once
        self._position = 0
        self._exhausted = False

    async def take(self) -> tuple[int, tuple[ImageLike, ...]]:
        """The position of the next image, from 0, and the image, if there is one."""
        position = self._position
        taken: tuple[ImageLike, ...] = tuple(self._paths[position : position + 1])
        if not taken and not self._exhausted:
            taken = await self._transport.take(self._iterator)
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
            self._iterator, self._exhausted = self._transport.iterator(self._images), False


def _encode(field: str, position: int, image: ImageLike, max_message_bytes: int) -> _Picture:
    try:
        message = encode_image(image)
        fit(message, [message], max_message_bytes)
    except (CdamError, OSError, TypeError, ValueError) as error:
        error.add_note(f"{field}s[{position}]")
        raise
    return _Picture(field, message, message.ByteSize() + WRAPPING_BYTES)
