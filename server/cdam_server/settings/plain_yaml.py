"""YAML read as people write it.

YAML 1.1 takes `no` for False, `2024-05-01` for a date and `1_000` for a number, reads `1e-6` as text, and lets the last
of two equal keys win. Here texts stay as they are written, numbers are numbers, and a repeated key is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final

import yaml

_TEXT: Final = "tag:yaml.org,2002:str"
_NULL: Final = "tag:yaml.org,2002:null"
_FLOAT: Final = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Also takes numbers with an exponent and without a point."""


_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path, texts: AbstractSet[str] = frozenset()) -> Any:
    """What a YAML file holds.

    Args:
        path: The file, in UTF-8.
        texts: Keys whose values, and the items of whose lists, are texts as they are written.

    Raises:
        ValueError: The file can't be read, is no YAML, or repeats a key; in one line.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            for mapping in _mappings(root, set()):
                _check_keys(mapping)
                for key, value in mapping.value:
                    if key.value in texts:
                        _keep_as_written(value)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _mappings(node: yaml.Node, seen: set[int]) -> Iterator[yaml.MappingNode]:
    """Every mapping of a document once, also those that aliases repeat."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _mappings(item, seen)


def _check_keys(mapping: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} is there twice")
            seen.add(key.value)


def _keep_as_written(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode):
        if node.tag != _NULL:  # no value at all
            node.tag = _TEXT
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if isinstance(item, yaml.ScalarNode):
                item.tag = _TEXT
