"""A second opinion on the engine: captum's methods on the whole model, or on the part of it behind T."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cdam_engine import (
    Cdam,
    Concept,
    Contrast,
    Explainer,
    InputXGradient,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    Noise,
    Output,
    RelevanceMap,
    SmoothCdam,
    SmoothGrad,
)
from reference import captum_maps
from reference.method_expectations import Target, concept, function
from reference.models import BY_ID, build, images, require
from reference.whole_model import run

SAMPLES, SEED, STEPS = 5, 3, 6
EXACT = 1e-10
# Captum keeps the points and weights of a path in single precision, whatever the model's.
PATH = 1e-6

of_several = pytest.mark.parametrize(
    "name", ["vit_small", "deit_distilled", "average_pool_register", "siglip", "beit", "eva02", "rope_mixed"]
)
both_rules = pytest.mark.parametrize("rule", ["riemann_right", "gauss_legendre"])


@of_several
def test_cdam(name: str) -> None:
    model, image, targets = _setting(name)
    for target, relevance in zip(targets, _maps(name, Cdam()), strict=True):
        _check_tokens(name, relevance, captum_maps.cdam(model, image, function(target)), EXACT)


@of_several
def test_smooth_cdam(name: str) -> None:
    """Sigma in T's own units for captum; the engine is given the same as a share of T's range, and as it is."""
    model, image, targets = _setting(name)
    tokens = run(model, image).tokens
    level = 0.2
    for noise, sigma in (
        (Noise(level), level * float((tokens.max() - tokens.min()).detach())),
        (Noise(level, relative=False), level),
    ):
        for target, relevance in zip(targets, _maps(name, SmoothCdam(SAMPLES, noise, SEED)), strict=True):
            captum = captum_maps.smooth_cdam(model, image, function(target), SAMPLES, sigma, SEED)
            _check_tokens(name, relevance, captum, EXACT)


@of_several
@both_rules
def test_integrated_cdam(name: str, rule: str) -> None:
    model, image, targets = _setting(name)
    for target, relevance in zip(targets, _maps(name, IntegratedCdam(STEPS, rule)), strict=True):
        captum = captum_maps.integrated_cdam(model, image, function(target), STEPS, rule)
        _check_tokens(name, relevance, captum, PATH)


@of_several
def test_input_x_gradient(name: str) -> None:
    model, image, targets = _setting(name)
    for target, relevance in zip(targets, _maps(name, InputXGradient()), strict=True):
        _check(relevance, captum_maps.input_x_gradient(model, image, function(target)), EXACT)


@of_several
def test_smooth_grad(name: str) -> None:
    model, image, targets = _setting(name)
    level = 0.2
    sigma = level * float(image.max() - image.min())
    for target, relevance in zip(targets, _maps(name, SmoothGrad(SAMPLES, Noise(level), SEED)), strict=True):
        captum = captum_maps.smooth_grad(model, image, function(target), SAMPLES, sigma, SEED)
        _check(relevance, captum, EXACT)


@of_several
@both_rules
def test_integrated_gradients(name: str, rule: str) -> None:
    model, image, targets = _setting(name)
    for target, relevance in zip(targets, _maps(name, IntegratedGradients(STEPS, rule)), strict=True):
        captum = captum_maps.integrated_gradients(model, image, function(target), STEPS, rule)
        _check(relevance, captum, PATH)


def _setting(name: str) -> tuple[torch.nn.Module, Tensor, tuple[Target, ...]]:
    case = BY_ID[name]
    require(case)
    model = build(case)
    vector = Concept(concept(model, 1), "cosine")
    return model, images(case, 1)[0], (Output(case.outputs - 1), vector, Contrast(Output(0), vector))


def _maps(name: str, method: Method) -> tuple[RelevanceMap, ...]:
    model, image, targets = _setting(name)
    (found,) = Explainer(model).explain(image[None], [targets], [[method]])
    return found.maps


def _check_tokens(name: str, found: RelevanceMap, captum: Tensor, tolerance: float) -> None:
    case = BY_ID[name]
    scores = captum.detach()
    share = float(scores[: case.prefix].abs().sum() / scores.abs().sum())
    assert found.prefix_share == pytest.approx(share, abs=tolerance)
    _check(found, scores[case.prefix :].reshape(case.grid), tolerance)


def _check(found: RelevanceMap, captum: Tensor, tolerance: float) -> None:
    expected = captum.detach().numpy()
    np.testing.assert_allclose(found.scores, expected, rtol=0, atol=tolerance * np.abs(expected).max())
