"""The store's operations, statement by statement; the same for every database.

Each is a generator: it yields a statement, is sent the rows that it found, and returns the operation's result. A database
runs it within one transaction, in whatever way it talks (`sqlite.py` in a thread, `postgres.py` in the event loop).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypeVar

from cdam_server.store import queries, records
from cdam_server.store.protocol import NameTakenError, Registration, StoredConcept, Version, VersionMismatchError
from cdam_server.store.records import Row

Result = TypeVar("Result")


@dataclass(frozen=True)
class Statement:
    """SQL in the spelling of `queries`, and its parameters."""

    sql: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


Operation: TypeAlias = Generator[Statement, Sequence[Row], Result]


def _now() -> datetime:
    return datetime.now(UTC)


def register(registration: Registration, clock: Callable[[], datetime] = _now) -> Operation[tuple[StoredConcept, bool]]:
    """See `ConceptStore.register`."""
    key = {"model": registration.model, "name": registration.name}
    yield Statement(queries.LOCK, key)
    newest = _version((yield Statement(queries.NEWEST, key)))
    created = _is_new(registration, newest)
    if created:
        rows = yield Statement(queries.COUNT, key)
        number = rows[0]["newest"] + 1
        yield Statement(queries.INSERT_CONTENT, records.content_parameters(registration.content))
        yield Statement(queries.INSERT_VERSION, records.version_parameters(registration, number, clock()))
        yield Statement(queries.TAKE, {**key, "number": number})
        yield Statement(queries.DELETE_LABELS, key)
        for digest in records.label_digests(registration.labels or {}):
            yield Statement(queries.INSERT_LABEL, {**key, "digest": digest})
    (row,) = yield Statement(queries.BY_NAME, key)
    return records.stored_of(row), created


def newest(model: str, name: str) -> Operation[Version | None]:
    """See `ConceptStore.newest`."""
    return _version((yield Statement(queries.NEWEST, {"model": model, "name": name})))


def by_name(model: str, name: str) -> Operation[StoredConcept | None]:
    """See `ConceptStore.by_name`."""
    return _stored((yield Statement(queries.BY_NAME, {"model": model, "name": name})))


def by_id(concept_id: str) -> Operation[StoredConcept | None]:
    """See `ConceptStore.by_id`."""
    return _stored((yield Statement(queries.BY_ID, {"id": concept_id})))


def page(
    model: str, labels: Mapping[str, str], after: tuple[str, str] | None, limit: int
) -> Operation[Sequence[Version]]:
    """See `ConceptStore.page`."""
    digests = records.label_digests(labels)
    rows = yield Statement(*queries.page(model=model, label_digests=digests, after=after, limit=limit))
    return [records.version_of(row) for row in rows]


def delete(model: str, name: str, expected_version: int | None) -> Operation[Version | None]:
    """See `ConceptStore.delete`."""
    key = {"model": model, "name": name}
    yield Statement(queries.LOCK_USED, key)
    newest = _version((yield Statement(queries.NEWEST, key)))
    if newest is None:
        return None
    if expected_version not in {None, newest.number}:
        raise VersionMismatchError(newest.number)
    yield Statement(queries.FREE, key)
    yield Statement(queries.DELETE_LABELS, key)
    return newest


def _is_new(registration: Registration, newest: Version | None) -> bool:
    """Whether a registration makes a new version; raises if it may not."""
    same_content = newest is not None and newest.facts.id == registration.content.facts.id
    if newest is not None and same_content and (not registration.replace or _same_words(registration, newest)):
        return False
    current = newest.number if newest is not None else 0
    if registration.expected_version not in {None, current}:
        raise VersionMismatchError(current)
    if newest is not None and not registration.replace:
        raise NameTakenError(newest)
    return True


def _same_words(registration: Registration, newest: Version) -> bool:
    return newest.description == registration.description and newest.labels == dict(registration.labels or {})


def _version(rows: Sequence[Row]) -> Version | None:
    return records.version_of(rows[0]) if rows else None


def _stored(rows: Sequence[Row]) -> StoredConcept | None:
    return records.stored_of(rows[0]) if rows else None
