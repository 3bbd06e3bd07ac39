"""What makes two concepts the same: one digest of model fingerprint, preprocessing and content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_FORMAT: Final = "cdam-concept-1"  # another name whenever a recipe below changes


@dataclass(frozen=True)
class Recipe:
    """What decides about a concept's vector beside its content.

    Attributes:
        model_fingerprint: Of the model.
        resize: Which part of the images the model saw; empty for a vector.
        input_size: (height, width) in pixels of its input; None for a vector.
    """

    model_fingerprint: str
    resize: str = ""
    input_size: tuple[int, int] | None = None

    def concept_id(self, content_digest: str) -> str:
        """The id of a concept of this content."""
        return _sha256(
            {
                "format": _FORMAT,
                "model_fingerprint": self.model_fingerprint,
                "resize": self.resize,
                "input_size": self.input_size and list(self.input_size),
                "content": content_digest,
            }
        )


def digest_of_images(examples: Iterable[str], negatives: Iterable[str]) -> str:
    """The content digest of images, by their digests; their order is nothing."""
    return _sha256({"format": _FORMAT, "examples": sorted(examples), "negatives": sorted(negatives)})


def digest_of_vector(vector: NDArray[np.float32]) -> str:
    """The content digest of a vector: that of its values as little-endian float32."""
    return _sha256({"format": _FORMAT, "vector": _of_values(vector)})


def digest_of_import(
    vector: NDArray[np.float32], examples: Iterable[tuple[str, float]], negatives: Iterable[tuple[str, float]]
) -> str:
    """The content digest of a vector and what is said about its images, all of it: nobody can say something else later.

    Args:
        vector: The vector.
        examples: Digest and cosine of each.
        negatives: Likewise.
    """
    said = {"examples": sorted(examples), "negatives": sorted(negatives)}
    return _sha256({"format": _FORMAT, "vector": _of_values(vector), **said})


def _of_values(vector: NDArray[np.float32]) -> str:
    return hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()


def _sha256(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
