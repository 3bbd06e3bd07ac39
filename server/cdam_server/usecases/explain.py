"""Explain: resolve what the request names, have the image computed, and return all that the answer needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdam_engine import Method, Output, TopK
from cdam_server.compute.facts import ModelFacts, NonFiniteError
from cdam_server.errors import InvalidArgumentError
from cdam_server.usecases.images import Answered, ImageRequest, Images
from cdam_server.usecases.resolve import Resolver, Wanted, resolve_methods


@dataclass(frozen=True, eq=False)
class ExplainCommand:
    """A request to explain one image, decoded but for the image.

    Attributes:
        model: Name of the model; empty for the default one.
        image: The image.
        targets: What to explain.
        methods: How.
        input_size: (height, width) in pixels, or None for the model's own.
    """

    model: str
    image: ImageRequest
    targets: tuple[Wanted, ...]
    methods: tuple[Method, ...]
    input_size: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Explained:
    """The answer to a command.

    Attributes:
        model: The model that was explained.
        answered: What was found of the image.
        probabilities: Of every output, shape (C,); None for a regression.
    """

    model: ModelFacts
    answered: Answered
    probabilities: NDArray[np.float64] | None


class ExplainUseCase:
    """Explains one image at a time.

    Args:
        resolver: Resolves what commands name.
        images: Has images computed.
    """

    def __init__(self, resolver: Resolver, images: Images) -> None:
        self._resolver = resolver
        self._images = images

    async def __call__(self, command: ExplainCommand) -> Explained:
        """Resolve, admit, prepare, queue, compute.

        Raises:
            ServiceError: The request is wrong, or can't be served now.
        """
        resolver = self._resolver
        model = resolver.models.get(command.model)
        input_size = resolver.input_size(model, command.input_size)
        methods = resolve_methods(model, command.methods)
        targets = await resolver.targets(model, command.targets)
        resolver.check_passes(model, methods, targets, input_size)
        try:
            answered = await self._images.explain(model, command.image, input_size, targets, methods)
        except NonFiniteError as error:
            if all(isinstance(target, Output | TopK) for target in targets):
                raise
            message = "a map is not finite: is a concept's vector too large for one of the methods?"
            raise InvalidArgumentError("targets", message) from error
        return Explained(model, answered, model.probabilities(answered.done.answer.logits))
