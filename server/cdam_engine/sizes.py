"""Which inputs a model takes, and the patches that they have."""

from __future__ import annotations

from dataclasses import dataclass

from cdam_engine.families import Grid


@dataclass(frozen=True)
class InputSizes:
    """Which inputs a model takes, (height, width) in pixels.

    Attributes:
        own: The model's own.
        patch_size: Pixels between neighbouring patches.
        flexible: Whether it takes others than its own.
        pads: Whether it fills up what is no multiple of the patch size.
    """

    own: tuple[int, int]
    patch_size: tuple[int, int]
    flexible: bool
    pads: bool

    def grid(self, input_size: tuple[int, int]) -> Grid:
        """The patch grid of an input.

        Raises:
            ValueError: The model does not take inputs of this size.
        """
        size, patch = tuple(input_size), self.patch_size
        if size != self.own and not self.flexible:
            raise ValueError(f"this model takes {_times(self.own)} pixels only, not {_times(size)}")
        if min(size) < 1 or (not self.pads and (size[0] % patch[0] or size[1] % patch[1])):
            raise ValueError(f"{_times(size)} pixels is not a multiple of the patch size {_times(patch)}")
        return Grid(-(-size[0] // patch[0]), -(-size[1] // patch[1]))


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
