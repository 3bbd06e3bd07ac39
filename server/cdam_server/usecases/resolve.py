"""From a request's words to the engine's objects, by what is known of the model; what it does not have is refused here."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cdam_engine import Attention, Concept, Contrast, Method, Output, PatchMaskPrediction, TopK, UnsupportedMethodError
from cdam_engine.targets import Scalar, Similarity, Target, count
from cdam_server.compute.facts import ModelFacts, Models
from cdam_server.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, within
from cdam_server.usecases.concepts import ConceptId, ConceptName, ConceptUseCase

_SHORT_ID: Final = 12  # hexadecimal digits
_SIMILAR_NAMES: Final = 3  # that an error lists
_SIMILARITY_CUTOFF: Final = 0.5  # of difflib


@dataclass(frozen=True)
class OutputNamed:
    """An output by name, still to be looked up."""

    name: str


@dataclass(frozen=True)
class ConceptSelected:
    """A registered concept, still to be looked up.

    Attributes:
        selector: Which.
        similarity: How similarity to it is measured.
    """

    selector: ConceptName | ConceptId
    similarity: Similarity


@dataclass(frozen=True, eq=False, kw_only=True)
class RegisteredConcept(Concept):
    """Similarity to a registered concept; equal questions are answered once, so equal ones must be equal.

    Attributes:
        id: The concept's id.
        name: What it is called in the answer.
    """

    id: str
    name: str

    def __eq__(self, other: object) -> bool:
        """Whether both are the same concept, compared in the same way."""
        return isinstance(other, RegisteredConcept) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, str, str]:
        return self.id, self.name, self.similarity


Side: TypeAlias = Output | OutputNamed | Concept | ConceptSelected


@dataclass(frozen=True, eq=False)
class ContrastNamed:
    """A contrast whose outputs are still to be looked up.

    Attributes:
        positive: The minuend.
        negative: The subtrahend.
    """

    positive: Side
    negative: Side


WantedScalar: TypeAlias = Side | ContrastNamed
Wanted: TypeAlias = WantedScalar | TopK


@dataclass(frozen=True)
class ExplainLimits:
    """What a request to explain may ask for.

    Attributes:
        targets: Largest number of targets, top-k counted as k.
        patches: Most patches that an input size may give.
        passes: Most passes through the whole model that the methods may take.
    """

    targets: int
    patches: int
    passes: int


class Resolver:
    """Resolves what requests name.

    Args:
        models: The models.
        concepts: Where registered concepts are found.
        limits: What a request may ask for.

    Attributes:
        models: As given.
    """

    def __init__(self, models: Models, concepts: ConceptUseCase, limits: ExplainLimits) -> None:
        self.models = models
        self._concepts = concepts
        self._limits = limits

    def input_size(self, model: ModelFacts, wanted: tuple[int, int] | None) -> tuple[int, int]:
        """(height, width) in pixels that images are brought to.

        Args:
            model: The model.
            wanted: What the request says; None: the model's own.

        Raises:
            InvalidArgumentError: The model can't take it, or it is too large.
        """
        own = model.data_config.input_size
        size = wanted or own
        try:
            grid = model.explained.sizes.grid(size)
        except ValueError as error:
            raise InvalidArgumentError("input_size", str(error)) from error
        # Attention's cost grows with the square of the patches; a model's own size is its operator's choice.
        if size != own and grid.h * grid.w > self._limits.patches:
            message = f"gives {grid.h} x {grid.w} patches; at most {self._limits.patches} are allowed"
            raise InvalidArgumentError("input_size", message)
        return size

    async def targets(self, model: ModelFacts, wanted: Sequence[Wanted]) -> tuple[Target, ...]:
        """Targets as the engine takes them, all of them such as the model has.

        Raises:
            ServiceError: The model has no such output, there is no such concept of it, or there are too many.
        """
        found = []
        for position, target in enumerate(wanted):
            with within(f"targets[{position}]"):
                found.append(await self._target(model, target))
        if count(found) > self._limits.targets:
            raise InvalidArgumentError("targets", f"{count(found)} targets; at most {self._limits.targets} a request")
        return tuple(found)

    async def _target(self, model: ModelFacts, target: Wanted) -> Target:
        if not isinstance(target, TopK):
            return await self.scalar(model, target)
        outputs = _output_count(model)
        if not 1 <= target.k <= outputs:
            raise InvalidArgumentError("k", f"must be from 1 to {outputs}, the number of outputs")
        return target

    async def scalar(self, model: ModelFacts, target: WantedScalar) -> Scalar:
        """The target of one value as the engine takes it, such as the model has.

        Raises:
            ServiceError: The model has no such output, or there is no such concept of it.
        """
        match target:
            case ContrastNamed(positive, negative):
                with within("positive"):
                    minuend = await self._side(model, positive)
                with within("negative"):
                    return Contrast(minuend, await self._side(model, negative))
            case _:
                return await self._side(model, target)

    async def _side(self, model: ModelFacts, target: Side) -> Output | Concept:
        match target:
            case ConceptSelected(selector, similarity):
                if isinstance(selector, ConceptName):
                    selector = replace(selector, model=model.name)
                with within("concept"):
                    found = await self._concepts.find(model, selector)
                concept_id = found.content.facts.id
                # Content that goes by an id may have any number of names, of anybody's.
                name = selector.name if isinstance(selector, ConceptName) else concept_id[:_SHORT_ID]
                vector = found.content.vector.copy()  # which is not for writing
                return RegisteredConcept.of(vector, similarity, id=concept_id, name=name)
            case Concept():
                check_vector(model, target.vector.numpy(), needs_direction=target.similarity == "cosine")
                return target
            case OutputNamed(name):
                _output_count(model)
                return Output(output_index(model, name))
            case Output(index):
                outputs = _output_count(model)
                if index >= outputs:
                    message = f"model {model.name!r} has outputs 0 to {outputs - 1}, not {index}"
                    raise NotFoundError("output", str(index), message, field="index")
                return target

    def check_passes(
        self, model: ModelFacts, methods: Sequence[Method], targets: Sequence[Target], input_size: tuple[int, int]
    ) -> None:
        """Refuse methods that take more than a request may ask for.

        Raises:
            InvalidArgumentError: They take too many passes through the whole model.
        """
        patches, number = model.patches(input_size), count(targets)
        passes = math.ceil(model.times_larger(input_size) * sum(method.passes(number, patches) for method in methods))
        if passes > self._limits.passes:
            message = (
                f"take {passes} passes through the whole model; at most {self._limits.passes} are allowed a request"
            )
            raise InvalidArgumentError("methods", message)


def resolve_method(model: ModelFacts, method: Method) -> Method:
    """The method as the engine takes it, such as the model can serve.

    Raises:
        InvalidArgumentError: The model has no such head.
        FailedPreconditionError: The model can't serve the method.
    """
    explained = model.explained
    with within(method.kind):
        match method:
            case Attention(heads) if any(head >= explained.heads for head in heads):
                message = f"model {model.name!r} has heads 0 to {explained.heads - 1}, not {max(heads)}"
                raise InvalidArgumentError("heads", message)
            case PatchMaskPrediction():
                method = replace(method, activation=model.activation)
        try:
            explained.check(method)
        except UnsupportedMethodError as error:
            message = f"model {model.name!r} can't serve it: {error}"
            facts = {"model": model.name, "method": method.kind}
            raise FailedPreconditionError(error.reason, message, field="", **facts) from error
    return method


def resolve_methods(model: ModelFacts, methods: Sequence[Method]) -> tuple[Method, ...]:
    """All of them; raises what `resolve_method` raises."""
    found = []
    for position, method in enumerate(methods):
        with within(f"methods[{position}]"):
            found.append(resolve_method(model, method))
    return tuple(found)


def output_index(model: ModelFacts, name: str) -> int:
    """The index of the output with this name.

    Raises:
        NotFoundError: There is none.
        InvalidArgumentError: Several outputs share the name.
    """
    names = model.output_names
    matches = [index for index, known in enumerate(names) if known == name]
    if not names:
        last = model.output_count - 1
        message = f"the outputs of model {model.name!r} have no names; ask by index, 0 to {last}"
        raise NotFoundError("output", name, message, field="name")
    if not matches:
        similar = difflib.get_close_matches(name, names, n=_SIMILAR_NAMES, cutoff=_SIMILARITY_CUTOFF)
        similar += [known for known in names if name and name in known and known not in similar][:_SIMILAR_NAMES]
        hint = f"; is it {' or '.join(map(repr, similar))}?" if similar else ""
        message = f"model {model.name!r} has no output named {name!r}{hint}"
        raise NotFoundError("output", name, message, field="name")
    if len(matches) > 1:
        raise InvalidArgumentError("name", f"outputs {matches} are all named {name!r}; say which by index")
    return matches[0]


def _output_count(model: ModelFacts) -> int:
    """The number of outputs, of which there must be one at least."""
    if not model.output_count:
        message = f"model {model.name!r} has no outputs: ask for a concept, or serve it with a head"
        raise FailedPreconditionError("NO_OUTPUTS", message, model=model.name)
    return model.output_count


def check_vector(model: ModelFacts, vector: NDArray[np.float32], *, needs_direction: bool) -> None:
    """Refuse a concept vector that is not one of the model's latent space.

    Args:
        model: The model.
        vector: Shape (D,), finite.
        needs_direction: Whether it must not be zero, either.

    Raises:
        InvalidArgumentError: It has another length, or no direction.
    """
    length, size = len(vector), model.explained.latent_size
    if length != size:
        raise InvalidArgumentError("vector", f"has length {length}; the latent of model {model.name!r} has {size}")
    if needs_direction and not vector.any():
        raise InvalidArgumentError("vector", "is zero, which makes no angle with anything")
