"""What the service costs where computing costs nothing, how it spreads over processes, and what a death of one costs.

    python tests/benchmarks/front_ends.py --ghz FILE [--hey FILE] [--before FOLDER] [--scenarios instant ...] [--seconds 10] [--rounds 5]

instant   answers a second with 64 callers, 224-pixel JPEGs and 640 x 427 photographs: this tree, the tree before, LitServe
cost      processor time of all server processes a request: unary, stream, a refusal; a bare grpc.aio echo of the same bytes; Pillow alone
waits     how long front ends' event loops let something wait that is due, with 64 callers
devices   two devices that take 20 ms, and 80 ms, for a batch of 8, over one
start     seconds from start to ready, and memory of all processes
kill      a front end is killed every 3 s for 60 s, under the client's default retries

The engine answers at once (`instant_server`), and so does LitServe's (`litserve_peer --zeros`, a worker for each core). Load comes from ghz
(`go install github.com/bojand/ghz/cmd/ghz@latest`), LitServe's from hey (`go install github.com/rakyll/hey@latest`); without hey LitServe is left out. `--before` is a worktree of
the commit to compare with; servers take turns within a round, and a ratio is the median over rounds. Prints a table, keeps results/front_ends.json in step, and exits 0 whatever the figures are.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc.aio
import numpy as np
import timm
import torch
from PIL import Image
from subject import machine

import cdam
from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2, target_pb2
from cdam_engine.preprocess import DataConfig, prepare

ROOT: Final = Path(__file__).parents[2]
SIZES: Final = {"224 x 224": (224, 224), "640 x 427": (640, 427)}
_TINY: Final = (32, 32)
MODEL: Final = "vit_small_patch16_224"
CALLERS: Final = 64
CONNECTIONS: Final = 16
EXPLAIN: Final = "cdam.v1.ExplainerService/Explain"
_START_SECONDS: Final = 180
_BARS: Final = {"before": ">= 1.9", "LitServe": ">= 2.5"}


@dataclass(frozen=True)
class Tree:
    """A tree of the sources, and how servers of it are started."""

    name: str
    folder: Path
    model: str = MODEL


@dataclass
class Report:
    """What has been found so far."""

    file: Path
    about: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, value: float | str, unit: str, bar: str = "") -> None:
        """A line of the table."""
        self.rows.append({"what": what, "value": value, "unit": unit, "bar": bar})
        shown = value if isinstance(value, str) else f"{value:.3g}"
        print(f"{what:72s} {shown:>12s} {unit:16s} {bar}", flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({**self.about, "rows": self.rows}, indent=2) + "\n")


# --- servers


class Server(ABC):
    """A server with all its processes.

    Args:
        name: For the table.
        command: Starts it.
        variables: Of its environment, besides this process's own.
        ready: URL that answers 200 once it serves.
    """

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str], ready: str) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        started = time.perf_counter()
        environment = {**os.environ, **variables}
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, env=environment, start_new_session=True
        )
        self._wait(ready)
        self.start_seconds = time.perf_counter() - started

    @abstractmethod
    def load(self, plan: argparse.Namespace, size: tuple[int, int], seconds: float) -> Load:
        """Closed-loop load of all callers."""

    def _wait(self, ready: str) -> None:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(ready, timeout=5):
                return
            time.sleep(0.05)
        self._log.seek(0)
        raise SystemExit(f"{self.name} did not get ready:\n{self._log.read().decode(errors='replace')[-4000:]}")

    @property
    def pids(self) -> list[int]:
        """All its processes."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                children.setdefault(int(_stat(path.name)[1]), []).append(int(path.name))
        found, waiting = [], [self.process.pid]
        while waiting:
            found.append(waiting.pop())
            waiting += children.get(found[-1], [])
        return found

    def processor_seconds(self) -> float:
        """That all its processes have had."""
        return _processor_seconds(self.pids)

    def memory(self) -> float:
        """MB of all its processes, what they share counted once."""
        pages = 0
        for pid in self.pids:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            pages += sum(int(number) for number in re.findall(r"^Pss:\s+(\d+)", rollup, re.MULTILINE))
        return pages / 1024

    @contextmanager
    def turn(self) -> Iterator[None]:
        """It runs; else it stands still."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def stop(self) -> None:
        """End it."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


class Ours(Server):
    """`cdam serve`, with an engine that costs nothing.

    Args:
        tree: Of which sources.
        *flags: Of `cdam serve`.
        seconds: That a batch takes; None: as long as it takes to compute it.
        waits: Folder for how long event loops let things wait.
    """

    def __init__(self, tree: Tree, *flags: str, seconds: float | None = 0.0, waits: str = "") -> None:
        api, admin = _free_port(), _free_port()
        self.address = f"127.0.0.1:{api}"
        path = os.pathsep.join(str(tree.folder / name) for name in ("client", "server"))
        self._data = tempfile.TemporaryDirectory()
        instant = str(Path(__file__).with_name("instant_server.py"))
        command = [sys.executable, *(["-m", "cdam_cli"] if seconds is None else [instant]), "serve"]
        command += ["--address", self.address, "--admin-address", f"127.0.0.1:{admin}", "--log-format", "json"]
        command += ["--token-cache-mib", "0", "--model", tree.model, "--data-dir", self._data.name, *flags]
        command += ["--random-weights"] if tree.model == MODEL else []
        variables = {"PYTHONPATH": path, "INSTANT_SECONDS": str(seconds or 0)}
        variables |= {"INSTANT_WAITS": waits} if waits else {}
        super().__init__(tree.name, command, variables, f"http://127.0.0.1:{admin}/readyz")

    def load(self, plan: argparse.Namespace, size: tuple[int, int], seconds: float) -> Load:
        """By ghz."""
        return ghz(plan, self.address, size, seconds)

    def front_ends(self) -> list[int]:
        """Processes that are front ends."""
        return [pid for pid in self.pids if Path(f"/proc/{pid}/comm").read_text().startswith("cdam-front")]

    def stop(self) -> None:
        """End it."""
        super().stop()
        self._data.cleanup()


class LitServe(Server):
    """LitServe whose predict answers zeros, a worker for each core."""

    def __init__(self) -> None:
        port = _free_port()
        workers = len(os.sched_getaffinity(0))
        command = [sys.executable, str(Path(__file__).with_name("litserve_peer.py")), "--zeros", "--port", str(port)]
        command += ["--model", MODEL, "--workers", str(workers), "--threads", "1"]
        self._url = f"http://127.0.0.1:{port}"
        super().__init__("LitServe", command, {}, f"{self._url}/health")

    def load(self, plan: argparse.Namespace, size: tuple[int, int], seconds: float) -> Load:
        """By hey."""
        image = base64.b64encode(photograph(size)).decode()
        with tempfile.TemporaryDirectory() as folder:
            body = Path(folder) / "body"
            body.write_text(json.dumps({"image": image, "class": 3}))
            command = [plan.hey, "-z", f"{seconds}s", "-c", str(CALLERS), "-m", "POST", "-T", "application/json"]
            command += ["-D", str(body), "-o", "csv", f"{self._url}/predict"]
            found = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        answers = list(csv.DictReader(io.StringIO(found)))
        took = [float(answer["response-time"]) for answer in answers if answer["status-code"] == "200"]
        p50, p99 = np.quantile(took, [0.5, 0.99])
        return Load(len(took), len(took) / seconds, float(p50), float(p99), len(answers) - len(took))


def _processor_seconds(pids: Sequence[int]) -> float:
    ticks = sum(int(_stat(str(pid))[11]) + int(_stat(str(pid))[12]) for pid in pids)
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: str) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# --- load


def photograph(size: tuple[int, int]) -> bytes:
    """A JPEG of a photograph's detail."""
    random = np.random.default_rng(0)
    width, height = size
    coarse, fine = (
        Image.fromarray(random.integers(0, 256, (height // step, width // step, 3), np.uint8)).resize(size)
        for step in (40, 4)
    )
    file = io.BytesIO()
    Image.blend(coarse, fine, 0.2).save(file, "JPEG", quality=90)
    return file.getvalue()


def explain_request(size: tuple[int, int], request_id: str = "") -> explain_pb2.ExplainRequest:
    """A request for one map."""
    target = target_pb2.Target(output=target_pb2.OutputTarget(index=3))
    image = common_pb2.Image(encoded=photograph(size))
    return explain_pb2.ExplainRequest(image=image, targets=[target], request_id=request_id)


@dataclass(frozen=True)
class Load:
    """What ghz found."""

    answers: int
    rate: float
    p50: float
    p99: float
    failed: int


def ghz(plan: argparse.Namespace, address: str, size: tuple[int, int], seconds: float) -> Load:
    """Closed-loop load of all callers."""
    with tempfile.TemporaryDirectory() as folder:
        message, protos = Path(folder) / "request", ROOT / "protos"
        message.write_bytes(explain_request(size).SerializeToString())
        command = [plan.ghz, "--insecure", "--proto", "cdam/v1/explainer_service.proto", "--import-paths", str(protos)]
        command += ["--call", EXPLAIN, "-B", str(message), "-c", str(CALLERS), "--connections", str(CONNECTIONS)]
        command += ["-z", f"{seconds}s", "--duration-stop", "wait", "-O", "json", address]
        found = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=folder).stdout)
    latencies = {item["percentage"]: item["latency"] / 1e9 for item in found["latencyDistribution"] or []}
    codes = found["statusCodeDistribution"]
    failed = sum(count for code, count in codes.items() if code != "OK")
    return Load(codes.get("OK", 0), found["rps"], latencies.get(50, 0.0), latencies.get(99, 0.0), failed)


async def stream(address: str, size: tuple[int, int], seconds: float) -> int:
    """Answers of four streams within so many seconds, as many items under way as the server takes."""
    request = explain_request(size)
    until = time.monotonic() + seconds

    async def items() -> AsyncIterator[bytes]:
        number = 0
        while time.monotonic() < until:
            request.request_id = str(number)
            yield explain_pb2.ExplainStreamRequest(request=request).SerializeToString()
            number += 1

    async def one() -> int:
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.stream_stream(f"/{EXPLAIN}Stream")(items())
            return sum([1 async for _ in call])

    return sum(await asyncio.gather(*(one() for _ in range(4))))


async def _echo(port: int) -> None:
    """A bare grpc.aio server that answers what an Explain answers."""
    answer = explain_pb2.ExplainResponse(
        model="m", maps=[explain_pb2.RelevanceMap(scores=common_pb2.FloatTensor(data=bytes(784)))]
    ).SerializeToString()

    async def reply(request: bytes, context: Any) -> bytes:
        return answer

    service = explainer_service_pb2.DESCRIPTOR.services_by_name["ExplainerService"].full_name
    server = grpc.aio.server()
    handlers = {"Explain": grpc.unary_unary_rpc_method_handler(reply)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


# --- scenarios


def instant(plan: argparse.Namespace, report: Report) -> None:
    """Answers a second."""
    makers: list[Callable[[], Server]] = [partial(Ours, tree) for tree in plan.trees]
    if plan.hey:
        makers.append(LitServe)
    servers: list[Server] = []
    with ExitStack() as stack:  # one that does not get ready leaves no other behind
        for make in makers:
            servers.append(make())
            stack.callback(servers[-1].stop)
        for server in servers:
            server.load(plan, SIZES["224 x 224"], 2)
            os.killpg(server.process.pid, signal.SIGSTOP)
        for name, size in SIZES.items():
            rounds: list[list[Load]] = []
            for _ in range(plan.rounds):
                found = []
                for server in servers:
                    with server.turn():
                        found.append(server.load(plan, size, plan.seconds))
                rounds.append(found)
            for position, server in enumerate(servers):
                its = [found[position] for found in rounds]
                report.add(f"instant, {name}, {server.name}", _median(load.rate for load in its), "answers/s")
                report.add(f"instant, {name}, {server.name}, p99", _median(load.p99 for load in its), "s")
                report.add(f"instant, {name}, {server.name}, failed", sum(load.failed for load in its), "")
                if position:
                    ratio = _median(found[0].rate / found[position].rate for found in rounds)
                    report.add(f"instant, {name}: after / {server.name}", ratio, "", _BARS[server.name])


def cost(plan: argparse.Namespace, report: Report) -> None:
    """Processor time a request."""
    size, port = SIZES["224 x 224"], _free_port()
    echo = subprocess.Popen([sys.executable, __file__, "--echo", str(port)])
    servers = [Ours(tree) for tree in plan.trees]
    # Half of the callers wait for it, the others are refused.
    full = Ours(plan.trees[0], "--max-pending", str(CALLERS // 2), "--max-batch-size", "4", seconds=1.0)
    config = DataConfig.from_timm(timm.create_model(MODEL, pretrained=False))
    photographs = {name: photograph(its) for name, its in SIZES.items()}
    found: dict[str, list[float]] = {}

    def measure(name: str, work: Callable[[], int], used: Callable[[], float]) -> None:
        before = used()
        answers = work()
        found.setdefault(name, []).append(1000 * (used() - before) / answers)

    def unary(address: str) -> int:
        return ghz(plan, address, size, plan.seconds).answers

    def refused(address: str) -> int:
        return ghz(plan, address, size, plan.seconds).failed

    def streamed(address: str) -> int:
        return asyncio.run(stream(address, size, plan.seconds))

    try:
        for server in servers:
            ghz(plan, server.address, size, 2)
        for _ in range(plan.rounds):
            measure("echo", partial(unary, f"127.0.0.1:{port}"), partial(_processor_seconds, [echo.pid]))
            for server in servers:
                name, used = server.name, server.processor_seconds
                measure(f"unary, {name}", partial(unary, server.address), used)
                measure(f"stream, {name}", partial(streamed, server.address), used)
            for shape, file in photographs.items():
                measure(f"Pillow, {shape}", partial(_prepare, file, config, 100), time.process_time)
            measure("refusal", partial(refused, full.address), full.processor_seconds)
    finally:
        echo.kill()
        for server in (*servers, full):
            server.stop()
    _tell_cost(found, report)


def _prepare(file: bytes, config: DataConfig, times: int) -> int:
    """Decode a photograph so many times, and bring it to the model's input, with Pillow alone, on one core."""
    for _ in range(times):
        prepare(Image.open(io.BytesIO(file)), config)
    return times


def _tell_cost(found: dict[str, list[float]], report: Report) -> None:
    for name, values in found.items():
        report.add(f"cost, {name}", _median(values), "ms/request")
    for one, other, bar in (
        ("unary, after", "echo", "<= 3"),
        ("stream, after", "unary, after", ""),
        ("unary, after", "unary, before", "<= 0.6"),
        ("stream, after", "unary, before", "<= 0.4"),
        ("Pillow, 224 x 224", "echo", ""),
        ("Pillow, 224 x 224", "unary, after", ""),
        ("refusal", "echo", ""),
    ):
        if other in found:
            ratio = _median(a / b for a, b in zip(found[one], found[other], strict=True))
            report.add(f"cost: {one} / {other}", ratio, "", bar)


def waits(plan: argparse.Namespace, report: Report) -> None:
    """How responsive front ends are."""
    with tempfile.TemporaryDirectory() as folder:
        server = Ours(plan.trees[0], waits=folder)
        try:
            files = [Path(folder) / str(pid) for pid in server.front_ends()]
            ghz(plan, server.address, SIZES["224 x 224"], 2)
            before = [len(file.read_text().splitlines()) for file in files]
            for name, size in SIZES.items():
                ghz(plan, server.address, size, plan.seconds)
                lines = [file.read_text().splitlines() for file in files]
                found = [float(line) for its, start in zip(lines, before, strict=True) for line in its[start:]]
                before = [len(its) for its in lines]
                report.add(f"waits, {name}: p99", float(np.quantile(found, 0.99)), "s")
                report.add(f"waits, {name}: longest", max(found), "s", "<= 0.02")
        finally:
            server.stop()


def devices(plan: argparse.Namespace, report: Report) -> None:
    """Two devices over one, that compute without a processor; tiny images of the demo's model, so that they are what limits."""
    flags = ("--max-batch-size", "8", "--compute-slots", "1")
    for seconds in (0.02, 0.08):
        rates = []
        for names in ("cpu", "cpu,cpu"):
            server = Ours(replace(plan.trees[0], model="demo"), "--device", names, *flags, seconds=seconds)
            try:
                ghz(plan, server.address, _TINY, 2)
                rates.append(ghz(plan, server.address, _TINY, plan.seconds).rate)
            finally:
                server.stop()
            report.add(f"devices, {seconds:g} s for a batch of 8: {names}", rates[-1], "answers/s")
        report.add(f"devices, {seconds:g} s for a batch of 8: two / one", rates[1] / rates[0], "", ">= 1.9")


def start(plan: argparse.Namespace, report: Report) -> None:
    """Start and memory of two front ends over one process."""
    ours = plan.trees[0]
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(plan.rounds):
        for name, flags in {"one process": ("--front-ends", "0"), "two front ends": ("--front-ends", "2")}.items():
            server = Ours(ours, *flags, seconds=None)
            try:
                ghz(plan, server.address, SIZES["224 x 224"], 2)
                found.setdefault(name, []).append((server.start_seconds, server.memory()))
            finally:
                server.stop()
    for name, values in found.items():
        report.add(f"start, {name}", _median(seconds for seconds, _ in values), "s")
        report.add(f"memory, {name}", _median(memory for _, memory in values), "MB")
    more = _median(b - a for (_, a), (_, b) in zip(*found.values(), strict=True))
    report.add("memory: two front ends more than one process", more, "MB", "<= 250")


def kill(plan: argparse.Namespace, report: Report) -> None:
    """A front end dies every 3 s for 60 s."""
    server = Ours(plan.trees[0], "--front-ends", "2")
    failed: list[str] = []
    maps: set[bytes] = set()
    calls = 0
    stop = threading.Event()
    image = photograph(SIZES["224 x 224"])

    def call() -> None:
        nonlocal calls
        with cdam.Client(server.address) as client:
            while not stop.is_set():
                try:
                    maps.add(client.explain(image, targets=[3]).maps[0].scores.tobytes())
                    calls += 1
                except cdam.RpcError as error:
                    failed.append(repr(error))

    callers = [threading.Thread(target=call) for _ in range(8)]
    try:
        for caller in callers:
            caller.start()
        killed = 0
        until = time.monotonic() + plan.kill_seconds
        while time.monotonic() < until:
            time.sleep(3)
            its = server.front_ends()
            os.kill(its[killed % len(its)], signal.SIGKILL)
            killed += 1
        stop.set()
        for caller in callers:
            caller.join()
    finally:
        server.stop()
    report.add("kill: front ends killed", killed, "")
    report.add("kill: calls", calls, "")
    report.add("kill: failed calls", len(failed), "", "0")
    report.add("kill: different maps of one image", len(maps), "", "1")
    for error in sorted(set(failed))[:5]:
        print("   ", error)


SCENARIOS: Final = {"instant": instant, "cost": cost, "waits": waits, "devices": devices, "start": start, "kill": kill}


def _median(values: Any) -> float:
    return statistics.median(list(values))


def _arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ghz", default="ghz", help="the load generator")
    parser.add_argument("--hey", help="the load generator for LitServe")
    parser.add_argument("--before", type=Path, help="a worktree to compare with")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kill-seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "front_ends.json")
    parser.add_argument("--echo", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main() -> None:
    """Measure all that was asked for."""
    plan = _arguments()
    if plan.echo:
        asyncio.run(_echo(plan.echo))
    for tool in filter(None, (plan.ghz, plan.hey)):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing; --help says how to get it")
    plan.trees = [Tree("after", ROOT)] + ([Tree("before", plan.before)] if plan.before else [])
    report = Report(plan.json, {**machine(torch.device("cpu")), "seconds": plan.seconds, "rounds": plan.rounds})
    for name in plan.scenarios:
        SCENARIOS[name](plan, report)
    print(f"\nwrote {plan.json}")


if __name__ == "__main__":
    main()
