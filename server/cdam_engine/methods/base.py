"""What all methods have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

if TYPE_CHECKING:
    from cdam_engine.batch import Batch
    from cdam_engine.targets import Target
    from cdam_engine.vit import SplitViT

Quadrature = Literal["riemann_right", "gauss_legendre"]


@dataclass(frozen=True)
class Noise:
    """Standard deviation of Gaussian noise.

    Attributes:
        level: The standard deviation, at least 0.
        relative: True: as a fraction of max - min of what the noise is added to, image by image; False: in its units.
    """

    level: float
    relative: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.level < float("inf"):
            raise ValueError(f"a standard deviation is finite and at least 0, not {self.level}")

    def sigma(self, values: Tensor) -> Tensor:
        """The standard deviation for each image of `values` (B, ...), shape (B,)."""
        flat = values.flatten(1)
        spread = flat.amax(1) - flat.amin(1)
        return self.level * (spread if self.relative else spread.new_ones(len(flat)))


@dataclass(frozen=True, eq=False)
class Scores:
    """What a method found out about B images and K targets each (K = 1 for methods that need no target).

    Attributes:
        scores: Of all tokens, prefix tokens first, shape (B, K, N); or of the patches alone.
        has_prefix: Whether they are of all tokens.
        value: The part of the scores that goes through the attention's values, same shape, if asked for.
        standard_error: Of the scores, same shape, for the mean over draws.
        residual: sum of all scores - change of the target, shape (B, K), for path integrals.
        steps: Points on the path for each image and target, for path integrals.
    """

    scores: Tensor
    has_prefix: bool = True
    value: Tensor | None = None
    standard_error: Tensor | None = None
    residual: Tensor | None = None
    steps: list[list[int]] | None = None


class Method(ABC):
    """A way to explain; its fields are its parameters.

    Attributes:
        kind: Its name.
        needs_target: False if its map is the same for every target.
        reads_tokens: True if it starts from the trunk's output (which a token cache may have); False if it runs the
            model itself and lets the batch learn latents and logits on the way.
    """

    kind: ClassVar[str]
    needs_target: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = True

    @property
    def variant(self) -> str:
        """What of its parameters decides which models can serve it; empty: nothing."""
        return ""

    @classmethod
    def variants(cls) -> Sequence[Method]:
        """One of each variant; the kind can be made without parameters."""
        return (cls(),)

    def check(self, vit: SplitViT) -> None:  # noqa: B027 - most methods serve every model
        """Refuse a model that the method is not defined for.

        Raises:
            UnsupportedMethodError: With the reason.
        """

    def passes(self, targets: int, patches: int) -> int:
        """How often the whole model runs for one image, over and above the trunk that all methods share.

        Args:
            targets: Number of scalar functions that are explained.
            patches: Number of patches.
        """
        return 0

    def gradients(self, targets: int) -> int:
        """How many gradients through the tail it takes for one image.

        Args:
            targets: Number of scalar functions that are explained.
        """
        return 0

    @abstractmethod
    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        """Scores of some images of a batch.

        Args:
            batch: The batch.
            images: Indices of the images, B of them; an image may occur more than once, with other targets.
            wanted: The targets of each, all standing for the same number K of scalar functions.
        """


def check_seed(seed: int) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        ValueError: It is negative, or has more than 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is a whole number of 64 bits, not {seed}")


def at_least_one(name: str, number: int) -> None:
    """Refuse a number of draws or steps that is no number.

    Raises:
        ValueError: It is less than 1.
    """
    if number < 1:
        raise ValueError(f"{name}: {number}, but at least 1 is needed")
