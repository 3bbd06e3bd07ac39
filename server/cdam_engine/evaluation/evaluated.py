"""What an evaluation compares: methods, and maps that explain nothing."""

from __future__ import annotations

from enum import Enum

from cdam_engine.methods.base import Method


class Anchor(Enum):
    """A map that is no explanation, for scale."""

    RANDOM = "random"
    """Independent standard normal scores."""
    MASK = "mask"
    """The share of each patch that the target's object covers."""
    INVERTED_MASK = "inverted_mask"
    """The share that it does not."""


Evaluated = Method | Anchor
"""What an evaluation compares."""
