"""The table of all claims, of made-up journals whose every number is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import claims, photos_masks, published, scenes, verdicts
from benchmarks.photos_masks import PATCHES, Compared
from benchmarks.sheets import Journal
from benchmarks.verdicts import Claim

DOCUMENT = Path(__file__).parents[3] / "docs/benchmarks/claims.md"
PUBLISHED: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("fidelity", "a_lif_mif"): published.A_LIF_MIF,
    ("box_sensitivity", "box_mean"): published.A_BOX,
    ("compactness", "compactness"): published.COMPACTNESS,
    ("class_discrimination", "delta_a_lif_mif"): published.DELTA_A_LIF_MIF,
    ("class_discrimination", "delta_box_mean"): published.DELTA_A_BOX,
}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "RESAMPLES", 40)


def write_scenes(path: Path, sign: float) -> None:
    """As the paper has it, or with every sign turned; what the paper has not is far from all it has."""
    part, rng = scenes.PARTS["papers"], np.random.default_rng(0)
    kinds = [metric.kind for metric in part.metrics]
    journal = Journal(path)
    for scene in range(8):
        noise = 1 + 0.001 * rng.standard_normal()
        journal.add(
            {
                "id": f"scene-{scene}",
                "values": [
                    [
                        part.names.index(method),
                        kinds.index(metric),
                        quantity,
                        sign * noise * table.get(method, -1000 * sign),
                    ]
                    for (metric, quantity), table in PUBLISHED.items()
                    for method in part.names
                ],
            }
        )


def model(right: float, patches: float, parameters: int = 10) -> Compared:
    """Of 20 images of two classes each; the logits of the third class are as right as said."""
    rng = np.random.default_rng(1)
    labels = np.array([[1, 1, image % 2] for image in range(20)], float)
    logits = labels * right + 0.01 * rng.standard_normal(labels.shape)
    values = {PATCHES: patches, "attention": 0.4, "CDAM": 0.5}
    maps = [
        (image, method, mine, theirs, value - 0.3 * (mine != theirs) + 0.01 * rng.standard_normal())
        for image in range(20)
        for method, value in values.items()
        for mine in (0, 1)
        for theirs in (0, 1)
    ]
    return Compared(parameters, logits.tolist(), labels.tolist(), maps)


def of_masks(folder: Path, before: Compared, after: Compared) -> dict[str, Claim]:
    for name, its in zip(photos_masks.CLAIMED, (before, after), strict=True):
        (folder / f"{name}.compared.json").write_text(json.dumps(asdict(its)))
    return {claim.text: claim for claim in photos_masks.claims(folder)}


def test_claims_hold_of_the_papers_own_figures(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a.jsonl", 1)
    found = {claim.text: claim for claim in scenes.claims([tmp_path / "a.jsonl"])}
    assert len(found) == 12
    (not_of_smooth_cdam,) = (claim for claim in found.values() if claim.verdict != "agrees")
    assert not_of_smooth_cdam.figure.startswith("`smooth_cdam`: 4 (")  # 827 - 823 in the paper's tables 2 and 3
    ahead = found["Smooth CDAM has the best fidelity (A_LIF-MIF) on X_multi"]
    assert ahead.figure.startswith("`smooth_cdam` - `integrated_cdam`: 158 (")
    assert ahead.found.value == pytest.approx(827 - 669, rel=1e-3)


def test_claims_fail_of_the_opposite(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a.jsonl", -1)
    found = {claim.text: claim.verdict for claim in scenes.claims([tmp_path / "a.jsonl"])}
    assert found["Smooth CDAM has the best fidelity (A_LIF-MIF) on X_multi"] == "does not"
    assert found["the three CDAM variants lead class discrimination, by boxes"] == "does not"
    assert found["Integrated CDAM measures better than CDAM, by A_LIF-MIF"] == "does not"


def test_claims_of_masks(tmp_path: Path) -> None:
    found = of_masks(tmp_path, model(0.0, 0.45), model(1.0, 0.6))
    assert {claim.verdict for claim in found.values()} == {"agrees"}
    better = found["... its maps are better than those of attention"]
    assert better.found.value == pytest.approx(0.2, abs=0.01)
    assert better.figure.startswith("AP of pixels 0.60 against 0.40: difference 0.20 (")
    assert found["... its maps depend on the class"].found.value == pytest.approx(0.3, abs=0.01)


def test_claims_of_masks_that_taught_nothing(tmp_path: Path) -> None:
    found = of_masks(tmp_path, model(1.0, 0.45), model(1.0, 0.3, parameters=11))
    assert found["patch mask prediction: no extra parameters"].verdict == "does not"
    assert found["... masks for 1 % of the training images suffice"].verdict == "does not"
    assert found["... its maps are better than those of CDAM"].verdict == "does not"
    assert found["... it is better in classification, too"].verdict == "can't tell"


def test_each_claim_stands_once_with_all_it_was_tested_on(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    write_scenes(tmp_path / "scenes/shipped-papers-0of1.jsonl", 1)
    of_masks(tmp_path, model(0.0, 0.45), model(1.0, 0.6))
    everything = list(claims.found(tmp_path, tmp_path))
    assert [ground for ground, _ in everything] == ["scenes (8)", "photographs, with masks"]
    again = [*everything, ("elsewhere", everything[0][1][:1])]
    rows = claims.claims(again).splitlines()
    assert len(rows) == 2 + 12 + 6 + 1
    assert rows[3] == rows[2].replace(rows[2].split("|")[1], "  ").replace("scenes (8)", "elsewhere")
    assert claims.counts(everything).splitlines()[-1] == "| photographs, with masks | 6 | 0 | 0 |"


def test_the_document_has_a_place_for_each_table(tmp_path: Path) -> None:
    text = DOCUMENT.read_text()
    for name in claims.blocks([]):
        assert f"<!-- {name} -->" in text
    assert list(claims.found(tmp_path, tmp_path)) == []
