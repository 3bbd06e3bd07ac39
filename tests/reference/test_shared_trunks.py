"""Models that differ in their tails alone share one run of the trunk, and answer as they would alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cdam_engine import (
    Asked,
    Attention,
    Cdam,
    Concept,
    Explainer,
    Explanation,
    InputXGradient,
    IntegratedCdam,
    Output,
    TokenCache,
    TopK,
    explain_together,
)
from reference.models import BY_ID, Case, fresh, images, randomise

CASES = ("eight_outputs", "average_pool_class_token", "dinov3_token", "cait", "deit_distilled")
METHODS = [Cdam(), IntegratedCdam(steps=4), Attention(), InputXGradient()]


def family(case: Case, *heads: int) -> list[nn.Module]:
    """Models on one backbone, each with a head of its own; 0: none."""
    first = fresh(case).double().eval()
    models = []
    for seed, outputs in enumerate(heads):
        model = copy.copy(first)
        model._modules = dict(first._modules)  # the shell alone is copied
        model.num_classes = outputs
        for name in {"head", "head_dist"} & set(first._modules):
            head = nn.Linear(first.num_features, outputs) if outputs else nn.Identity()
            randomise(head, seed)
            setattr(model, name, head.double().eval())
        models.append(model)
    return models


def explainers(models: list[nn.Module], **options: Any) -> list[Explainer]:
    first = Explainer(models[0], **options)
    return [first, *map(first.share_trunk, models[1:])]


def count_trunks(model: nn.Module) -> list[int]:
    """How many images each run of the first block has had since."""
    sizes: list[int] = []
    model.blocks[0].register_forward_hook(lambda _module, given, _out: sizes.append(len(given[0])))
    return sizes


def assert_equal(found: list[Explanation], expected: list[Explanation]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-10, atol=1e-12)
        assert [target.index for target in one.targets] == [target.index for target in other.targets]
        assert len(one.maps) == len(other.maps)
        for a, b in zip(one.maps, other.maps, strict=True):
            np.testing.assert_allclose(a.scores, b.scores, rtol=0, atol=1e-11 * max(np.abs(b.scores).max(), 1e-30))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cached", [False, True], ids=["no_cache", "cache"])
def test_together_equals_alone(name: str, cached: bool) -> None:
    case = BY_ID[name]
    models = family(case, 3, 1, 0)
    cache = TokenCache(1 << 24) if cached else None
    sharing = explainers(models, cache=cache)
    pixels = images(case, 3)
    vector = torch.randn(sharing[2].vit.latent_size, generator=torch.Generator().manual_seed(0)).double()
    questions = [
        (pixels[:2], [[Output(1), TopK(2)], [Output(0)]], [METHODS, [Cdam()]]),
        (pixels[1:], [[Output(0)], [Output(0)]], None),
        (pixels[[0, 2]], [[Concept(vector)], [Concept(vector, "cosine")]], None),
    ]
    alone = [Explainer(model).explain(*its) for model, its in zip(models, questions, strict=True)]
    for _ in range(2):  # the second time out of the cache, where there is one
        together = explain_together([Asked(explainer, *its) for explainer, its in zip(sharing, questions, strict=True)])
        for found, expected in zip(together, alone, strict=True):
            assert_equal(found, expected)
    assert all(item.token_cache_hit == cached for found in together for item in found)


@pytest.mark.parametrize("cached", [False, True], ids=["no_cache", "cache"])
def test_the_trunk_runs_once_for_all_heads(cached: bool) -> None:
    case = BY_ID["eight_outputs"]
    models = family(case, 2, *[1] * 8)  # malignancy and eight biomarkers
    sharing = explainers(models, cache=TokenCache(1 << 24) if cached else None)
    sizes = count_trunks(models[0])
    pixels = images(case, 2)
    explain_together([Asked(explainer, pixels, [[Output(0)]] * 2) for explainer in sharing])
    assert sizes == [2]
    if cached:
        for explainer in sharing:
            assert all(its.token_cache_hit for its in explainer.explain(pixels, [[Output(0)]] * 2))
        assert sizes == [2]


def test_a_question_that_needs_no_tokens_does_not_run_the_trunk_for_them() -> None:
    case = BY_ID["eight_outputs"]
    models = family(case, 2, 3)
    sharing = explainers(models)
    sizes = count_trunks(models[0])
    pixels = images(case, 2)
    together = explain_together(
        [
            Asked(sharing[0], pixels[:1], [[Output(0)]]),
            Asked(sharing[1], pixels[1:], [[Output(2)]], [[InputXGradient()]]),
        ]
    )
    assert sizes == [1, 1]
    assert_equal(together[1], Explainer(models[1]).explain(pixels[1:], [[Output(2)]], [[InputXGradient()]]))


def test_a_tail_of_another_head_is_not_taken_from_the_cache() -> None:
    case = BY_ID["eight_outputs"]
    models = family(case, 3, 4)
    first, second = explainers(models, cache=TokenCache(1 << 24))
    pixels = images(case, 1)
    first.explain(pixels, [[TopK(1)]])
    (found,) = second.explain(pixels, [[TopK(4)]])
    assert found.token_cache_hit
    assert_equal([found], Explainer(models[1]).explain(pixels, [[TopK(4)]]))


def test_fine_tuned_tails_share_a_trunk() -> None:
    case = BY_ID["eight_outputs"]
    models = family(case, 3, 3)
    blocks = list(models[1].blocks)
    last = copy.deepcopy(blocks[-1])
    randomise(last.mlp, seed=9)
    randomise(last.attn, seed=9)
    models[1].blocks = nn.Sequential(*blocks[:-1], last).eval()
    first, second = explainers(models)
    pixels = images(case, 2)
    together = explain_together([Asked(its, pixels, [[Output(1)]] * 2) for its in (first, second)])
    assert_equal(together[1], Explainer(models[1]).explain(pixels, [[Output(1)]] * 2))


def test_other_trunks_are_refused() -> None:
    case = BY_ID["eight_outputs"]
    first, other = (Explainer(fresh(case).double().eval()) for _ in range(2))
    changed = fresh(case).double().eval()
    with torch.no_grad():
        changed.blocks[0].mlp.fc1.weight[0, 0] += 0.1
    with pytest.raises(ValueError, match="other tokens"):
        first.share_trunk(changed)
    with pytest.raises(ValueError, match="other sizes"):
        first.share_trunk(fresh(BY_ID["vit_small"]).double().eval())
    pixels = images(case, 1)
    with pytest.raises(ValueError, match="share_trunk"):
        explain_together([Asked(first, pixels, [[Output(0)]]), Asked(other, pixels, [[Output(0)]])])


def test_images_of_two_kinds_are_refused() -> None:
    first, second = explainers(family(BY_ID["eight_outputs"], 3, 1))
    pixels = images(BY_ID["eight_outputs"], 1)
    with pytest.raises(ValueError, match="one size and type"):
        explain_together([Asked(first, pixels, [[Output(0)]]), Asked(second, pixels.float(), [[Output(0)]])])


def test_wrong_questions_are_refused_before_anything_runs() -> None:
    case = BY_ID["eight_outputs"]
    models = family(case, 3, 1)
    first, second = explainers(models)
    sizes = count_trunks(models[0])
    pixels = images(case, 1)
    with pytest.raises(IndexError, match="1 outputs"):
        explain_together([Asked(first, pixels, [[Output(0)]]), Asked(second, pixels, [[Output(1)]])])
    assert not sizes


def test_bfloat16_trunks_are_shared() -> None:
    case = BY_ID["eight_outputs"]
    models = [model.float() for model in family(case, 3, 2)]
    first, second = explainers(models, precision="bf16")
    pixels = images(case, 2, torch.float32)
    (found, _), (expected, _) = (
        explain_together([Asked(first, pixels, [[Output(1)]] * 2), Asked(second, pixels, [[Output(1)]] * 2)])[1],
        Explainer(models[1], precision="bf16").explain(pixels, [[Output(1)]] * 2),
    )
    np.testing.assert_allclose(found.maps[0].scores, expected.maps[0].scores, rtol=0, atol=1e-5)
