"""From rows to records and back; the same for every database."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import numpy as np

from cdam_server.store.protocol import (
    ConceptFacts,
    Content,
    Example,
    Registration,
    StoredConcept,
    StoreUnusableError,
    Version,
)

_SHORT_COLUMNS: Final = (
    "id",
    "model_fingerprint",
    "resize",
    "input_height",
    "input_width",
    "example_count",
    "negative_count",
    "spread",
    "content_digest",
)


class Row(Protocol):
    """A row of a result, its values by column."""

    def __getitem__(self, column: str, /) -> Any: ...


def version_of(row: Row) -> Version:
    """The version in a row that has `queries.VERSION`.

    Raises:
        StoreUnusableError: It is not what was written.
    """
    time = row["create_time"]  # PostgreSQL has a type for it, SQLite text
    try:
        labels = json.loads(row["labels"])
        time = time if isinstance(time, datetime) else datetime.fromisoformat(time)
    except ValueError as error:
        raise StoreUnusableError(
            f"version {row['number']} of {row['name']!r} is damaged: {error}. Restore the database from a backup."
        ) from error
    return Version(
        model=row["model"],
        name=row["name"],
        number=row["number"],
        description=row["description"],
        labels=labels,
        create_time=time.astimezone(UTC),
        facts=_facts(row),
    )


def stored_of(row: Row) -> StoredConcept:
    """The version and its content, in a row that has `queries.CONCEPT`.

    Raises:
        StoreUnusableError: The content is not what was written.
    """
    if not intact(row):
        raise StoreUnusableError(
            f"the content {row['id']} is damaged: its checksum is wrong. Restore the database from a backup."
        )
    content = Content(
        facts=_facts(row),
        vector=np.frombuffer(row["vector"], "<f4"),
        examples=_examples(row["examples"]),
        negatives=_examples(row["negatives"]),
    )
    return StoredConcept(version_of(row), content)


def intact(row: Row) -> bool:
    """Whether a content is what was written."""
    found: int = row["checksum"]
    return found == _checksum(row)


def content_parameters(content: Content) -> dict[str, Any]:
    """The columns of a content."""
    facts = content.facts
    height, width = facts.input_size or (None, None)
    columns = {
        "id": facts.id,
        "model_fingerprint": facts.model_fingerprint,
        "resize": facts.resize,
        "input_height": height,
        "input_width": width,
        "example_count": facts.example_count,
        "negative_count": facts.negative_count,
        "spread": facts.spread,
        "content_digest": facts.content_digest,
        "imported": facts.imported,
        "vector": np.ascontiguousarray(content.vector, "<f4").tobytes(),
        "examples": _json_of(content.examples),
        "negatives": _json_of(content.negatives),
    }
    return {**columns, "checksum": _checksum(columns)}


def version_parameters(registration: Registration, number: int, time: datetime) -> dict[str, Any]:
    """The columns of a version."""
    return {
        "model": registration.model,
        "name": registration.name,
        "number": number,
        "description": registration.description,
        "labels": json.dumps(dict(registration.labels or {}), ensure_ascii=False),
        "create_time": time.astimezone(UTC).isoformat(timespec="microseconds"),
        "content_id": registration.content.facts.id,
    }


def label_digest(key: str, value: str) -> str:
    """What a label is found by."""
    return hashlib.sha256(json.dumps([key, value]).encode()).hexdigest()


def label_digests(labels: Mapping[str, str]) -> list[str]:
    """What labels are found by."""
    return [label_digest(key, value) for key, value in labels.items()]


def _facts(row: Row) -> ConceptFacts:
    height, width = row["input_height"], row["input_width"]
    return ConceptFacts(
        id=row["id"],
        model_fingerprint=row["model_fingerprint"],
        resize=row["resize"],
        input_size=None if height is None else (height, width),
        example_count=row["example_count"],
        negative_count=row["negative_count"],
        spread=row["spread"],
        content_digest=row["content_digest"],
        imported=bool(row["imported"]),
    )


def _json_of(examples: Sequence[Example]) -> str:
    return json.dumps([[example.digest, float(example.cosine)] for example in examples], separators=(",", ":"))


def _examples(text: str) -> tuple[Example, ...]:
    return tuple(Example(digest, cosine) for digest, cosine in json.loads(text))


def _checksum(row: Row) -> int:
    short = [row[column] for column in _SHORT_COLUMNS] + [bool(row["imported"])]
    crc = zlib.crc32(row["vector"], zlib.crc32(json.dumps(short).encode()))
    return zlib.crc32(row["negatives"].encode(), zlib.crc32(row["examples"].encode(), crc))
