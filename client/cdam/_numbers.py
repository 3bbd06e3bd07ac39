"""Whole numbers, as callers have them: Python's, numpy's, torch's, or anything else that may be an index."""

import operator
from typing import Any, SupportsIndex

import numpy as np


def whole(value: SupportsIndex, name: str) -> int:
    """The number as an int.

    Args:
        value: An integer of any library, of no axes; a bool is none.
        name: What it is called in the error.

    Raises:
        TypeError: if it is no integer.
    """
    if not is_whole(value):
        raise TypeError(f"{name} is a whole number, not {_kind(value)}")
    return operator.index(value)


def is_whole(value: Any) -> bool:
    """Whether a value is one whole number."""
    if isinstance(value, bool | np.bool_) or "bool" in str(getattr(value, "dtype", "")):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _kind(value: object) -> str:
    shape = getattr(value, "shape", ())
    of = f" of {value.dtype}" if hasattr(value, "dtype") and not isinstance(value, np.generic) else ""
    return f"{type(value).__name__}{of}{f' of shape {tuple(shape)}' if shape else ''}"
