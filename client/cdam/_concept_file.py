"""Concepts as files, to be carried from server to server: a vector in safetensors, and what is known of it in JSON.

Nothing in such a file is ever executed.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np

from cdam._concepts import ConceptExample, RegisteredConcept
from cdam._encode import Resize
from cdam._errors import ConceptFileError

FORMAT = "cdam-concept-1"

_KEY = "cdam.concept"
_TENSOR = "vector"
_LARGEST = 64 * 1024 * 1024  # some half a million examples


def save_concept(concept: RegisteredConcept, path: str | os.PathLike[str]) -> Path:
    """Write a concept to a ``.safetensors`` file, which is there whole or not at all.

    Args:
        concept: A concept with its vector.
        path: The file; one that is there already is replaced.

    Returns:
        The file.

    Raises:
        ValueError: if the concept comes without its vector, as from a list.
        OSError: if the file can't be written.
    """
    from safetensors.numpy import save

    if concept.vector is None:
        raise ValueError(f"{concept!r} comes without its vector, as from a list: get it by its id")
    fields = {f.name: getattr(concept, f.name) for f in dataclasses.fields(concept) if f.name not in _NOT_SAVED}
    fields |= {
        "format": FORMAT,
        "labels": dict(concept.labels),
        "create_time": concept.create_time.isoformat(),
        "examples": [dataclasses.asdict(example) for example in concept.examples],
        "negatives": [dataclasses.asdict(example) for example in concept.negatives],
    }
    vector = np.ascontiguousarray(concept.vector, np.float32)
    content = save({_TENSOR: vector}, {_KEY: json.dumps(fields, sort_keys=True)})
    target = Path(path)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:  # which would name the draft
        raise OSError(error.errno, error.strerror, os.fspath(target)) from error
    finally:
        draft.unlink(missing_ok=True)
    return target


def load_concept(path: str | os.PathLike[str]) -> RegisteredConcept:
    """Read a concept that was exported.

    Args:
        path: The ``.safetensors`` file.

    Returns:
        The concept as it was on the server that it comes from.

    Raises:
        ConceptFileError: if the file is none, or damaged.
        OSError: if it can't be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_fifo():  # which would have to be waited for
        raise ConceptFileError(f"{path}: no file")
    with path.open("rb") as file:  # safetensors tells one OSError from another by the message alone
        size = os.fstat(file.fileno()).st_size
    if size > _LARGEST:
        raise ConceptFileError(f"{path}: {size} bytes are more than a concept has")
    try:
        with safe_open(path, framework="np") as content:
            text = (content.metadata() or {}).get(_KEY)
            if text is None:
                raise ConceptFileError(f"{path}: no concept, its metadata have no {_KEY!r}")
            if list(content.keys()) != [_TENSOR]:
                raise ConceptFileError(f"{path}: a concept has one tensor, {_TENSOR!r}, not {list(content.keys())}")
            vector = content.get_tensor(_TENSOR)
    except (SafetensorError, TypeError, ValueError) as error:
        if isinstance(error, ConceptFileError):
            raise
        raise ConceptFileError(f"{path}: no safetensors file, or a damaged one ({error})") from error
    try:
        return _concept(json.loads(text), vector)
    except _WrongError as error:
        raise ConceptFileError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # of json
        raise ConceptFileError(f"{path}: {_KEY!r} is no JSON ({error})") from error


_NOT_SAVED = frozenset({"vector", "created"})


class _WrongError(Exception):
    """What is wrong in a file."""


def _concept(fields: Any, vector: Any) -> RegisteredConcept:
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        its = fields.get("format") if isinstance(fields, dict) else None
        raise _WrongError(f"its format is {its!r}, this version reads {FORMAT!r}")
    if vector.dtype != np.float32 or vector.ndim != 1:
        raise _WrongError(f"a vector is float32 and has one axis, not {vector.dtype} of shape {vector.shape}")
    if not (np.isfinite(vector).all() and vector.any()):
        raise _WrongError("a vector is finite and not all zero")
    given = {name: _read(fields, name, reader) for name, reader in _READERS.items()}
    for side, count in (("examples", "example_count"), ("negatives", "negative_count")):
        if len(given[side]) != given[count]:
            raise _WrongError(f"{len(given[side])} {side}, but {count} is {given[count]}")
    vector.flags.writeable = False
    return RegisteredConcept(vector=vector, **given)


def _read(fields: Mapping[str, Any], name: str, reader: Callable[[Any], Any]) -> Any:
    if name not in fields:
        raise _WrongError(f"{name!r} is missing")
    try:
        return reader(fields[name])
    except (AttributeError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise _WrongError(f"{name!r} can't be {str(fields[name])[:60]!r}") from error


def _is(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not kind:  # True is no 1
            raise TypeError
        return value

    return read


_flag = _is(bool)


def _text(value: Any) -> str:
    value.encode()  # a lone surrogate is legal in JSON, and nowhere else
    return str(_is(str)(value))


def _resize(value: Any) -> str:
    if value not in get_args(Resize):
        raise ValueError
    return str(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise TypeError
    return value


def _digest(value: Any) -> str:
    if not (isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")):
        raise ValueError
    return value


def _cosine(value: Any) -> float:
    if type(value) not in {int, float} or not -1.001 <= value <= 1.001:  # NaN is neither
        raise ValueError
    return float(value)


def _labels(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise TypeError
    return MappingProxyType({_text(key): _text(word) for key, word in value.items()})


def _moment(value: Any) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError
    return moment


def _size(value: Any) -> tuple[int, int]:
    height, width = map(_count, value)
    if max(height, width) >= 2**32:
        raise ValueError
    return height, width


def _examples(value: Any) -> tuple[ConceptExample, ...]:
    return tuple(ConceptExample(_digest(example["digest"]), _cosine(example["cosine"])) for example in value)


def _or_none(reader: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else reader(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "id": _digest,
    "name": _text,
    "version": _count,
    "model": _text,
    "model_fingerprint": _text,
    "description": _text,
    "labels": _labels,
    "example_count": _count,
    "negative_count": _count,
    "spread": _or_none(_cosine),
    "content_digest": _text,
    "create_time": _moment,
    "resize": _or_none(_resize),
    "input_size": _or_none(_size),
    "examples": _examples,
    "negatives": _examples,
    "imported": _flag,
}
