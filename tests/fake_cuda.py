"""A GPU that computes nothing: what is asked of it has shape, type and device, and no values.

Tensors on it are torch's fake ones, all others are real. Whatever would have to wait for a GPU fails, unless it is one
copy to pinned memory with a wait for the stream thereafter; so does whatever would mix devices.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from cdam_engine.evaluation import blur
from cdam_engine.methods import draws

_aten = torch.ops.aten
_MASKS = {torch.bool, torch.uint8}


class FaultError(AssertionError):
    """Something that would wait for a GPU, or that a GPU would refuse."""


class FakeCuda(TorchDispatchMode):
    """Decides for every operator where it runs.

    Args:
        fake: Runs those on the GPU.

    Attributes:
        waits: How often the host has waited for the GPU.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.waits = 0
        self._fake = fake
        self._pinned = WeakIdKeyDictionary()
        self._on_their_way: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Called by torch in the place of every operator."""
        given = dict(kwargs or {})
        if func.namespace == "prim":  # a fake tensor is asked where it is
            return func(*args, **given)
        tensors = [its for its in tree_leaves((args, given)) if isinstance(its, Tensor)]
        place = given.get("device")
        here = place is not None and torch.device(place).type == "cuda"
        if not here and not any(isinstance(its, FakeTensor) for its in tensors):
            with unset_fake_temporarily():
                return self._on_host(func, args, given)
        on_host = [its for its in tensors if not isinstance(its, FakeTensor)]
        if func is _aten.copy_.default and args[0] in on_host:
            return self._leaves(args[0], args[1], *args[2:], **given)
        if func is _aten._to_copy.default and place is not None and not here:
            raise FaultError("a copy to the host waits for the GPU")
        if func in {_aten._to_copy.default, _aten.copy_.default}:
            if any(not given.get("non_blocking") or its not in self._pinned for its in on_host):
                raise FaultError("a copy from ordinary memory waits for the GPU")
        elif any(its.ndim for its in on_host):  # a single number is read on the host
            raise FaultError(f"{func} of tensors on {' and '.join(sorted({its.device.type for its in tensors}))}")
        if func in {_aten.index_put_.default, _aten.index_put.default} and any(
            index is not None and index.dtype in _MASKS for index in args[1]
        ):
            raise FaultError("a mask waits for the GPU, which counts it")
        if on_host:
            args, given = tree_map_only(Tensor, self._as_fake, (args, given))
        return func(*args, **given)

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    def _on_host(self, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        # Pinning asks the driver.
        if func is _aten.is_pinned.default:
            return args[0] in self._pinned
        pins = given.pop("pin_memory", False) or func is _aten._pin_memory.default
        found = args[0].clone() if func is _aten._pin_memory.default else func(*args, **given)
        if pins:
            self._pinned[found] = True
        return found

    def _leaves(self, to: Tensor, values: Tensor, non_blocking: bool = False) -> Tensor:
        """A copy from the GPU: nobody knows what it holds before the next wait."""
        if not non_blocking or to not in self._pinned:
            raise FaultError("a copy to ordinary memory waits for the GPU")
        if to.shape != values.shape or to.dtype != values.dtype:
            raise FaultError(f"a copy of {values.dtype} {tuple(values.shape)} into {to.dtype} {tuple(to.shape)}")
        with unset_fake_temporarily():
            to.fill_(float("nan") if to.is_floating_point() else -(2**15))
        self._on_their_way.append(to)
        return to

    def synchronize(self) -> None:
        """Of the one stream that there is."""
        self.waits += 1
        with unset_fake_temporarily():
            for arrived in self._on_their_way:
                arrived.zero_()
        self._on_their_way.clear()


class _Event:
    def __init__(self, **_: Any) -> None: ...

    def record(self, _stream: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _other: Any) -> float:
        return 1.0


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """A block with a GPU that computes nothing.

    What of torch is replaced asks for a driver: events, streams, and the engine that runs backward passes, in the place
    of which their steps are run one after the other.
    """
    fake = FakeTensorMode()
    cuda = FakeCuda(fake)
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda.Event", _Event))
        stack.enter_context(mock.patch("torch.cuda.current_stream", return_value=cuda))
        stack.enter_context(mock.patch("torch.autograd.grad", _grad))
        # A fake tensor's copy would be of a copy of its mode.
        stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", lambda its, _memo: torch.empty_like(its)))
        for kept in (draws._drawn, blur._blur):  # of other tests, and for other tests
            kept.cache_clear()
            stack.callback(kept.cache_clear)
        stack.enter_context(fake)
        stack.enter_context(cuda)
        yield cuda


def on_fake_cuda(model: nn.Module) -> nn.Module:
    """A copy of a model there; to be called within the block."""
    with unset_fake_temporarily():
        copied = copy.deepcopy(model)

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(moved(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
    return copied


def _grad(
    outputs: Tensor,
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | None = None,
    *,
    retain_graph: bool | None = None,
    allow_unused: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of one output."""
    wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    places = [_place(its) for its in wanted]
    flowing: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    first = torch.ones_like(outputs) if grad_outputs is None else grad_outputs
    assert first.shape == outputs.shape
    flowing[outputs.grad_fn][outputs.output_nr] = first
    with torch.no_grad():
        for node in _in_order(outputs.grad_fn):
            if flowing[node] and node.next_functions:  # else it is where gradients end
                _step(node, flowing)
    found = [flowing[node].get(number) for node, number in places]
    assert allow_unused or all(its is not None for its in found)
    for gradient, its in zip(found, wanted, strict=True):
        assert gradient is None or (gradient.shape, gradient.device) == (its.shape, its.device)
    return tuple(found)


def _place(tensor: Tensor) -> tuple[Any, int]:
    """Where a tensor's gradient arrives."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    return torch.autograd.graph.get_gradient_edge(tensor).node, 0


def _step(node: Any, flowing: dict[Any, dict[int, Tensor]]) -> None:
    """Run a step of the backward pass, and hand on what it gives."""
    sizes = [meta.shape for meta in node._input_metadata]
    given = [flowing[node].get(number) for number in range(len(sizes))]
    # A function written in Python answers for all of its arguments, of which its tensors are the first.
    given_back = node.apply(*given) if isinstance(node, torch.autograd.function.BackwardCFunction) else node(*given)
    gradients = given_back if isinstance(given_back, tuple) else (given_back,)
    for (following, number), gradient in zip(node.next_functions, gradients, strict=False):
        if following is None or gradient is None:
            continue
        fitting = gradient.sum_to_size(following._input_metadata[number].shape)
        known = flowing[following].get(number)
        flowing[following][number] = fitting if known is None else known + fitting


def _in_order(root: Any) -> list[Any]:
    """All steps, each before those that it leads to."""
    seen: set[Any] = set()
    done: list[Any] = []
    pending = [(root, False)]
    while pending:
        node, finished = pending.pop()
        if finished:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            pending.append((node, True))
            pending += [(following, False) for following, _ in node.next_functions if following is not None]
    return done[::-1]
