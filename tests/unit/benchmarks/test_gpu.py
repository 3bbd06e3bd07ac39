"""The GPU benchmark's frame: a part that fails or takes too long loses nothing, and the others go on."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


WRITES = """
import json, sys
with open(sys.argv[sys.argv.index("--rows") + 1], "a") as file:
    print(json.dumps({"value": 1}), file=file)
"""


@pytest.mark.parametrize(
    ("more", "seconds", "became"),
    [
        ("", 30, "done"),
        ("raise ValueError('broken')", 30, "ValueError: broken"),
        ("import time; time.sleep(600)", 1, "not done within 1 s"),
        ("import subprocess as s; s.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])", 30, "done"),
    ],
)
def test_rows_are_kept_whatever_becomes_of_a_part(
    gpu: ModuleType, tmp_path: Path, more: str, seconds: float, became: str
) -> None:
    script = tmp_path / "part.py"
    script.write_text(WRITES + more)
    rows, told = gpu.run(gpu.Part("it", 60, (str(script),)), seconds, [], dict(os.environ))
    assert rows == [{"value": 1}]
    assert became in told


def test_time_that_is_left_over_goes_to_the_others(gpu: ModuleType) -> None:
    parts = [gpu.Part("a", 60, ()), gpu.Part("b", 120, ()), gpu.Part("c", 60, ())]
    assert gpu.budgets(480, parts) == pytest.approx(120)
    assert gpu.budgets(450, parts[1:]) == pytest.approx(300)
    assert gpu.budgets(80, parts[2:]) == pytest.approx(80)


def test_goals(gpu: ModuleType) -> None:
    found = {
        "compiled": [
            {"model": "S/16", "precision": "bf16", "batch": 64, "CDAM": 0.99},
            {"model": "S/16", "precision": "fp32", "batch": 64, "CDAM": 1.01},
            {"model": "S/16", "precision": "fp32", "batch": 8, "CDAM": 2.0},
            {"model": "B/16", "precision": "fp32", "batch": 64, "note": "no time was left"},
        ],
        "served": [{"front ends": 12, "served / engine": 0.91}, {"front ends": 4, "served / engine": 0.5}],
    }
    assert [(row["reached"], row["met"]) for row in gpu.goals(found)] == [(0.99, True), (1.01, False), (0.91, True)]


def test_table_has_a_column_for_every_key(gpu: ModuleType) -> None:
    assert gpu.table([{"a": 1, "b": 0.12345}, {"c": None, "a": "x|y"}]).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 1 | 0.123 | - |",
        "| x/y | - | - |",
    ]
