"""ConceptRegister: from example images, or a ready vector, to a concept that is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdam_engine import mean_concept
from cdam_engine.preprocess import Resize
from cdam_server.compute.facts import ModelFacts
from cdam_server.compute.interface import Compute
from cdam_server.compute.scheduling import ByteBudget
from cdam_server.errors import (
    InvalidArgumentError,
    OverloadedError,
    ServiceError,
    UnavailableError,
    within,
)
from cdam_server.store import (
    ConceptFacts,
    ConceptStore,
    Content,
    Example,
    NameTakenError,
    Registration,
    StoredConcept,
    VersionMismatchError,
)
from cdam_server.usecases.concepts import check_fingerprint, store_errors
from cdam_server.usecases.identity import Recipe, digest_of_images, digest_of_import, digest_of_vector
from cdam_server.usecases.images import ImageRequest, Images, refusals
from cdam_server.usecases.resolve import Resolver, check_vector

_ROUNDING: Final = 0.05  # bfloat16's, in a difference of means
# Images. So many of a registration are decoded or queued at once: a full batch as max_batch_size has it by default; more would
# only hold memory.
_IN_WORK: Final = 16


@dataclass(frozen=True, eq=False)
class ExampleImage:
    """An image that shows a concept, or one that doesn't.

    Attributes:
        open_image: Decodes it, upright RGB; slow.
        digest: Computes its digest, 64 hexadecimal digits; slow if it is large.
        negative: Whether it is one that doesn't.
        bytes: Memory that it holds until it is embedded; 0 if it is part of what the request holds.
    """

    open_image: Callable[[], Image.Image]
    digest: Callable[[], str]
    negative: bool
    bytes: int


@dataclass(frozen=True, eq=False)
class ReadyVector:
    """A vector instead of images.

    Attributes:
        values: float32, shape (D,).
        examples: The images that it was made of elsewhere; empty if nothing is said about them.
        negatives: Likewise.
    """

    values: NDArray[np.float32]
    examples: tuple[Example, ...] = ()
    negatives: tuple[Example, ...] = ()


@dataclass(frozen=True, eq=False)
class RegisterCommand:
    """What to register, apart from the images.

    Attributes:
        name: The concept's name.
        model: Name of the model; empty for the default one.
        description: For people.
        labels: For finding it again.
        resize: Which part of an image the model sees.
        input_size: (height, width) in pixels, or None for the model's own.
        replace: Whether a taken name gets a new version.
        expected_version: Only if the newest version has this number; None: whatever it is.
        model_fingerprint: Only if the model has this fingerprint; empty: whatever it is.
        vector: A ready vector, or None.
        timeout: Seconds that the caller will still wait, or None.
        caller: Who asks; callers take turns.
        bytes: Memory that is held until the end, besides that of images that come one by one.
    """

    name: str
    model: str
    description: str
    labels: Mapping[str, str]
    resize: Resize
    input_size: tuple[int, int] | None
    replace: bool
    expected_version: int | None
    model_fingerprint: str
    vector: ReadyVector | None
    timeout: float | None
    caller: str
    bytes: int


class RegisterUseCase:
    """Registers concepts.

    Args:
        resolver: Resolves what requests name.
        store: Where concepts are kept.
        images: Embeds images.
        compute: What computes.
        budget: For the images in work, those of all callers.
    """

    def __init__(
        self, resolver: Resolver, store: ConceptStore, images: Images, compute: Compute, budget: ByteBudget
    ) -> None:
        self._resolver = resolver
        self._store = store
        self._images = images
        self._budget = budget
        self._compute = compute

    async def __call__(
        self, command: RegisterCommand, images: Sequence[ExampleImage] | AsyncIterator[ExampleImage]
    ) -> tuple[StoredConcept, bool]:
        """Form the concept and store it; the bool says whether anything was stored.

        Args:
            command: What to register.
            images: Of the concept. Of those that are all there, nothing is computed that is stored already.

        Raises:
            ServiceError: The request is wrong, or can't be served now.
        """
        with refusals():
            async with self._compute.long_request("registrations", command.caller):
                with self._memory(command.bytes):
                    return await self._register(command, images)

    @contextmanager
    def _memory(self, held: int) -> Iterator[None]:
        if not self._budget.try_take(held):
            raise OverloadedError("there is no memory for it now")
        try:
            yield
        finally:
            self._budget.give_back(held)

    async def _register(
        self, command: RegisterCommand, images: Sequence[ExampleImage] | AsyncIterator[ExampleImage]
    ) -> tuple[StoredConcept, bool]:
        models = self._resolver.models
        model = models.get(command.model)
        if command.model_fingerprint:
            with within("model_fingerprint"):
                check_fingerprint(models, model, command.model_fingerprint, "this concept")
        if command.vector is None:
            content = await self._content_of_images(model, command, images)
        else:
            async for _ in _each(images):
                raise InvalidArgumentError("vector", "stands for images; send either")
            content = await self._content_of_vector(model, command, command.vector)
        registration = Registration(
            model=model.name,
            name=command.name,
            content=content,
            description=command.description,
            labels=command.labels,
            replace=command.replace,
            expected_version=command.expected_version,
        )
        with store_errors():
            return await self._store.register(registration)

    async def _content_of_vector(self, model: ModelFacts, command: RegisterCommand, vector: ReadyVector) -> Content:
        """What a caller says about a vector's images can't be checked, so the id covers those statements, too.

        Unless the store has this concept, made here of the same images: then it is that one.
        """
        check_vector(model, vector.values, needs_direction=True)
        if not vector.examples:
            recipe, digest = Recipe(model.fingerprint), digest_of_vector(vector.values)
            return Content(_facts(recipe, digest, (), ()), vector.values)
        size = self._resolver.input_size(model, command.input_size)
        recipe, sides = Recipe(model.fingerprint, command.resize, size), (vector.examples, vector.negatives)
        with store_errors():
            seen = await self._store.by_id(recipe.concept_id(_digest_of_images(*sides)))
        if seen is not None and _close(vector.values, seen.content.vector):
            return seen.content
        said = [[(item.digest, item.cosine) for item in side] for side in sides]
        digest = digest_of_import(vector.values, *said)
        return Content(_facts(recipe, digest, *sides, imported=True), vector.values, *sides)

    async def _content_of_images(
        self, model: ModelFacts, command: RegisterCommand, images: Sequence[ExampleImage] | AsyncIterator[ExampleImage]
    ) -> Content:
        size = self._resolver.input_size(model, command.input_size)
        recipe = Recipe(model.fingerprint, command.resize, size)
        if isinstance(images, Sequence):
            known = await self._known(model, command, recipe, images)
            if known is not None:
                return known
        embedding = _Embedding(self._images, self._budget, model, command, size)
        return _formed(recipe, await embedding.all_of(images))

    async def _known(
        self, model: ModelFacts, command: RegisterCommand, recipe: Recipe, images: Sequence[ExampleImage]
    ) -> Content | None:
        """The content, if it is stored; a registration that must fail fails here, before anything is computed."""
        digests = await asyncio.to_thread(lambda: [(image.negative, image.digest()) for image in images])
        examples = [digest for negative, digest in digests if not negative]
        negatives = [digest for negative, digest in digests if negative]
        with store_errors():
            found = await self._store.by_id(recipe.concept_id(digest_of_images(examples, negatives)))
            if found is not None:
                return found.content
            newest = await self._store.newest(model.name, command.name)
            current = newest.number if newest else 0
            if command.expected_version not in {None, current}:
                raise VersionMismatchError(current)
            if newest and not command.replace:
                raise NameTakenError(newest)
        return None


@dataclass(frozen=True, eq=False)
class _Embedded:
    """An image that has been embedded: on which side it is, its digest, and its latent of shape (D,)."""

    negative: bool
    digest: str
    latent: NDArray[np.floating]


class _Embedding:
    """The images of one registration on their way."""

    def __init__(
        self,
        images: Images,
        budget: ByteBudget,
        model: ModelFacts,
        command: RegisterCommand,
        input_size: tuple[int, int],
    ) -> None:
        self._done: dict[int, _Embedded] = {}
        self._images = images
        self._budget = budget
        self._model = model
        self._input_size = input_size
        self._command = command
        self._slots = asyncio.Semaphore(_IN_WORK)
        self._deadline = None if command.timeout is None else monotonic() + command.timeout

    async def all_of(self, images: Sequence[ExampleImage] | AsyncIterator[ExampleImage]) -> list[_Embedded]:
        """Embed images, in their order; at most `_IN_WORK` are in work, and only they are held.

        Raises:
            ServiceError: One can't be embedded.
        """
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                count = 0
                async for image in _each(images):
                    await self._begin(tasks, count, image)
                    count += 1
        except* ServiceError as group:
            failure = _first(group)
        if failure is not None:
            raise failure
        return [self._done[position] for position in sorted(self._done)]

    async def _begin(self, tasks: asyncio.TaskGroup, position: int, image: ExampleImage) -> None:
        """Start with an image as soon as there is room for it."""
        await self._slots.acquire()
        await self._budget.take(image.bytes)
        task = tasks.create_task(self._embed(position, image))

        def end(_: asyncio.Task[None]) -> None:
            self._budget.give_back(image.bytes)
            self._slots.release()

        task.add_done_callback(end)

    async def _embed(self, position: int, image: ExampleImage) -> None:
        latent = await self._latent(position, image)
        self._done[position] = _Embedded(image.negative, await asyncio.to_thread(image.digest), latent)

    async def _latent(self, position: int, image: ExampleImage) -> NDArray[np.floating]:
        """Wait while the queue is full; but a registration whose first image finds no room is refused at once."""
        while True:
            try:
                return await self._images.embed(self._model, self._image_request(image), self._input_size)
            except UnavailableError:
                raise
            except OverloadedError as full:
                if position == 0:
                    raise
                await asyncio.sleep(full.pause())

    def _image_request(self, image: ExampleImage) -> ImageRequest:
        return ImageRequest(
            open=image.open_image,
            resize=self._command.resize,
            timeout=None if self._deadline is None else max(0.0, self._deadline - monotonic()),
            caller=self._command.caller,
            bytes=image.bytes,
        )


def _formed(recipe: Recipe, embedded: Sequence[_Embedded]) -> Content:
    """The concept that the images show.

    Raises:
        InvalidArgumentError: They show none.
    """
    examples = [item for item in embedded if not item.negative]
    negatives = [item for item in embedded if item.negative]
    if not examples:
        raise InvalidArgumentError("examples", "at least one is required, unless spec.vector is set")
    try:
        formed = mean_concept(
            np.stack([item.latent for item in examples]),
            np.stack([item.latent for item in negatives]) if negatives else None,
        )
    except ValueError as error:
        raise InvalidArgumentError("examples", str(error)) from error
    sides = _weighed(examples, formed.cosines), _weighed(negatives, formed.negative_cosines)
    return Content(_facts(recipe, _digest_of_images(*sides), *sides), formed.vector, *sides)


def _weighed(embedded: Sequence[_Embedded], cosines: NDArray[np.float64]) -> tuple[Example, ...]:
    return tuple(Example(item.digest, float(cosine)) for item, cosine in zip(embedded, cosines, strict=True))


def _digest_of_images(examples: Sequence[Example], negatives: Sequence[Example]) -> str:
    return digest_of_images((item.digest for item in examples), (item.digest for item in negatives))


def _facts(
    recipe: Recipe, digest: str, examples: Sequence[Example], negatives: Sequence[Example], *, imported: bool = False
) -> ConceptFacts:
    return ConceptFacts(
        id=recipe.concept_id(digest),
        model_fingerprint=recipe.model_fingerprint,
        resize=recipe.resize,
        input_size=recipe.input_size,
        example_count=len(examples),
        negative_count=len(negatives),
        spread=float(np.mean([item.cosine for item in examples])) if examples else None,
        content_digest=digest,
        imported=imported,
    )


def _close(given: NDArray[np.float32], seen: NDArray[np.float32]) -> bool:
    """Whether both can be of the same images, computed on other devices."""
    difference = np.linalg.norm(given.astype(np.float64) - seen)
    return bool(difference <= _ROUNDING * np.linalg.norm(seen.astype(np.float64)))


async def _each(images: Sequence[ExampleImage] | AsyncIterator[ExampleImage]) -> AsyncIterator[ExampleImage]:
    if isinstance(images, Sequence):
        for image in images:
            yield image
    else:
        async for image in images:
            yield image


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first error of a group; any of them may be reported."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
