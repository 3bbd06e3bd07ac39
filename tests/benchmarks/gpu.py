"""What a GPU makes of the engine and of the service, on a bare machine, in a given time.

    python tests/benchmarks/gpu.py [--wheels FOLDER] [--minutes 9] [--parts tests engine ...] [--out results/gpu.json]
    python tests/benchmarks/gpu.py --device cpu --quick

tests     tests/integration/test_gpu.py
engine    forward pass, CDAM, 100 targets, Integrated, Smooth, relevance propagation, ablation, token cache, by model,
          precision and batch: times as ratios to the forward pass in the same precision, maps a second, peak memory
compiled  the same of the compiled trunk, beside the compiled model
truth     maps in float32, TF32 and with the trunk in bfloat16, against those in float64
served    maps a second of `cdam serve` with 1, 4 and 12 front ends, decoding included, and how busy the GPU is

Every part is a process of its own with its share of the time; what a part leaves over, the next ones have. A part that
fails or is not done in time keeps the rows that it has, and the others go on. Beside JSON, the table is kept in step with
them. Needs Python 3.12, torch, grpcio, onnxruntime and transformers; what else it needs may be installed, or lie in
--wheels as wheels, which are installed for this run alone. Exits 0 whatever the figures are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
_HERE: Final = Path(__file__).resolve().parent
_CODE: Final = (ROOT / "client", ROOT / "server", ROOT / "tests")
_GRACE: Final = 6.0  # seconds for a part to put away what it has started
_PACKAGES: Final = ("torch", "timm", "grpcio", "numpy", "nvidia-ml-py")

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
        name: For --parts.
        seconds: Its share of nine minutes.
        command: What is run; it writes rows, one JSON object a line, to the file that `--rows` names.
    """

    name: str
    seconds: float
    command: tuple[str, ...]


PARTS: Final = (
    Part("tests", 60, (str(_HERE / "gpu_tests.py"),)),
    Part("engine", 150, (str(_HERE / "gpu_engine.py"), "engine")),
    Part("served", 150, (str(_HERE / "gpu_served.py"),)),
    Part("compiled", 120, (str(_HERE / "gpu_engine.py"), "compiled")),
    Part("truth", 30, (str(_HERE / "gpu_engine.py"), "truth")),
)


def budgets(left: float, parts: Sequence[Part]) -> float:
    """Seconds for the first of the parts that are still to come: its share, and what the others leave over."""
    return left * parts[0].seconds / sum(part.seconds for part in parts) if len(parts) > 1 else left


def run(part: Part, seconds: float, options: Sequence[str], environment: dict[str, str]) -> tuple[list[Row], str]:
    """The rows of a part, and what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        command = [sys.executable, *part.command, *options, "--seconds", f"{seconds - _GRACE:.0f}", "--rows", str(rows)]
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
            )
            try:
                code = process.wait(seconds)
                became = "done" if code == 0 else f"ended with {code}"
            except subprocess.TimeoutExpired:
                became = f"not done within {seconds:.0f} s"
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if became != "done":
            became += f": {log.read_text(errors='replace').strip()[-1500:]}"
        return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else [], became


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of rows, whose keys are its columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value).replace("|", "/").replace("\n", " ")


def goals(found: dict[str, list[Row]]) -> list[Row]:
    """What was to be reached, and what was."""
    told = [
        {
            "goal": f"CDAM / compiled forward <= 1.0, {row['model']}, {row['precision']}, batch 64",
            "reached": row["CDAM"],
            "met": row["CDAM"] <= 1.0,
        }
        for row in found.get("compiled", [])
        if row.get("batch") == 64 and isinstance(row.get("CDAM"), float)
    ]
    for row in found.get("served", []):
        if row.get("front ends") == 12 and isinstance(row.get("served / engine"), float):
            share = row["served / engine"]
            told.append({"goal": "served / engine >= 0.9, 12 front ends", "reached": share, "met": share >= 0.9})
    return told


def _environment(wheels: Path | None, folder: str) -> dict[str, str]:
    """With the repository's code, and the wheels, installed without looking for others."""
    paths = [*map(str, _CODE), str(_HERE)]
    if wheels is not None:
        files = sorted(map(str, wheels.resolve().glob("*.whl")))
        if not files:
            raise SystemExit(f"--wheels: there is no wheel in {wheels}")
        options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--target", folder]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)
        paths.append(folder)
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}


def _machine(device: str) -> Row:
    versions = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    with suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        versions["gpu"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    return {"device": device, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}


def _arguments() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of what is not installed")
    parser.add_argument("--minutes", type=float, default=9, help="for everything")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest of everything, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"), help="the table is beside it, as .md")
    return parser.parse_args()


def main() -> None:
    """Measure all parts that were asked for."""
    arguments = _arguments()
    until = monotonic() + 60 * arguments.minutes
    parts = [part for part in PARTS if part.name in arguments.parts]
    options = ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]
    report: dict[str, Any] = {"machine": _machine(arguments.device), "became": {}, "rows": {}, "goals": []}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(arguments.wheels, folder)
        for number, part in enumerate(parts):
            started = monotonic()
            left = until - started - _GRACE
            if left < 2 * _GRACE:
                rows, became = [], "no time was left"
            else:
                known = ["--engine", str(arguments.out)] if part.name == "served" else []
                rows, became = run(part, budgets(left, parts[number:]), [*options, *known], environment)
            report["rows"][part.name], report["became"][part.name] = rows, became
            report["goals"] = goals(report["rows"])
            text = f"\n## {part.name}: {became} ({monotonic() - started:.0f} s)\n\n{table(rows) if rows else ''}"
            print(text, flush=True)
            _keep(report, arguments.out)
    if report["goals"]:
        print(f"\n## goals\n\n{table(report['goals'])}")
    print(f"\nwrote {arguments.out} and {arguments.out.with_suffix('.md')}")


def _keep(report: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(report, indent=2) + "\n")
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    parts = [f"## {name}: {report['became'][name]}\n\n{table(rows)}" for name, rows in report["rows"].items() if rows]
    told = [f"## goals\n\n{table(report['goals'])}"] if report["goals"] else []
    out.with_suffix(".md").write_text("\n\n".join([about, *parts, *told]) + "\n")


if __name__ == "__main__":
    main()
