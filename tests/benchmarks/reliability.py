"""What the service promises about trouble, at full size; the tests in tests/faults prove the same in small.

    PYTHONPATH=tests python tests/benchmarks/reliability.py [--scenarios cancel sigterm concepts ...] [--rounds 50]

cancel   calls that are given up at random moments (--calls): nothing of them stays behind
sigterm  SIGTERM under load, again and again (--rounds): no call that was let in is lost
concepts SIGKILL while concepts are registered, again and again (--kills), with SQLite and with PostgreSQL: none is lost;
         and how soon a second server notices a new version
soak     a mixture of everything for a while (--minutes): memory, threads and files do not grow
loop     the event loop under 64 callers (--seconds): how late a heartbeat of 1 ms is, and how long callbacks take
faults   an engine that fails: seconds until the next call is answered, or until the process has ended

Servers of the demo model in processes of their own; for `loop` the server is in this process and its callers are not.
Linux only. Prints a table and keeps results/reliability.json in step; exits 0 whatever the figures are.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import torch
from subject import machine

from calls import method
from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2_grpc
from cdam_server.bootstrap import Application
from cdam_server.compute.catalog import load_catalog
from cdam_server.operation import logs
from cdam_server.settings.config import Settings
from faults.callers import Innocents, call_and_leave, noise, raw_request, settle
from faults.faulty_server import Fault, marked
from faults.registrars import kill_writing_servers, seconds_until_noticed
from postgres import postgres_server
from processes import ServerProcess, Usage, serving

LONGEST_CALLBACK: Final = 0.020  # seconds; the bar
LOOP_CALLERS: Final = 64
SIGTERM_CALLERS: Final = 16
SOAK_CALLERS: Final = 12
FAULTY: Final = (sys.executable, str(Path(__file__).parents[1] / "faults" / "faulty_server.py"))
REFUSED: Final = "RESOURCE_EXHAUSTED"

_SAMPLE_SECONDS: Final = 5.0
_ABLATION_SECONDS: Final = 20.0  # between two
_STREAM_ITEMS: Final = 100
_NEWS: Final = 50  # new versions
_TICK: Final = 0.001
_IMAGES: Final = [noise(seed) for seed in range(256)]

Stub = explainer_service_pb2_grpc.ExplainerServiceStub


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        scenario: Which one.
        what: What was measured.
        value: The figure.
        bar: What it must be, or "".
        met: Whether it is; None without a bar.
    """

    scenario: str
    what: str
    value: str
    bar: str = ""
    met: bool | None = None


@contextmanager
def _server(*flags: str, **options: Any) -> Iterator[ServerProcess]:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "log", *flags, **options) as server:
        yield server


# --- cancel


def cancel(arguments: argparse.Namespace) -> Iterator[Row]:
    """Calls that are given up."""
    with _server("--token-cache-mib", "0") as server:
        asyncio.run(call_and_leave(server.address, 500))
        earlier, before = settle(server), server.usage()
        started = time.monotonic()
        asyncio.run(call_and_leave(server.address, arguments.calls))
        seconds = time.monotonic() - started
        later, after = settle(server), server.usage()
    grown = {name: value - earlier.get(name, 0) for name, value in later.items()}
    answered = grown.get('grpc_server_handled_total{code="OK",method="Explain"}', 0.0)
    dropped = grown.get('cdam_dropped_total{reason="cancelled"}', 0.0)
    unaccounted = grown["cdam_admitted_total"] - answered - dropped
    pending = later["cdam_pending_requests"]
    yield Row("cancel", "calls, in seconds", f"{arguments.calls}, {seconds:.0f}")
    yield Row("cancel", "answered before they were given up, withdrawn", f"{answered:.0f}, {dropped:.0f}")
    yield Row("cancel", "let in, neither answered nor withdrawn", f"{unaccounted:.0f}", "0", unaccounted == 0)
    yield Row("cancel", "pending afterwards", f"{pending:.0f}", "0", pending == 0)
    yield Row("cancel", "growth of memory", f"{after.mib - before.mib:+.1f} MiB")
    for name in ("threads", "files"):
        growth = getattr(after, name) - getattr(before, name)
        yield Row("cancel", f"growth of {name}", f"{growth:+d}", "< 8", growth < 8)


# --- sigterm


@dataclass
class _Round:
    """One SIGTERM: ids of the calls that were answered, other codes, the server's side of it, and the drain."""

    received: set[str]
    codes: Counter[str]
    answered: set[str]
    logged: Counter[str]
    exit_code: int
    seconds: float

    @property
    def lost(self) -> int:
        return len(self.answered - self.received)


async def _sigterm(server: ServerProcess, after: float) -> _Round:
    received: set[str] = set()
    codes: Counter[str] = Counter()
    numbers = itertools.count()

    async def ask(stub: Stub) -> None:
        code = "OK"
        while code == "OK":
            name = f"call-{next(numbers)}"
            call = stub.Explain(raw_request(random.choice(_IMAGES), request_id=name), timeout=60)
            code = (await call.code()).name
            codes[code] += 1
            if code == "OK":
                received.add(name)

    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = Stub(channel)
        callers = [asyncio.create_task(ask(stub)) for _ in range(SIGTERM_CALLERS)]
        await asyncio.sleep(after)
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        exit_code = await asyncio.to_thread(server.process.wait, 60)
        seconds = time.monotonic() - started
        await asyncio.gather(*callers)
    lines = [line for line in server.log_lines() if line["event"] == "rpc"]
    answered = {str(line["request_id"]) for line in lines if line["code"] == "OK"}
    return _Round(received, codes, answered, Counter(str(line["code"]) for line in lines), exit_code, seconds)


def sigterm(arguments: argparse.Namespace) -> Iterator[Row]:
    """SIGTERM under load."""
    draw = random.Random(0)
    rounds = []
    for number in range(arguments.rounds):
        with _server("--token-cache-mib", "0") as server:
            rounds.append(asyncio.run(_sigterm(server, draw.uniform(0.5, 1.5))))
        print(f"sigterm {number + 1}/{arguments.rounds}: {dict(rounds[-1].codes)}", file=sys.stderr)
    codes = sum((its.codes for its in rounds), Counter[str]())
    logged = sum((its.logged for its in rounds), Counter[str]())
    lost = sum(its.lost for its in rounds)
    exits = Counter(its.exit_code for its in rounds)
    drains = [its.seconds for its in rounds]
    yield Row("sigterm", "rounds", str(len(rounds)))
    yield Row("sigterm", "what callers were told", _counts(codes))
    yield Row("sigterm", "what the log says", _counts(logged), "OK, UNAVAILABLE", set(logged) <= {"OK", "UNAVAILABLE"})
    yield Row("sigterm", "calls answered and not received", str(lost), "0", lost == 0)
    yield Row("sigterm", "exit codes", _counts(exits), "0", set(exits) == {0})
    yield Row(
        "sigterm", "from SIGTERM to exit, median and longest", f"{statistics.median(drains):.2f} s, {max(drains):.2f} s"
    )


# --- concepts


def concepts(arguments: argparse.Namespace) -> Iterator[Row]:
    """SIGKILL under registrations."""
    with ExitStack() as stack:
        stores = {"SQLite": ("--data-dir", stack.enter_context(tempfile.TemporaryDirectory()))}
        try:
            postgres = stack.enter_context(postgres_server())
            stores["PostgreSQL"] = ("--store", postgres.new_database())
        except LookupError as error:
            print(error, file=sys.stderr)
        for store, flags in stores.items():
            with tempfile.TemporaryDirectory() as folder:
                promises, broken = kill_writing_servers(Path(folder), *flags, rounds=arguments.kills, longest=1.0)
            yield Row(
                "concepts",
                f"{store}: kills; registrations acknowledged",
                f"{arguments.kills}; {len(promises.concepts)}",
            )
            yield Row("concepts", f"{store}: of these lost or changed", str(len(broken)), "0", not broken)
        if "PostgreSQL" in stores:
            with _server(*stores["PostgreSQL"]) as first, _server(*stores["PostgreSQL"]) as second:
                seconds = seconds_until_noticed(first.address, second.address, rounds=_NEWS)
            worst = max(seconds)
            row = f"{statistics.median(seconds):.2f} s, {worst:.2f} s"
            yield Row(
                "concepts",
                "a new version is noticed by another server after, median and longest",
                row,
                "1 s",
                worst <= 1,
            )


# --- soak


class _Soak:
    """A mixture of everything.

    Attributes:
        codes: What came of each kind of call.
        samples: Seconds since the start, and what the server took then.
    """

    def __init__(self, server: ServerProcess, seconds: float) -> None:
        self._server = server
        self._until = time.monotonic() + seconds
        self._draw = random.Random(0)
        self.codes: dict[str, Counter[str]] = {}
        self.samples: list[tuple[float, Usage]] = []

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self._server.address) as channel:
            stub = Stub(channel)
            await asyncio.gather(
                self._sample(), self._stream(stub), self._ablate(stub), *(self._ask(stub) for _ in range(SOAK_CALLERS))
            )

    @property
    def _over(self) -> bool:
        return time.monotonic() > self._until

    def _request(self, **fields: Any) -> explain_pb2.ExplainRequest:
        return raw_request(self._draw.choice(_IMAGES), **fields)

    def _book(self, kind: str, code: str) -> None:
        self.codes.setdefault(kind, Counter())[code] += 1

    async def _sample(self) -> None:
        started = time.monotonic()
        while not self._over:
            self.samples.append((time.monotonic() - started, self._server.usage()))
            await asyncio.sleep(_SAMPLE_SECONDS)

    async def _ask(self, stub: Stub) -> None:
        kinds: dict[str, tuple[float, Callable[[], Any]]] = {
            "cdam": (50, lambda: stub.Explain(self._request())),
            "smooth": (8, lambda: stub.Explain(self._request(methods=[method("smooth_cdam", samples=10)]))),
            "integrated": (8, lambda: stub.Explain(self._request(methods=[method("integrated_cdam", steps=20)]))),
            "bad image": (8, lambda: stub.Explain(_bad_image())),
            "unknown model": (8, lambda: stub.Explain(self._request(model="unicorn"))),
            "tiny deadline": (8, lambda: stub.Explain(self._request(), timeout=self._draw.uniform(0.0001, 0.02))),
            "cancelled": (8, lambda: stub.Explain(self._request())),
        }
        weights = [weight for weight, _ in kinds.values()]
        while not self._over:
            (kind,) = self._draw.choices(list(kinds), weights)
            call = kinds[kind][1]()
            if kind == "cancelled":
                await asyncio.sleep(self._draw.uniform(0, 0.05))
                call.cancel()
            self._book(kind, (await call.code()).name)

    async def _ablate(self, stub: Stub) -> None:
        while not self._over:
            call = stub.Explain(self._request(methods=[method("token_ablation")]))
            self._book("ablation", (await call.code()).name)
            await asyncio.sleep(min(_ABLATION_SECONDS, max(0.0, self._until - time.monotonic())))

    async def _stream(self, stub: Stub) -> None:
        while not self._over:
            async for answer in stub.ExplainStream(self._items()):
                self._book("stream item", answer.WhichOneof("outcome"))
            await asyncio.sleep(1)

    async def _items(self) -> AsyncIterator[explain_pb2.ExplainStreamRequest]:
        for number in range(_STREAM_ITEMS):
            yield explain_pb2.ExplainStreamRequest(request=self._request(request_id=str(number)))


_EXPECTED: Final = {
    "cdam": {"OK", REFUSED},
    "smooth": {"OK", REFUSED},
    "integrated": {"OK", REFUSED},
    "ablation": {"OK", REFUSED},
    "stream item": {"response"},
    "bad image": {"INVALID_ARGUMENT"},
    "unknown model": {"NOT_FOUND"},
    "tiny deadline": {"OK", "DEADLINE_EXCEEDED", REFUSED},
    "cancelled": {"OK", "CANCELLED"},
}


def soak(arguments: argparse.Namespace) -> Iterator[Row]:
    """A mixture of everything."""
    seconds = 60 * arguments.minutes
    with _server("--token-cache-mib", "16", "--max-connection-age-seconds", "60") as server:
        run = _Soak(server, seconds)
        asyncio.run(run.run())
        errors = sum(line["event"] == "internal error" for line in server.log_lines())
    late = [(at, usage) for at, usage in run.samples if at > seconds / 5]
    slope, error = _slope([at / 3600 for at, _ in late], [usage.mib for _, usage in late])
    yield Row("soak", "minutes", f"{arguments.minutes:g}")
    for kind, codes in run.codes.items():
        yield Row("soak", kind, _counts(codes), ", ".join(sorted(_EXPECTED[kind])), set(codes) <= _EXPECTED[kind])
    yield Row("soak", "internal errors in the log", str(errors), "0", errors == 0)
    yield Row(
        "soak", "memory at the end, most", f"{late[-1][1].mib:.0f} MiB, {max(u.mib for _, u in run.samples):.0f} MiB"
    )
    yield Row(
        "soak",
        "slope of memory after a fifth of the time, +- 2 standard errors",
        f"{slope:+.1f} +- {2 * error:.1f} MiB/h",
    )
    for name in ("threads", "files"):
        counts = [getattr(usage, name) for _, usage in late]
        third = max(1, len(counts) // 3)
        growth = max(counts[-third:]) - max(counts[:third])
        yield Row("soak", f"growth of {name}, most of the last third - of the first", f"{growth:+d}", "< 8", growth < 8)


def _bad_image() -> explain_pb2.ExplainRequest:
    return explain_pb2.ExplainRequest(image=common_pb2.Image(encoded=b"\x89PNG\r\n\x1a\n of no picture"))


def _slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of the line of least squares, and its standard error if the points scatter independently."""
    if len(x) < 3:
        return math.nan, math.nan
    fit = statistics.linear_regression(x, y)
    residuals = [b - fit.intercept - fit.slope * a for a, b in zip(x, y, strict=True)]
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    return fit.slope, math.sqrt(sum(r * r for r in residuals) / (len(x) - 2) / spread)


# --- loop


@dataclass
class _Watched:
    """What is seen of an event loop.

    Attributes:
        callbacks: Of each, the seconds that it took, those of the processor among them, and its name.
        delays: Seconds by which the heartbeat was late.
    """

    callbacks: list[tuple[float, float, str]]
    delays: list[float]


def loop(arguments: argparse.Namespace) -> Iterator[Row]:
    """The event loop under load."""
    logs.configure("json", "error")
    settings = Settings.load(address="127.0.0.1:0", admin_address="127.0.0.1:0", token_cache_mib=0)
    with _in_thread(settings) as (address, its_loop, thread):
        context = multiprocessing.get_context("spawn")
        load = context.Process(target=_load_forever, args=(address,), daemon=True)
        load.start()
        time.sleep(5)
        try:
            seen = _watch(its_loop, thread, arguments.seconds)
        finally:
            load.kill()
            load.join()
    seconds = [its for its, _, _ in seen.callbacks]
    longest, busiest = max(seconds), max(its for _, its, _ in seen.callbacks)
    yield Row("loop", "callbacks in seconds", f"{len(seconds)} in {arguments.seconds:g}")
    yield Row("loop", "a callback, 99th percentile", f"{1000 * float(np.quantile(seconds, 0.99)):.2f} ms")
    yield Row("loop", "the longest callback", f"{1000 * longest:.2f} ms", "<= 20 ms", longest <= LONGEST_CALLBACK)
    for took, worked, name in sorted(seen.callbacks, reverse=True)[:5]:
        yield Row("loop", f"... {name}", f"{1000 * took:.2f} ms, of the processor {1000 * worked:.2f} ms")
    yield Row("loop", "the longest without waits for the processor or the interpreter", f"{1000 * busiest:.2f} ms")
    delay = max(seen.delays)
    yield Row("loop", "a heartbeat's delay, 99th percentile", f"{1000 * float(np.quantile(seen.delays, 0.99)):.2f} ms")
    yield Row("loop", "the longest delay", f"{1000 * delay:.2f} ms", "<= 20 ms", delay <= LONGEST_CALLBACK)


@contextmanager
def _in_thread(settings: Settings) -> Iterator[tuple[str, asyncio.AbstractEventLoop, threading.Thread]]:
    """A server whose event loop can be looked into."""
    its_loop = asyncio.new_event_loop()
    thread = threading.Thread(target=its_loop.run_forever, name="server", daemon=True)
    thread.start()

    def wait_for(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, its_loop).result()

    application = Application(settings, load_catalog(settings))
    wait_for(application.start())
    try:
        yield application.address, its_loop, thread
    finally:
        wait_for(application.stop())
        its_loop.call_soon_threadsafe(its_loop.stop)
        thread.join()
        its_loop.close()


def _watch(its_loop: asyncio.AbstractEventLoop, thread: threading.Thread, seconds: float) -> _Watched:
    seen = _Watched([], [])
    run: Callable[[asyncio.Handle], None] = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        if threading.current_thread() is not thread:
            return run(handle)
        name = _name(handle)
        started, worked = time.perf_counter(), time.thread_time()
        run(handle)
        worked = time.thread_time() - worked
        seen.callbacks.append((time.perf_counter() - started, worked, name))
        return None

    async def beat() -> None:
        until = time.perf_counter() + seconds
        while (started := time.perf_counter()) < until:
            await asyncio.sleep(_TICK)
            seen.delays.append(time.perf_counter() - started - _TICK)

    asyncio.Handle._run = timed  # type: ignore[method-assign]
    try:
        asyncio.run_coroutine_threadsafe(beat(), its_loop).result()
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]
    return seen


def _name(handle: Any) -> str:
    """What a callback is: of a task's step, the name of its coroutine."""
    callback = handle._callback
    task = getattr(callback, "__self__", None)
    if isinstance(task, asyncio.Task):
        return f"task {getattr(task.get_coro(), '__qualname__', task.get_coro())}"
    function = getattr(callback, "func", callback)  # of a partial
    return str(getattr(function, "__qualname__", function))


def _load_forever(address: str) -> None:
    async def run() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = Stub(channel)

            async def ask() -> None:
                while True:
                    with suppress(grpc.aio.AioRpcError):
                        await stub.Explain(raw_request(random.choice(_IMAGES)))

            await asyncio.gather(*(ask() for _ in range(LOOP_CALLERS)))

    asyncio.run(run())


# --- faults


def faults(arguments: argparse.Namespace) -> Iterator[Row]:
    """An engine that fails, under load."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"program": FAULTY, "environment": {"FAULTS_MEMORY": f"{folder}/memory"}}
        with _server("--token-cache-mib", "0", **options) as server, grpc.insecure_channel(server.address) as channel:
            for fault in (Fault.POISON, Fault.LOGITS, Fault.HUNGRY, Fault.HOST_MEMORY):
                yield _mended(server, Stub(channel), fault)
        for fault in (Fault.DEVICE_LOST, Fault.EXIT, Fault.STUCK):
            with _server("--token-cache-mib", "0", "--watchdog-seconds", "1", **options) as server:
                yield _ended(server, fault)


def _mended(server: ServerProcess, stub: Stub, fault: Fault) -> Row:
    codes: Counter[str] = Counter()
    seconds = []
    with Innocents(server.address) as innocents:
        for _ in range(20):
            codes[stub.Explain.future(raw_request(marked(noise(1000), fault))).code().name] += 1
            started = time.monotonic()
            stub.Explain(raw_request(noise(1001)))
            seconds.append(time.monotonic() - started)
    others = set(innocents.codes)
    value = (
        f"culprit {_counts(codes)}; others {_counts(innocents.codes)}; next answer after {max(seconds):.2f} s at most"
    )
    return Row("faults", fault.name.lower(), value, "others OK, < 1 s", others == {"OK"} and max(seconds) < 1)


def _ended(server: ServerProcess, fault: Fault) -> Row:
    with grpc.insecure_channel(server.address) as channel, Innocents(server.address) as innocents:
        culprit = Stub(channel).Explain.future(raw_request(marked(noise(1000), fault)))
        started = time.monotonic()
        told = culprit.code().name
        told_after = time.monotonic() - started
        exit_code = server.process.wait(timeout=60)
        seconds = time.monotonic() - started
    codes = innocents.codes
    value = f"culprit {told} after {told_after:.2f} s; others {_counts(codes)}; exit {exit_code} after {seconds:.2f} s"
    return Row("faults", fault.name.lower(), value, "UNAVAILABLE, exit 1", told == "UNAVAILABLE" and exit_code == 1)


# --- the table


SCENARIOS: Final[dict[str, Callable[[argparse.Namespace], Iterator[Row]]]] = {
    "cancel": cancel,
    "sigterm": sigterm,
    "concepts": concepts,
    "soak": soak,
    "loop": loop,
    "faults": faults,
}


def _counts(counter: Counter[Any]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in sorted(counter.items(), key=lambda item: -item[1]))


def _print(rows: Sequence[Row]) -> None:
    print("| scenario | what | measured | must be | met |\n|---|---|---|---|---|")
    for row in rows:
        met = {None: "-", True: "yes", False: "no"}[row.met]
        print(f"| {row.scenario} | {row.what} | {row.value} | {row.bar or '-'} | {met} |")


def main() -> None:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--json", type=Path, default=Path("results/reliability.json"))
    arguments = parser.parse_args()
    kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    rows: list[Row] = []
    for name in arguments.scenarios:
        found = list(SCENARIOS[name](arguments))
        rows += found
        kept[name] = {"machine": machine(torch.device("cpu")), "rows": [asdict(row) for row in found]}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    _print(rows)


if __name__ == "__main__":
    main()
