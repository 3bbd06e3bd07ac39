"""The benchmark on photographs: which are chosen, both turns of a photograph, what is computed of its journals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import oblong_vit
from benchmarks import table_claims
from benchmarks.photographs import choice, claims, concepts, high_norms, pixelwise, sigmas
from benchmarks.photographs.maps import UnnormalisedCdam, norms
from benchmarks.photographs.measuring import Measuring, decode_mask, encode_mask
from benchmarks.photographs.reading import Part, Record, stronger, sure, tau
from benchmarks.sheets import Journal, decode, encode
from benchmarks.verdicts import Claim, Estimate, claims_table, estimate
from cdam_engine import (
    Attention,
    Cdam,
    Explainer,
    InputXGradient,
    IntegratedGradients,
    Method,
    Noise,
    Output,
    RelevancePropagation,
    SmoothGrad,
)
from cdam_engine.evaluation import (
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Fidelity,
    MaskAgreement,
    Measured,
    Protocol,
    Sample,
)
from cdam_engine.evaluation.perturbation import MapOf
from oblong_vit import CONFIG
from real.voc import Photograph, Photographs

FIDELITY = Fidelity(points=4)
BOXES = BoxSensitivity(boxes=5)


def photograph(name: str, **shares: float) -> Photograph:
    return Photograph(Path(f"images/{name}.jpg"), Path(f"masks/{name}.png"), shares)


def several_photographs() -> Photographs:
    val = (
        photograph("two", dog=0.02, cat=0.5),
        photograph("small", dog=0.0199, cat=0.5),
        photograph("three", cat=0.1, dog=0.3, owl=0.2),
        photograph("equal", owl=0.1, cat=0.1),
        photograph("one", owl=0.4),
        photograph("other", cat=0.02),
        photograph("tiny", cat=0.01),
    )
    train = tuple(photograph(f"train {k}", **({"cat": 0.1, "dog": 0.2} if k % 2 else {"owl": 0.1})) for k in range(6))
    return Photographs(("cat", "dog", "owl"), train, val)


def test_of_several_classes_the_two_largest_are_taken() -> None:
    found = {one.id: one.classes for one in choice.several(several_photographs())}
    assert found == {"two": (0, 1), "three": (1, 2), "equal": (0, 2)}


def test_of_one_class_no_other_is_there() -> None:
    voc = several_photographs()
    assert {one.id: one.classes for one in choice.alone(voc, 2)} == {"one": (2,), "other": (0,)}
    assert choice.alone(voc, 1) == choice.alone(voc, 2)[:1]
    with pytest.raises(ValueError, match=r"^3 photographs of one class, but there are 2$"):
        choice.alone(voc, 3)


def test_photographs_to_choose_on_and_examples_are_for_training() -> None:
    voc = several_photographs()
    found = choice.trained(voc, 6)
    assert sorted(one.id for one in found) == [f"train {k}" for k in range(6)]
    assert {one.classes for one in found} == {(1,), (2,)}  # the larger class
    assert [one.path.stem for one in choice.examples(voc, 0, 30)] == [one.id for one in found if one.classes == (1,)]
    assert len(choice.examples(voc, 0, 2)) == 2
    with pytest.raises(ValueError, match=r"^7 photographs to choose on, but there are 6$"):
        choice.trained(voc, 7)


def test_the_order_is_drawn_but_always_the_same() -> None:
    voc = several_photographs()
    backwards = replace(voc, val=voc.val[::-1])
    assert choice.several(voc) == choice.several(backwards)
    names = [one.id for one in choice.trained(voc, 6)]
    assert names != sorted(names)


def test_a_mask_is_squashed_and_the_undecided_is_not_there(tmp_path: Path) -> None:
    values = np.zeros((8, 12), np.uint8)
    values[:4, :6], values[4:, :6], values[:4, 6:] = 2, 255, 1
    Image.fromarray(values).save(tmp_path / "mask.png")
    found = choice.mask(tmp_path / "mask.png", 1, (4, 4))
    assert found.dtype == bool
    assert found.tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2


def test_numbers_and_masks_as_text() -> None:
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    assert decode(encode(values)).tolist() == values.ravel().tolist()
    mask = values > 0
    assert (decode_mask(encode_mask(mask), (3, 5)) == mask).all()


def sample(seed: int = 1) -> Sample:
    return oblong_vit.sample(seed, counterfactual=None)


def values_of(found: Measured, *, without: int) -> dict[tuple[int, int, str], float]:
    return {(v.method_index, v.metric_index, v.quantity): v.value for v in found.values if v.method_index != without}


def test_the_second_turn_is_the_exchanged_sample_and_asks_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = (Cdam(), Attention(), RelevancePropagation(), Anchor.RANDOM, Anchor.MASK)
    metrics = (FIDELITY, BOXES, ClassDiscrimination(FIDELITY, BOXES), Compactness(), MaskAgreement())
    explainer = Explainer(oblong_vit.vit(), data_config=CONFIG)
    measuring = Measuring(explainer, Protocol(methods, metrics))
    its = sample()
    turned = replace(its, target=its.wrong_target, wrong_target=its.target, mask=its.wrong_mask, wrong_mask=its.mask)
    expected = measuring.evaluator.evaluate([its, turned])
    asked: list[int] = []
    outputs = Explainer.outputs
    monkeypatch.setattr(
        Explainer, "outputs", lambda self, pixels: (asked.append(len(pixels)), outputs(self, pixels))[1]
    )
    found = measuring.measure(its)
    assert sum(asked) <= measuring.evaluator.passes() + 1
    for one, other in zip(found, expected, strict=True):
        assert isinstance(other, Measured)
        # The random maps of right and wrong targets are other ones.
        assert values_of(one, without=3) == pytest.approx(values_of(other, without=3), abs=1e-4)


@pytest.mark.parametrize(
    "method", [InputXGradient(), IntegratedGradients(steps=30), SmoothGrad(samples=30, noise=Noise(0.2))], ids=str
)
def test_scores_of_pixels_sum_to_those_of_patches(method: Method) -> None:
    explainer = Explainer(oblong_vit.vit(), data_config=CONFIG)
    x = torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(5))
    (expected,) = explainer.explain(x, [[Output(1), Output(0)]], [[method]])
    found = pixelwise.pixel_maps(explainer, x[0], [1, 0], method)
    for scores, relevance in zip(found, expected.maps, strict=True):
        assert scores.shape == (24, 32)
        sums = scores.detach().reshape(3, 8, 4, 8).sum((1, 3)).numpy()
        np.testing.assert_allclose(sums, relevance.scores, rtol=0, atol=2e-5 * np.abs(relevance.scores).max())


def test_pixels_are_measured_by_their_own_scores() -> None:
    """With the wrong class's map in the wrong one's place, and in both turns."""
    its = Protocol((InputXGradient(),), (FIDELITY, BOXES, Compactness(), ClassDiscrimination(FIDELITY, BOXES)))
    explainer = Explainer(oblong_vit.vit(), data_config=CONFIG)
    tool = pixelwise.PixelMeasuring(explainer, its)
    subjects = tool.turns(sample())
    x = subjects[0].pixels
    own, other = pixelwise.pixel_maps(explainer, x, [1, 3], InputXGradient())
    for subject, (right, wrong) in zip(subjects, ((own, other), (other, own)), strict=True):
        for at_wrong, scores in ((False, right), (True, wrong)):
            name = MapOf(InputXGradient(), at_wrong)
            np.testing.assert_allclose(subject.enlarged(name, "bilinear"), scores.numpy(), rtol=1e-6)
            np.testing.assert_allclose(subject.maps[name], scores.numpy(), rtol=1e-6)


def test_of_a_sample_without_a_wrong_target_there_is_one_turn() -> None:
    measuring = Measuring(Explainer(oblong_vit.vit(), data_config=CONFIG), Protocol((Cdam(),), (FIDELITY,)))
    its = replace(sample(), wrong_target=None, wrong_mask=None)
    (found,) = measuring.measure(its)
    (expected,) = measuring.evaluator.evaluate([its])
    assert isinstance(expected, Measured)
    assert values_of(found, without=-1) == pytest.approx(values_of(expected, without=-1), abs=1e-5)


def reference(vit: VisionTransformer, pixels: Tensor, index: int, *, times_normalised: bool) -> Tensor:
    """By the whole model's own forward pass from the last block on."""
    kept: list[Tensor] = []
    hook = vit.blocks[-1].register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    vit(pixels)
    hook.remove()
    x = kept[0].detach().requires_grad_()
    logit = vit.forward_head(vit.norm(vit.blocks[-1](x)))[0, index]
    (gradient,) = torch.autograd.grad(logit, x)
    factor = vit.blocks[-1].norm1(x) if times_normalised else x
    return (factor * gradient).sum(-1)[0, 1:].detach()


@pytest.mark.parametrize("times_normalised", [False, True])
def test_gradients_for_unnormalised_tokens(times_normalised: bool) -> None:
    vit = oblong_vit.vit().double()
    pixels = torch.randn(1, 3, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    method = UnnormalisedCdam(times_normalised)
    (found,) = Explainer(vit, data_config=CONFIG).explain(pixels, [[Output(1), Output(4)]], [[method]])
    for relevance, index in zip(found.maps, (1, 4), strict=True):
        expected = reference(vit, pixels, index, times_normalised=times_normalised)
        assert torch.from_numpy(relevance.scores).flatten() == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_times_themselves_they_are_nearly_zero() -> None:
    """The norm undoes a token's length."""
    vit = oblong_vit.vit().double()
    pixels = torch.randn(1, 3, 24, 32, dtype=torch.float64)
    (found,) = Explainer(vit, data_config=CONFIG).explain(pixels, [[Output(1)]], [[Cdam(), UnnormalisedCdam()]])
    normalised, unnormalised = (np.abs(relevance.scores).max() for relevance in found.maps)
    assert 0 < unnormalised < 1e-4 * normalised


def test_norms_are_those_of_the_last_blocks_input() -> None:
    vit = oblong_vit.vit()
    kept: list[Tensor] = []
    hook = vit.blocks[-1].register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    pixels = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        vit(pixels)
    hook.remove()
    assert norms(Explainer(vit, data_config=CONFIG), pixels).numpy() == pytest.approx(
        kept[0][:, 1:].square().sum(-1).sqrt().numpy(), rel=1e-5
    )


def test_two_kinds_of_norms_are_parted_between_their_modes() -> None:
    rng = np.random.default_rng(0)
    both = np.concatenate([np.exp(rng.normal(2, 0.1, 5000)), np.exp(rng.normal(4, 0.1, 100))])
    found = high_norms.threshold(both)
    assert found.modes == 2
    assert np.exp(2.4) < found.value < np.exp(3.6)
    assert (both > found.value).sum() == 100


def test_norms_of_one_kind_have_outliers() -> None:
    normal = np.exp(np.random.default_rng(0).normal(2, 0.1, 20_000))
    found = high_norms.threshold(normal)
    assert found.modes == 1
    assert np.log(found.value) == pytest.approx(2 + 3 * 0.1, abs=0.01)


def test_what_lies_on_patches_of_high_norm() -> None:
    scores = np.array([[3, -5], [1, 0]], np.float32)
    high = np.array([[True, True], [False, False]])
    assert high_norms.share(scores, high) == 0.75
    assert high_norms.share(-np.abs(scores), high) == 0
    assert high_norms.zeroed(scores, high).tolist() == [[0, 0], [1, 0]]


def test_orders_are_compared_by_kendalls_tau() -> None:
    assert tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)  # two pairs of three
    assert tau([1, 2, 3], [1, 1, 2]) == pytest.approx(2 / np.sqrt(3 * 2))  # tau-b: a tie on one side
    assert tau([1, 1, 1], [1, 2, 3]) == 0


def test_an_interval_is_that_of_the_mean() -> None:
    rows = np.random.default_rng(0).normal(5, 2, 400)
    found = estimate(rows, lambda its: float(its.mean()))
    assert found.value == rows.mean()
    half = 1.96 * rows.std() / 20
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.15)


def test_the_models_mean_average_precision() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((200, 3)) < 0.3
    logits = (labels + rng.standard_normal(labels.shape)).astype(np.float32)
    its = concepts.Outputs(tuple(map(str, range(200))), logits, logits, labels)
    found = concepts.summary(its, ["a", "b", "c"])
    assert found["mean"] == pytest.approx(average_precision_score(labels, logits, average="macro"))
    assert found["interval"][0] < found["mean"] < found["interval"][1]


def test_one_photograph_says_nothing_of_others() -> None:
    found = estimate(np.array([3.0]), lambda its: float(its.mean()))
    assert found.text(1) == "3.0"
    assert Claim("", "", found).verdict == "can't tell"


def record(
    name: str, logits: tuple[float, float], values: Mapping[tuple[str, int, str], tuple[float, float]]
) -> Record:
    turns = [{key: pair[turn] for key, pair in values.items()} for turn in (0, 1)]
    nothing = np.zeros((2, 1))
    return Record(name, (0, 1), np.array(logits), turns, [{}, {}], {}, nothing, np.zeros(4), np.zeros((2, 1, 1), bool))


def part(count: int = 50) -> Part:
    """Of CDAM's fidelity 10 and 30 by turn, of attention's 5 and 25, with noise; the second class is not always seen."""
    rng = np.random.default_rng(0)
    records = []
    for k in range(count):
        noise = rng.normal(0, 0.1)
        values = {
            ("cdam", 0, "a_lif_mif"): (10.0, 30.0 + noise),
            ("attention", 0, "a_lif_mif"): (5.0, 25.0 - noise),
        }
        records.append(record(str(k), (2.0, 1.0 if k % 2 else -1.0), values))
    return Part({"methods": ["cdam", "attention"], "model": "m", "protocol": "p"}, records)


def test_a_photograph_counts_once_whatever_its_turns() -> None:
    its = part()
    assert its.column("cdam", 0, "a_lif_mif").shape == (50,)
    assert its.column("cdam", 0, "a_lif_mif").mean() == pytest.approx(20, abs=0.1)
    seen = replace(its, turns=sure).column("cdam", 0, "a_lif_mif")
    assert seen[1::2] == pytest.approx(20, abs=0.2)
    assert seen[::2].tolist() == [10] * 25
    assert replace(its, turns=stronger).column("cdam", 0, "a_lif_mif").tolist() == [10] * 50
    (row, _) = its.results().table.rows
    assert (row.samples, row.mean) == (50, pytest.approx(20, abs=0.1))


def test_verdicts_are_by_the_interval() -> None:
    its = part()
    values = claims.values_of(its)
    ahead = table_claims.ahead("it leads", values, ("cdam",), ("attention",), table_claims.FIDELITY)
    assert ahead.verdict == "agrees"
    assert ahead.figure.startswith("`cdam` - `attention`: 5 (")
    assert table_claims.difference("it lags", values, "attention", "cdam", table_claims.FIDELITY).verdict == "does not"
    unsure = Claim("who knows", "", Estimate(0.1, -1, 1))
    assert unsure.verdict == "can't tell"
    assert claims_table([unsure]).splitlines()[-1] == "| who knows |  | can't tell |"
    table = claims_table([unsure, ahead], {"seed1": [replace(ahead, found=Estimate(-1, -2, -0.5))]}).splitlines()
    assert table[2] == "| who knows |  | can't tell |  |"
    assert table[3].endswith("| agrees | does not |")


def test_cdam_by_attention() -> None:
    attention = np.arange(20, dtype=np.float32).reshape(4, 5)
    cdam = np.where(attention >= 18, -8, np.where(attention < 2, 1, 0)).astype(np.float32)
    its = record("x", (1, 1), {})
    its = replace(its, maps={"attention": np.stack([attention] * 2), "cdam": np.stack([cdam, 2 * cdam])})
    assert claims.by_attention(its).tolist() == [1 / 8, *[0] * 8, 1]
    assert claims.largest_where_attention_is_low(its) == 1 / 8


def test_the_best_noise_is_that_of_the_highest_fidelity(tmp_path: Path) -> None:
    levels = len(sigmas.LEVELS["smooth_grad"])
    for kind, top in (("smooth_cdam", 3), ("smooth_grad", 1)):
        journal = Journal(tmp_path / f"seed0-sigma_{kind}-0of1.jsonl", {"model": "m"})
        for name, more in (("a", 0.0), ("b", 2.0)):
            values = [
                [m, 0, quantity, 10.0 * (m == top) + more]
                for m in range(len(sigmas.LEVELS[kind]))
                for quantity in ("a_mif", "a_lif_mif")
            ]
            journal.add({"id": name, "values": values})
    chosen = sigmas.chosen_sigmas(tmp_path, "seed0")
    assert (chosen.smooth_cdam, chosen.smooth_grad) == (
        sigmas.LEVELS["smooth_cdam"][3],
        sigmas.LEVELS["smooth_grad"][1],
    )
    tried = sigmas.read("smooth_grad", [tmp_path / "seed0-sigma_smooth_grad-0of1.jsonl"])
    assert [one.mean for one in tried] == [1, 11, *[1] * (levels - 2)]
    assert [one.error for one in tried] == pytest.approx([1] * levels)  # the values are 2 apart
    lines = sigmas.markdown(tmp_path, "seed0").splitlines()
    assert lines[0] == "`smooth_cdam`, 2 photographs:"
    assert lines[-3:-1] == ["| sigma | 0.02 | 0.05 | 0.1 | 0.2 |", "| --- | --- | --- | --- | --- |"]
    assert lines[-1] == "| A_LIF-MIF | 1 ± 2 | **11 ± 2** | 1 ± 2 | 1 ± 2 |"
    with pytest.raises(ValueError, match=r"run `sigma` first, or give --sigmas$"):
        sigmas.chosen_sigmas(tmp_path, "seed1")
