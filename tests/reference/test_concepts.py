"""Concept CDAM from example images to the map, against the same written plainly, on several architectures in fp64."""

from __future__ import annotations

import functools
from itertools import product

import numpy as np
import pytest
import torch

from cdam_engine import Cdam, Concept, Contrast, Explainer, Explanation, mean_concept
from cdam_engine.concepts import Formed
from reference import concept_references, tail_references
from reference.cdam_reference import relative_error
from reference.concept_references import ReferenceConcept
from reference.models import BY_ID, Case, available, build, images

CASES = [
    BY_ID[name]
    for name in (
        "vit_small",  # [CLS], in closed form
        "token_fc_norm",  # [CLS], normalised once more before the classifier
        "average_pool",
        "average_pool_register",
        "dinov3_token",  # [CLS] beside register tokens
        "siglip",  # pooled by an attention of its own
        "eva02",
        "beit",
    )
    if available(BY_ID[name])
]
SIMILARITIES = ("dot", "cosine", "l2")
TOLERANCE = 1e-10

# Examples, negatives, another concept's examples, and what is explained: no image twice.
EXAMPLES, NEGATIVES, OTHERS, EXPLAINED = slice(0, 5), slice(5, 9), slice(9, 10), slice(10, 12)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@functools.cache
def pictures(case: Case) -> torch.Tensor:
    """A concept's examples share a colour, so that they have something in common."""
    drawn = images(case, 12, seed=3)
    drawn[EXAMPLES] += torch.tensor([1.5, -1.0, 0.0], dtype=drawn.dtype)[:, None, None]
    return drawn


@functools.cache
def latents(case: Case) -> np.ndarray:
    """All pictures' at once, as the engine tells them."""
    found = Explainer(build(case)).explain(pictures(case), [[]] * 12, [[]] * 12)
    return np.stack([explanation.latent for explanation in found])


@functools.cache
def formed(case: Case, *, negatives: bool) -> Formed:
    return mean_concept(latents(case)[EXAMPLES], latents(case)[NEGATIVES] if negatives else None)


@functools.cache
def expected(case: Case, *, negatives: bool) -> ReferenceConcept:
    its = pictures(case)
    return concept_references.concept(build(case), its[EXAMPLES], its[NEGATIVES] if negatives else None)


@each_case
def test_latents_are_what_the_classifier_gets(case: Case) -> None:
    plain = torch.stack(concept_references.latents(build(case), pictures(case)))
    assert relative_error(torch.from_numpy(latents(case)), plain) <= TOLERANCE


@each_case
@pytest.mark.parametrize("negatives", [False, True])
def test_vector_spread_and_cosines(case: Case, negatives: bool) -> None:
    found, truth = formed(case, negatives=negatives), expected(case, negatives=negatives)
    assert found.vector.dtype == np.float32
    assert relative_error(torch.from_numpy(found.vector), truth.vector) <= 1e-7  # a float32
    assert found.spread == pytest.approx(truth.spread, abs=TOLERANCE)
    np.testing.assert_allclose(found.cosines, truth.cosines, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found.negative_cosines, truth.negative_cosines, rtol=0, atol=TOLERANCE)
    assert len(found.negative_cosines) == (4 if negatives else 0)
    assert -1 <= found.cosines.min() < found.spread < found.cosines.max() <= 1


@each_case
def test_one_example_is_its_latent(case: Case) -> None:
    found = mean_concept(latents(case)[OTHERS])
    (latent,) = concept_references.latents(build(case), pictures(case)[OTHERS])
    assert relative_error(torch.from_numpy(found.vector), latent) <= 1e-7
    assert found.spread == pytest.approx(1, abs=TOLERANCE)


@each_case
@pytest.mark.parametrize("negatives", [False, True])
def test_maps_of_concepts_and_their_differences(case: Case, negatives: bool) -> None:
    vector, plain = formed(case, negatives=negatives).vector, expected(case, negatives=negatives).vector
    other = mean_concept(latents(case)[OTHERS]).vector
    (plain_other,) = concept_references.latents(build(case), pictures(case)[OTHERS])
    # The vector's rounding to float32 is compared above; here it would hide everything else.
    plain, plain_other = (truth.float().double() for truth in (plain, plain_other))
    assert np.array_equal(vector, plain.numpy())
    assert np.array_equal(other, plain_other.numpy())
    kinds = [*product(SIMILARITIES, SIMILARITIES)]
    targets = [
        *(Concept(torch.from_numpy(vector), kind) for kind in SIMILARITIES),
        *(Contrast(Concept(torch.from_numpy(vector), a), Concept(torch.from_numpy(other), b)) for a, b in kinds),
    ]
    found = Explainer(build(case)).explain(pictures(case)[EXPLAINED], [targets] * 2, [[Cdam()]] * 2)
    one = {kind: concept_references.similarity(plain, kind) for kind in SIMILARITIES}
    two = {kind: concept_references.similarity(plain_other, kind) for kind in SIMILARITIES}
    functions = [
        *one.values(),
        *(lambda latent, logits, f=one[a], g=two[b]: f(latent, logits) - g(latent, logits) for a, b in kinds),
    ]
    for picture, explanation in zip(pictures(case)[EXPLAINED], found, strict=True):
        compare(case, picture, explanation, functions)


def compare(case: Case, picture: torch.Tensor, explanation: Explanation, functions: list) -> None:
    assert len(explanation.maps) == len(functions)
    (latent,) = concept_references.latents(build(case), picture[None])
    for f, target, relevance in zip(functions, explanation.targets, explanation.maps, strict=True):
        truth = tail_references.cdam(build(case), picture, f)
        assert relative_error(torch.from_numpy(relevance.scores), truth.scores) <= TOLERANCE
        assert relevance.prefix_share == pytest.approx(truth.prefix_share, abs=TOLERANCE)
        assert target.value == pytest.approx(float(f(latent, latent)), rel=TOLERANCE, abs=TOLERANCE)


def test_the_image_itself_as_a_concept() -> None:
    """Nothing is more similar: by cosine and L2 there is nowhere to go, so nothing is relevant."""
    case = BY_ID["vit_small"]
    vector = torch.from_numpy(latents(case)[EXPLAINED][:1].astype(np.float64))[0]
    (found,) = Explainer(build(case)).explain(
        pictures(case)[EXPLAINED][:1], [[Concept(vector, kind) for kind in SIMILARITIES]]
    )
    dot, cosine, l2 = (relevance.scores for relevance in found.maps)
    assert np.abs(dot).max() > 1e-3
    np.testing.assert_allclose(cosine, 0, atol=1e-12)
    np.testing.assert_allclose(l2, 0, atol=1e-12)
    assert [target.value for target in found.targets[1:]] == pytest.approx([1, 0], abs=1e-12)
