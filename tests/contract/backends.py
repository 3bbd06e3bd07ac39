"""Databases for tests of the store, and what is put into them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cdam_server.store import ConceptFacts, ConceptStore, Content, Example, Registration

SIZE = 768  # of a latent


@dataclass(frozen=True)
class Place:
    """Where a store keeps its concepts; any number of stores, in any number of processes, may share it.

    Attributes:
        kind: Of database.
        address: A folder or a URL.
    """

    kind: Literal["sqlite", "postgres"]
    address: str

    def store(self) -> ConceptStore:
        """A store, not opened."""
        if self.kind == "sqlite":
            from cdam_server.store.sqlite import SqliteStore

            return SqliteStore(Path(self.address))
        from cdam_server.store.postgres import PostgresStore

        return PostgresStore(self.address)


def content(seed: int, **facts: Any) -> Content:
    """Content like no other, of two examples and a negative."""
    draw = np.random.default_rng(seed)
    return Content(
        facts=replace(
            ConceptFacts(
                id=digest("content", seed),
                model_fingerprint=digest("model", 1),
                resize="model",
                input_size=(224, 196),
                example_count=2,
                negative_count=1,
                spread=float(draw.uniform(-1, 1)),
                content_digest=digest("digest", seed),
            ),
            **facts,
        ),
        vector=draw.standard_normal(SIZE, np.float32),
        examples=tuple(Example(digest("image", seed, number), draw.uniform(-1, 1)) for number in range(2)),
        negatives=(Example(digest("image", seed, 2), draw.uniform(-1, 1)),),
    )


def registration(name: str = "zebra", seed: int = 1, *, model: str = "vit", **fields: Any) -> Registration:
    """Content `seed` under a name."""
    return Registration(model=model, name=name, content=content(seed), **fields)


def digest(*parts: object) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def same(one: Content, other: Content) -> bool:
    """Whether two contents are equal to the last bit."""
    return (
        (one.facts, one.examples, one.negatives) == (other.facts, other.examples, other.negatives)
        and one.vector.dtype == other.vector.dtype
        and one.vector.tobytes() == other.vector.tobytes()
    )


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what others bring about."""
    async with asyncio.timeout(100):
        while not condition():  # noqa: ASYNC110 - there is nothing that tells
            await asyncio.sleep(0.01)


def digest_of(file: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
