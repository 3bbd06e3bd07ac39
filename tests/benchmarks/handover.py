"""What a compute process spends on a request beside computing it: the limit to what any GPU can be fed with.

    python tests/benchmarks/handover.py [--before FOLDER] [--seconds 5] [--rounds 5]

A compute process whose model costs nothing (`instant_server`) has one core to itself; on another, processes hand it pixels as front ends do, without
gRPC and images, 256 requests under way at once, of 128 callers. `--before` is a worktree of the commit to compare with, by turns. Prints the requests a second,
and the processor time of the event loop and of the workers, a request; writes results/handover.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).parents[2]
MODEL: Final = "vit_small_patch16_224"
_DRIVERS: Final = 2
_UNDER_WAY: Final = 128
_SIZE: Final = (224, 224)
_TIMEOUT: Final = 300.0  # seconds; the first answer is computed, and nobody is to be refused for it


def _compute(assignment: tuple[Any, ...]) -> None:
    import instant_server  # noqa: F401 - it makes the model cost nothing

    from cdam_server.processes import children

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    children.compute(children.Assignment(*assignment))


def _drive(board: Any, number: int, path: Path, models: bytes, seconds: float, told: Connection) -> None:
    from cdam_engine import Cdam, Output
    from cdam_server.compute.scheduling import JobSpec
    from cdam_server.compute.work import ExplainWork, image_bucket
    from cdam_server.operation.telemetry import Telemetry
    from cdam_server.processes.remote import RemoteCompute

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    model = pickle.loads(models).default
    bucket, pixels = image_bucket(model, _SIZE), np.zeros((*_SIZE, 3), np.uint8)

    async def ask(remote: RemoteCompute, caller: int, until: float) -> int:
        answers = 0
        while time.monotonic() < until:
            spec = JobSpec(bucket, bytes=pixels.nbytes, caller=str(caller), timeout=_TIMEOUT)
            async with remote.admit(spec) as ticket:
                await ticket.submit(ExplainWork(bucket, model.name, pixels, (Output(3),), (Cdam(),)))
            answers += 1
        return answers

    async def main() -> int:
        remote = RemoteCompute(board, number, _DRIVERS, 1024, Telemetry(), remembers=False)
        await remote.connect(0, path)
        told.send("ready")
        told.recv()
        until = time.monotonic() + seconds
        return sum(await asyncio.gather(*(ask(remote, caller, until) for caller in range(_UNDER_WAY))))

    told.send(asyncio.run(main()))


def _processor_seconds(pid: int) -> np.ndarray:
    """Of the event loop's thread, and of all others."""
    used = np.zeros(2)
    for thread in Path(f"/proc/{pid}/task").iterdir():
        used[int(thread.name != str(pid))] += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return used


def measure(seconds: float, rounds: int) -> list[list[float]]:
    """Of each round: requests a second, and milliseconds a request of the event loop and of the workers."""
    from cdam_server.processes.board import make_board
    from cdam_server.settings.config import Settings

    context = multiprocessing.get_context("spawn")
    board = make_board(context)
    settings = Settings(
        model=MODEL, random_weights=True, token_cache_mib=0, max_pending=1024, max_batch_size=64, log_level="error"
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        control, theirs = context.Pipe()
        computing = context.Process(target=_compute, args=((settings, 0, board, theirs, Path(folder)),))
        computing.start()
        theirs.close()
        models = control.recv().models
        for turn in range(rounds + 1):  # the first one warms up
            pipes = [context.Pipe() for _ in range(_DRIVERS)]
            drivers = [
                context.Process(target=_drive, args=(board, number, Path(folder) / "compute-0", models, seconds, end))
                for number, (_, end) in enumerate(pipes)
            ]
            for driver in drivers:
                driver.start()
            for pipe, _ in pipes:
                pipe.recv()
            assert computing.pid is not None
            before = _processor_seconds(computing.pid)
            for pipe, _ in pipes:
                pipe.send("go")
            answers = sum(pipe.recv() for pipe, _ in pipes)
            used = _processor_seconds(computing.pid) - before
            if turn:
                found.append([answers / seconds, *(1000 * used / answers)])
            for driver in drivers:
                driver.join()
        computing.kill()
        computing.join()
    return found


def _measured(tree: Path, plan: argparse.Namespace) -> list[list[float]]:
    """Of a tree, in a process that imports it."""
    variables = {**os.environ, "PYTHONPATH": f"{tree / 'client'}:{tree / 'server'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", "--seconds", str(plan.seconds), "--rounds", str(plan.rounds)]
    return list(json.loads(subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True).stdout))


def main() -> None:
    """Measure, by turns if there is a tree to compare with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a worktree to compare with")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "handover.json")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    plan = parser.parse_args()
    if plan.measure:
        print(json.dumps(measure(plan.seconds, plan.rounds)))
        return
    trees = {"after": ROOT} | ({"before": plan.before} if plan.before else {})
    found: dict[str, list[list[float]]] = {name: [] for name in trees}
    for _ in range(2):
        for name, tree in trees.items():
            found[name] += _measured(tree, plan)
    print("| | requests a second | event loop, ms a request | workers, ms a request |\n|---|---|---|---|")
    for name, rounds in found.items():
        rate, loop, workers = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"| {name} | {rate:.0f} | {loop:.3f} | {workers:.3f} |")
    plan.json.parent.mkdir(exist_ok=True)
    plan.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
