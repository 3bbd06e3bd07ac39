"""What an explainer says of its model is what the model does; and it travels between processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cdam_engine import METHODS, Explainer, Method, UnsupportedMethodError
from cdam_engine.families import Grid
from reference.models import CASES, Case, build, images, require

every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])


@every_case
def test_numbers_are_the_models(case: Case) -> None:
    require(case)
    explainer = Explainer(build(case, torch.float32))
    facts, pixels = explainer.facts, images(case, 1, torch.float32)
    assert facts.prefix_tokens == case.prefix
    assert facts.sizes.grid(case.image_size) == Grid(*case.grid)
    with torch.no_grad():
        assert explainer.vit.trunk(pixels).tokens.shape[1] == case.prefix + case.grid[0] * case.grid[1]
    assert explainer.outputs(pixels).latent.shape == (1, facts.latent_size)
    assert facts.heads == explainer.vit.blocks[-1].attn.num_heads


@every_case
def test_sizes_are_those_that_the_model_takes(case: Case) -> None:
    require(case)
    model = build(case, torch.float32)
    sizes = Explainer(model).facts.sizes
    height, width = case.image_size
    down, across = sizes.patch_size
    for size in [(height, width), (height + down, width), (height, width + 3 * across), (height + 1, width)]:
        try:
            sizes.grid(size)
        except ValueError:
            assert not _takes(model, case.channels, size), size
        else:
            assert _takes(model, case.channels, size), size


def _takes(model: nn.Module, channels: int, size: tuple[int, int]) -> bool:
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, *size))
    except (AssertionError, RuntimeError):
        return False
    return True


@every_case
def test_methods_are_refused_as_by_the_model_itself(case: Case) -> None:
    require(case)
    explainer = Explainer(build(case, torch.float32))
    for method in (variant for kind in METHODS.values() for variant in kind.variants()):
        assert _refusal(explainer.facts.check, method) == _refusal(explainer.check, method)


def _refusal(check: Callable[[Method], None], method: Method) -> tuple[str, str] | None:
    try:
        check(method)
    except UnsupportedMethodError as error:
        return error.reason, str(error)
    return None


@every_case
def test_they_travel(case: Case) -> None:
    require(case)
    facts = Explainer(build(case, torch.float32)).facts
    packed = pickle.dumps(facts)
    assert pickle.loads(packed) == facts
    assert len(packed) < 10_000  # and carry no weights
