"""What is wrong with settings, in words for people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Final

from pydantic import BaseModel, ValidationError

_MOST: Final = 390  # characters of a line: what is longer is not read


def one_line(error: ValidationError, settings: type[BaseModel]) -> str:
    """All that is wrong, in one line of less than 400 characters.

    Args:
        error: What pydantic found.
        settings: The class that was validated, for the names of its settings.
    """
    text = "; ".join(problems(error, settings))
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."


def problems(error: ValidationError, settings: type[BaseModel]) -> Iterator[str]:
    """Each thing that is wrong once, with the setting in front."""
    told: set[str] = set()
    for item in error.errors(include_url=False, include_context=False):
        path = [part for part in item["loc"] if not isinstance(part, str) or part.isidentifier()]
        text = _words(item["type"], item["msg"], item.get("input"), path, settings)
        where = _where(path)
        line = f"{where}{'' if text.startswith('[') or not where else ': '}{text}"
        if line not in told:
            told.add(line)
            yield line


def unknown(name: str, known: Iterable[str]) -> str:
    """Says that a name is none of those that there are, and which one may have been meant."""
    names = sorted(known)
    similar = difflib.get_close_matches(name, names, n=2)
    return f"is it {' or '.join(similar)}?" if similar else f"there are {', '.join(names)}"


def _where(path: Iterable[Any]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _words(kind: str, message: str, given: object, path: list[Any], settings: type[BaseModel]) -> str:
    found = _shown(given)
    words = {
        "missing": "must be given",
        "model_type": f"must be settings with their values, not {found}",
        "dict_type": f"must be settings with their values, not {found}",
        "string_type": f"must be text, not {found}: put it in quotes",
        "bool_parsing": f"must be true or false, not {found}",
        "bool_type": f"must be true or false, not {found}",
        "string_too_short": "must not be empty",
        "int_parsing": f"must be a whole number, not {found}",
        "int_type": f"must be a whole number, not {found}",
        "int_from_float": f"must be a whole number, not {found}",
        "float_parsing": f"must be a number, not {found}",
        "float_type": f"must be a number, not {found}",
        "tuple_type": f"must be a list, not {found}",
        "list_type": f"must be a list, not {found}",
        "path_type": f"must be a path, not {found}",
        "value_error": message.removeprefix("Value error, "),
    }
    if kind == "extra_forbidden":
        return f"there is no such setting; {unknown(str(path[-1]), _fields(settings, path[:-1]))}"
    return words.get(kind, f"{message.replace('Input should', 'must', 1)}, not {found}")


def _fields(settings: type[BaseModel], path: Iterable[Any]) -> Iterable[str]:
    for part in path:
        field = settings.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            settings = field.annotation
    return settings.model_fields


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
