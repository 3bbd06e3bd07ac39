"""What a store of concepts is: its records, its operations, its errors.

StoreError
├── NameTakenError         the name has other content
├── VersionMismatchError   the name's newest version is not the expected one
├── StoreUnavailableError  the database can't be reached; it may be again
│   └── StoreBusyError     it is there, but can't do this now: occupied, locked, read-only
├── StoreFullError         no space left
├── StoreUnwritableError   nowhere to write to: its operator must act; what is there can be read
└── StoreUnusableError     corrupt, of a newer schema, or not to be opened: its operator must act
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ConceptFacts:
    """What is known about a concept's content, but for the long parts.

    Attributes:
        id: Digest of fingerprint, preprocessing and content, 64 hexadecimal digits.
        model_fingerprint: Of the model in whose latent space the vector lies.
        resize: "model" or "squash": how the examples were brought to the model's input; empty for a vector.
        input_size: (height, width) in pixels of that input; None for a vector.
        example_count: Number of examples; 0 for a vector.
        negative_count: Number of negatives.
        spread: Mean cosine of the examples to their mean; None for a vector.
        content_digest: Digest of examples and negatives, or of the vector.
        imported: Whether all this was said by a caller, and no image seen.
    """

    id: str
    model_fingerprint: str
    resize: str
    input_size: tuple[int, int] | None
    example_count: int
    negative_count: int
    spread: float | None
    content_digest: str
    imported: bool = False


@dataclass(frozen=True)
class Example:
    """An image that a concept was made of.

    Attributes:
        digest: SHA-256 of the image as it was sent, 64 hexadecimal digits.
        cosine: Of its latent to the mean of its side.
    """

    digest: str
    cosine: float


@dataclass(frozen=True, eq=False)
class Content:
    """A concept's content: immutable, found by its id.

    Attributes:
        facts: All but the long parts.
        vector: float32, shape (latent size).
        examples: The examples, in the order in which they came.
        negatives: The negatives, likewise.
    """

    facts: ConceptFacts
    vector: NDArray[np.float32]
    examples: tuple[Example, ...] = ()
    negatives: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Version:
    """A name's version: immutable, points at content.

    Attributes:
        model: Name of the model that it was registered with.
        name: The concept's name.
        number: Of the version, from 1; a name that was deleted goes on counting.
        description: For people.
        labels: For finding it again.
        create_time: When it was stored, with time zone, to the microsecond.
        facts: About its content.
    """

    model: str
    name: str
    number: int
    description: str
    labels: Mapping[str, str]
    create_time: datetime
    facts: ConceptFacts


@dataclass(frozen=True, eq=False)
class StoredConcept:
    """A version with its content."""

    version: Version
    content: Content


@dataclass(frozen=True, eq=False)
class Registration:
    """What is to be stored. Numbers are finite; text has no U+0000, which PostgreSQL can't keep: whoever calls sees to it.

    Attributes:
        model: Name of the model.
        name: The concept's name.
        content: What the name shall point at.
        description: For people.
        labels: For finding it again.
        replace: Whether a taken name gets a new version.
        expected_version: Only if the newest version has this number (0: the name is free, or deleted); None: whatever it is.
    """

    model: str
    name: str
    content: Content
    description: str = ""
    labels: Mapping[str, str] | None = None
    replace: bool = False
    expected_version: int | None = None


class ConceptStore(Protocol):
    """Keeps concepts; safe to call from one event loop at a time, by many tasks, and by several processes on one database.

    Every operation may raise `StoreUnavailableError`; those that write, `StoreFullError` and `StoreUnwritableError`. What a writing operation has
    returned is on disk. A deleted name behaves as if it had never existed, except that its version numbers continue.
    """

    async def open(self) -> None:
        """Check what is there and bring its schema up to date; what is not there yet is made when it is first written to.

        A database that can't be reached is no error here: it is checked as soon as it can.

        Raises:
            StoreUnusableError: It must not be used; nothing was changed.
        """
        ...

    async def close(self) -> None:
        """Finish what is being written, and let go."""
        ...

    async def register(self, registration: Registration) -> tuple[StoredConcept, bool]:
        """Store a concept under its name, in one transaction; the bool says whether anything was.

        In this order: the name's newest version has this content, and `replace` is off or description and labels are the
        same too: it is returned as it is. Its number is not the expected one: `VersionMismatchError`. It has other
        content and `replace` is off: `NameTakenError`. Else the content is stored, unless it is known by its id, in which
        case what was stored first stays, and a new version points at it.

        Raises:
            NameTakenError: See above.
            VersionMismatchError: See above.
        """
        ...

    async def newest(self, model: str, name: str) -> Version | None:
        """The newest version of a name, or None if the name is free; cheap, reads no vector."""
        ...

    async def by_name(self, model: str, name: str) -> StoredConcept | None:
        """The newest version of a name with its content, or None if the name is free."""
        ...

    async def by_id(self, concept_id: str) -> StoredConcept | None:
        """The content of this id with the version that was stored last of all that point at it, deleted or not; or None."""
        ...

    async def page(
        self, *, model: str, labels: Mapping[str, str], after: tuple[str, str] | None, limit: int
    ) -> Sequence[Version]:
        """Newest versions of the names that are not free, in the order of (model, name) by code point.

        Args:
            model: Only of this model; empty: of all.
            labels: Only versions that have all these.
            after: Only those behind this (model, name); None: from the beginning.
            limit: At most so many.
        """
        ...

    async def delete(self, model: str, name: str, expected_version: int | None) -> Version | None:
        """Free a name; returns the version that was its newest, or None if it was free, whatever was expected. Content stays.

        Raises:
            VersionMismatchError: The newest version is not the expected one.
        """
        ...


class StoreError(Exception):
    """Base of what can go wrong with a store."""


class NameTakenError(StoreError):
    """The name has other content.

    Args:
        newest: Its newest version.
    """

    def __init__(self, newest: Version) -> None:
        super().__init__(f"concept {newest.name!r} of model {newest.model!r} has other content")
        self.newest = newest


class VersionMismatchError(StoreError):
    """The newest version is not the expected one.

    Args:
        current: The newest version's number; 0 if the name is free.
    """

    def __init__(self, current: int) -> None:
        super().__init__(f"the newest version is {current}")
        self.current = current


class StoreUnavailableError(StoreError):
    """The database can't be reached; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoreBusyError(StoreUnavailableError):
    """The database is there, but can't do this now: it is occupied, locked or read-only. It says nothing about all else."""


class StoreFullError(StoreError):
    """There is no space left to write; what was stored is unharmed."""


class StoreUnwritableError(StoreError):
    """There is nowhere to write to; the message says what the store's operator can do about it."""


class StoreUnusableError(StoreError):
    """The store must not be used as it is; the message says what its operator can do."""
