"""The report of the benchmark on lung nodules, of made-up journals."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import verdicts
from benchmarks.lung import reading, reporting
from benchmarks.lung.measuring import BEFORE, METHODS, OUTPUTS
from benchmarks.sheets import Journal, encode

pytestmark = pytest.mark.filterwarnings("error")

DOCUMENT = Path(__file__).parents[3] / "docs/benchmarks/nodules.md"
NODULES = 12


def write(folder: Path, seed: int, protocol: str = "p") -> None:
    """A seed whose model is right of three in four nodules, of the untuned one of half; the last is too small for a rim."""
    rng = np.random.default_rng(seed)
    recipe = {"optimizer": "adamw", "block_lr": 1e-4, "lr": 2e-3, "schedule": "one_cycle", "batch_size": 16}
    recipe |= {"token_dropout": 0.6, "mixup": 0.4, "ema": 0.98, "views": 2}
    head = {
        "model": f"m{seed}",
        "protocol": protocol,
        "seed": seed,
        "trained": "the head",
        "recipe": recipe,
        "epochs": 8,
    }
    head |= {"sides": {"train": 70, "validation": 15, "test": NODULES}, "versions": {"torch": "2"}}
    journal, removed = (Journal(folder / f"{name}{seed}.jsonl", head) for name in ("seed", "removed"))
    bright = np.zeros((32, 32), bool)
    bright[9:24, 9:24] = True
    names = [*(method.kind for method in METHODS), BEFORE]
    for row in range(NODULES):
        malignant = row % 2
        sign = 2.0 * malignant - 1
        maps = {name: rng.standard_normal((len(OUTPUTS), 16, 16)) for name in names}
        maps["attention"] = np.repeat(np.abs(maps["attention"][:1]), len(OUTPUTS), 0)
        truth = rng.uniform(1, 5, 8)
        line = {
            "id": str(row),
            "scan": row // 2,
            "radius": 3.0 if row == NODULES - 1 else 7.0,
            "truth": [*truth.tolist(), malignant],
            "mean_malignancy": 3 + 1.5 * sign,
            "outputs": [*truth.tolist(), sign if row % 8 < 6 else -sign],
            "untuned": [*rng.uniform(1, 5, 8).tolist(), 1.0],
            "maps": {name: encode(scores) for name, scores in maps.items()},
            "blurred": {name: [0.0, 0.0] for name in [*names[:-1], "random"]},
            "bright": np.packbits(bright).tobytes().hex(),
        }
        journal.add(line)
        if not seed:
            removed.add({"id": str(row), "logits": {name: [0.0, 0.5] for name in [*names[:-1], "random", "disc"]}})


def test_a_report_of_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        write(tmp_path, seed)
    copy = tmp_path / "nodules.md"
    copy.write_text(DOCUMENT.read_text())
    monkeypatch.setattr(verdicts, "RESAMPLES", 20)
    monkeypatch.setattr(reporting, "DOCUMENT", copy)
    monkeypatch.setattr(reporting, "IMAGES", tmp_path / "images")
    printed = list(reporting.report(tmp_path, write=True))
    pictures = [Path(line.removeprefix("wrote ")) for line in printed[-3:]]
    for picture in pictures:
        with Image.open(picture) as opened:
            assert min(opened.size) > 300
    blocks = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", copy.read_text(), re.DOTALL))
    assert "Not measured" not in "".join(blocks.values())
    assert re.search(r"\| untuned backbone \| 0.500 \| 0.500 \| 0.500 \(", blocks["malignancy"])
    # Of 12 nodules those of rows 6 and 7 are told wrong.
    assert re.search(r"\| tuned on the biomarkers \| 0.833 \| 0.833 \| 0.833 \(", blocks["malignancy"])
    assert re.search(r"\| diameter \| \S+ \(.*\) \| 1.00 \(1.00 to 1.00\) \|", blocks["biomarkers"])
    assert blocks["left_out"].startswith("Of 24 (12 nodules) in the tests of 2 seeds, 22 (11 nodules) have a rim")
    assert "largest difference 0, in 24 (12 nodules) | agrees |" in blocks["claims"]
    assert blocks["claims"].count("\n") == 16
    assert "| `attention` |" in blocks["quantities"]


def test_journals_of_different_protocols_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path, 1, "q")
    with pytest.raises(ValueError, match=r"seed1.jsonl: of another protocol than .*seed0.jsonl: remove one of them$"):
        reading.read(tmp_path)
    with pytest.raises(ValueError, match=r"no seed\*.jsonl: run `measure` first$"):
        list(reporting.report(tmp_path / "empty", write=False))


def test_what_was_removed_belongs_to_the_maps(tmp_path: Path) -> None:
    write(tmp_path, 0)
    removed = tmp_path / "removed0.jsonl"
    removed.write_text(removed.read_text().replace('"m0"', '"m9"'))
    with pytest.raises(
        ValueError, match=r"removed0.jsonl: of another model than the maps: remove it, and run `remove` again$"
    ):
        reading.read(tmp_path)
