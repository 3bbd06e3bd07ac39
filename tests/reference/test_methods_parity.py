"""Every method of the engine equals its reference: mixed in one call, with several targets, another set for each image."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdam_engine import (
    METHODS,
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
    UnsupportedMethodError,
)
from cdam_engine.chunks import Limit
from cdam_engine.preprocess import DataConfig
from reference.method_expectations import Target, concept, expected, supported
from reference.models import BY_ID, CASES, Case, build, images, require
from reference.whole_model import ReferenceMap, run

FEW = (
    "eight_outputs",
    "patch_oblong",
    "single_block",
    "deit_distilled",
    "dinov2_registers",
    "qk_norm",
    "inner_norms_token",
    "differential_attention",
    "average_pool_register",
    "average_pool_with_prefix",
    "token_fc_norm",
    "no_final_norm",
    "max_pool",
    "siglip",
    "clip_quickgelu",
    "beit_token",
    "beitv2_shared_bias",
    "eva02",
    "eva02_unfused",
    "dinov3_token",
    "rope_mixed",
    "perception_encoder",
    "sapiens2",
)
# One [CLS] token is read out, and what all blocks share comes without a dimension for the batch; then both biases.
SHARED_BIAS = (
    Case(
        "shared_bias_token",
        "beitv2_base_patch16_224",
        (48, 32),
        (3, 2),
        options={
            "depth": 2,
            "embed_dim": 48,
            "num_heads": 3,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "global_pool": "token",
        },
    ),
    Case(
        "both_biases_token",
        "beitv2_base_patch16_224",
        (48, 32),
        (3, 2),
        options={
            "depth": 2,
            "embed_dim": 48,
            "num_heads": 3,
            "use_rel_pos_bias": True,
            "use_shared_rel_pos_bias": True,
            "global_pool": "token",
        },
    ),
)
every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in (*CASES, *SHARED_BIAS)])
some_cases = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id) for case in (*map(BY_ID.__getitem__, FEW), *SHARED_BIAS)]
)
both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])

# Two images; what is asked for differs in kind, in parameters and in order.
CDAM_FAMILY: tuple[tuple[Method, ...], ...] = (
    (Cdam(parts=True), SmoothCdam(3, Noise(0.1), seed=5), IntegratedCdam(4)),
    (IntegratedCdam(3, "gauss_legendre"), SmoothCdam(3, Noise(0.3, relative=False), seed=1), Cdam()),
)
TOKENS_AND_ATTENTION: tuple[tuple[Method, ...], ...] = (
    (Attention(), RelevancePropagation(), PartialLrp(), PatchMaskPrediction(), PatchMaskPrediction("identity")),
    (TokenAblation(), PatchMaskPrediction("sigmoid"), AttentionRollout(), PartialLrp(), Attention((1,)), Cdam()),
)
PIXELS: tuple[tuple[Method, ...], ...] = (
    (InputXGradient(), SmoothGrad(3, Noise(0.2), seed=2), IntegratedGradients(4)),
    (IntegratedGradients(3, "gauss_legendre"), SmoothGrad(2, Noise(0.5, relative=False), seed=9), InputXGradient()),
)


def test_no_method_is_without_a_reference() -> None:
    groups = (*CDAM_FAMILY, *TOKENS_AND_ATTENTION, *PIXELS)
    assert {type(method) for group in groups for method in group} == set(METHODS.values())


# Of the largest score of the map, in single precision, against the truth in double precision.
SINGLE = 5e-5
DOUBLE = 1e-10


class Asked(NamedTuple):
    """One map: of which image, by which method, of which target, and where it stands in the explanation."""

    image: int
    method: Method
    target: Target | None
    method_index: int
    target_index: int | None


@functools.cache
def targets(case: Case) -> tuple[tuple[Target, ...], ...]:
    model = build(case)
    last = case.outputs - 1
    return (
        (Output(last), Concept(concept(model, 1), "cosine")),
        (Contrast(Output(0), Concept(concept(model, 2), "l2")), Concept(concept(model, 3), "dot"), Output(last // 2)),
    )


def asked(case: Case, methods: Sequence[Sequence[Method]]) -> list[Asked]:
    """Method by method, target by target, as maps come."""
    return [
        Asked(image, method, target, method_index, target_index)
        for image, (its_methods, its_targets) in enumerate(zip(methods, targets(case), strict=True))
        for method_index, method in enumerate(method for method in its_methods if supported(case, method))
        for target_index, target in (enumerate(its_targets) if method.needs_target else [(None, None)])
    ]


@functools.cache
def truth(case: Case, image: int, method: Method, target: Target | None) -> ReferenceMap:
    """The reference's answer in double precision."""
    return expected(build(case), images(case, 2)[image], method, target)


def explained(case: Case, methods: Sequence[Sequence[Method]], dtype: torch.dtype) -> list[Explanation]:
    kept = [[method for method in its if supported(case, method)] for its in methods]
    return Explainer(build(case, dtype)).explain(images(case, 2, dtype), targets(case), kept)


def check(case: Case, methods: Sequence[Sequence[Method]], dtype: torch.dtype) -> None:
    require(case)
    found = explained(case, methods, dtype)
    wanted = asked(case, methods)
    assert sum(len(item.maps) for item in found) == len(wanted)
    maps = [relevance for item in found for relevance in item.maps]
    for relevance, its in zip(maps, wanted, strict=True):
        assert (relevance.method_index, relevance.target_index) == (its.method_index, its.target_index)
        tolerance = DOUBLE if dtype == torch.float64 else SINGLE
        if isinstance(its.method, PartialLrp):
            # Relevance is shared out over sums in which terms cancel, so that rounding is magnified.
            tolerance *= 100
        compare(relevance, truth(case, its.image, its.method, its.target), tolerance, f"{its.method} {its.target}")


def compare(found: RelevanceMap, wanted: ReferenceMap, tolerance: float, what: str) -> None:
    """All that a map has, relative to its largest score."""
    scale = float(wanted.scores.abs().max()) or 1.0  # where no relevance is positive, all of the map is zero
    assert found.scores.shape == wanted.scores.shape, what
    difference = np.abs(found.scores - wanted.scores.numpy()).max() / scale
    assert difference <= tolerance, f"{what}: {difference:.1e}"
    if wanted.prefix_share is None:
        assert found.prefix_share is None, what
    else:
        assert found.prefix_share == pytest.approx(wanted.prefix_share, abs=tolerance), what
    for name in ("value_part", "key_part", "standard_error"):
        close(getattr(found, name), getattr(wanted, name), tolerance, scale, f"{what} {name}")
    assert found.steps == wanted.steps, what
    if wanted.completeness_residual is None:
        assert found.completeness_residual is None, what
    else:
        # A difference of sums over all tokens or patches.
        most = tolerance * scale * wanted.scores.numel()
        assert found.completeness_residual == pytest.approx(wanted.completeness_residual, abs=most), what


def close(found: NDArray[np.floating] | None, wanted: Tensor | None, tolerance: float, scale: float, what: str) -> None:
    if wanted is None:
        assert found is None, what
        return
    assert found is not None, what
    scale = max(scale, float(wanted.abs().max()))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=tolerance * scale, err_msg=what)


@every_case
@both_precisions
def test_cdam_family(case: Case, dtype: torch.dtype) -> None:
    check(case, CDAM_FAMILY, dtype)


@some_cases
@both_precisions
def test_attention_and_tokens(case: Case, dtype: torch.dtype) -> None:
    check(case, TOKENS_AND_ATTENTION, dtype)


@some_cases
@both_precisions
def test_pixels(case: Case, dtype: torch.dtype) -> None:
    check(case, PIXELS, dtype)


@pytest.mark.parametrize("name", ["eight_outputs", "deit_distilled", "siglip", "rope_mixed"])
@pytest.mark.parametrize("part", [0.9, 0.2])
@pytest.mark.parametrize("quadrature", ["riemann_right", "gauss_legendre"])
def test_steps_are_doubled_target_by_target(name: str, part: float, quadrature: str) -> None:
    """As far as the reference doubles them for each target alone."""
    case = BY_ID[name]
    require(case)
    plain = IntegratedCdam(2, quadrature)
    residuals = [abs(truth(case, 0, plain, target).completeness_residual) for target in targets(case)[0]]
    method = IntegratedCdam(2, quadrature, tolerance=part * max(residuals))
    (found,) = Explainer(build(case)).explain(images(case, 2)[:1], targets(case)[:1], [[method]])
    for relevance, target in zip(found.maps, targets(case)[0], strict=True):
        compare(relevance, expected(build(case), images(case, 2)[0], method, target), DOUBLE, str(target))
        assert abs(relevance.completeness_residual) <= method.tolerance


@pytest.mark.parametrize("name", ["eight_outputs", "deit_distilled", "siglip", "beit"])
def test_outputs_are_the_plain_models(name: str) -> None:
    """Whatever the methods, latents, logits and the targets' values are those of one forward pass."""
    case = BY_ID[name]
    for methods in (CDAM_FAMILY, TOKENS_AND_ATTENTION, PIXELS, [[TokenAblation()]] * 2, [[]] * 2):
        found = explained(case, methods, torch.float64)
        for image, item in enumerate(found):
            there = run(build(case), images(case, 2)[image])
            np.testing.assert_allclose(item.latent, there.latent.detach().numpy(), rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(item.logits, there.logits.detach().numpy(), rtol=1e-10, atol=1e-12)
            assert item.grid == case.grid
            assert [one.target for one in item.targets] == list(targets(case)[image])
            assert [one.request_index for one in item.targets] == list(range(len(item.targets)))
            for one in item.targets:
                assert one.index == (one.target.index if isinstance(one.target, Output) else None)
                wanted = one.target(there.latent, there.logits).detach()
                assert one.value == pytest.approx(float(wanted), rel=1e-10)


def test_top_k_stands_for_outputs_whatever_the_method() -> None:
    case = BY_ID["eight_outputs"]
    methods = [TokenAblation(), Attention(), InputXGradient(), Cdam(), RelevancePropagation(), PatchMaskPrediction()]
    pixels = images(case, 2)
    asked_for = [[Output(1), TopK(3), Output(2)], [TopK(2)]]
    for chosen in (methods, methods[:1], methods[2:3], methods[4:5]):
        for image, item in enumerate(Explainer(build(case)).explain(pixels, asked_for, [chosen] * 2)):
            order = np.argsort(-item.logits, kind="stable").tolist()
            wanted = [[1, *order[:3], 2], order[:2]][image]
            assert [one.index for one in item.targets] == wanted
            assert [one.request_index for one in item.targets] == [[0, 1, 1, 1, 2], [0, 0]][image]
            for relevance in item.maps:
                method = chosen[relevance.method_index]
                target = None if relevance.target_index is None else item.targets[relevance.target_index].target
                compare(relevance, truth(case, image, method, target), DOUBLE, str(method))


def test_map_without_target() -> None:
    """A method that needs none gives one map, whether there are targets or not."""
    case = BY_ID["eight_outputs"]
    methods = [Attention(), Cdam(), AttentionRollout(), TokenAblation(), Attention((2,))]
    nothing, two = Explainer(build(case)).explain(images(case, 2), [[], [Output(0), Output(1)]], [methods, methods])
    assert [(one.method_index, one.target_index) for one in nothing.maps] == [(0, None), (2, None), (4, None)]
    assert [(one.method_index, one.target_index) for one in two.maps] == [
        (0, None),
        (1, 0),
        (1, 1),
        (2, None),
        (3, 0),
        (3, 1),
        (4, None),
    ]


def test_methods_default_to_cdam() -> None:
    case = BY_ID["eight_outputs"]
    found = Explainer(build(case)).explain(images(case, 2), [[Output(0)], []])
    assert [[one.method_index for one in item.maps] for item in found] == [[0], []]
    compare(found[0].maps[0], truth(case, 0, Cdam(), Output(0)), DOUBLE, "default")


@every_case
def test_what_is_not_defined_is_refused(case: Case) -> None:
    """For every method there is: as the table says, by `check` and, whatever else is asked for, by `explain`."""
    require(case)
    explainer = Explainer(build(case))
    every = [kind() for kind in METHODS.values()]
    for method in (*every, Cdam(parts=True), Attention((case.options.get("num_heads", 3) - 1,))):
        if supported(case, method):
            explainer.check(method)
            continue
        with pytest.raises(UnsupportedMethodError) as refused:
            explainer.check(method)
        assert refused.value.reason
        assert refused.value.reason == refused.value.reason.upper()
        assert " " not in refused.value.reason
        with pytest.raises(UnsupportedMethodError):
            explainer.explain(images(case, 2), [[Output(0)]] * 2, [[Cdam()], [Cdam(), method]])


@pytest.mark.parametrize("heads", [(3,), (0, 7)])
def test_heads_that_are_not_there(heads: tuple[int, ...]) -> None:
    case = BY_ID["eight_outputs"]
    with pytest.raises(UnsupportedMethodError):
        Explainer(build(case)).check(Attention(heads))


@pytest.mark.parametrize("name", ["dynamic_size"])
@pytest.mark.parametrize("size", [(48, 80), (32, 16)])
def test_other_image_sizes(name: str, size: tuple[int, int]) -> None:
    case = BY_ID[name]
    resized = Case(case.id, case.timm_name, size, (size[0] // 16, size[1] // 16), options=case.options)
    model, pixels = build(case), images(resized, 1)
    methods = [Cdam(parts=True), SmoothGrad(2), TokenAblation(), RelevancePropagation(), PartialLrp()]
    (found,) = Explainer(model).explain(pixels, [[Output(4)]], [methods])
    for relevance, method in zip(found.maps, methods, strict=True):
        compare(relevance, expected(model, pixels[0], method, Output(4)), 100 * DOUBLE, str(method))


def _bound(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [
        (module, bound, value)
        for path, module in sys.modules.items()
        if path.startswith("cdam_engine.")
        for bound, value in vars(module).items()
        if isinstance(value, Limit) or (isinstance(value, int) and value >= 1 << 20)
    ]
    assert len(bounds) >= 10
    for module, bound, value in bounds:
        monkeypatch.setattr(module, bound, Limit(most, most) if isinstance(value, Limit) else most)


@pytest.mark.parametrize("most", [1, 3000, 100_000])
@pytest.mark.parametrize("name", ["eight_outputs", "deit_distilled", "beit", "rope_mixed"])
def test_work_in_pieces(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever bounds memory changes no map: every such bound is made so small that small models exceed it."""
    case = BY_ID[name]
    require(case)
    _bound(most, monkeypatch)
    for methods in (CDAM_FAMILY, TOKENS_AND_ATTENTION, PIXELS):
        check(case, methods, torch.float64)


@pytest.mark.parametrize("most", [None, 3000, 10_000])
@pytest.mark.parametrize("name", ["eight_outputs", "deit_distilled", "siglip"])
def test_the_large_steps_of_a_gpu(name: str, most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several images share them, and nothing else changes."""
    case = BY_ID[name]
    every = (*CDAM_FAMILY[0], *TOKENS_AND_ATTENTION[0], *PIXELS[0], TokenAblation())
    methods = [[method for method in every if supported(case, method)]]
    explainer, pixels = Explainer(build(case)), images(case, 3)
    wanted = [targets(case)[0], targets(case)[0], targets(case)[0][::-1]]
    one_by_one = [explainer.explain(pixels[[row]], [its], methods)[0] for row, its in enumerate(wanted)]
    for module in ("chunks", "targets", "tail", "methods.cdam"):
        monkeypatch.setattr(f"cdam_engine.{module}.is_wide", lambda _device: True)
    if most is not None:
        _bound(most, monkeypatch)
    for together, alone in zip(explainer.explain(pixels, wanted, 3 * methods), one_by_one, strict=True):
        for one, other in zip(together.maps, alone.maps, strict=True):
            scale = np.abs(other.scores).max()
            tolerance = DOUBLE * (100 if methods[0][one.method_index].kind == "partial_lrp" else 1)
            for its, same in ((one.scores, other.scores), (one.standard_error, other.standard_error)):
                close(its, None if same is None else torch.from_numpy(same), tolerance, scale, str(one.method_index))


def test_raw_pixels() -> None:
    """uint8, rows by columns by channels, normalised as the model's configuration says."""
    case = BY_ID["eight_outputs"]
    config = DataConfig(case.image_size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bicubic", 1.0, "center")
    random = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (2, *case.image_size, 3), dtype=torch.uint8, generator=random)
    normalised = (raw.double() / 255 - torch.tensor(config.mean).double()) / torch.tensor(config.std).double()
    pixels = normalised.permute(0, 3, 1, 2).contiguous()
    methods = [[Cdam(), InputXGradient(), IntegratedGradients(3)], [TokenAblation(), AttentionRollout(), Cdam()]]
    explainer = Explainer(build(case), data_config=config)
    wanted = [[Output(0)], [Output(1)]]
    for item, image, its in zip(explainer.explain(raw, wanted, methods), pixels, methods, strict=True):
        for relevance in item.maps:
            method, target = its[relevance.method_index], item.targets[0].target
            # The channels' means are kept in single precision.
            compare(relevance, expected(build(case), image, method, target), 1e-5, str(method))
