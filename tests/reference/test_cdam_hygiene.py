"""Nothing of an explanation outlives it, whether it succeeds or fails half-way."""

from __future__ import annotations

import contextlib
import copy
import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdam_engine import Explainer, Explanation, Output, TopK
from reference.models import BY_ID, build, images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

CASE = BY_ID["eight_outputs"]
TARGETS = [[Output(0)], [TopK(2), Output(7)]]
CALLERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": contextlib.nullcontext,
    "enable_grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
every_caller = pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)


class BrokenError(RuntimeError):
    """Raised on purpose."""


class BreaksForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise BrokenError


class _BreaksBackward(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_context: Any, *_gradients: Tensor) -> Tensor:
        raise BrokenError


class BreaksBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _BreaksBackward.apply(x)


def model_in_use(hooked: str) -> nn.Module:
    """A model of one's own, some of it frozen, some of it with gradients from elsewhere, one hook of its owner's."""
    model = copy.deepcopy(build(CASE))
    model.blocks[0].requires_grad_(requires_grad=False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.get_submodule(hooked).register_forward_hook(lambda *_: None)
    return model


@pytest.fixture
def model() -> nn.Module:
    return model_in_use("head")


@every_caller
def test_success_leaves_the_model_as_it_was(model: nn.Module, caller: Callable[[], Any]) -> None:
    with caller(), unchanged(model):
        Explainer(model).explain(images(CASE, 2), TARGETS)


@every_caller
@pytest.mark.parametrize(
    ("broken_part", "broken"),
    [
        pytest.param("head", BreaksForward(), id="head"),
        pytest.param("blocks.1.mlp.act", BreaksForward(), id="last_mlp"),
        pytest.param("blocks.1.attn.proj", BreaksForward(), id="last_attention"),
        pytest.param("blocks.1.norm1", BreaksForward(), id="last_norm1"),
        pytest.param("blocks.0.mlp", BreaksForward(), id="trunk"),
        pytest.param("patch_embed", BreaksForward(), id="patch_embedding"),
        pytest.param("blocks.1.mlp.act", BreaksBackward(), id="backward"),
    ],
)
def test_failure_half_way_leaves_the_model_as_it_was(
    model: nn.Module, caller: Callable[[], Any], broken_part: str, broken: nn.Module
) -> None:
    explainer = Explainer(model)
    whole = model.get_submodule(broken_part)
    model.set_submodule(broken_part, broken.eval())
    with caller(), unchanged(model), pytest.raises(BrokenError):
        explainer.explain(images(CASE, 2), TARGETS)
    # And the explainer still works once the model does.
    model.set_submodule(broken_part, whole)
    with caller():
        _assert_equal(explainer.explain(images(CASE, 2), TARGETS), _undisturbed())


@every_caller
@pytest.mark.parametrize("target", [Output(8), TopK(9)], ids=["no_such_output", "too_many"])
def test_wrong_target_leaves_the_model_as_it_was(
    model: nn.Module, caller: Callable[[], Any], target: Output | TopK
) -> None:
    with caller(), unchanged(model), pytest.raises(IndexError):
        Explainer(model).explain(images(CASE, 2), [[Output(0)], [Output(1), target]])


@every_caller
def test_wrong_size_leaves_the_model_as_it_was(model: nn.Module, caller: Callable[[], Any]) -> None:
    with caller(), unchanged(model), pytest.raises(ValueError, match="pixels"):
        Explainer(model).explain(images(CASE, 2)[..., :16], TARGETS)


@every_caller
def test_result_does_not_depend_on_the_callers_grad_mode(caller: Callable[[], Any]) -> None:
    with caller():
        pixels = images(CASE, 2)  # made in that mode, too
        _assert_equal(Explainer(build(CASE)).explain(pixels, TARGETS), _undisturbed())


def test_frozen_model() -> None:
    model = copy.deepcopy(build(CASE)).requires_grad_(requires_grad=False)
    with unchanged(model):
        _assert_equal(Explainer(model).explain(images(CASE, 2), TARGETS), _undisturbed())


def test_pixels_are_left_alone(model: nn.Module) -> None:
    pixels = images(CASE, 2).requires_grad_()
    before = pixels.detach().clone()
    Explainer(model).explain(pixels, TARGETS)
    assert pixels.grad is None
    assert pixels.requires_grad
    assert torch.equal(pixels, before)


def test_results_carry_no_graph(model: nn.Module) -> None:
    explainer = Explainer(model)
    explainer.explain(images(CASE, 2), TARGETS)  # whatever is cached is cached now
    before = _tensors_alive()
    found = explainer.explain(images(CASE, 2), TARGETS)
    for item in found:
        assert type(item.logits) is np.ndarray
        for relevance in item.maps:
            assert type(relevance.scores) is np.ndarray
            assert type(relevance.prefix_share) is float
        for target in item.targets:
            assert type(target.index) is int
            assert type(target.value) is float
    # Arrays may share memory with detached tensors; what must be gone are tensors with a graph.
    assert _tensors_alive() == before


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that the block leaves the model and torch's modes as they were."""
    before = _state(model)
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    yield
    assert _state(model) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def _state(model: nn.Module) -> dict[str, Any]:
    hooks = {
        f"{name}.{kind}": list(value)
        for name, module in [*model.named_modules(), ("torch", torch.nn.modules.module)]
        for kind, value in vars(module).items()
        if kind.endswith("_hooks") and hasattr(value, "keys")
    }
    assert "blocks.1.norm1._forward_hooks" in hooks
    assert "torch._global_forward_hooks" in hooks
    return {
        "hooks": hooks,
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "grad": {
            name: None if weight.grad is None else weight.grad.sum().item() for name, weight in model.named_parameters()
        },
        "tensor_hooks": {name: bool(weight._backward_hooks) for name, weight in model.named_parameters()},
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def _undisturbed() -> list[Explanation]:
    return Explainer(build(CASE)).explain(images(CASE, 2), TARGETS)


def _tensors_alive() -> int:
    gc.collect()
    return sum(type(item) is Tensor and item.grad_fn is not None for item in gc.get_objects())


def _assert_equal(found: list[Explanation], expected: list[Explanation]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-10, atol=1e-13)
        assert [target.index for target in one.targets] == [target.index for target in other.targets]
        for a, b in zip(one.maps, other.maps, strict=True):
            np.testing.assert_allclose(a.scores, b.scores, rtol=0, atol=1e-11 * np.abs(b.scores).max())
            assert a.prefix_share == pytest.approx(b.prefix_share, rel=1e-9)
