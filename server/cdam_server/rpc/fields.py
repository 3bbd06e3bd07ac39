"""From the service's names of a request's parts to the API's paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from cdam_server.errors import ServiceError

_OF_TARGET: Final = {
    "name": "output.name",
    "index": "output.index",
    "k": "top_k.k",
    "vector": "concept.vector",
    "positive": "contrast.positive",
    "negative": "contrast.negative",
}
_INPUT_SIZE: Final = "preprocessing.input_size"


@contextmanager
def named(path: Callable[[str], str]) -> Iterator[None]:
    """Errors with the field as the API's callers know it.

    Args:
        path: Of a field, the API's path.
    """
    try:
        yield
    except ServiceError as error:
        if error.field:
            error.field = path(error.field)
        raise


def of_explain(field: str) -> str:
    """A part of an Explain request."""
    first, _, rest = field.partition(".")
    if first == "input_size":
        return _INPUT_SIZE
    return f"{first}.{_of_target(rest)}" if rest and first.startswith("targets[") else field


def of_registration(field: str) -> str:
    """A part of a registration: of its specification, or of its images."""
    if field == "input_size":
        return f"spec.{_INPUT_SIZE}"
    return f"spec.{field}" if field in {"expected_version", "name", "vector", "model_fingerprint"} else field


def of_protocol(field: str) -> str:
    """A part of an evaluation's protocol."""
    first, _, rest = field.partition(".")
    if first == "input_size":
        return f"protocol.{_INPUT_SIZE}"
    if first == "resamples":
        return "protocol.bootstrap_resamples"
    return f"protocol.{first}.method.{rest}" if rest and first.startswith("methods[") else f"protocol.{field}"


def of_sample(field: str) -> str:
    """A part of a sample."""
    first, _, rest = field.partition(".")
    return f"sample.{first}.{_of_target(rest)}" if rest and first in {"target", "wrong_target"} else f"sample.{field}"


def of_page(field: str) -> str:
    """A part of a request for a page."""
    return "page_token" if field == "token" else field


def _of_target(field: str) -> str:
    return ".".join(_OF_TARGET.get(part, part) for part in field.split("."))
