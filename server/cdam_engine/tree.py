"""All modules of a model, looked through before every explanation: somebody may have changed any of them since."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, Final

from torch import Tensor, nn

_parts: Final = itemgetter("_modules")
_training: Final = itemgetter("training")
_hooks: Final = itemgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Tree:
    """The modules of a model in one list, which is made again when any of them has other parts than it had.

    All of them are looked at each time, by what runs in C: in a third of the time of a walk from each to its parts.

    Args:
        root: The model, or a part of it.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._known: tuple[list[Any], list[dict[str, Any]], list[dict[str, Any]]] = [], [], []  # modules, theirs, parts

    def modules(self) -> list[Any]:
        """All modules that there are now, the model first; of a shared one each place."""
        modules, theirs, parts = self._known
        if not modules or list(map(_parts, theirs)) != parts:  # equal dicts hold the same objects
            modules = [self._root]
            for module in modules:  # which grows meanwhile
                modules += [part for part in module._modules.values() if part is not None]  # noqa: SLF001 - torch has no other way that is as fast
            theirs = list(map(vars, modules))
            self._known = modules, theirs, [dict(its) for its in map(_parts, theirs)]
        return modules

    def any_training(self) -> bool:
        """Whether one of them is in training mode."""
        modules = self.modules()
        try:
            return any(map(_training, self._known[1]))
        except KeyError:  # compiled ones keep it elsewhere
            return any(map(attrgetter("training"), modules))

    def hooked(self) -> Sequence[Any]:
        """Those that something hooks into."""
        modules = self.modules()
        hooks = list(map(_hooks, self._known[1]))
        if not any(chain.from_iterable(hooks)):
            return ()
        return [module for module, its in zip(modules, hooks, strict=True) if any(its)]

    def tensors(self) -> tuple[list[Tensor], list[int]]:
        """All weights and buffers, and how many each module has."""
        theirs = (self.modules(), self._known[1])[1]
        dicts: list[dict[str, Tensor | None]] = [
            *map(itemgetter("_parameters"), theirs),
            *map(itemgetter("_buffers"), theirs),
        ]
        its: Iterable[Tensor | None] = chain.from_iterable(some.values() for some in filter(None, dicts))
        return [tensor for tensor in its if tensor is not None], list(map(len, dicts))

    def own(self, name: str) -> list[Any]:
        """What each has got under a name in the place of its class's; None: nothing."""
        return [its.get(name) for its in (self.modules(), self._known[1])[1]]
