"""The tensors of a foreign checkpoint, each used or left out by name: nothing is dropped in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

StateDict = dict[str, Tensor]


class ConversionError(ValueError):
    """A checkpoint is of no model that timm has, or not what its configuration says; one line, with the reason."""


class Tensors:
    """Tensors by name, handed out once each.

    Args:
        tensors: What the checkpoint holds.
        renamings: Pairs of a regular expression and its replacement, applied to every name in order. They bring the
            names of all versions of a library to one.

    Attributes:
        left_out: What was left out and why, one line each.

    Raises:
        ConversionError: Two tensors get the same name.
    """

    def __init__(self, tensors: Mapping[str, Tensor], renamings: Sequence[tuple[str, str]] = ()) -> None:
        self.left_out: list[str] = []
        self._tensors: StateDict = {}
        origins: dict[str, str] = {}
        for origin, tensor in tensors.items():
            name = origin
            for pattern, replacement in renamings:
                name = re.sub(pattern, replacement, name)
            if name in origins:
                raise ConversionError(f"two tensors are {name}: {origins[name]} and {origin}")
            origins[name] = origin
            self._tensors[name] = tensor

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name that was not taken yet."""
        return name in self._tensors

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name.

        Args:
            name: After renaming.
            shape: What it must be; any if left out.

        Raises:
            ConversionError: There is none, or its shape is another.
        """
        if name not in self._tensors:
            raise ConversionError(f"{name} is missing")
        tensor = self._tensors.pop(name)
        if shape and tuple(tensor.shape) != shape:
            raise ConversionError(f"{name} is {tuple(tensor.shape)} in place of {shape}")
        return tensor

    def take_layer(self, name: str) -> StateDict:
        """Weight and bias of a layer, the bias only if there is one."""
        layer = {"weight": self.take(f"{name}.weight")}
        if f"{name}.bias" in self:
            layer["bias"] = self.take(f"{name}.bias")
        return layer

    def size(self, name: str, dimension: int) -> int:
        """One dimension of a tensor that is not taken yet.

        Raises:
            ConversionError: There is no such tensor, or it has fewer dimensions.
        """
        if name not in self._tensors:
            raise ConversionError(f"{name} is missing")
        shape = self._tensors[name].shape
        if len(shape) <= dimension:
            raise ConversionError(f"{name} is {tuple(shape)}, with too few dimensions")
        return int(shape[dimension])

    def count(self, pattern: str) -> int:
        """How many numbers the first group of a pattern takes on, which must be 0, 1, 2, ...

        Raises:
            ConversionError: Numbers are left out.
        """
        numbers = {int(found[1]) for name in self._tensors if (found := re.match(pattern, name))}
        if numbers != set(range(len(numbers))):
            raise ConversionError(f"the layers are numbered {sorted(numbers)}, with gaps")
        return len(numbers)

    def leave_out(self, pattern: str, because: str) -> None:
        """Leaves out what a regular expression matches from the start; says so only if there was any."""
        names = [name for name in self._tensors if re.match(pattern, name)]
        for name in names:
            del self._tensors[name]
        if names:
            self.left_out.append(f"left out: {because} ({few(names)})")

    def refuse(self, pattern: str, because: str) -> None:
        """Refuses what a regular expression matches from the start.

        Raises:
            ConversionError: There is such a tensor.
        """
        if names := [name for name in self._tensors if re.match(pattern, name)]:
            raise ConversionError(f"{because} ({few(names)})")

    def has(self, pattern: str) -> bool:
        """Whether there are tensors whose names a regular expression matches from the start."""
        return any(re.match(pattern, name) for name in self._tensors)

    def check_all_used(self) -> None:
        """To be called last.

        Raises:
            ConversionError: There are tensors that nobody asked for.
        """
        if self._tensors:
            raise ConversionError(f"the checkpoint holds more than the model: {few(self._tensors)}")


def few(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
