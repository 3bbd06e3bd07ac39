"""What must hold for every method, whatever the images, targets and parameters are."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cdam_engine
from cdam_engine import (
    Attention,
    AttentionRollout,
    Cdam,
    Concept,
    Contrast,
    Explainer,
    Explanation,
    InputXGradient,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    Noise,
    Output,
    PartialLrp,
    PatchMaskPrediction,
    RelevanceMap,
    RelevancePropagation,
    SmoothCdam,
    SmoothGrad,
    TokenAblation,
    TopK,
)
from reference.method_expectations import concept, supported
from reference.models import BY_ID, build, images, require

CASE = BY_ID["eight_outputs"]
COUNT = 3

GRADIENT_METHODS: tuple[Method, ...] = (
    Cdam(),
    Cdam(parts=True),
    SmoothCdam(3, Noise(0.2), seed=5),
    IntegratedCdam(3),
    IntegratedCdam(2, "gauss_legendre"),
    InputXGradient(),
    SmoothGrad(3, seed=2**31),
    IntegratedGradients(3),
    IntegratedGradients(2, "gauss_legendre"),
    TokenAblation(),
)
METHODS: tuple[Method, ...] = (
    *GRADIENT_METHODS,
    SmoothCdam(1),
    SmoothCdam(4, Noise(0.1, relative=False), seed=1),
    IntegratedCdam(1, tolerance=0.05),
    Attention(),
    Attention((0, 2)),
    AttentionRollout(),
    RelevancePropagation(),
    PartialLrp(),
    SmoothGrad(2, Noise(0.3, relative=False)),
    PatchMaskPrediction(),
    PatchMaskPrediction("sigmoid"),
    PatchMaskPrediction("identity"),
)
DRAWN: tuple[type[Method], ...] = (SmoothCdam, SmoothGrad)

few = settings(max_examples=15, deadline=None, derandomize=True)
every_method = pytest.mark.parametrize("method", METHODS, ids=str)
gradient_methods = pytest.mark.parametrize("method", GRADIENT_METHODS, ids=str)

outputs = st.integers(0, CASE.outputs - 1).map(Output)
concepts = st.builds(
    lambda seed, similarity: Concept(concept(build(CASE), seed), similarity),
    st.integers(0, 3),
    st.sampled_from(["dot", "cosine", "l2"]),
)
sides = st.one_of(outputs, concepts)
target = st.one_of(sides, st.builds(Contrast, sides, sides), st.integers(1, 3).map(TopK))
some_targets = st.lists(target, max_size=3)
some_methods = st.lists(st.sampled_from(METHODS), max_size=4)


def batch_of(count: int) -> st.SearchStrategy[list[tuple[list[Output | Concept | Contrast | TopK], list[Method]]]]:
    return st.lists(st.tuples(some_targets, some_methods), min_size=count, max_size=count)


def test_no_method_is_missing() -> None:
    assert {type(method) for method in METHODS} == set(cdam_engine.METHODS.values())


# Batches.


@few
@given(wanted=batch_of(COUNT), order=st.permutations(range(COUNT)))
def test_permuted_batch_gives_permuted_results(wanted: list, order: list[int]) -> None:
    found = explain(range(COUNT), wanted)
    permuted = explain(order, [wanted[i] for i in order])
    assert_equal(permuted, [found[i] for i in order])


@few
@given(wanted=batch_of(COUNT))
def test_batch_size_does_not_matter(wanted: list) -> None:
    whole = explain(range(COUNT), wanted)
    assert_equal([item for i in range(COUNT) for item in explain([i], [wanted[i]])], whole)


@few
@given(its_targets=some_targets, its_methods=some_methods, order=st.data())
def test_order_of_methods_and_targets_does_not_matter(
    its_targets: list, its_methods: list, order: st.DataObject
) -> None:
    (found,) = explain([0], [(its_targets, its_methods)])
    targets = order.draw(st.permutations(range(len(its_targets))))
    methods = order.draw(st.permutations(range(len(its_methods))))
    (permuted,) = explain([0], [([its_targets[i] for i in targets], [its_methods[i] for i in methods])])

    def name(item: Explanation, relevance: RelevanceMap, methods: Sequence[int], targets: Sequence[int]) -> object:
        method = methods[relevance.method_index]
        if relevance.target_index is None:
            return method, None
        its = item.targets[relevance.target_index]
        return method, targets[its.request_index], its.index

    by_name = {name(found, one, range(len(its_methods)), range(len(its_targets))): one for one in found.maps}
    assert len(permuted.maps) == len(found.maps) == len(by_name)
    for one in permuted.maps:
        assert_close(one, by_name[name(permuted, one, methods, targets)])


@every_method
def test_map_is_the_same_alone_and_in_any_batch(method: Method) -> None:
    """Seeds included: the same image, target and parameters give the same map, whatever is asked for beside it."""
    contrast = Contrast(Output(1), Output(2))
    (alone,) = explain([1], [([contrast], [method])])
    beside = [
        ([Output(0), contrast], [*(other for other in METHODS[:3] if other != method), method]),
        ([Output(0), contrast, TopK(2)], [method, *METHODS[-3:]]),
        ([contrast, contrast], [method, method]),
    ]
    together = explain([1, 0, 1], [beside[0], beside[1], beside[2]])
    for item, (its_targets, its_methods) in ((together[0], beside[0]), (together[2], beside[2])):
        same = [
            one
            for one in item.maps
            if its_methods[one.method_index] == method
            and (one.target_index is None or its_targets[item.targets[one.target_index].request_index] is contrast)
        ]
        assert len(same) == (1 if its_targets[0] is not contrast else 4 if method.needs_target else 2)
        for one in same:
            assert_close(one, alone.maps[0])


@pytest.mark.parametrize("kind", DRAWN)
@few
@given(seed=st.integers(0, 2**63 - 1), other=st.integers(0, 2**63 - 1))
def test_seed_decides_the_map(kind: type[Method], seed: int, other: int) -> None:
    (found,) = explain([0], [([Output(1)], [kind(2, seed=seed), kind(2, seed=seed), kind(2, seed=other)])])
    assert_close(found.maps[0], found.maps[1])
    different = np.abs(found.maps[0].scores - found.maps[2].scores).max() > 1e-3 * np.abs(found.maps[0].scores).max()
    assert different == (seed != other)


@pytest.mark.parametrize("kind", DRAWN)
def test_more_draws_go_on_where_fewer_stopped(kind: type[Method]) -> None:
    """Draw k depends on the seed alone: the mean of 1 and of 2 draws give the second draw, which is not the first."""
    (found,) = explain([0], [([Output(1)], [kind(1, seed=3), kind(2, seed=3)])])
    one, two = found.maps
    second = 2 * two.scores - one.scores
    assert np.abs(second - one.scores).max() > 1e-3 * np.abs(one.scores).max()
    # Of two draws: standard deviation |a - b| / sqrt(2), by sqrt(2).
    np.testing.assert_allclose(two.standard_error, np.abs(second - one.scores) / 2, rtol=1e-6, atol=1e-9)
    assert one.standard_error is None


@pytest.mark.parametrize("kind", DRAWN)
def test_noise_is_drawn_for_each_image_alike(kind: type[Method]) -> None:
    """Two images with one seed get what either gets alone, not one stream of noise shared out."""
    asked = ([Output(1)], [kind(3, seed=3)])
    together = explain([0, 1], [asked, asked])
    assert_equal([*explain([0], [asked]), *explain([1], [asked])], together)


@pytest.mark.parametrize(
    ("noisy", "plain"),
    [(SmoothCdam(4, Noise(0.0)), Cdam()), (IntegratedGradients(1), InputXGradient()), (IntegratedCdam(1), Cdam())],
    ids=str,
)
def test_limits_of_methods(noisy: Method, plain: Method) -> None:
    """No noise, or one step of the right-hand sum: the plain method."""
    (found,) = explain([0], [([Output(1)], [noisy, plain])])
    np.testing.assert_allclose(found.maps[0].scores, found.maps[1].scores, rtol=0, atol=1e-10 * scale(found.maps[1]))
    if found.maps[0].standard_error is not None:
        assert found.maps[0].standard_error.max() < 1e-10 * scale(found.maps[1])


# Targets.


@gradient_methods
def test_contrast_is_the_difference_of_maps(method: Method) -> None:
    one, other = Output(1), Concept(concept(build(CASE), 0), "cosine")
    (found,) = explain([0], [([one, other, Contrast(one, other), Contrast(other, one)], [method])])
    first, second, difference, opposite = found.maps
    size = max(scale(first), scale(second))
    for name in ("scores", "value_part", "key_part"):
        parts = [getattr(relevance, name) for relevance in (first, second, difference, opposite)]
        if parts[0] is not None:
            np.testing.assert_allclose(parts[2], parts[0] - parts[1], rtol=0, atol=1e-10 * size)
            np.testing.assert_allclose(parts[3], -parts[2], rtol=0, atol=1e-10 * size)
    if difference.completeness_residual is not None:
        expected = first.completeness_residual - second.completeness_residual
        assert difference.completeness_residual == pytest.approx(expected, abs=1e-10 * size)


@pytest.mark.parametrize("method", [*GRADIENT_METHODS, RelevancePropagation(), PartialLrp()], ids=str)
def test_head_row_as_a_concept_gives_the_outputs_map(method: Method) -> None:
    """Up to the bias, which no map depends on."""
    row = build(CASE).head.weight[3].detach()
    (found,) = explain([0], [([Output(3), Concept(row, "dot")], [method])])
    as_output, as_concept = found.maps
    np.testing.assert_allclose(as_concept.scores, as_output.scores, rtol=0, atol=1e-10 * scale(as_output))
    bias = float(build(CASE).head.bias[3].detach())
    assert found.targets[0].value == pytest.approx(found.targets[1].value + bias)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name in ("eight_outputs", "deit_distilled", "siglip", "beit")
        for method in METHODS
        # Where outputs pass through a softmax or a sigmoid it does matter.
        if supported(BY_ID[name], method) and not isinstance(method, PatchMaskPrediction)
    ],
    ids=str,
)
def test_bias_of_the_head_does_not_matter(name: str, method: Method) -> None:
    case = BY_ID[name]
    model = copy.deepcopy(build(case))
    with torch.no_grad():
        for head in (model.head, getattr(model, "head_dist", model.head)):
            head.bias.add_(torch.linspace(-5, 5, len(head.bias)))
    (plain,) = Explainer(build(case)).explain(images(case, 1), [[Output(3)]], [[method]])
    (moved,) = Explainer(model).explain(images(case, 1), [[Output(3)]], [[method]])
    assert_close(moved.maps[0], plain.maps[0], tolerance=1e-9)


@every_method
def test_scaled_target_gives_scaled_map(method: Method) -> None:
    """Linear in the target where the method is a gradient; as the definitions say elsewhere."""
    vector = concept(build(CASE), 0)
    (found,) = explain([0], [([Concept(vector, "dot"), Concept(4 * vector, "dot")], [method])])
    if not method.needs_target:
        return
    plain, scaled = found.maps
    if isinstance(method, IntegratedCdam) and method.tolerance is not None:
        assert scaled.steps >= plain.steps
        return
    if isinstance(method, RelevancePropagation):
        assert (scaled.scores >= plain.scores).all()
        return
    # Layer-wise relevance starts from 1, whatever the target's size.
    factor = 1 if isinstance(method, PartialLrp) else 4
    size = scale(plain)
    np.testing.assert_allclose(scaled.scores, factor * plain.scores, rtol=0, atol=1e-8 * size)
    if plain.standard_error is not None:
        np.testing.assert_allclose(scaled.standard_error, 4 * plain.standard_error, rtol=1e-8, atol=1e-10 * size)


# Parts, attention and paths.


@pytest.mark.parametrize("name", ["eight_outputs", "deit_distilled", "siglip", "beit", "rope_mixed", "qk_norm"])
def test_parts_sum_to_the_scores(name: str) -> None:
    case = BY_ID[name]
    require(case)
    (found,) = Explainer(build(case)).explain(images(case, 1), [[Output(1), TopK(2)]], [[Cdam(), Cdam(parts=True)]])
    plain, split = found.maps[:3], found.maps[3:]
    for one, parts in zip(plain, split, strict=True):
        np.testing.assert_allclose(parts.value_part + parts.key_part, parts.scores, rtol=0, atol=1e-12 * scale(one))
        assert one.value_part is None
        assert one.key_part is None
        np.testing.assert_allclose(parts.scores, one.scores, rtol=0, atol=1e-10 * scale(one))


@pytest.mark.parametrize("name", ["eight_outputs", "deit_distilled", "dinov2_registers", "beit_token"])
@pytest.mark.parametrize("seed", range(3))
def test_token_that_nobody_attends_to_scores_nothing(name: str, seed: int) -> None:
    """A_i -> 0 makes S_i -> 0: with queries as long as these, each head reads one token and forgets the others."""
    case = BY_ID[name]
    model = copy.deepcopy(build(case))
    attn = model.blocks[-1].attn
    with torch.no_grad():
        queries = attn.num_heads * (attn.qkv.weight.shape[0] // 3 // attn.num_heads)
        attn.qkv.weight[:queries] *= 200
        if attn.qkv.bias is not None:
            attn.qkv.bias[:queries] *= 200
        if getattr(attn, "q_bias", None) is not None:
            attn.q_bias *= 200
    (found,) = Explainer(model).explain(images(case, 1, seed=seed), [[Output(1)]], [[Attention(), Cdam(parts=True)]])
    attended, scores = found.maps
    forgotten = attended.scores < 1e-9
    assert forgotten.sum() > 0
    assert scale(scores) > 0 or scores.prefix_share == 1
    for part in (scores.scores, scores.value_part, scores.key_part):
        assert np.abs(part[forgotten]).max() < 1e-5
    # Not because there is nothing: with the queries as they were those very tokens count.
    (before,) = Explainer(build(case)).explain(images(case, 1, seed=seed), [[Output(1)]])
    assert np.abs(before.maps[0].scores[forgotten]).max() > 1e-3


@pytest.mark.parametrize("name", ["eight_outputs", "deit_distilled", "siglip", "beit", "dinov3_token"])
@pytest.mark.parametrize("kind", [IntegratedCdam, IntegratedGradients])
def test_gauss_legendre_is_more_complete_than_a_sum(name: str, kind: type[Method]) -> None:
    case = BY_ID[name]
    rules = ("riemann_right", "gauss_legendre")
    (found,) = Explainer(build(case)).explain(images(case, 1), [[Output(1)]], [[kind(24, rule) for rule in rules]])
    by_sum, by_gauss = (abs(relevance.completeness_residual) for relevance in found.maps)
    assert by_gauss < by_sum / 3


@pytest.mark.parametrize("kind", [IntegratedCdam, IntegratedGradients])
@pytest.mark.parametrize("rule", ["riemann_right", "gauss_legendre"])
def test_residual_is_what_is_missing(kind: type[Method], rule: str) -> None:
    """Of the sum over patches; the prefix tokens' share is known in size alone, so there must be little of it."""
    case = BY_ID["siglip"]  # no prefix tokens
    (found,) = Explainer(build(case)).explain(images(case, 1), [[Output(1)]], [[kind(5, rule), kind(6, rule)]])
    five, six = found.maps
    changes = [relevance.scores.sum() - relevance.completeness_residual for relevance in (five, six)]
    assert changes[0] == pytest.approx(changes[1], rel=1e-9)


@few
@given(tolerance=st.floats(1e-4, 1.0), rule=st.sampled_from(["riemann_right", "gauss_legendre"]))
def test_tolerance_is_reached_or_the_steps_are_used_up(tolerance: float, rule: str) -> None:
    method = IntegratedCdam(3, rule, tolerance=tolerance)
    (found,) = explain([0], [([Output(1), Output(2), Concept(concept(build(CASE), 0), "cosine")], [method])])
    for relevance in found.maps:
        assert relevance.steps in [3 * 2**k for k in range(9)]
        assert abs(relevance.completeness_residual) <= tolerance or 2 * relevance.steps > 1024


def test_attention_shares_out_one() -> None:
    for name in ("eight_outputs", "deit_distilled", "average_pool_register", "beit"):
        case = BY_ID[name]
        (found,) = Explainer(build(case)).explain(
            images(case, 1), [[]], [[Attention(), AttentionRollout(), Attention((0,))]]
        )
        for relevance in found.maps:
            assert relevance.scores.min() >= 0
            assert relevance.scores.sum() == pytest.approx(1 - relevance.prefix_share)


def test_mask_predictions_are_probabilities() -> None:
    targets = [Output(output) for output in range(CASE.outputs)]
    (found,) = explain([0], [(targets, [PatchMaskPrediction(), PatchMaskPrediction("sigmoid")])])
    soft = np.stack([relevance.scores for relevance in found.maps[: CASE.outputs]])
    np.testing.assert_allclose(soft.sum(axis=0), 1)
    for relevance in found.maps:
        assert relevance.scores.min() > 0
        assert relevance.scores.max() < 1


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (SmoothCdam, {"samples": 0}),
        (SmoothGrad, {"samples": -1}),
        (IntegratedCdam, {"steps": 0}),
        (IntegratedGradients, {"steps": 0}),
        (IntegratedCdam, {"quadrature": "simpson"}),
        (IntegratedGradients, {"quadrature": ""}),
        (IntegratedCdam, {"tolerance": 0}),
        (IntegratedCdam, {"tolerance": float("nan")}),
        (IntegratedCdam, {"tolerance": float("inf")}),
        (Noise, {"level": -0.1}),
        (Noise, {"level": float("nan")}),
        (Noise, {"level": float("inf")}),
        (Attention, {"heads": (-1,)}),
        (Attention, {"heads": (1, 1)}),
        (PatchMaskPrediction, {"activation": "relu"}),
        (SmoothCdam, {"seed": 2**64}),
        (SmoothGrad, {"seed": 2**64}),
    ],
    ids=str,
)
def test_wrong_parameters_are_refused_at_once(make: type, parameters: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        make(**parameters)


def explain(chosen: Sequence[int], wanted: Sequence[tuple[Sequence, Sequence[Method]]]) -> list[Explanation]:
    return Explainer(build(CASE)).explain(
        images(CASE, COUNT)[list(chosen)], [targets for targets, _ in wanted], [methods for _, methods in wanted]
    )


def scale(relevance: RelevanceMap) -> float:
    return float(np.abs(relevance.scores).max())


def assert_equal(found: Sequence[Explanation], expected: Sequence[Explanation]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(one.latent, other.latent, rtol=1e-10, atol=1e-13)
        assert [item.target for item in one.targets] == [item.target for item in other.targets]
        for a, b in zip(one.maps, other.maps, strict=True):
            assert (a.method_index, a.target_index) == (b.method_index, b.target_index)
            assert_close(a, b)


def assert_close(found: RelevanceMap, expected: RelevanceMap, tolerance: float = 1e-10) -> None:
    size = scale(expected)
    for name in ("scores", "value_part", "key_part", "standard_error"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            most = tolerance * max(size, float(np.abs(other).max()))
            np.testing.assert_allclose(one, other, rtol=0, atol=most, err_msg=name)
    if expected.prefix_share is None:
        assert found.prefix_share is None
    else:
        assert found.prefix_share == pytest.approx(expected.prefix_share, rel=1e-8, abs=1e-12)
    assert found.steps == expected.steps
    if expected.completeness_residual is None:
        assert found.completeness_residual is None
    else:
        assert found.completeness_residual == pytest.approx(expected.completeness_residual, abs=100 * tolerance * size)
