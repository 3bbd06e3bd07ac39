"""What to explain."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsIndex, TypeAlias, cast, overload

import numpy as np
from numpy.typing import NDArray

from cdam._concepts import RegisteredConcept
from cdam._numbers import is_whole, whole

Similarity: TypeAlias = Literal["dot", "cosine", "l2"]
"""How a latent is compared with a concept vector: dot product, cosine, or -1/2 |l - l_c|^2. Larger is more similar."""


@dataclass(frozen=True)
class Output:
    """A class, or an output of a regression head: `Output(3)` by index, `Output("tench")` by name.

    Attributes:
        selector: Index from 0, or name as in `Model.output_names`.
    """

    selector: int | str

    def __post_init__(self) -> None:
        if isinstance(self.selector, str):
            return
        if not is_whole(self.selector):
            raise TypeError(f"an output goes by index or name, not by {type(self.selector).__name__}")
        index = whole(self.selector, "an index")  # a numpy or torch integer, say
        if index < 0:
            raise ValueError(f"an output's index starts at 0, got {index}")
        object.__setattr__(self, "selector", index)


@dataclass(frozen=True)
class TopK:
    """The k outputs with the highest values for the image; stands for k targets in the answer.

    Attributes:
        k: How many, at least 1.
    """

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole(self.k, "k"))
        if self.k < 1:
            raise ValueError(f"k is at least 1, got {self.k}")


@dataclass(frozen=True, init=False)
class Concept:
    """Similarity of the image's latent to a concept: by `name` (its newest version), by `id` (one version), or by `vector`.

    Attributes:
        name: Name of a registered concept, or None.
        id: Id of a registered concept, or None.
        vector: The vector itself, length `Model.latent_size`, or None.
        similarity: How similarity is measured.
        label: What answers call it: its name, or, for one that goes by its id, what the caller does; None: the id's first
            digits. Two concepts that differ in this alone are equal.
    """

    name: str | None
    id: str | None
    vector: tuple[float, ...] | None
    similarity: Similarity
    label: str | None = field(compare=False, repr=False)

    def __init__(
        self,
        name: str | None = None,
        *,
        id: str | None = None,  # noqa: A002 - the API's name for it
        vector: Sequence[float] | NDArray[Any] | None = None,
        similarity: Similarity = "dot",
        label: str | None = None,
    ) -> None:
        if sum(selector is not None for selector in (name, id, vector)) != 1:
            raise ValueError("a concept goes by exactly one of name, id and vector")
        if label is not None and id is None:
            raise ValueError("a label is for a concept that goes by its id")
        if vector is not None:
            array = np.asarray(vector, np.float32)
            if array.ndim != 1:
                raise ValueError(f"a concept vector has one axis, got shape {array.shape}")
            vector = tuple(array.tolist())
        given = {"name": name, "id": id, "vector": vector, "similarity": similarity, "label": name or label}
        for attribute, value in given.items():
            object.__setattr__(self, attribute, value)


@dataclass(frozen=True)
class Contrast:
    """`positive` minus `negative`: what speaks for one and against the other.

    Attributes:
        positive: The minuend; an int or str is an output, a `RegisteredConcept` the concept of its id.
        negative: The subtrahend, likewise.
    """

    positive: int | str | Output | Concept | RegisteredConcept
    negative: int | str | Output | Concept | RegisteredConcept

    def __post_init__(self) -> None:
        for side in ("positive", "negative"):
            target = as_target(getattr(self, side))
            if not isinstance(target, Output | Concept):
                raise TypeError(f"a contrast is of outputs and concepts, not of {type(target).__name__}")
            object.__setattr__(self, side, target)


Target: TypeAlias = Output | TopK | Concept | Contrast
TargetLike: TypeAlias = int | str | Target | RegisteredConcept
"""A target; an int is an output's index, a str an output's name."""


@overload
def as_target(target: int | str | Output) -> Output: ...
@overload
def as_target(target: Concept | RegisteredConcept) -> Concept: ...
@overload
def as_target(target: TargetLike) -> Target: ...
def as_target(target: TargetLike) -> Target:
    """The target that is meant."""
    if isinstance(target, RegisteredConcept):
        return Concept(id=target.id, label=target.name)
    return target if isinstance(target, Target) else Output(target)


def as_targets(targets: TargetLike | Sequence[TargetLike]) -> tuple[Target, ...]:
    """The targets that are meant, of one or several."""
    if isinstance(targets, str | bool | Target | RegisteredConcept):
        return (as_target(targets),)
    if is_whole(targets):
        return (Output(whole(cast(SupportsIndex, targets), "an index")),)
    if not isinstance(targets, Iterable) or getattr(targets, "ndim", 1) == 0:
        raise TypeError(f"a target is an index, a name or one of cdam's classes, not {type(targets).__name__}")
    return tuple(as_target(target) for target in targets)
