"""What the service makes of the engine, and how it stands trouble, beside bars and a peer.

    python tests/benchmarks/service.py [--scenarios engine litserve ...] [--seconds 20] [--rounds 5] [--model NAME]

engine    throughput with 32 callers / what the engine alone does with batches of the size that the server forms
litserve  the same load on LitServe with captum (`litserve_peer`), in float32 and with our trunk in bfloat16
demo      the demo model and 64 callers, beside the same peer
overload  4 times as many requests as the server can do, each with a deadline of a second
flood     a caller who asks once a second, while another keeps 64 requests in flight
heavy     a caller who asks for one CDAM after the other, while another has all tokens ablated without pause

Every server runs in processes of its own, on all cores, with random weights (the demo's are trained) and without a
token cache. All get the same images from the same load generator in this process. Servers that are compared take
turns, so that a noisy machine is noisy for all, and a ratio is the median over rounds of (ours / theirs of the same
round); those that wait for their turn are stopped, as an idle LitServe polls its queue. Maps are compared before
anything is measured. Prints a table and keeps results/service.json in step; exits 0 whatever the figures are.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import importlib.util
import io
import json
import math
import multiprocessing
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Final, NoReturn

import aiohttp
import grpc.aio
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from subject import DEMO, load, machine

from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2, method_pb2, target_pb2
from cdam_cli.load import OK, Call, ClosedLoop, Load, OpenLoop, generate
from cdam_engine import Cdam
from cdam_server.demo.scenes import draw_scene

OURS: Final = "cdam-serve"
PEER: Final = "LitServe"
CALLERS: Final = 32
DEMO_CALLERS: Final = 64
FLOOD_CALLERS: Final = 64
TIMES_CAPACITY: Final = 4
DEADLINE: Final = 1.0  # seconds, of each request of an overload
REFUSED: Final = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")

_IMAGES: Final = 128  # more than any batch, so that no batch holds one twice
_PHOTO: Final = (480, 360)
_CONNECTIONS: Final = 16  # the kernel deals them to the front ends; of a few all might go to one
_IDENTITIES: Final = 8  # of the callers of an overload
_AFTER_REFUSAL: Final = 0.05  # seconds; without a pause the flood would be of refusals, and mostly our own work
_EXPLAIN: Final = f"/{explainer_service_pb2.DESCRIPTOR.services_by_name['ExplainerService'].full_name}/Explain"
_PEER_FILE: Final = Path(__file__).with_name("litserve_peer.py")
_START_SECONDS: Final = 180


# --- what is asked


@cache
def images(model: str) -> list[bytes]:
    """Encoded images: the demo's scenes as PNG, for other models JPEGs of a common photo's size and detail."""
    random = np.random.default_rng(0)
    return [_encode(_scene(number) if model == DEMO else _photo(random), model) for number in range(_IMAGES)]


def _scene(number: int) -> Image.Image:
    return Image.fromarray(draw_scene("test", seed=number, digits=1 + number % 3).image)


def _photo(random: np.random.Generator) -> Image.Image:
    coarse, fine = (
        Image.fromarray(random.integers(0, 256, (_PHOTO[1] // step, _PHOTO[0] // step, 3), np.uint8)).resize(_PHOTO)
        for step in (40, 4)
    )
    return Image.blend(coarse, fine, 0.2)


def _encode(image: Image.Image, model: str) -> bytes:
    file = io.BytesIO()
    image.save(file, *(["PNG"] if model == DEMO else ["JPEG"]), quality=90)
    return file.getvalue()


def _class(number: int) -> int:
    return number % 10


# --- who is asked


class Server:
    """A server in processes of its own.

    Args:
        name: For the table.
        model: What it serves.
        command: Starts it.
        ready: URL that answers 200 once it serves.
    """

    def __init__(self, name: str, model: str, command: Sequence[str], ready: str) -> None:
        self.name, self.model, self._ready = name, model, ready
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )

    async def wait_until_ready(self) -> None:
        """Wait for the probe."""
        until = monotonic() + _START_SECONDS
        async with aiohttp.ClientSession() as session:
            while monotonic() < until:
                if self._process.poll() is not None:
                    self._fail("ended")
                try:
                    async with session.get(self._ready) as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
        self._fail("did not get ready")

    def _fail(self, what: str) -> NoReturn:
        self._log.seek(0)
        raise SystemExit(f"{self.name} {what}:\n{self._log.read().decode(errors='replace')[-4000:]}")

    def memory(self) -> int:
        """Bytes that all its processes have in memory; what several share counts once."""
        kilobytes = 0
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                if os.getpgid(int(process.name)) == self._process.pid:
                    lines = (process / "smaps_rollup").read_text().splitlines()
                    kilobytes += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return 1024 * kilobytes

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """All of its processes stand still, except in `turn`."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """They run."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def stop(self) -> None:
        """End it; kill what doesn't."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


class Ours(Server):
    """`cdam serve`."""

    def __init__(self, plan: Plan, model: str, precision: str) -> None:
        api, admin = _free_port(), _free_port()
        self._address = f"127.0.0.1:{api}"
        command = [sys.executable, "-m", "cdam_cli", "serve", "--log-format", "json"]
        command += ["--address", self._address, "--admin-address", f"127.0.0.1:{admin}", "--token-cache-mib", "0"]
        command += ["--model", model, "--precision", precision, *plan.flags]
        if model != DEMO:
            command.append("--random-weights")
        name = OURS if precision == "fp32" else f"{OURS}, {precision}"
        super().__init__(name, model, command, f"http://127.0.0.1:{admin}/readyz")

    @asynccontextmanager
    async def calls(
        self, *tokens: str, method: str = "cdam", deadline: float | None = None
    ) -> AsyncIterator[GrpcCalls]:
        """Calls over new connections, in turn: each goes to one of the front ends.

        Args:
            *tokens: Who calls, in turn; none: nobody in particular.
            method: What is asked for.
            deadline: Of each, in seconds from its beginning.
        """
        how = method_pb2.Method()
        getattr(how, method).SetInParent()
        requests = [
            explain_pb2.ExplainRequest(
                image=common_pb2.Image(encoded=image),
                targets=[target_pb2.Target(output=target_pb2.OutputTarget(index=_class(number)))],
                methods=[how],
            ).SerializeToString()
            for number, image in enumerate(images(self.model))
        ]
        metadata: list[Any] = [(("authorization", f"Bearer {token}"),) for token in tokens] or [()]
        async with AsyncExitStack() as stack:
            explain = []
            for _ in range(_CONNECTIONS):
                channel = grpc.aio.insecure_channel(self._address, [("grpc.use_local_subchannel_pool", 1)])
                explain.append((await stack.enter_async_context(channel)).unary_unary(_EXPLAIN))
            yield GrpcCalls(explain, requests, metadata, deadline)


class GrpcCalls:
    """Calls of a `cdam serve`; bytes go out and come in, so that little is done here while it is measured.

    Attributes:
        codes: How often each was returned.
    """

    def __init__(
        self, explain: Sequence[Any], requests: Sequence[bytes], metadata: Sequence[Any], deadline: float | None
    ) -> None:
        self._explain, self._requests, self._metadata, self._deadline = explain, requests, metadata, deadline
        self._answers: dict[int, bytes] = {}
        self.codes: Counter[str] = Counter()

    async def __call__(self, number: int) -> str:
        """Make the request of this number."""
        request, metadata = self._requests[number % _IMAGES], self._metadata[number % len(self._metadata)]
        explain = self._explain[number % len(self._explain)]
        try:
            self._answers[number] = await explain(request, metadata=metadata, timeout=self._deadline)
        except grpc.aio.AioRpcError as error:
            code: str = error.code().name
        else:
            code = OK
        self.codes[code] += 1
        return code

    def scores(self, number: int) -> NDArray[np.float32]:
        """The map of an answer."""
        answer = explain_pb2.ExplainResponse.FromString(self._answers[number])
        return np.frombuffer(answer.maps[0].scores.data, "<f4")

    def batch_size(self, measured: Load) -> float:
        """Mean size of the batches: each answer is one of so many that share one."""
        numbers = measured.numbers[measured.in_window & (measured.codes == OK)].tolist()
        answers = (explain_pb2.ExplainResponse.FromString(self._answers[number]) for number in numbers)
        return statistics.harmonic_mean([answer.timing.batch_size for answer in answers])


class LitServe(Server):
    """`litserve_peer`, its threads as many as there are cores for each worker."""

    def __init__(self, plan: Plan, model: str, workers: int) -> None:
        port = _free_port()
        self._base = f"http://127.0.0.1:{port}"
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        command = [sys.executable, str(_PEER_FILE), "--model", model, "--port", str(port)]
        command += ["--workers", str(workers), "--threads", str(threads)]
        command += ["--max-batch-size", str(plan.peer_batch), "--batch-timeout", str(plan.peer_batch_timeout)]
        name = f"{PEER}, {workers} worker{'s' * (workers > 1)}"
        super().__init__(name, model, command, f"{self._base}/health")

    @asynccontextmanager
    async def calls(self) -> AsyncIterator[HttpCalls]:
        """Calls over new connections, which are kept."""
        requests = [
            json.dumps({"image": base64.b64encode(image).decode(), "class": _class(number)}).encode()
            for number, image in enumerate(images(self.model))
        ]
        async with aiohttp.ClientSession(
            self._base,
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Content-Type": "application/json"},
        ) as session:
            yield HttpCalls(session, requests)


class HttpCalls:
    """Calls of a `litserve_peer`."""

    def __init__(self, session: aiohttp.ClientSession, requests: Sequence[bytes]) -> None:
        self._session, self._requests = session, requests
        self._answers: dict[int, bytes] = {}

    async def __call__(self, number: int) -> str:
        """Make the request of this number."""
        async with self._session.post("/predict", data=self._requests[number % _IMAGES]) as answer:
            self._answers[number] = await answer.read()
            return OK if answer.status == 200 else f"HTTP {answer.status}"

    def scores(self, number: int) -> NDArray[np.float32]:
        """The map of an answer."""
        return np.frombuffer(base64.b64decode(json.loads(self._answers[number])["scores"]), "<f4")


class Engine:
    """The engine without a service, in a process of its own, fed with pixels."""

    def __init__(self, model: str, precision: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run_engine, args=(theirs, model, precision), daemon=True)
        self._process.start()
        theirs.close()

    async def throughput(self, batch: int, seconds: float, warm_up: float) -> float:
        """Images a second in batches of this size."""
        self._pipe.send((batch, warm_up, seconds))
        return float(await asyncio.to_thread(self._pipe.recv))

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.join()


def _run_engine(pipe: Connection, model: str, precision: str) -> None:
    subject = load(model, _IMAGES, torch.device("cpu"), precision)
    explainer = subject.explainer()
    while True:
        batch, warm_up, seconds = pipe.recv()
        given = subject.pixels[:batch], subject.targets[:batch], [[Cdam()]] * batch
        for lasting in (warm_up, seconds):
            started, took, done = perf_counter(), 0.0, 0
            while not done or took < lasting:
                explainer.explain(*given)
                done += batch
                took = perf_counter() - started
        pipe.send(done / took)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as item:
        return int(item.getsockname()[1])


@asynccontextmanager
async def serving(*servers: Server) -> AsyncIterator[None]:
    """All are ready; ended afterwards."""
    try:
        for server in servers:
            await server.wait_until_ready()
        yield
    finally:
        for server in servers:
            server.stop()


# --- how it is measured


@dataclass(frozen=True)
class Plan:
    """What the command line says; see there."""

    model: str
    seconds: float
    warm_up: float
    rounds: int
    overload_seconds: float
    samples: int
    precision: str
    peer_workers: tuple[int, ...]
    peer_batch: int
    peer_batch_timeout: float
    flags: tuple[str, ...]


Loads = Mapping[str, Sequence[Load]]
"""Of each server, by name, the load of each round."""


async def check_maps(servers: Sequence[Ours | LitServe]) -> dict[str, float]:
    """Ask all for the same map; each one's correlation with the first's.

    Raises:
        SystemExit: They differ.
    """
    maps = {}
    for server in servers:
        async with server.calls() as call:
            if (code := await call(0)) != OK:
                raise SystemExit(f"{server.name} answers {code}")
            maps[server.name] = call.scores(0)
    first = servers[0].name
    found = {name: float(np.corrcoef(maps[first], its)[0, 1]) for name, its in maps.items()}
    for name, correlation in found.items():
        less = any(precision in first + name for precision in ("bf16", "auto"))
        if not correlation > (0.999 if less else 0.9999):
            raise SystemExit(f"{name} has another map than {first}: their correlation is {correlation:.6f}")
    return found


async def take_turns(plan: Plan, callers: int, servers: Sequence[Ours | LitServe]) -> Loads:
    """The same closed loop on each server in every round; who begins changes from round to round."""
    loads: dict[str, list[Load]] = {server.name: [] for server in servers}
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(server.stopped())
        for turn in range(plan.rounds):
            start = turn % len(servers)
            for server in [*servers[start:], *servers[:start]]:
                with server.turn():
                    async with server.calls() as call:
                        loads[server.name].append(await closed_loop(plan, call, callers))
    return loads


async def closed_loop(plan: Plan, call: Call, callers: int) -> Load:
    """So many callers for as long as the plan says."""
    return await generate(call, ClosedLoop(callers), seconds=plan.seconds, warm_up_seconds=plan.warm_up)


async def one_by_one(call: Call, requests: int, interval: float = 0.0) -> list[float]:
    """Latencies of one request after the other, begun no more often than the interval says; infinite if refused."""
    latencies = []
    for number in range(requests):
        started = perf_counter()
        code = await call(number)
        took = perf_counter() - started
        latencies.append(took if code == OK else math.inf)
        await asyncio.sleep(max(0.0, interval - took))
    return latencies


@asynccontextmanager
async def busy(call: Call, callers: int, settle: float) -> AsyncIterator[None]:
    """Callers who ask again and again, from `settle` seconds before the block to its end; their last answers are awaited."""
    numbers = count()  # one for all: equal questions in a batch are answered once
    over = False

    async def again() -> None:
        while not over:
            if await call(next(numbers)) != OK:
                await asyncio.sleep(_AFTER_REFUSAL)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(again())
        await asyncio.sleep(settle)
        try:
            yield
        finally:
            over = True


def quantile(latencies: Sequence[float] | NDArray[np.float64], q: float) -> float:
    """The q-quantile, one of the values: some may be infinite."""
    return float(np.quantile(latencies, q, method="higher")) if len(latencies) else math.nan


def pooled(loads: Sequence[Load], q: float) -> float:
    """The q-quantile of the latencies of all rounds."""
    return quantile(np.concatenate([load.latencies for load in loads]), q)


# --- what is told


@dataclass(frozen=True)
class Bar:
    """What must be reached.

    Attributes:
        limit: The limit itself reaches it.
        at_least: Whether higher is better.
        unit: For the table.
    """

    limit: float
    at_least: bool = False
    unit: str = ""

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{self.unit}"

    def met(self, value: float) -> bool:
        """Whether a value reaches it."""
        return value >= self.limit if self.at_least else value <= self.limit


class Report:
    """Prints a table line by line and keeps a JSON file in step with it.

    Args:
        about: What it is measured on and with.
        out: Where the JSON goes.
    """

    def __init__(self, about: Mapping[str, object], out: Path) -> None:
        self._about, self._out = dict(about), out
        self._rows: list[dict[str, object]] = []
        print(", ".join(f"{key} {value}" for key, value in about.items()), "\n")
        print("| scenario | model | what | measured | must reach | met | behind it |")
        print("|---|---|---|---|---|---|---|")

    def add(
        self,
        scenario: str,
        model: str,
        what: str,
        value: float | Sequence[float],
        bar: Bar,
        behind: str,
        details: Mapping[str, object],
    ) -> None:
        """A row; of several values, one a round, the median counts and the extremes are told, too; NaN: there is none."""
        values = [value] if isinstance(value, float) else list(value)
        middle = statistics.median(values)
        told = _number(middle) + bar.unit
        if len(values) > 1:
            told += f" ({_number(min(values))} to {_number(max(values))})"
        met = None if math.isnan(middle) else bar.met(middle)
        word = {True: "yes", False: "no", None: "-"}[met]
        print(f"| {scenario} | {model} | {what} | {told} | {bar} | {word} | {behind} |", flush=True)
        row = {"scenario": scenario, "model": model, "what": what, "value": middle, "values": values}
        self._rows.append(_finite({**row, "bar": str(bar), "met": met, "behind": behind, **details}))
        self._out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": self._about, "rows": self._rows}, indent=2, allow_nan=False)
        self._out.write_text(text + "\n")


def _finite(value: Any) -> Any:
    """JSON knows no infinity: None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _in_words(name: str, loads: Sequence[Load]) -> str:
    middle = statistics.median(load.throughput for load in loads)
    p50, p99 = (_time(pooled(loads, q)) for q in (0.5, 0.99))
    return f"{name} {_number(middle)}/s, p50 {p50}, p99 {p99}{_failures(loads)}"


def _failures(loads: Sequence[Load]) -> str:
    counts = sum((Counter(load.counts) for load in loads), Counter[str]())
    counts.pop(OK, None)
    return "".join(f", {number} {code}" for code, number in counts.items())


def _rounds(loads: Loads) -> dict[str, object]:
    return {"rounds": {name: [load.to_json() for load in its] for name, its in loads.items()}}


# --- scenarios


async def engine(plan: Plan, report: Report) -> None:
    """Throughput of the service / of the engine alone, in turns."""
    server, alone = Ours(plan, plan.model, plan.precision), Engine(plan.model, plan.precision)
    loads: list[Load] = []
    rates: list[float] = []
    batches: list[float] = []
    try:
        async with serving(server):
            await alone.throughput(1, 0, 0)  # until it is there
            for turn in range(plan.rounds):
                if turn % 2:
                    rates.append(await alone.throughput(round(batches[-1]), plan.seconds, plan.warm_up))
                async with server.calls() as call:
                    loads.append(await closed_loop(plan, call, CALLERS))
                    batches.append(call.batch_size(loads[-1]))
                if not turn % 2:
                    rates.append(await alone.throughput(round(batches[-1]), plan.seconds, plan.warm_up))
    finally:
        alone.stop()
    middle = f"{_number(statistics.median(rates))}/s in batches of {_number(statistics.median(batches))}"
    report.add(
        "engine",
        plan.model,
        f"throughput, {CALLERS} callers / the engine's",
        [load.throughput / rate for load, rate in zip(loads, rates, strict=True)],
        Bar(0.95, at_least=True),
        f"{_in_words(server.name, loads)}; engine {middle}",
        {"engine": rates, "batches": batches, **_rounds({server.name: loads})},
    )


async def litserve(plan: Plan, report: Report) -> None:
    """A common model, also with the trunk in bfloat16."""
    bars = {"fp32": Bar(1.1, at_least=True), "bf16": Bar(2.5, at_least=True)}
    await _beside_litserve(plan, report, "litserve", plan.model, CALLERS, bars)


async def demo(plan: Plan, report: Report) -> None:
    """The small model, where all that is not compute weighs more."""
    bars = {plan.precision: Bar(1.5, at_least=True)}
    await _beside_litserve(plan, report, "demo", DEMO, DEMO_CALLERS, bars)


async def _beside_litserve(
    plan: Plan, report: Report, scenario: str, model: str, callers: int, bars: Mapping[str, Bar]
) -> None:
    """The service in each precision that has a bar beside the peer; of several peers the fastest counts."""
    ours = {precision: Ours(plan, model, precision) for precision in bars}
    peers = [LitServe(plan, model, workers) for workers in plan.peer_workers]
    servers: list[Ours | LitServe] = [*ours.values(), *peers]
    async with serving(*servers):
        correlations = await check_maps(servers)
        loads = await take_turns(plan, callers, servers)
    fastest = max(
        (peer.name for peer in peers),
        key=lambda name: statistics.median(load.throughput for load in loads[name]),
    )
    behind = "; ".join(_in_words(name, its) for name, its in loads.items())
    details = {"correlations": correlations, **_rounds(loads)}
    for precision, bar in bars.items():
        mine, theirs = loads[ours[precision].name], loads[fastest]
        ratios = [a.throughput / b.throughput for a, b in zip(mine, theirs, strict=True)]
        what = f"{callers} callers, {precision}"
        report.add(scenario, model, f"throughput, {what} / {fastest}", ratios, bar, behind, details)
        p99 = pooled(mine, 0.99) / pooled(theirs, 0.99)
        behind, details = "as above", {}
        report.add(scenario, model, f"p99, {what} / {fastest}", p99, Bar(1), behind, details)


async def overload(plan: Plan, report: Report) -> None:
    """More than the server can do: what it still does, whom it lets wait, how fast it says no."""
    for model in dict.fromkeys((plan.model, DEMO)):
        server = Ours(plan, model, plan.precision)
        async with serving(server):
            async with server.calls() as call:
                before = await closed_loop(plan, call, CALLERS)
            memory = [server.memory()]
            async with server.calls(*_identities(), deadline=DEADLINE) as call:
                load = await generate(
                    call,
                    OpenLoop(TIMES_CAPACITY * before.throughput),
                    seconds=plan.overload_seconds,
                    warm_up_seconds=plan.warm_up,
                )
            memory.append(server.memory())
            async with server.calls() as call:
                after = await closed_loop(plan, call, CALLERS)
        _tell_overload(report, model, load, [before, after], memory, goal=0.9 if model == DEMO else 0.93)


def _identities() -> list[str]:
    return [f"caller-{number}" for number in range(_IDENTITIES)]


def _tell_overload(
    report: Report, model: str, load: Load, peaks: Sequence[Load], memory: Sequence[int], *, goal: float
) -> None:
    refused = load.in_window & np.isin(load.codes, REFUSED)
    took = load.ended - load.begun  # as the deadline counts; how late the generator itself was is told beside it
    admitted = load.in_window & ~refused
    late = admitted & (load.codes != OK)
    share = 100 * late.sum() / max(admitted.sum(), 1)
    p99 = _time(quantile(took[admitted & ~late], 0.99))
    peak = statistics.mean(each.throughput for each in peaks)
    start, end = (size / 2**20 for size in memory)
    counts = ", ".join(f"{number} {code}" for code, number in load.counts.items())
    sent = f"sent late by p99 {_time(quantile(load.late, 0.99))}"
    offered = f"{_number(load.requests / load.seconds)}/s for {load.seconds:g} s ({sent}): {counts}"
    details = {"load": load.to_json(), "peaks": [each.to_json() for each in peaks], "memory": list(memory)}
    for what, value, bar, behind in (
        (
            "goodput / peak",
            load.throughput / peak,
            Bar(goal, at_least=True),
            f"{_number(load.throughput)}/s, peak {_number(peak)}/s; offered {offered}",
        ),
        (
            "let in and not answered in time",
            float(share),
            Bar(1, unit=" %"),
            f"{late.sum()} of {admitted.sum()}; p99 of the others {p99}",
        ),
        ("p99 of refusals", quantile(took[refused], 0.99), Bar(0.1, unit=" s"), f"{refused.sum()} requests"),
        ("memory, end / start", end / start, Bar(1.1), f"{start:.0f} MiB, {end:.0f} MiB"),
    ):
        report.add("overload", model, what, value, bar, behind, details)
        details = {}


async def flood(plan: Plan, report: Report) -> None:
    """A quiet caller beside one who floods."""
    await _beside_trouble(plan, report, "flood", f"{FLOOD_CALLERS} in flight", "cdam", FLOOD_CALLERS, interval=1.0)


async def heavy(plan: Plan, report: Report) -> None:
    """A caller of cheap things beside one of dear ones."""
    await _beside_trouble(plan, report, "heavy", "token ablation", "token_ablation", 1, interval=0.0)


async def _beside_trouble(
    plan: Plan, report: Report, scenario: str, trouble: str, method: str, callers: int, *, interval: float
) -> None:
    """One caller's latencies, by turns alone and beside another."""
    server = Ours(plan, plan.model, plan.precision)
    requests = math.ceil(plan.samples / plan.rounds)
    alone: list[float] = []
    beside: list[float] = []
    async with (
        serving(server),
        server.calls("quiet") as quiet,
        server.calls("trouble", method=method) as other,
    ):
        for _ in range(plan.rounds):
            alone += await one_by_one(quiet, requests, interval)
            async with busy(other, callers, plan.warm_up):
                beside += await one_by_one(quiet, requests, interval)
    (p50, p99), (p50_beside, p99_beside) = ([quantile(its, q) for q in (0.5, 0.99)] for its in (alone, beside))
    counts = ", ".join(f"{number} {code}" for code, number in other.codes.most_common()) or "none answered"
    report.add(
        scenario,
        plan.model,
        f"p99 beside {trouble} / alone",
        p99_beside / p99,
        Bar(1.5),
        f"alone p50 {_time(p50)}, p99 {_time(p99)}; beside p50 {_time(p50_beside)}, p99 {_time(p99_beside)}; "
        f"{len(beside)} requests; the other's: {counts}",
        {"alone": alone, "beside": beside, "other": dict(other.codes)},
    )


SCENARIOS: Final = {each.__name__: each for each in (engine, litserve, demo, overload, flood, heavy)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--model", default="vit_small_patch16_224", help=f'name in timm, or "{DEMO}"')
    parser.add_argument("--seconds", type=float, default=20, help="of a closed loop, in each round")
    parser.add_argument("--warm-up", type=float, default=4, help="seconds before that, under the same load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--samples", type=int, default=40, help="of flood and heavy: requests alone, and beside")
    parser.add_argument("--precision", choices=["fp32", "bf16", "auto"], default="fp32", help="litserve: both")
    parser.add_argument("--peer-workers", nargs="+", type=int, default=[1, 2], help="LitServe's, a peer for each")
    parser.add_argument("--peer-batch", type=int, default=16, help="LitServe's max_batch_size")
    parser.add_argument("--peer-batch-timeout", type=float, default=0.01, help="LitServe's batch_timeout, in seconds")
    parser.add_argument("--flags", type=shlex.split, default=[], help='more flags of `cdam serve`, as "--flag value"')
    parser.add_argument("--json", type=Path, default=Path("results/service.json"))
    return parser.parse_args()


async def _measure(plan: Plan, scenarios: Sequence[str], report: Report) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # so that no server is left behind
    for name in scenarios:
        await SCENARIOS[name](plan, report)


def main() -> None:
    """Measure all that was asked for."""
    given = vars(_arguments())
    scenarios, out = given.pop("scenarios"), given.pop("json")
    peers = {"litserve", "demo"}.intersection(scenarios)
    if peers and importlib.util.find_spec("litserve") is None:
        raise SystemExit(f"litserve is missing, for {' and '.join(sorted(peers))}: it is in the extra `dev`")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    plan = Plan(**values)
    about = {**machine(torch.device("cpu")), "litserve": version("litserve") if peers else "-"}
    asyncio.run(_measure(plan, scenarios, Report({**about, **dataclasses.asdict(plan)}, out)))
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
