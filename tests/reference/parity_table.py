"""Print how closely the engine agrees with the reference, as a Markdown table.

    python tests/reference/parity_table.py [architecture ...]

"fp32" and "fp64" are the worst `max|engine - reference| / max|reference|` over images and targets, in a batch and
alone. The last two columns compare the float32 maps of the engine and of the reference with the reference in double
precision: they tell rounding from error.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from reference.agreement import alone, in_batch, reference_noise
from reference.models import BY_ID, CASES, available


def main(names: list[str]) -> None:
    cases = [BY_ID[name] for name in names] or [case for case in CASES if available(case)]
    print("| architecture | timm | grid | prefix | fp32 | fp64 | fp32 engine to fp64 | fp32 reference to fp64 |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        single = max(alone(case, torch.float32).maps, in_batch(case, torch.float32).maps)
        double = max(alone(case, torch.float64).maps, in_batch(case, torch.float64).maps)
        rounding = in_batch(case, torch.float32, truth=torch.float64).maps
        grid = "x".join(map(str, case.grid))
        print(
            f"| {case.id} | {case.timm_name} | {grid} | {case.prefix} "
            f"| {single:.1e} | {double:.1e} | {rounding:.1e} | {reference_noise(case):.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
