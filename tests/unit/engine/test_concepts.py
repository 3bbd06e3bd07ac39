"""A concept from its examples' latents: the mean, the spread, and what makes none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cdam_engine import mean_concept

rng = np.random.default_rng(0)


def draws(count: int, size: int = 24) -> np.ndarray:
    return rng.normal(0.5, 1, (count, size)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Plainly, in Python's exact sums."""
    dot = math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.hypot(*map(float, a)) / math.hypot(*map(float, b))


def mean(latents: np.ndarray) -> np.ndarray:
    return np.array([math.fsum(column) / len(latents) for column in latents.T.tolist()])


@pytest.mark.parametrize(("examples", "others"), [(1, 0), (2, 0), (30, 0), (30, 1), (7, 30)])
def test_mean_and_cosines(examples: int, others: int) -> None:
    latents, negatives = draws(examples), draws(others)
    formed = mean_concept(latents, negatives if others else None)
    expected = mean(latents) - (mean(negatives) if others else 0)
    assert formed.vector.dtype == np.float32
    np.testing.assert_array_max_ulp(formed.vector, expected.astype(np.float32), 1)
    np.testing.assert_allclose(formed.cosines, [cosine(row, mean(latents)) for row in latents], rtol=1e-14)
    np.testing.assert_allclose(formed.negative_cosines, [cosine(row, mean(negatives)) for row in negatives], rtol=1e-14)
    assert formed.spread == pytest.approx(math.fsum(formed.cosines) / examples, rel=1e-14)


def test_no_negatives_is_none() -> None:
    latents = draws(5)
    without, empty = mean_concept(latents), mean_concept(latents, latents[:0])
    assert np.array_equal(without.vector, empty.vector)
    assert without.negative_cosines.shape == empty.negative_cosines.shape == (0,)


def test_the_order_of_the_images_changes_no_bit() -> None:
    latents, negatives = draws(200), draws(100)
    latents[::3] *= 1e6  # so that sums round differently in another order
    order, other = rng.permutation(200), rng.permutation(100)
    formed, shuffled = mean_concept(latents, negatives), mean_concept(latents[order], negatives[other])
    assert np.array_equal(formed.vector, shuffled.vector)
    assert np.array_equal(formed.cosines[order], shuffled.cosines)
    assert np.array_equal(formed.negative_cosines[other], shuffled.negative_cosines)
    assert formed.spread == shuffled.spread


def test_sums_are_in_float64() -> None:
    latents = np.full((100_000, 2), 0.1, np.float32)
    assert mean_concept(latents).vector.tolist() == latents[0].tolist()
    huge = np.full((4, 2), 3e38, np.float32)  # their sum, their squares: all beyond float32
    assert mean_concept(huge).vector.tolist() == huge[0].tolist()
    assert mean_concept(huge).spread == pytest.approx(1)


def test_one_example_is_its_own_concept() -> None:
    latents = draws(1)
    formed = mean_concept(latents)
    assert np.array_equal(formed.vector, latents[0])
    assert formed.spread == pytest.approx(1)
    assert -1 <= formed.spread <= 1


def test_an_example_that_does_not_belong_shows() -> None:
    latents = 3 + draws(10)
    latents[4] *= -1
    formed = mean_concept(latents)
    assert formed.cosines.argmin() == 4
    assert formed.cosines[4] < 0 < np.delete(formed.cosines, 4).min()


def test_a_zero_latent_has_cosine_zero() -> None:
    latents = draws(3)
    latents[1] = 0
    formed = mean_concept(latents, np.zeros_like(latents))
    assert formed.cosines[1] == 0
    assert formed.negative_cosines.tolist() == [0, 0, 0]


def test_examples_around_zero_with_negatives_elsewhere() -> None:
    latents, negatives = draws(2), draws(2)
    latents[1] = -latents[0]
    formed = mean_concept(latents, negatives)
    np.testing.assert_allclose(formed.vector, -mean(negatives), rtol=1e-6)
    assert formed.cosines.tolist() == [0, 0]
    assert formed.spread == 0


def opposites() -> np.ndarray:
    latents = draws(2)
    latents[1] = -latents[0]
    return latents


@pytest.mark.parametrize(
    ("latents", "negatives", "message"),
    [
        (draws(0), None, "needs an example"),
        (draws(0), draws(3), "needs an example"),
        (draws(3)[0], None, r"examples of shape \(24,\)"),
        (draws(3), draws(3)[0], r"negatives of shape \(24,\)"),
        (np.zeros((3, 0)), None, r"shape \(3, 0\)"),
        (draws(3), draws(3, 23), "length 24, negatives of 23"),
        (np.full((2, 4), np.nan), None, "examples that are not finite"),
        (draws(3), np.full((2, 24), -np.inf), "negatives that are not finite"),
        (np.full((1, 4), 1e39), None, "not finite"),  # in float32
        (np.zeros((3, 4)), None, "mean latent is zero"),
        (opposites(), None, "mean latent is zero"),
        (np.full((1, 4), 1e-50), None, "mean latent is zero"),  # in float32
        (np.full((1, 4), 3e38), np.full((1, 4), -3e38), "too far apart for float32"),
    ],
)
def test_what_makes_no_concept(latents: np.ndarray, negatives: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_concept(latents, negatives)


def test_negatives_that_are_the_examples_make_no_concept() -> None:
    latents = draws(30)
    again = latents[::-1] * np.float32(1 + 2e-7)  # the same images in another batch
    for negatives in (latents, np.concatenate([latents] * 3), again):
        with pytest.raises(ValueError, match="are equal: this makes no direction"):
            mean_concept(latents, negatives)
