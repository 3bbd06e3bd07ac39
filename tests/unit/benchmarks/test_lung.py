"""The benchmark on lung nodules: regions, splits and verdicts, with made-up nodules whose every number is known."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks.lung import claims, dataset, drawing, reading, regions, training
from benchmarks.lung.measuring import OUTPUTS
from benchmarks.lung.reading import Part, Record
from benchmarks.verdicts import Estimate, estimate, mean
from real.lidc import BIOMARKERS, Nodules

GRID = (16, 16)


def nodules(count: int = 120) -> Nodules:
    rng = np.random.default_rng(0)
    scan = np.sort(rng.integers(0, count // 2, count))
    malignant = rng.integers(0, 2, count)
    crops = rng.integers(0, 65536, (count, 32, 32)).astype(np.uint16)
    ratings = rng.uniform(1, 5, (count, len(BIOMARKERS)))
    return Nodules(crops, scan, malignant, 2.0 + 2 * malignant, ratings, rng.uniform(3, 9, count))


def test_regions_of_a_disc_have_its_areas() -> None:
    its = regions.regions(regions.disc(8.0))  # 4 patches
    area = regions.PATCH**2
    assert its.inside.sum() * area == pytest.approx(np.pi * 8**2, rel=2e-3)
    assert its.body.sum() * area == pytest.approx(np.pi * 6**2, rel=2e-3)
    assert its.rim.sum() * area == pytest.approx(np.pi * (10**2 - 6**2), rel=2e-3)
    assert its.body + its.rim + its.outside == pytest.approx(np.ones(GRID))
    rows, columns = np.indices(GRID) * 2 + 1
    assert (its.inside * rows).sum() / its.inside.sum() == pytest.approx(regions.CENTRE, abs=0.01)
    assert (its.inside * columns).sum() / its.inside.sum() == pytest.approx(regions.CENTRE, abs=0.01)


def test_a_rim_must_be_told_from_a_body_and_lie_in_the_crop() -> None:
    # The body has the area of two patches, 8 pixels, from a radius of 2 + sqrt(8 / pi) = 3.6 on; the nearer edge is 15.5
    # pixels away, and the rim reaches 2 pixels beyond the disc: from 12 on it touches the outermost patches.
    found = {radius: regions.regions(regions.disc(radius)).has_rim for radius in (3.4, 3.8, 11.0, 12.0, 20.0)}
    assert found == {3.4: False, 3.8: True, 11.0: True, 12.0: False, 20.0: False}


def test_a_discs_mask_on_the_input_is_where_its_shares_are() -> None:
    mask = regions.disc_mask(6.0)
    assert mask.shape == (224, 224)
    shares = mask.reshape(16, 14, 16, 14).mean((1, 3))
    assert shares == pytest.approx(regions.regions(regions.disc(6.0)).inside, abs=0.03)


def test_what_is_bright_hangs_together_with_the_middle() -> None:
    crop = np.zeros((32, 32), np.uint16)  # -1000 HU
    crop[13:20, 14:19] = 46811  # 0 HU
    crop[2:5, 2:5] = 46811
    found = regions.bright(crop, 5.0)
    assert found is not None
    assert np.argwhere(found).min(0).tolist() == [13, 14]
    assert np.argwhere(found).max(0).tolist() == [19, 18]
    assert found.sum() == 35
    assert regions.bright(np.zeros_like(crop), 5.0) is None
    wide = np.full((32, 32), 65535, np.uint16)
    near = regions.bright(wide, 4.0)
    assert near is not None
    assert near.sum() == pytest.approx(np.pi * 6**2, rel=0.05)  # cut off at 1.5 radii


def test_an_outlines_distances_are_those_of_its_edge() -> None:
    mask = np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    distance = regions.outline(mask)
    y = np.array([[16.5, 8.5, 7.5, 4.5]])
    assert distance(y, np.full_like(y, 16.5)) == pytest.approx(np.array([[-7.5, -0.5, 0.5, 3.5]]))
    its = regions.regions(distance)
    assert its.inside.sum() == pytest.approx(64, abs=0.5)
    assert its.has_rim


@pytest.mark.parametrize("seed", range(3))
def test_scans_stay_on_one_side(seed: int) -> None:
    its = nodules(600)
    side = dataset.sides(its.scan, its.malignant, seed)
    for scan in np.unique(its.scan):
        assert len(set(side[its.scan == scan])) == 1
    shares = [np.mean(side == name) for name in dataset.SIDES]
    assert shares == pytest.approx(dataset.SHARES, abs=0.04)
    assert (side == dataset.sides(its.scan, its.malignant, seed)).all()
    assert (side != dataset.sides(its.scan, its.malignant, seed + 1)).any()


def test_a_dataset_is_what_the_command_takes(tmp_path: Path) -> None:
    its = nodules()
    path = dataset.write(its, tmp_path, 2)
    with path.open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert len(rows) == 120
    assert list(rows[0])[:4] == ["image", "scan", "split_0", "split_1"]
    for row in (0, 77):
        assert rows[row]["scan"] == str(its.scan[row])
        assert rows[row]["split_1"] == dataset.sides(its.scan, its.malignant, 1)[row]
        assert [float(rows[row][name]) for name in BIOMARKERS] == pytest.approx(its.biomarkers[row], rel=1e-5)
        with Image.open(tmp_path / rows[row]["image"]) as picture:
            assert picture.mode == "L"
            assert np.asarray(picture) == pytest.approx(its.crops[row] / 65535 * 255, abs=0.5)
    with (tmp_path / "test_1.csv").open(newline="") as text:
        samples = list(csv.DictReader(text))
    assert [int(sample["id"]) for sample in samples] == [k for k, row in enumerate(rows) if row["split_1"] == "test"]
    with Image.open(tmp_path / samples[0]["mask"]) as mask:
        radius = its.radius[int(samples[0]["id"])]
        assert (np.asarray(mask) > 0).sum() == pytest.approx(np.pi * radius**2, rel=0.1)


def test_one_backbone_has_both_heads() -> None:
    its = dict(training.commands(Path("b.safetensors"), Path("d"), Path("m"), 3, "--train-blocks 4"))
    assert list(its) == ["untuned_biomarkers", "untuned_malignancy", "biomarkers", "malignancy"]
    for words in its.values():  # the same split: else what one head was trained on would be the other's test
        assert words[words.index("--split-by") + 1] == "split_3"
    assert its["malignancy"][its["malignancy"].index("--head") + 1] == "m/seed3/biomarkers.safetensors"
    assert "--train-blocks" in its["biomarkers"]
    assert [word for word in its["biomarkers"] if word in BIOMARKERS] == list(BIOMARKERS)


def record(nodule: int, seed: int = 0, **maps: np.ndarray) -> Record:
    """A nodule of four patches' radius; attention is the disc, all other maps are noise but for those given by output."""
    rng = np.random.default_rng(nodule)
    disc = regions.regions(regions.disc(8.0)).inside
    scores = rng.standard_normal((len(OUTPUTS), *GRID)).astype(np.float32)
    for name, its in maps.items():
        scores[OUTPUTS.index(name)] = its
    malignant = nodule % 2
    logit = 2.0 * malignant - 1
    line = {
        "id": str(nodule),
        "scan": nodule // 2,
        "radius": 8.0,
        "truth": [*np.linspace(3, 4, 8).tolist(), malignant],
        "mean_malignancy": 2.0 + 2 * malignant,
        "outputs": [*np.linspace(3, 4, 8).tolist(), logit],
        "untuned": [*np.linspace(3, 4, 8).tolist(), -1.0],
        "maps": {},
        "blurred": {},
        "bright": None,
    }
    removed = {"cdam": [logit - 0.5, logit + 0.25], "random": [logit - 0.1, logit]}
    attention = np.broadcast_to(disc, (len(OUTPUTS), *GRID)).astype(np.float32)
    its = Record.of(line, seed, removed)
    return replace(its, maps={**its.maps, "cdam": scores, "attention": attention})


def part(count: int = 40, **maps: np.ndarray) -> Part:
    return Part({0: {}}, [record(nodule, **maps) for nodule in range(count)])


def test_scores_are_relative_to_their_mean_size() -> None:
    scores = np.array([[2.0, -2.0], [4.0, 0.0]])
    assert reading.relative(scores) == pytest.approx(np.array([[1.0, -1.0], [2.0, 0.0]]))
    assert (reading.relative(np.zeros((2, 2))) == 0).all()
    shares = np.array([[1.0, 0.5], [0.0, 0.5]])
    assert reading.average(scores, shares) == pytest.approx(0.5)


def test_maps_as_the_paper_describes_them_agree() -> None:
    its = regions.regions(regions.disc(8.0))
    edge = its.rim - its.body
    malignancy = np.where(np.indices(GRID)[0] < 8, 1.0, -1.0) * its.inside
    paper = part(diameter=its.body, margin=edge, sphericity=edge, spiculation=edge, malignancy=malignancy)
    for one in paper.records:
        one.truth[OUTPUTS.index("spiculation")] = 4.0
    found = {claim.text: claim for claim in claims.every_claim(paper)}
    assert {claim.verdict for claim in found.values()} == {"agrees"}
    assert len(found) == 15
    (lesser,) = (claim for text, claim in found.items() if text.startswith("malignancy"))
    assert lesser.found.value == pytest.approx(0.44 - 0.1, abs=0.03)  # the middle lies a quarter patch below
    (falls,) = (claim for text, claim in found.items() if "towards" in text)
    assert falls.found == Estimate(*[pytest.approx(0.4)] * 3)


def test_maps_of_the_contrary_do_not() -> None:
    its = regions.regions(regions.disc(8.0))
    edge = its.body - its.rim
    contrary = part(
        diameter=its.outside - its.body, margin=edge, sphericity=edge, spiculation=edge, malignancy=its.inside
    )
    for one in contrary.records:
        one.truth[OUTPUTS.index("spiculation")] = 4.0
    attention = contrary.records[0].maps["attention"].copy()
    attention[3, 0, 0] += 1e-7
    contrary.records[0].maps["attention"] = attention  # type: ignore[index]
    verdicts = {claim.text: claim.verdict for claim in claims.every_claim(contrary)}
    agreeing = {text for text, verdict in verdicts.items() if verdict != "does not"}
    assert agreeing == {
        "attention is on the nodule: benign ones",
        "attention is on the nodule: malignant ones",
        "... and what is positive drives the model towards malignancy",
        "... and what is negative away from it",
        "maps of biomarkers are distinct",
    }


def test_of_noise_one_cannot_tell() -> None:
    verdicts = {claim.text.partition(":")[0]: claim.verdict for claim in claims.every_claim(part(20))}
    assert verdicts["margin"] == "can't tell"
    assert verdicts["sphericity"] == "can't tell"


def test_agreement_with_the_disc() -> None:
    its = record(3)
    inside = its.of_disc.inside
    positive = np.maximum(its.maps["cdam"][0], 0)
    assert claims.energy(its, "cdam", "subtlety") == pytest.approx((positive * inside).sum() / positive.sum(), rel=1e-6)
    expected = roc_auc_score(inside.ravel() >= 0.5, its.maps["cdam"][0].ravel())
    assert claims.auroc(its, "cdam", "subtlety") == pytest.approx(expected)
    assert claims.auroc(its, "disc", "subtlety") == 1
    assert claims.auroc(its, "inverted disc", "subtlety") == 0
    assert claims.energy(its, "inverted disc", "subtlety") < 0.1
    assert claims.likeness(its, "attention") == pytest.approx(1)


def test_profiles_are_by_distance_from_the_edge() -> None:
    its = record(0)
    middles = np.arange(16) * 2 + 1
    distance = (np.hypot(*(np.stack(np.meshgrid(middles, middles, indexing="ij")) - 16.5)) - 8) / 2
    found = drawing.profile(its, np.floor(distance))
    there = ~np.isnan(found)
    assert found[there] == pytest.approx(np.arange(-5.0, 6.0)[there])
    assert np.isnan(found[0])  # nothing is 5 patches inside a disc of 4


def test_scans_are_what_is_resampled() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 4)
    values = np.repeat(rng.standard_normal(50), 4)  # four copies of 50 numbers tell as much as the 50
    grouped, single = mean(values, groups), mean(values)
    alone = mean(values[::4])
    assert grouped.value == pytest.approx(values.mean())
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert single.high - single.low < 0.7 * (grouped.high - grouped.low)
    assert estimate(np.stack([values, values], 1), lambda its: float(np.ptp(its, axis=1).max()), groups) == Estimate(
        0, 0, 0
    )
