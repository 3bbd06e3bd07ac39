"""Part of `gpu`: maps a second of the service, by the number of its front ends, and how busy the GPU is meanwhile.

Encoded images are sent as fast as answers come, by several processes, since one Python process can't ask a GPU enough:
how busy these are is told, too. The server keeps no tokens, so that every map takes a pass.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import monotonic, process_time, sleep
from typing import Any, Final, Self

import grpc.aio
import numpy as np
from gpu_rows import Rows
from PIL import Image

from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2, method_pb2, target_pb2
from cdam_cli.load import OK, ClosedLoop, generate
from cdam_server.demo.scenes import draw_scene

FRONT_ENDS: Final = (12, 1, 4)  # in this order, should time be short
_MODEL: Final = "vit_small_patch16_224"
_DEMO: Final = "demo"
_EXPLAIN: Final = f"/{explainer_service_pb2.DESCRIPTOR.services_by_name['ExplainerService'].full_name}/Explain"
_IMAGES: Final = 64  # that each process sends again and again
_PHOTO: Final = (480, 360)
_CALLERS: Final = 256
_BATCH: Final = 64
_START: Final = 120.0  # seconds
_EVERY: Final = 0.05  # seconds between looks at the GPU


# --- who asks


@dataclass(frozen=True)
class Asked:
    """What one process asks.

    Attributes:
        address: Of the server.
        model: What it serves.
        seed: Of the images.
        callers: How many.
        warm_up: Seconds before the window that counts.
        seconds: Of the window.
    """

    address: str
    model: str
    seed: int
    callers: int
    warm_up: float
    seconds: float


@dataclass(frozen=True)
class Heard:
    """What it was told.

    Attributes:
        throughput: Maps a second.
        latencies: Seconds.
        codes: How often each was returned.
        busy: Its processor time over the time it took.
        batch: Mean size of the batches.
        window: When it counted, by the machine's monotonic clock.
    """

    throughput: float
    latencies: list[float]
    codes: dict[str, int]
    busy: float
    batch: float
    window: tuple[float, float]


_together: Any = None  # a barrier: all processes begin at once


def meet(barrier: Any) -> None:
    """Tell a process where it waits for the others."""
    global _together  # noqa: PLW0603 - of a process
    _together = barrier


def ask(asked: Asked) -> Heard:
    """Ask for one map after the other."""
    return asyncio.run(_ask(asked))


async def _ask(asked: Asked) -> Heard:
    requests = [
        explain_pb2.ExplainRequest(
            image=common_pb2.Image(encoded=image),
            targets=[target_pb2.Target(output=target_pb2.OutputTarget(index=number % 10))],
            methods=[method_pb2.Method(cdam=method_pb2.CdamMethod())],
        ).SerializeToString()
        for number, image in enumerate(_images(asked.model, asked.seed))
    ]
    sizes: list[int] = []
    _together.wait(_START)
    # Several connections, so that the kernel deals them to several front ends.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(asked.address, options) for _ in range(min(16, asked.callers))]
    explains = [channel.unary_unary(_EXPLAIN) for channel in channels]

    async def call(number: int) -> str:
        try:
            answer = await explains[number % len(explains)](requests[number % _IMAGES])
        except grpc.aio.AioRpcError as error:
            await asyncio.sleep(0.01)
            return str(error.code().name)
        if not number % 16:
            sizes.append(explain_pb2.ExplainResponse.FromString(answer).timing.batch_size)
        return OK

    started, used = monotonic(), process_time()
    load = await generate(call, ClosedLoop(asked.callers), seconds=asked.seconds, warm_up_seconds=asked.warm_up)
    busy = (process_time() - used) / (monotonic() - started)
    for channel in channels:
        await channel.close()
    batch = statistics.harmonic_mean(sizes) if sizes else math.nan
    window = started + asked.warm_up, started + asked.warm_up + asked.seconds
    return Heard(load.throughput, load.latencies.tolist(), dict(load.counts), busy, batch, window)


@cache
def _images(model: str, seed: int) -> list[bytes]:
    random = np.random.default_rng(seed)
    files = []
    for number in range(_IMAGES):
        file = io.BytesIO()
        if model == _DEMO:
            Image.fromarray(draw_scene("test", seed=1000 * seed + number, digits=2).image).save(file, "PNG")
        else:
            coarse, fine = (
                Image.fromarray(random.integers(0, 256, (_PHOTO[1] // step, _PHOTO[0] // step, 3), np.uint8)).resize(
                    _PHOTO
                )
                for step in (40, 4)
            )
            Image.blend(coarse, fine, 0.2).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


# --- who is asked


def has_front_ends() -> bool:
    """Whether this `cdam serve` knows the option."""
    return "--front-ends" in subprocess.run(
        [sys.executable, "-m", "cdam_cli", "serve", "--help"], check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


@contextmanager
def serving(model: str, device: str, precision: str, front_ends: int | None) -> Iterator[str]:
    """The address of a server that is ready."""
    address, admin = (f"127.0.0.1:{_free_port()}" for _ in range(2))
    command = [sys.executable, "-m", "cdam_cli", "serve", "--address", address, "--admin-address", admin]
    command += ["--device", device, "--precision", precision, "--token-cache-mib", "0", "--log-format", "json"]
    command += ["--max-batch-size", str(_BATCH), "--max-pending", str(4 * _CALLERS), "--model", model]
    command += [] if model == _DEMO else ["--random-weights"]
    command += [] if front_ends is None else ["--front-ends", str(front_ends)]
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as data:
        process = subprocess.Popen([*command, "--data-dir", data], stdout=log, stderr=subprocess.STDOUT)
        try:
            if not _is_ready(process, f"http://{admin}/readyz"):
                log.seek(0)
                raise RuntimeError(f"the server did not get ready: {log.read().decode(errors='replace')[-600:]}")
            yield address
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()


def _is_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    until = monotonic() + _START
    while monotonic() < until and process.poll() is None:
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError), urllib.request.urlopen(url, timeout=5):
            return True
        sleep(0.1)
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as item:
        return int(item.getsockname()[1])


class Busy:
    """How busy the first GPU is: by NVML, else by `nvidia-smi`; the share of the time in which any kernel ran.

    Attributes:
        source: Who says so; "-": nobody does.
    """

    def __init__(self) -> None:
        self._shares: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.source, self._look = _look()

    def __enter__(self) -> Self:
        """Begin to look."""
        if self._look is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def share(self, start: float, end: float) -> float | None:
        """The mean between two moments of the monotonic clock, 0 to 1."""
        shares = [share for moment, share in self._shares if start <= moment <= end]
        return statistics.mean(shares) if shares else None

    def _watch(self) -> None:
        while not self._over.wait(_EVERY):
            with suppress(Exception):  # no look is worth a measurement
                self._shares.append((monotonic(), self._look()))  # type: ignore[misc]


def _look() -> tuple[str, Any]:
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # noqa: BLE001 - the package or the driver's library is missing, or has no GPU
        pass
    else:
        return "NVML", lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]

    def ask_tool() -> float:
        return float(subprocess.run(query, check=True, capture_output=True, text=True).stdout) / 100

    try:
        ask_tool()
    except (OSError, subprocess.CalledProcessError, ValueError):
        return "-", None
    return "nvidia-smi", ask_tool


# --- how it is measured


def _best_engine(path: Path | None, precision: str) -> float | None:
    """Maps a second of the engine alone, by what `gpu` has measured before: the best batch up to the server's."""
    if path is None or not path.exists():
        return None
    rows = json.loads(path.read_text())["rows"].get("engine", [])
    alike = (row for row in rows if row.get("model") == "S/16" and row.get("precision") == precision)
    return max((row["maps/s"] for row in alike if row["batch"] <= _BATCH and row.get("maps/s")), default=None)


def measure(
    rows: Rows, pool: ProcessPoolExecutor, processes: int, front_ends: int | None, precision: str, seconds: float
) -> None:
    """One server."""
    quick = rows.arguments.quick
    model, callers = (_DEMO, 8) if quick else (_MODEL, _CALLERS)
    with serving(model, rows.arguments.device, precision, front_ends) as address:
        asked = [
            Asked(address, model, seed, max(1, callers // processes), seconds / 2, seconds) for seed in range(processes)
        ]
        with Busy() as gpu:
            heard = list(pool.map(ask, asked))
    throughput = sum(its.throughput for its in heard)
    codes: Counter[str] = sum((Counter(its.codes) for its in heard), Counter())
    latencies: Sequence[float] = np.concatenate([its.latencies for its in heard]).tolist()
    engine = None if quick else _best_engine(rows.arguments.engine, precision)
    rows.add(
        model=model,
        precision=precision,
        front_ends="none" if front_ends is None else front_ends,
        **{"maps/s": throughput, "engine maps/s": engine, "served / engine": throughput / engine if engine else None},
        **{f"p{q} ms": 1000 * float(np.quantile(latencies, q / 100)) if latencies else None for q in (50, 99)},
        mean_batch=statistics.mean(its.batch for its in heard),
        GPU_busy=gpu.share(max(its.window[0] for its in heard), min(its.window[1] for its in heard)),
        said_by=gpu.source,
        callers=callers,
        processes=f"{processes}, busy {max(its.busy for its in heard):.2f}",
        codes=", ".join(f"{count} {code}" for code, count in codes.items()),
    )


def main() -> None:
    """Measure each number of front ends."""
    rows = Rows(__doc__, engine={"type": Path, "help": "what was measured before, for the engine's maps a second"})
    cuda = rows.arguments.device != "cpu"
    numbers: list[int | None] = list(FRONT_ENDS[1:2] if rows.arguments.quick else FRONT_ENDS)
    if not has_front_ends():
        for number in numbers:
            rows.add(front_ends=number, codes="not available: this `cdam serve` knows no --front-ends")
        numbers = [None]
    wanted = [(number, precision) for precision in (("bf16", "fp32") if cuda else ("fp32",)) for number in numbers]
    processes = 1 if rows.arguments.quick else max(1, len(os.sched_getaffinity(0)) // 4)
    seconds = 2.0 if rows.arguments.quick else 6.0
    longest = 0.0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, meet, (context.Barrier(processes),)) as pool:
        for number, precision in wanted:
            started = monotonic()
            if rows.left() < 1.2 * longest:
                rows.add(precision=precision, front_ends=number, codes="no time was left")
                continue
            try:
                measure(rows, pool, processes, number, precision, seconds)
            except Exception as error:  # noqa: BLE001 - the others go on
                rows.add(precision=precision, front_ends=number, codes=f"{type(error).__name__}: {error}"[:700])
            longest = max(longest, monotonic() - started)


if __name__ == "__main__":
    main()
