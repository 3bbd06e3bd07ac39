"""Concepts, as a server describes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ConceptExample:
    """An image that a concept was made of; the image itself is not kept.

    Attributes:
        digest: SHA-256 in hexadecimal of the image as it was sent: of a JPEG, PNG or WebP file, of its bytes.
        cosine: Of its latent to the mean of all examples', or of all negatives' if it is one; low for an image that
            does not belong.
    """

    digest: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class RegisteredConcept:
    """A version of a concept on a server; may be given as a target, and then is compared by the dot product.

    Versions never change: two of these are equal if they are the same version.

    Attributes:
        id: Digest of model, preprocessing and content; the same everywhere.
        name: Its name.
        version: Version under this name, from 1.
        model: Name of its model.
        model_fingerprint: That model's fingerprint.
        description: For people.
        labels: For finding it again.
        example_count: Number of examples; 0 if it was given as a vector.
        negative_count: Number of negatives.
        spread: Mean cosine of the examples to their mean, -1..1; a low one hints at a bad concept. None for a vector.
        content_digest: Digest of examples and negatives, or of the vector.
        create_time: When this version was stored, with time zone.
        vector: float32, shape (latent size), read-only; None in lists.
        resize: Which part of the examples the model saw, "model" or "squash"; None for a vector.
        input_size: (height, width) in pixels that they were brought to; None for a vector.
        examples: The examples in the order in which they were sent; empty in lists.
        negatives: The negatives, likewise.
        imported: True if all this is what an export said, and the server saw no image.
        created: Of `register_concept` and `import_concept`: False if the same was registered before and nothing
            changed; else None.
    """

    id: str
    name: str
    version: int
    model: str
    model_fingerprint: str
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    example_count: int = 0
    negative_count: int = 0
    spread: float | None = None
    content_digest: str = ""
    create_time: datetime
    vector: NDArray[np.float32] | None = field(default=None, compare=False)
    resize: str | None = None
    input_size: tuple[int, int] | None = None
    examples: tuple[ConceptExample, ...] = field(default=(), compare=False)
    negatives: tuple[ConceptExample, ...] = field(default=(), compare=False)
    imported: bool = False
    created: bool | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        spread = "" if self.spread is None else f", spread={self.spread:.3f}"
        return (
            f"{type(self).__name__}(name={self.name!r}, version={self.version}, model={self.model!r}, "
            f"id='{self.id[:12]}...', example_count={self.example_count}, "
            f"negative_count={self.negative_count}{spread})"
        )
