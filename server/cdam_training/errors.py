"""What can be wrong with a dataset.

ValueError
  DatasetError    a row, a column, a file or a split; one line that says where, what, and what to do
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

from PIL import Image

from cdam_server.load_error import few

UNREADABLE: Final = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises of files that are no images, or damaged."""


class DatasetError(ValueError):
    """A dataset can't be trained on as it is asked for."""


def meant(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that there is not: the one that may be meant, or some that there are."""
    known = list(names)
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {few(map(shown, known), 8)}"


def shown(name: str) -> str:
    """A name of a file or a column as it is, or where that is not one line of what can be seen, with escapes."""
    return name if name.isprintable() else ascii(name)
