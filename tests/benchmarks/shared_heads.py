"""What several heads on one backbone take, beside one head: memory, time until ready, a question to all of them.

    PYTHONPATH=tests python tests/benchmarks/shared_heads.py [--heads 3] [--input-size 224] [--images 24]

Real servers, one after another, on a ViT-S/14 (DINOv2's architecture, random weights): with one head, with several on the
same backbone, and with as many backbones. A question goes to every head at once, about an image that the server has not
seen. Prints a table and keeps results/shared_heads.json in step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import cdam
from processes import serving

ARCHITECTURE: Final = "vit_small_patch14_dinov2"
OUTPUTS: Final = (2, 8, 3, 5, 4)


@dataclass(frozen=True)
class Row:
    """One server.

    Attributes:
        what: What it serves.
        mib: Resident memory when it is ready.
        ready_seconds: From its start to readiness.
        warm_up_seconds: Of these, in warm-up batches.
        question_seconds: Median time of a question to all heads about a new image.
    """

    what: str
    mib: float
    ready_seconds: float
    warm_up_seconds: float
    question_seconds: float


def measure(what: str, folder: Path, entries: Sequence[dict[str, Any]], images: int, size: int) -> Row:
    """Start a server, ask, stop it."""
    path = folder / "models.yaml"
    path.write_text(json.dumps({"models": entries}), encoding="utf-8")  # JSON is YAML
    names = [entry["name"] for entry in entries]
    started = perf_counter()
    flags = ("--models-file", str(path), "--token-cache-mib", "64", "--log-level", "info")
    with serving(folder / "log", *flags) as server, cdam.Client(server.address, timeout=300) as client:
        ready = perf_counter() - started
        mib = server.usage().mib
        warm = sum(float(str(line["seconds"])) for line in server.log_lines() if line.get("event") == "warm")
        rng = np.random.default_rng(0)
        seconds = []
        with ThreadPoolExecutor(len(names)) as pool:
            for _ in range(images):
                picture = rng.integers(0, 256, (size, size, 3), np.uint8)
                asked = perf_counter()
                list(pool.map(lambda name, picture=picture: client.explain(picture, 0, model=name), names))
                seconds.append(perf_counter() - asked)
    return Row(what, mib, ready, warm, statistics.median(seconds[1:]))


def entries_in(folder: Path, heads: int, size: int, *, shared: bool) -> list[dict[str, Any]]:
    """Entries of a models file, with their files."""
    torch.manual_seed(0)
    backbone = timm.create_model(ARCHITECTURE, num_classes=0, img_size=size)
    entries = []
    for number in range(heads):
        if number and not shared:
            backbone = timm.create_model(ARCHITECTURE, num_classes=0, img_size=size)
        weights = folder / f"backbone{0 if shared else number}.safetensors"
        if not weights.exists():
            save_file(backbone.state_dict(), weights)
        head = folder / f"head{number}.safetensors"
        save_file(nn.Linear(backbone.num_features, OUTPUTS[number % len(OUTPUTS)]).state_dict(), head)
        entries.append(
            {
                "name": f"head{number}",
                "architecture": ARCHITECTURE,
                "model_kwargs": {"img_size": size},
                "checkpoint": weights.name,
                "head": head.name,
            }
        )
    return entries


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--json", type=Path, default=Path("results/shared_heads.json"))
    arguments = parser.parse_args()
    heads, size = arguments.heads, arguments.input_size
    print(f"{ARCHITECTURE} at {size} x {size}, {os.cpu_count()} cores\n")
    print(
        "| served | memory, MiB | until ready, s | of it warm-up, s | a question to all heads, s |\n|---|---|---|---|---|"
    )
    rows = []
    for what, number, shared in (
        ("one head", 1, True),
        (f"{heads} heads on one backbone", heads, True),
        (f"{heads} models", heads, False),
    ):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            row = measure(what, folder, entries_in(folder, number, size, shared=shared), arguments.images, size)
        rows.append(row)
        print(
            f"| {row.what} | {row.mib:.0f} | {row.ready_seconds:.1f} | {row.warm_up_seconds:.2f} "
            f"| {row.question_seconds:.3f} |",
            flush=True,
        )
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    kept = {"machine": machine, "input_size": size, "heads": heads, "rows": [asdict(row) for row in rows]}
    arguments.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
