"""Names of outputs, from settings and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from cdam_server.settings.load_error import LoadError

IMAGENETS: Final = ("imagenet-1k", "imagenet-12k", "imagenet-21k-goog", "imagenet-21k-miil", "imagenet-22k")
"""Names that stand for timm's lists of ImageNet classes."""


def read_names(outputs: Path | list[str] | None) -> list[str]:
    """The names that a setting gives; none if it gives none. timm is imported for its own lists alone.

    Raises:
        LoadError: A file can't be read, or holds something else than names.
    """
    if outputs is None:
        return []
    if isinstance(outputs, list):
        names = outputs
    elif str(outputs) in IMAGENETS:
        names = imagenet_names(str(outputs))
    else:
        names = _names_in_file(outputs)
    if not names:
        raise LoadError("outputs", "there are no names")
    if any(not name.strip() for name in names):
        raise LoadError("outputs", f"name {next(i for i, name in enumerate(names) if not name.strip())} is empty")
    return names


def imagenet_names(subset: str) -> list[str]:
    """Descriptions of the classes of one of timm's sets, in the order of outputs."""
    import timm.data

    names: list[str] = timm.data.ImageNetInfo(subset).label_descriptions()
    return names


def _names_in_file(path: Path) -> list[str]:
    if not path.is_file():
        raise LoadError("outputs", f"there is no file {path}; the lists that need none are {', '.join(IMAGENETS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError("outputs", f"{path} can't be read: {error}") from error
    if path.suffix != ".json":
        return [line.strip() for line in text.rstrip().splitlines()]
    try:
        return _names_in_json(json.loads(text))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise LoadError(
            "outputs",
            f"{path} must be JSON with a list of names, names by index from 0, or indices from 0 by name ({error})",
        ) from error


def _names_in_json(content: Any) -> list[str]:
    """A list; {"0": "cat"}; {"0": ["n0123", "cat"]} as in Keras; {"cat": 0}. Anything else raises."""
    if isinstance(content, dict):
        count = len(content)
        if all(isinstance(value, int) for value in content.values()):
            content = {index: name for name, index in content.items()}
        by_index = {int(index): name for index, name in content.items()}
        if sorted(by_index) != list(range(count)):
            raise ValueError(f"the indices are not 0 to {count - 1}, each once")
        content = [by_index[index] for index in range(count)]
    names = [entry[-1] if isinstance(entry, list) else entry for entry in content] if isinstance(content, list) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError("there is something else in it")
    return names
