"""The card: everything that a training was, in one stable file, and nothing of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdam_server.settings.specs import Task
from cdam_training.card import (
    SCHEMA_VERSION,
    Card,
    ModelPart,
    SidePart,
    data_part,
    installed_versions,
    now,
    write_card,
)
from cdam_training.datasets import Dataset, Row, Split
from cdam_training.metrics import Estimate, Scores
from cdam_training.splits import split_dataset
from cdam_training.values import Value

SIDES: tuple[Split, ...] = ("train", "train", "train", "validation", "test", "test")


def dataset(task: Task, values: list[Value], outputs: tuple[str, ...]) -> Dataset:
    rows = tuple(
        Row(Path(f"/home/ann/{n}.png"), f"line {n + 2}", f"{n:064x}", value, f"g{n // 2 if n < 2 else n}", SIDES[n])
        for n, value in enumerate(values)
    )
    return Dataset("nodules.csv", "csv", task, outputs, rows, "d" * 64, "scan", "side", ("a note",))


NODULES = dataset(Task.MULTI_CLASS, [0, 1, 1, 0, 1, 1], ("benign", "/m/01malignant"))


def card(**change: Any) -> Card:
    plain = Card(
        task=Task.MULTI_CLASS,
        outputs=NODULES.outputs,
        model=ModelPart("lesions", "local-dir:/home/ann/models/vit", "f" * 64, "e" * 64, "head", 0, 770),
        data=data_part(NODULES, split_dataset(NODULES)),
        recipe={
            "epochs": 10,
            "lr": np.float32(0.5),
            "checkpoint": Path("/home/ann/secret/weights.safetensors"),
            "output": "/home/ann/head.safetensors",
            "cache": "~/cache/latents",
            "windows": "C:\\Users\\ann\\head.safetensors",
            "optimizer": "adam",
            "betas": (0.9, np.float64(0.999)),
            "views": None,
        },
        curve=[{"epoch": 1, "train_loss": 0.5, "validation_loss": np.float64(0.25)}],
        metrics={
            "test": Scores(
                2, 2, {"accuracy": Estimate(0.5, 0.0, 1.0)}, {"recall": {"benign": Estimate(None, note="none")}}
            )
        },
        started=datetime(2026, 11, 25, 13, 0, tzinfo=timezone(timedelta(hours=1))),
        seconds=12.5,
        versions={"python": "3.11.2"},
    )
    return replace(plain, **change)


def test_all_of_it() -> None:
    content = json.loads(card().to_json())
    assert content == {
        "schema_version": SCHEMA_VERSION,
        "task": "multi_class",
        "outputs": ["benign", "/m/01malignant"],
        "model": {
            "name": "lesions",
            "architecture": "local-dir:vit",
            "fingerprint": "f" * 64,
            "trained_fingerprint": "e" * 64,
            "trained": "head",
            "blocks_trained": 0,
            "parameters_trained": 770,
        },
        "data": {
            "name": "nodules.csv",
            "kind": "csv",
            "digest": "d" * 64,
            "rows": 6,
            "group_by": "scan",
            "split": "by 'side'",
            "split_seed": None,
            "shares": {},
            "sides": {
                "train": {"rows": 3, "clusters": 2, "examples": {"benign": 1, "/m/01malignant": 2}, "values": {}},
                "validation": {"rows": 1, "clusters": 1, "examples": {"benign": 1, "/m/01malignant": 0}, "values": {}},
                "test": {"rows": 2, "clusters": 2, "examples": {"benign": 0, "/m/01malignant": 2}, "values": {}},
            },
            "notes": ["a note"],
        },
        "recipe": {
            "epochs": 10,
            "lr": 0.5,
            "checkpoint": "weights.safetensors",
            "output": "head.safetensors",
            "cache": "latents",
            "windows": "head.safetensors",
            "optimizer": "adam",
            "betas": [0.9, 0.999],
            "views": None,
        },
        "curve": [{"epoch": 1, "train_loss": 0.5, "validation_loss": 0.25}],
        "metrics": {
            "test": {
                "rows": 2,
                "clusters": 2,
                "estimates": {"accuracy": {"value": 0.5, "low": 0.0, "high": 1.0, "note": ""}},
                "by_output": {"recall": {"benign": {"value": None, "low": None, "high": None, "note": "none"}}},
            }
        },
        "started": "2026-11-25T12:00:00+00:00",
        "seconds": 12.5,
        "notes": [],
        "versions": {"python": "3.11.2"},
    }


def test_nothing_of_the_machine() -> None:
    assert "ann" not in card().to_json()


def test_it_is_sorted_and_stable(tmp_path: Path) -> None:
    text = card().to_json()
    turned = card(recipe=dict(reversed(card().recipe.items())))
    assert turned.to_json() == text
    keys = list(json.loads(text))
    assert keys == sorted(keys)
    path = tmp_path / "head.json"
    path.write_text("an older one")
    write_card(card(), path)
    assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == ["head.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curve": [{"loss": 1.0}, {"loss": float("nan")}]}, r"card.curve\[1\].loss is nan, which JSON has not"),
        ({"seconds": np.float32("inf")}, r"card.seconds is inf, which JSON has not"),
        ({"recipe": {"device": object()}}, r"card.recipe.device is a object, which JSON has not"),
        ({"recipe": {"weights": np.zeros(3)}}, r"card.recipe.weights is a ndarray, which JSON has not"),
    ],
)
def test_what_json_has_not_is_refused_and_nothing_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_card(card(**change), tmp_path / "head.json")
    assert list(tmp_path.iterdir()) == []


def test_labels_are_counted_where_they_are_positive() -> None:
    values: list[Value] = [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)]
    found = dataset(Task.MULTI_LABEL, values, ("a", "b"))
    sides = data_part(found, split_dataset(found)).sides
    assert [dict(side.examples) for side in sides.values()] == [{"a": 2, "b": 2}, {"a": 1, "b": 1}, {"a": 1, "b": 0}]


def test_numbers_are_summed_up() -> None:
    found = dataset(Task.REGRESSION, [(1.0,), (2.0,), (6.0,), (4.0,), (0.5,), (2.5,)], ("mm",))
    side = data_part(found, split_dataset(found)).sides["train"]
    summary = {"mean": 3.0, "std": pytest.approx((14 / 3) ** 0.5), "min": 1.0, "max": 6.0}
    assert side == SidePart(3, 2, values={"mm": summary})  # type: ignore[dict-item]


def test_versions_are_those_that_are_installed() -> None:
    found = installed_versions()
    assert set(found) == {"python", "cdam-serve", "numpy", "scikit-learn", "timm", "torch"}
    assert found["numpy"] == np.__version__
    assert found["torch"] == metadata.version("torch")


def test_the_time_is_utc() -> None:
    assert now().tzinfo is UTC
    assert now().microsecond == 0
