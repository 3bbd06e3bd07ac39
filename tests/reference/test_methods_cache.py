"""The token cache changes how much is computed, and nothing else."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdam_engine import (
    Attention,
    Cdam,
    Concept,
    Contrast,
    Explainer,
    Explanation,
    InputXGradient,
    Output,
    TokenCache,
    TopK,
)
from reference.method_expectations import concept, supported
from reference.models import BY_ID, Case, build, images, require
from reference.test_cdam_hygiene import BreaksForward, BrokenError
from reference.test_methods_properties import METHODS, assert_equal

CASE = BY_ID["eight_outputs"]
PLENTY = 1 << 30
TARGETS = [Output(1), TopK(2)]


def explainer(case: Case = CASE, size: int = PLENTY, dtype: torch.dtype = torch.float64) -> Explainer:
    return Explainer(build(case, dtype), cache=TokenCache(size))


def entry(case: Case = CASE) -> int:
    """Bytes that one image takes."""
    made = explainer(case)
    made.explain(images(case, 1), [TARGETS])
    assert made.cache is not None
    return made.cache.bytes


@contextmanager
def counting(model: nn.Module) -> Iterator[list[int]]:
    """How many images went through the first block, call by call."""
    counts: list[int] = []

    def count(_module: nn.Module, args: tuple[Tensor, ...], _out: Any) -> None:
        counts.append(len(args[0]))

    with model.blocks[0].register_forward_hook(count):
        yield counts


@pytest.mark.parametrize(
    "name", ["eight_outputs", "deit_distilled", "siglip", "beit", "beitv2_shared_bias", "rope_mixed"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_hit_gives_what_a_miss_gives(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """For every method, several times over, so that none spoils what is kept."""
    case = BY_ID[name]
    require(case)
    methods = [method for method in METHODS if supported(case, method) and not getattr(method, "tolerance", None)]
    if name == "beitv2_shared_bias":
        methods = [Cdam(parts=True), Attention()]
    vector = concept(build(case), 0)
    asked = [[Output(1), Contrast(Output(0), Concept(vector, "cosine"))]] * 2
    pixels = images(case, 2, dtype)
    without = Explainer(build(case, dtype)).explain(pixels, asked, [methods] * 2)
    cached = explainer(case, dtype=dtype)
    for hit in (False, True, True):
        found = cached.explain(pixels, asked, [methods] * 2)
        assert [item.token_cache_hit for item in found] == [hit] * 2
        for item, truth in zip(found, without, strict=True):
            np.testing.assert_allclose(item.logits, truth.logits, rtol=0, atol=tolerance * np.abs(truth.logits).max())
            for one, other in zip(item.maps, truth.maps, strict=True):
                # Rounding may differ with the size of the batch; relevance shared out over cancelling sums magnifies it.
                factor = 1000 if type(methods[one.method_index]).__name__ == "PartialLrp" else 1
                most = factor * tolerance * np.abs(other.scores).max()
                np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=most)
    assert not any(item.token_cache_hit for item in without)


def test_hits_and_misses_in_one_batch() -> None:
    pixels = images(CASE, 4)
    cached = explainer()
    cached.explain(pixels[[1, 3]], [TARGETS] * 2)
    order = [0, 1, 2, 3, 1, 0]
    asked = [[Output(row)] for row in order]
    with counting(cached.vit.model) as counts:
        found = cached.explain(pixels[order], asked)
    assert sum(counts) == 2
    # Of an image that comes twice, both are new, or both were there.
    assert [item.token_cache_hit for item in found] == [False, True, False, True, True, False]
    assert_equal(found, Explainer(build(CASE)).explain(pixels[order], asked))


@pytest.mark.parametrize("size", [None, PLENTY], ids=["without_cache", "with_cache"])
def test_image_that_comes_twice_is_computed_once(size: int | None) -> None:
    pixels = images(CASE, 2)[[0, 1, 0, 0]]
    made = Explainer(build(CASE), cache=None if size is None else TokenCache(size))
    asked = [[Output(0)], [Output(1)], [Output(2), Output(0)], [TopK(3)]]
    with counting(made.vit.model) as counts:
        found = made.explain(pixels, asked, [[Cdam()], [Attention()], [Attention(), Cdam()], [Cdam()]])
    assert sum(counts) == 2
    plain = Explainer(build(CASE))
    for row, item in enumerate(found):
        methods = [[Cdam()], [Attention()], [Attention(), Cdam()], [Cdam()]][row]
        assert_equal([item], plain.explain(pixels[row : row + 1], [asked[row]], [methods]))


def test_another_question_costs_no_trunk() -> None:
    cached = explainer()
    pixels = images(CASE, 3)
    cached.explain(pixels, [[Output(0)]] * 3)
    with counting(cached.vit.model) as counts:
        cached.explain(pixels, [[Output(1), TopK(3)]] * 3, [[Cdam(parts=True), Attention()]] * 3)
    assert not counts
    assert cached.cache is not None
    assert (cached.cache.hits, cached.cache.misses) == (3, 3)


@pytest.mark.parametrize("entries", [1, 2, 3])
def test_bytes_are_bounded(entries: int) -> None:
    most = entries * entry()
    cached = explainer(size=most)
    pixels = images(CASE, 6)
    cache = cached.cache
    assert cache is not None
    for rows in ([0], [1, 2], [3, 4, 5], [0, 1, 2, 3, 4, 5]):
        cached.explain(pixels[rows], [TARGETS] * len(rows))
        assert cache.bytes == sum(kept.bytes for kept in cache._kept.values()) <= most
        assert len(cache) >= min(entries, len(rows))
    assert_equal(cached.explain(pixels, [TARGETS] * 6), Explainer(build(CASE)).explain(pixels, [TARGETS] * 6))


def test_bytes_are_those_of_the_tensors() -> None:
    tokens = CASE.prefix + CASE.grid[0] * CASE.grid[1]
    width = build(CASE).embed_dim
    # The residual stream, T and V, in double precision, and the tail of one row: beside a real model's tokens, little.
    tail = tokens * width + 30 * width + 3 * build(CASE).blocks[-1].attn.num_heads * tokens + CASE.outputs
    assert 2 * tokens * width * 8 <= entry() <= (2 * tokens * width + tail) * 8


def test_least_recently_used_goes_first() -> None:
    cached = explainer(size=2 * entry())
    pixels = images(CASE, 3)

    def hit(row: int) -> bool:
        return cached.explain(pixels[row : row + 1], [TARGETS])[0].token_cache_hit

    assert [hit(row) for row in (0, 1, 0, 2)] == [False, False, True, False]  # 1 was the oldest
    assert [hit(row) for row in (0, 2)] == [True, True]
    assert not hit(1)  # and 0 goes
    assert [hit(row) for row in (2, 1, 0)] == [True, True, False]


@pytest.mark.parametrize("size", [0, 1, 100])
def test_nothing_is_kept_that_does_not_fit(size: int) -> None:
    cached = explainer(size=size)
    pixels = images(CASE, 2)
    for _ in range(2):
        found = cached.explain(pixels, [TARGETS] * 2)
        assert not any(item.token_cache_hit for item in found)
        assert_equal(found, Explainer(build(CASE)).explain(pixels, [TARGETS] * 2))
    assert cached.cache is not None
    assert cached.cache.bytes == 0


def test_kept_tokens_do_not_hold_on_to_their_batch() -> None:
    """What is counted is what is kept alive."""
    cached = explainer(size=2 * entry())
    cached.explain(images(CASE, 8), [TARGETS] * 8)
    assert cached.cache is not None
    kept = [tensor for its in cached.cache._kept.values() for tensor in (its.trunk.residual, its.trunk.tokens)]
    alive = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert sum(alive.values()) <= cached.cache.bytes
    assert not any(tensor.requires_grad for tensor in kept)


@pytest.mark.parametrize("difference", ["one_value", "order", "sign_of_zero"])
def test_images_that_differ_a_little_are_different(difference: str) -> None:
    cached = explainer()
    pixels = images(CASE, 2)
    pixels[0, 0, 0, 0] = 0.0
    cached.explain(pixels[:1], [TARGETS])
    other = pixels[:1].clone()
    if difference == "one_value":
        other[0, 2, -1, -1] += 1e-9
    elif difference == "order":
        other = other.flip(-1)
    else:
        other[0, 0, 0, 0] = -0.0
    (found,) = cached.explain(other, [TARGETS])
    assert not found.token_cache_hit or difference == "sign_of_zero"
    assert_equal([found], Explainer(build(CASE)).explain(other, [TARGETS]))


def test_same_bytes_in_another_shape_are_another_image() -> None:
    case = BY_ID["dynamic_size"]
    cached = explainer(case)
    pixels = images(Case("wide", case.timm_name, (32, 64), (2, 4)), 1)
    for reshaped in (pixels, pixels.reshape(1, 3, 64, 32), pixels.reshape(1, 3, 16, 128)):
        (found,) = cached.explain(reshaped, [TARGETS])
        assert not found.token_cache_hit
        assert_equal([found], Explainer(build(case)).explain(reshaped, [TARGETS]))


def test_models_share_a_cache_without_mixing_up() -> None:
    cache = TokenCache(PLENTY)
    model = copy.deepcopy(build(CASE))
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight[0, 0] += 1
    pixels = images(CASE, 1)
    one, other = Explainer(build(CASE), cache=cache), Explainer(model, cache=cache)
    for made in (one, other, one, other):
        assert_equal(made.explain(pixels, [TARGETS]), Explainer(made.vit.model).explain(pixels, [TARGETS]))
    assert (cache.hits, cache.misses) == (2, 2)


def test_failure_leaves_the_cache_usable() -> None:
    model = copy.deepcopy(build(CASE))
    cached = Explainer(model, cache=TokenCache(PLENTY))
    pixels = images(CASE, 2)
    for part in ("blocks.0.mlp", "head"):
        whole = model.get_submodule(part)
        model.set_submodule(part, BreaksForward().eval())
        with pytest.raises(BrokenError):
            cached.explain(pixels, [TARGETS] * 2)
        model.set_submodule(part, whole)
    for _ in range(2):
        assert_equal(cached.explain(pixels, [TARGETS] * 2), Explainer(model).explain(pixels, [TARGETS] * 2))


def test_two_threads_share_a_cache_that_is_too_small() -> None:
    cached = explainer(size=3 * entry())
    pixels = images(CASE, 6)
    orders = [[0, 1, 2], [3, 0], [4, 5, 1, 2], [2], [5, 4, 3]]
    asked = [[[Output(row)] for row in order] for order in orders]
    alone = [Explainer(build(CASE)).explain(pixels[order], its) for order, its in zip(orders, asked, strict=True)]
    together = threading.Barrier(2)

    def work(jobs: Sequence[int]) -> list[tuple[int, list[Explanation]]]:
        together.wait(timeout=30)
        return [(job, cached.explain(pixels[orders[job]], asked[job])) for _ in range(3) for job in jobs]

    with ThreadPoolExecutor(2) as pool:
        for answers in pool.map(work, [range(5), range(4, -1, -1)]):
            for job, found in answers:
                assert_equal(found, alone[job])
    assert cached.cache is not None
    assert cached.cache.bytes == sum(kept.bytes for kept in cached.cache._kept.values()) <= 3 * entry()


def test_in_bfloat16_the_outputs_do_not_depend_on_the_company() -> None:
    ours = Explainer(build(CASE, torch.float32), precision="bf16")
    pixels = images(CASE, 2, torch.float32)
    (alone,) = ours.explain(pixels[:1], [[Output(1)]], [[InputXGradient()]])
    beside, _ = ours.explain(pixels, [[Output(1)], [Output(1)]], [[InputXGradient()], [Cdam()]])
    np.testing.assert_allclose(alone.logits, beside.logits, rtol=1e-5, atol=1e-5)


def test_what_is_told_is_not_what_is_kept() -> None:
    made = explainer()
    (first,) = made.explain(images(CASE, 1), [TARGETS])
    expected = copy.deepcopy(first)
    for array in (first.latent, first.logits, *(item.scores for item in first.maps)):
        array[:] = np.nan
    (again,) = made.explain(images(CASE, 1), [TARGETS])
    assert again.token_cache_hit
    np.testing.assert_array_equal(again.latent, expected.latent)
    np.testing.assert_array_equal(again.logits, expected.logits)
    np.testing.assert_array_equal(again.maps[0].scores, expected.maps[0].scores)
