"""No method leaves anything behind: on success, on failure half way, from several threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cdam_engine import Concept, Contrast, Explainer, Explanation, Method, Output, TopK, UnsupportedMethodError
from reference.method_expectations import concept, supported
from reference.models import BY_ID, build, images, require
from reference.test_cdam_hygiene import (
    BreaksBackward,
    BreaksForward,
    BrokenError,
    _tensors_alive,
    every_caller,
    model_in_use,
    unchanged,
)
from reference.test_methods_properties import METHODS, assert_equal

CASE = BY_ID["eight_outputs"]
TARGETS = [[Contrast(Output(0), Output(1))], [TopK(2), Output(7)]]

every_method = pytest.mark.parametrize("method", METHODS, ids=str)


@pytest.fixture
def model() -> nn.Module:
    return model_in_use("patch_embed")


@every_method
@every_caller
def test_success_leaves_the_model_as_it_was(
    model: nn.Module, method: Method, caller: Callable[[], AbstractContextManager[Any]]
) -> None:
    with caller(), unchanged(model):
        pixels = images(CASE, 2)  # made in that mode, too
        found = Explainer(model).explain(pixels, TARGETS, [[method]] * 2)
    assert_equal(found, undisturbed(method))


@every_method
@pytest.mark.parametrize(
    ("broken_part", "broken"),
    [
        pytest.param("head", BreaksForward(), id="head"),
        pytest.param("blocks.1.mlp.act", BreaksForward(), id="last_mlp"),
        pytest.param("blocks.1.attn.proj", BreaksForward(), id="last_attention"),
        pytest.param("blocks.0.attn.qkv", BreaksForward(), id="first_attention"),
        pytest.param("blocks.0.mlp", BreaksForward(), id="trunk"),
        pytest.param("blocks.1.mlp.act", BreaksBackward(), id="backward"),
        pytest.param("norm", BreaksBackward(), id="backward_from_the_norm"),
        pytest.param("blocks.0.norm2", BreaksBackward(), id="backward_in_the_trunk"),
    ],
)
def test_failure_half_way_leaves_the_model_as_it_was(
    model: nn.Module, method: Method, broken_part: str, broken: nn.Module
) -> None:
    """Whether a method gets as far as the broken part or not."""
    explainer = Explainer(model)
    whole = model.get_submodule(broken_part)
    model.set_submodule(broken_part, broken.eval())
    with unchanged(model):
        try:
            explainer.explain(images(CASE, 2), TARGETS, [[method]] * 2)
        except (BrokenError, UnsupportedMethodError):
            pass  # a method may find out beforehand that the part is none that it knows
        else:
            assert isinstance(broken, BreaksBackward)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    model.set_submodule(broken_part, whole)
    assert_equal(explainer.explain(images(CASE, 2), TARGETS, [[method]] * 2), undisturbed(method))


@every_method
def test_frozen_model(method: Method) -> None:
    model = copy.deepcopy(build(CASE)).requires_grad_(requires_grad=False)
    with unchanged(model):
        found = Explainer(model).explain(images(CASE, 2), TARGETS, [[method]] * 2)
    assert_equal(found, undisturbed(method))


@every_method
def test_inputs_are_left_alone(method: Method) -> None:
    pixels = images(CASE, 2).requires_grad_()
    vector = concept(build(CASE), 0).requires_grad_()
    before = pixels.detach().clone(), vector.detach().clone()
    Explainer(build(CASE)).explain(pixels, [[Concept(vector, "cosine")], [Output(0)]], [[method]] * 2)
    for given, kept in zip((pixels, vector), before, strict=True):
        assert given.grad is None
        assert given.requires_grad
        assert torch.equal(given, kept)


@every_method
def test_random_state_is_left_alone(method: Method) -> None:
    before = torch.get_rng_state()
    Explainer(build(CASE)).explain(images(CASE, 2), TARGETS, [[method]] * 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_results_carry_no_graph() -> None:
    explainer = Explainer(build(CASE))
    explainer.explain(images(CASE, 2), TARGETS, [METHODS] * 2)  # whatever is cached is cached now
    before = _tensors_alive()
    for item in explainer.explain(images(CASE, 2), TARGETS, [METHODS] * 2):
        assert type(item.latent) is np.ndarray
        assert type(item.logits) is np.ndarray
        for one in item.targets:
            assert type(one.value) is float
        for relevance in item.maps:
            assert type(relevance.scores) is np.ndarray
            assert type(relevance.prefix_share) in {float, type(None)}
            assert type(relevance.completeness_residual) in {float, type(None)}
            assert type(relevance.steps) in {int, type(None)}
            for array in (relevance.value_part, relevance.key_part, relevance.standard_error):
                assert type(array) in {np.ndarray, type(None)}
    assert _tensors_alive() == before


@pytest.mark.parametrize("name", ["eight_outputs", "dinov3_token", "beit", "dynamic_size"])
def test_two_threads_share_an_explainer(name: str) -> None:
    case = BY_ID[name]
    require(case)
    explainer = Explainer(build(case))
    methods = [method for method in METHODS if supported(case, method)]
    jobs = [
        (images(case, 2, seed=seed), [[Output(seed)], [TopK(1 + seed % 2)]], [methods[seed::4], methods[seed % 3 :: 5]])
        for seed in range(5)
    ]
    alone = [explainer.explain(*job) for job in jobs]
    together = threading.Barrier(2)

    def work(order: list[int]) -> dict[int, list[Explanation]]:
        together.wait(timeout=30)
        # The second thread's mode must not reach the first.
        with torch.inference_mode(mode=order[0] == 0):
            return {index: explainer.explain(*jobs[index]) for index in order}

    with ThreadPoolExecutor(2) as pool:
        forwards, backwards = pool.map(work, [list(range(5)), list(reversed(range(5)))])
    for index, expected in enumerate(alone):
        assert_equal(forwards[index], expected)
        assert_equal(backwards[index], expected)
    assert torch.is_grad_enabled()


def undisturbed(method: Method) -> list[Explanation]:
    return Explainer(build(CASE)).explain(images(CASE, 2), TARGETS, [[method]] * 2)
