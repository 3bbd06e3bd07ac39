"""Concepts: found by name or id for whoever explains with them, listed, deleted; `registration` makes them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import structlog

from cdam_server.compute.facts import ModelFacts, Models
from cdam_server.errors import (
    AbortedError,
    AlreadyExistsError,
    ExhaustedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from cdam_server.store import (
    ConceptStore,
    NameTakenError,
    StoreBusyError,
    StoredConcept,
    StoreFullError,
    StoreUnavailableError,
    StoreUnusableError,
    StoreUnwritableError,
    Version,
    VersionMismatchError,
)

PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000
_MAX_PAGE_BYTES: Final = 1 << 20  # gRPC's clients take 4 MiB if they are told nothing
_VERSION_BYTES: Final = 512
_MAX_TOKEN: Final = 8192  # of the longest names, every character escaped
_UNUSABLE_RETRY_SECONDS: Final = 30.0
_log = structlog.get_logger("cdam.concepts")


@dataclass(frozen=True)
class ConceptName:
    """A concept by its name.

    Attributes:
        name: The name.
        model: Its model; empty: the default one.
    """

    name: str
    model: str = ""


@dataclass(frozen=True)
class ConceptId:
    """A concept by the id of its content."""

    id: str


@dataclass(frozen=True)
class Page:
    """A part of a list.

    Attributes:
        versions: Newest versions, by model and name.
        next_token: Where the next page begins; empty on the last.
    """

    versions: Sequence[Version]
    next_token: str


class ConceptUseCase:
    """All about concepts that are stored.

    Args:
        models: The models.
        store: Where concepts are kept.
    """

    def __init__(self, models: Models, store: ConceptStore) -> None:
        self._models = models
        self._store = store

    async def get(self, selector: ConceptName | ConceptId) -> StoredConcept:
        """One concept.

        Raises:
            NotFoundError: There is none.
            UnavailableError: The store is down.
        """
        match selector:
            case ConceptId(concept_id):
                with store_errors():
                    found = await self._store.by_id(concept_id)
                if found is None:
                    raise NotFoundError("concept", concept_id, f"there is no concept of id {concept_id!r}", field="")
            case ConceptName(name, model):
                its_model = self._model(model)
                with store_errors():
                    found = await self._store.by_name(its_model, name)
                if found is None:
                    raise _no_such_name(name, its_model)
        return found

    async def find(self, model: ModelFacts, selector: ConceptName | ConceptId) -> StoredConcept:
        """A concept that the model can be explained with.

        Raises:
            NotFoundError: There is none.
            FailedPreconditionError: It lies in another model's latent space.
            UnavailableError: The store is down, and the concept was not asked for before.
        """
        found = await self.get(selector)
        fingerprint = found.content.facts.model_fingerprint
        check_fingerprint(self._models, model, fingerprint, f"concept {found.version.name!r}")
        return found

    async def page(self, *, model: str, labels: Mapping[str, str], size: int, token: str) -> Page:
        """Newest versions of names in use, a page at a time.

        Args:
            model: Only of this model; empty: of all.
            labels: Only those that have all these.
            size: Most of a page; 0: `PAGE_SIZE`. More than `MAX_PAGE_SIZE`, or about a MiB, are not given.
            token: Of the previous page; empty: the first page.

        Raises:
            InvalidArgumentError: The token is not of this list.
            UnavailableError: The store is down.
        """
        size = min(size or PAGE_SIZE, MAX_PAGE_SIZE)
        question = _digest([model, dict(labels)])
        with store_errors():
            found = await self._store.page(
                model=model, labels=labels, after=_behind(token, question) if token else None, limit=size + 1
            )
        versions = _first_bytes(found[:size])
        more = len(found) > len(versions)
        return Page(versions, _token(versions[-1], question) if more else "")

    async def delete(self, name: ConceptName, expected_version: int | None) -> Version:
        """Free a name; content stays readable by its id.

        Raises:
            NotFoundError: The name is free.
            AbortedError: Its newest version is another.
            UnavailableError: The store is down.
        """
        with store_errors():
            deleted = await self._store.delete(name.model, name.name, expected_version)
        if deleted is None:
            raise _no_such_name(name.name, name.model)
        return deleted

    def _model(self, name: str) -> str:
        return name or self._models.default.name


def check_fingerprint(models: Models, model: ModelFacts, fingerprint: str, subject: str) -> None:
    """Refuse what was made for other weights: in another latent space a vector means nothing.

    Args:
        models: The models, of which another may be the right one.
        model: The model.
        fingerprint: Of the model that it was made for.
        subject: What it is, for the message.

    Raises:
        FailedPreconditionError: The fingerprint is not the model's.
    """
    own, name = model.fingerprint, model.name
    if fingerprint == own:
        return
    right = [repr(other.name) for other in models if other.fingerprint == fingerprint]
    message = (
        f"{subject} is of model {' or '.join(right)}, not of {name!r}"
        if right
        else (
            f"{subject} was made for other weights (fingerprint {fingerprint[:12]}...) than those of model {name!r} "
            f"({own[:12]}...), and can't be converted: register its images for this model"
        )
    )
    facts = {"model": name, "model_fingerprint": own, "concept_fingerprint": fingerprint}
    raise FailedPreconditionError("CONCEPT_OF_ANOTHER_MODEL", message, field="", **facts)


@contextmanager
def store_errors() -> Iterator[None]:
    """The store's errors, in the service's words."""
    try:
        yield
    except NameTakenError as error:
        newest = error.newest
        message = (
            f"{newest.name!r} of model {newest.model!r} is taken: version {newest.number} has other content; `replace` "
            "makes a new version"
        )
        raise AlreadyExistsError("concept", newest.name, message, field="name") from error
    except VersionMismatchError as error:
        message = (
            f"the newest version is {error.current}" if error.current else "the name is free, its version counts as 0"
        )
        current = str(error.current)
        raise AbortedError("VERSION_MISMATCH", message, "expected_version", current_version=current) from error
    except StoreBusyError as error:
        raise UnavailableError(
            "the store of concepts is busy, or can't be written to now", error.retry_after
        ) from error
    except StoreUnavailableError as error:
        raise UnavailableError("the store of concepts can't be reached", error.retry_after) from error
    except StoreFullError as error:
        raise ExhaustedError("STORE_FULL", "the store of concepts has no space left") from error
    except StoreUnwritableError as error:
        _log.error("store can't be written", reason=str(error))
        message = "this server has no place to store concepts; its log says why"
        raise FailedPreconditionError("STORE_READ_ONLY", message) from error
    except StoreUnusableError as error:
        _log.error("store can't be used", reason=str(error))
        message = "the store of concepts can't be used; the server's log says why"
        raise UnavailableError(message, _UNUSABLE_RETRY_SECONDS) from error


def _first_bytes(versions: Sequence[Version]) -> Sequence[Version]:
    """As many of them as a message should hold, and one at least."""
    total = 0
    for count, version in enumerate(versions):
        words = [version.description, *version.labels, *version.labels.values()]
        total += _VERSION_BYTES + sum(len(word.encode()) for word in words)
        if count and total > _MAX_PAGE_BYTES:
            return versions[:count]
    return versions


def _no_such_name(name: str, model: str) -> NotFoundError:
    return NotFoundError("concept", name, f"model {model!r} has no concept {name!r}", field="")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _token(last: Version, question: str) -> str:
    """Says that the list which answers this question continues after this version."""
    return base64.urlsafe_b64encode(json.dumps([question, last.model, last.name]).encode()).decode()


def _behind(token: str, question: str) -> tuple[str, str]:
    """(model, name) behind which the page begins.

    Raises:
        InvalidArgumentError: The token is not one of this question.
    """
    if len(token) > _MAX_TOKEN:
        raise InvalidArgumentError("token", "is not one that this server gave out")
    try:
        asked, model, name = map(str, json.loads(base64.b64decode(token, altchars=b"-_", validate=True)))
        text = (model + name).encode()  # no lone surrogates
    except (binascii.Error, ValueError, TypeError, RecursionError):
        text = b"\0"
    if b"\0" in text:
        raise InvalidArgumentError("token", "is not one that this server gave out")
    if asked != question:
        raise InvalidArgumentError("token", "is of a list with another `model` or other `labels`")
    return model, name
