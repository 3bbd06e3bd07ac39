"""How the engine evaluates: what shares work, what depends on what, and what goes wrong alone.

That the numbers are right is shown in tests/reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import every
from cdam_engine import Attention, Cdam, Concept, Contrast, Explainer, Output, TokenCache, TopK, UnsupportedMethodError
from cdam_engine.evaluation import (
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Evaluator,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Measured,
    Metric,
    Protocol,
    Randomisation,
    Sample,
    SampleError,
    Sparseness,
)
from cdam_engine.methods import RelevancePropagation
from cdam_engine.pauses import interruptible
from oblong_vit import CONFIG, sample, vit

FIDELITY = Fidelity(points=4)
BOXES = BoxSensitivity(boxes=5)
EVERY = every.metrics(FIDELITY, BOXES, ClassDiscrimination(FIDELITY, BOXES), InsertionDeletion(steps=3))
METHODS = (Cdam(), Attention(), Anchor.RANDOM, Anchor.MASK)


def explainer(model: VisionTransformer | None = None, **settings: Any) -> Explainer:
    return Explainer(model or vit(), data_config=CONFIG, **settings)


def values(result: Measured | SampleError) -> np.ndarray:
    assert isinstance(result, Measured), result
    return np.array([value.value for value in result.values])


def only(*metrics: Metric) -> Protocol:
    return Protocol((Cdam(),), metrics)


@contextmanager
def forwards(model: VisionTransformer) -> Iterator[list[int]]:
    """How many images each run of the model's first block had."""
    sizes: list[int] = []
    hook = model.blocks[0].register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        hook.remove()


def test_every_metric_gives_its_quantities_in_order() -> None:
    (result,) = Evaluator(explainer(), Protocol(METHODS, EVERY)).evaluate([sample(0)])
    assert isinstance(result, Measured)
    found = [(value.method_index, value.metric_index, value.quantity) for value in result.values]
    assert found == [
        (m, k, quantity)
        for m in range(len(METHODS))
        for k, metric in enumerate(EVERY)
        for quantity in metric.quantities
    ]
    with_curves = {"a_mif", "a_lif", "box_area", "insertion", "deletion", "randomisation_mean", "box_acc"}
    assert {value.quantity for value in result.values if value.curve is not None} == with_curves
    assert all(value.curve.shape[0] == 2 for value in result.values if value.curve is not None)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_results_do_not_depend_on_the_grouping(batch_size: int) -> None:
    model = vit().double()
    samples = [sample(seed) for seed in range(5)]
    together = Evaluator(explainer(model), Protocol(METHODS, EVERY)).evaluate(samples)
    evaluator = Evaluator(explainer(model), Protocol(METHODS, EVERY), batch_size=batch_size)
    for one, expected in reversed(list(zip(samples, together, strict=True))):
        (alone,) = evaluator.evaluate([one])
        np.testing.assert_allclose(values(alone), values(expected), rtol=1e-10, atol=1e-10)


def test_a_token_cache_is_left_alone() -> None:
    cache = TokenCache(1 << 20)
    caching = explainer(cache=cache)
    evaluator = Evaluator(caching, Protocol(METHODS, EVERY))
    evaluator.evaluate([sample(0)])
    assert caching.cache is cache
    assert not len(cache)


def test_bad_samples_fail_alone() -> None:
    nan = torch.zeros(3, 24, 32)
    nan[0, 0, 0] = torch.nan
    huge = torch.full((3, 24, 32), 3e38)
    mask = np.zeros((24, 32), bool)
    whole = sample(0)
    bad = {
        "image": [
            sample(1, image=nan),
            sample(2, image=huge, counterfactual=torch.zeros(3, 24, 32)),
            sample(3, image=np.zeros((32, 24, 3), np.uint8)),
            sample(4, image=torch.zeros(1, 24, 32)),
        ],
        "target": [
            sample(5, target=Output(5)),
            sample(6, target=TopK(1)),
            sample(7, target=Concept(torch.ones(7))),
            sample(8, target=Contrast(Output(0), Output(-1))),
            sample(9, target="cat"),
        ],
        "wrong_target": [sample(10, wrong_target=None), sample(11, wrong_target=Output(9))],
        "mask": [
            sample(12, mask=None),
            sample(13, mask=mask),
            sample(14, mask=~mask),
            sample(15, mask=mask[1:]),
            sample(16, mask=mask.astype(np.uint8)),
        ],
        "wrong_mask": [sample(17, wrong_mask=None)],
        "counterfactual": [
            sample(18, counterfactual=None),
            sample(19, counterfactual=sample(19).image),
            sample(20, counterfactual=torch.zeros(3, 24, 32)),
            sample(21, counterfactual=np.zeros((24, 31, 3), np.uint8)),
        ],
    }
    evaluator = Evaluator(explainer(), Protocol(METHODS, EVERY))
    samples = [whole, *(one for group in bad.values() for one in group), sample(99)]
    first, *failed, last = evaluator.evaluate(samples)
    assert [error.field for error in failed if isinstance(error, SampleError)] == [
        field for field, group in bad.items() for _ in group
    ]
    for one, result in ((whole, first), (sample(99), last)):
        np.testing.assert_allclose(values(result), values(evaluator.evaluate([one])[0]), rtol=1e-5, atol=1e-4)


def test_a_sample_says_what_required_a_field() -> None:
    needs = {
        "wrong_target": (Cdam(), ClassDiscrimination()),
        "mask": (Anchor.MASK, Fidelity()),
        "counterfactual": (Cdam(), Counterfactual()),
    }
    for field, (method, metric) in needs.items():
        (error,) = Evaluator(explainer(), Protocol((method,), (metric,))).evaluate([sample(0, **{field: None})])
        assert isinstance(error, SampleError)
        by = method.value if isinstance(method, Anchor) else metric.kind
        assert (error.field, error.reason) == (field, f"is required by {by}")


def test_what_no_metric_asks_for_may_be_missing() -> None:
    bare = sample(0, wrong_target=None, mask=None, counterfactual=None, wrong_mask=None)
    (result,) = Evaluator(explainer(), only(FIDELITY, BOXES, Sparseness())).evaluate([bare])
    assert isinstance(result, Measured)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_makes_batches_smaller(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    protocol = Protocol(METHODS, EVERY)
    samples = [sample(0), sample(1)]
    evaluator = Evaluator(explainer(vit().double()), protocol)
    expected = evaluator.evaluate(samples)
    original, sizes = Explainer.outputs, []

    def short_of_memory(self: Explainer, pixels: torch.Tensor) -> Any:
        if len(pixels) > 3:
            raise error
        sizes.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(Explainer, "outputs", short_of_memory)
    for result, its in zip(evaluator.evaluate(samples), expected, strict=True):
        np.testing.assert_allclose(values(result), values(its), rtol=1e-10, atol=1e-10)
    assert max(sizes) == 2


def test_out_of_memory_for_a_single_image_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def short_of_memory(self: Explainer, pixels: torch.Tensor) -> Any:
        sizes.append(len(pixels))
        raise MemoryError

    monkeypatch.setattr(Explainer, "outputs", short_of_memory)
    with pytest.raises(MemoryError):
        Evaluator(explainer(), only(BOXES), batch_size=8).evaluate([sample(0)])
    assert sizes == [8, 4, 2, 1]


def test_other_errors_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Explainer, pixels: torch.Tensor) -> Any:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(Explainer, "outputs", broken)
    with pytest.raises(RuntimeError, match="device-side"):
        Evaluator(explainer(), only(BOXES)).evaluate([sample(0)])


def test_work_can_be_interrupted_before_every_batch() -> None:
    class Enough(Exception):  # noqa: N818 - it is no error
        pass

    rests = 0

    def rest() -> None:
        nonlocal rests
        rests += 1
        if rests == limit:
            raise Enough

    evaluator = Evaluator(explainer(), only(BOXES), batch_size=2)
    limit = 10**9
    with interruptible(rest):
        (expected,) = evaluator.evaluate([sample(0)])
    total, rests = rests, 0
    assert total >= 10  # 20 boxes, two at a time
    for limit in (1, total // 2, total):  # noqa: B007 - read by `rest`
        rests = 0
        with pytest.raises(Enough), interruptible(rest):
            evaluator.evaluate([sample(0)])
    (again,) = evaluator.evaluate([sample(0)])
    np.testing.assert_array_equal(values(again), values(expected))


def test_equal_work_is_done_once() -> None:
    model = vit()
    fidelity, boxes = Fidelity(points=5), BoxSensitivity(box_sizes=(4, 8), boxes=6)
    curve_images = 2 * 3  # between the clean image, which the map's run answers, and the blurred one

    def images(*metrics: Metric, methods: tuple[Any, ...] = (Cdam(),)) -> int:
        evaluator = Evaluator(explainer(model), Protocol(methods, metrics))
        with forwards(model) as sizes:
            evaluator.evaluate([sample(0)])
        return sum(sizes)

    assert images(fidelity) == 1 + 1 + curve_images
    assert images(fidelity, fidelity, methods=(Cdam(), Cdam())) == 1 + 1 + curve_images
    assert images(fidelity, Fidelity(points=3)) == 1 + 1 + curve_images  # 0, 50 and 100 % are among 0, 25, ... %
    assert images(boxes) == 1 + 12
    assert images(fidelity, boxes, methods=(Cdam(), Attention())) == 1 + 1 + 2 * curve_images + 12
    both = ClassDiscrimination(fidelity, boxes)
    assert images(fidelity, boxes, both) == images(both) == 1 + 1 + 2 * curve_images + 12
    assert images(fidelity, boxes, both, methods=(Attention(),)) == 1 + 1 + curve_images + 12  # one map for both
    assert images(Compactness(), Sparseness(), MaskAgreement(), Localisation()) == 1
    assert images(Compactness(), methods=(Anchor.RANDOM,)) == 0


def test_batches_are_full_across_samples() -> None:
    model = vit()
    evaluator = Evaluator(explainer(model), Protocol((Anchor.RANDOM,), (Fidelity(points=5),)), batch_size=8)
    with forwards(model) as sizes:
        evaluator.evaluate([sample(seed) for seed in range(6)])
    assert sizes == [8] * 6  # of 6 x (2 + 2 x 3) images


def test_a_map_of_no_target_does_not_discriminate() -> None:
    protocol = Protocol((Attention(),), (ClassDiscrimination(FIDELITY, BOXES),))
    (result,) = Evaluator(explainer(), protocol).evaluate([sample(0)])
    assert (values(result) == 0).all()


def test_an_anchor_does_not_depend_on_the_model() -> None:
    protocol = Protocol((Anchor.RANDOM, Anchor.MASK), (Randomisation(),))
    (result,) = Evaluator(explainer(), protocol).evaluate([sample(0)])
    np.testing.assert_allclose(values(result), 1.0)


def test_the_model_is_left_as_it_was() -> None:
    model = vit()
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    Evaluator(explainer(model), Protocol(METHODS, EVERY)).evaluate([sample(0), sample(1)])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_callers_modes_do_not_matter() -> None:
    evaluator = Evaluator(explainer(), Protocol(METHODS, EVERY))
    expected = evaluator.evaluate([sample(0)])
    with torch.inference_mode():
        found = evaluator.evaluate([sample(0)])
        normalised = torch.from_numpy(sample(0).image).permute(2, 0, 1) / 127.5 - 1
        without = torch.from_numpy(sample(0).counterfactual).permute(2, 0, 1) / 127.5 - 1
        tensors = evaluator.evaluate([sample(0, image=normalised, counterfactual=without)])
    np.testing.assert_array_equal(values(found[0]), values(expected[0]))
    np.testing.assert_allclose(values(tensors[0]), values(expected[0]), rtol=1e-3, atol=1e-3)


def test_read_only_images_are_taken_in_silence() -> None:
    one = sample(0)
    for array in (one.image, one.counterfactual, one.mask):
        array.flags.writeable = False
    (result,) = Evaluator(explainer(), Protocol(METHODS, EVERY)).evaluate([one])
    assert isinstance(result, Measured)


def test_a_zero_map_is_measured() -> None:
    model = vit()
    model.blocks[-1].norm1.weight.data.zero_()  # T is 0, and so is every score
    model.blocks[-1].norm1.bias.data.zero_()
    (result,) = Evaluator(explainer(model), only(*EVERY)).evaluate([sample(0)])
    assert isinstance(result, Measured)
    found = {value.quantity: value.value for value in result.values if value.metric_index}
    zero = ("box_mean", "box_area", "compactness", "energy", "gini", "randomisation_mean", "map_change")
    assert {quantity: found[quantity] for quantity in zero} == dict.fromkeys(zero, 0.0)
    assert (found["auroc"], found["sign_agreement"]) == (0.5, 0.5)
    assert found["pointing_game"] == pytest.approx(sample(0).mask.mean())


def test_concepts_are_measured_without_a_head() -> None:
    model = vit(num_classes=0)
    one, other = Concept(torch.arange(24.0) - 12), Concept(torch.ones(24), "cosine")
    samples = [sample(0, target=one, wrong_target=other), sample(1, target=Contrast(one, other), wrong_target=other)]
    for result in Evaluator(explainer(model), Protocol(METHODS, EVERY)).evaluate(samples):
        assert isinstance(result, Measured)


def test_inputs_that_are_padded_to_whole_patches() -> None:
    model = vit(dynamic_img_size=True)
    model.patch_embed.dynamic_img_pad = True
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (21, 27, 3), np.uint8)
    mask = np.zeros((21, 27), bool)
    mask[10:, 12:] = True
    without = np.where(mask[..., None], np.uint8(0), image)
    one = Sample("padded", image, Output(0), Output(1), mask, without, ~mask)
    evaluator = Evaluator(explainer(model), Protocol(METHODS, EVERY), input_size=(21, 27))
    (result,) = evaluator.evaluate([one])
    assert isinstance(result, Measured)


def test_what_no_sample_could_mend_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="box_sizes"):
        Evaluator(explainer(), only(ClassDiscrimination(box_sensitivity=BoxSensitivity(box_sizes=(25,)))))
    with pytest.raises(ValueError, match="pixels"):
        Evaluator(explainer(), only(FIDELITY), input_size=(48, 48))
    with pytest.raises(ValueError, match="batch_size"):
        Evaluator(explainer(), only(FIDELITY), batch_size=0)
    pooled = explainer(vit(global_pool="avgmax"))
    with pytest.raises(UnsupportedMethodError):
        Evaluator(pooled, Protocol((RelevancePropagation(),), (FIDELITY,)))
    with pytest.raises(TypeError, match="metric"):
        Evaluator(explainer(), Protocol((Cdam(),), ("fidelity",)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="anchor"):
        Evaluator(explainer(), Protocol(("cdam",), (FIDELITY,)))  # type: ignore[arg-type]


def test_passes_are_what_is_run() -> None:
    model = vit()
    for metrics in ((Compactness(),), (FIDELITY,), EVERY):
        evaluator = Evaluator(explainer(model), Protocol((Cdam(), Anchor.RANDOM), metrics))
        with forwards(model) as sizes:
            evaluator.evaluate([sample(0)])
        assert 0 <= evaluator.passes() - sum(sizes) <= 1  # the gradients cost a little
