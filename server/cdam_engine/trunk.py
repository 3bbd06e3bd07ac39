"""How the trunk is run: in which precision, compiled or not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from cdam_engine.attention import hooks_on
from cdam_engine.families import TrunkOutput
from cdam_engine.tree import Tree
from cdam_engine.vit import SplitViT

Precision = Literal["fp32", "bf16"]


class Trunk:
    """The trunk of a model without gradients.

    In bf16 it runs a copy of the model, which is made again when the model's modules, hooks or weights have changed.

    Args:
        vit: The model.
        precision: "fp32": as the model is; "bf16": matrix products in bfloat16, the residual stream and norms in
            float32. What is differentiated afterwards is never in bfloat16.
        compile: Whether to compile it, for the model's own input size and the given batch sizes; other inputs run
            as they would without.
        batch_sizes: Sizes that batches are filled up to when compiled.
    """

    def __init__(
        self,
        vit: SplitViT,
        precision: Precision = "fp32",
        *,
        compile: bool = False,  # noqa: A002 - torch's name for it
        batch_sizes: Sequence[int] = (),
    ) -> None:
        self._vit = vit
        self._tree = Tree(vit.model)
        self._precision = precision
        self._model = vit
        self._copied: _State | None = None
        self._follow()
        self._batch_sizes = sorted(batch_sizes)
        self._compiled: Callable[[Tensor], TrunkOutput] | None = None
        if compile:
            # dynamo counts the graphs of all models together, since they share this class's code.
            torch._dynamo.config.recompile_limit += len(self._batch_sizes)  # noqa: SLF001
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # noqa: SLF001 - hooks may come later, and count then
            compiled: Any = torch.compile(self._run, dynamic=False)
            self._compiled = compiled

    @torch.no_grad()  # in inference mode, what a model caches of its positions could never be differentiated again
    def __call__(self, pixels: Tensor) -> TrunkOutput:
        """Run it.

        Args:
            pixels: Normalised input, shape (B, C, H, W), in the model's dtype and on its device.
        """
        self._follow()
        size = next((size for size in self._batch_sizes if size >= len(pixels)), None)
        if self._compiled is None or size is None or tuple(pixels.shape[-2:]) != self._vit.input_size:
            return self._run(pixels)
        filled = torch.cat((pixels, pixels[-1:].expand(size - len(pixels), -1, -1, -1)))
        out = self._compiled(filled)
        return replace(out, residual=out.residual[: len(pixels)], tokens=out.tokens[: len(pixels)])

    def _follow(self) -> None:
        """In bfloat16, make the copy again if somebody has changed the model since."""
        if self._precision == "bf16":
            state = _State.of(self._tree)
            if self._copied is None or not state.equals(self._copied):
                self._model, self._copied = SplitViT(_in_bfloat16(self._vit.model)), state

    def _run(self, pixels: Tensor) -> TrunkOutput:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            out = self._model.trunk(pixels)
        if self._precision == "fp32":
            return out
        return replace(
            out,
            residual=out.residual.to(pixels.dtype),
            tokens=out.tokens.to(pixels.dtype),
            attention_arguments={
                name: value.to(pixels.dtype) if isinstance(value, Tensor) else value
                for name, value in out.attention_arguments.items()
            },
        )


class _State(NamedTuple):
    """What a copy of a model is a copy of.

    Attributes:
        things: Modules, hooks, weights and buffers.
        counts: How many weights, and buffers, each module has.
        versions: How often each weight and buffer was written to; what was written through `.data` does not count.
    """

    things: list[object]
    counts: list[int]
    versions: list[int]

    @classmethod
    def of(cls, tree: Tree) -> _State:
        """The state of a model as it is now."""
        tensors, counts = tree.tensors()
        hooks = [its for module in tree.hooked() for its in (module, *hooks_on(module))]
        things = [*tree.modules(), *tree.own("forward"), *hooks, *tensors]
        return cls(things, counts, [tensor._version for tensor in tensors])  # noqa: SLF001

    def equals(self, other: _State) -> bool:
        """Whether nobody has changed anything in between."""
        same = self[1:] == other[1:] and len(self.things) == len(other.things)
        return same and all(map(is_, self.things, other.things))


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """What "auto" means on a device: bfloat16 where its matrix units have it, else float32.

    Raises:
        ValueError: There is no such precision.
    """
    if precision == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
        return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"  # noqa: SLF001
    if precision not in get_args(Precision):
        raise ValueError(f"a precision is fp32, bf16 or auto, not {precision!r}")
    return "fp32" if precision == "fp32" else "bf16"


def _in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy whose linear maps are in bfloat16; under autocast norms stay as they are."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)
    return copied
