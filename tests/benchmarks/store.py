"""What the store of concepts takes: time on disk and in memory, with many of them.

    PYTHONPATH=tests python tests/benchmarks/store.py [--stores sqlite postgres] [--concepts 10000] [--calls 1000]

Concepts of 768 numbers and 30 examples under names of one model, a tenth of them with the label that is asked for. One
process, its calls one after another but for registering (16 at once); a PostgreSQL server of its own, on this machine.
Prints a table and keeps results/store.json in step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np

from cdam_server.store import ConceptFacts, ConceptStore, Content, Example, Registration
from cdam_server.store.cache import CachedStore
from contract.backends import Place, digest
from postgres import postgres_server

SIZE: Final = 768
EXAMPLES: Final = 30
PAGE: Final = 100
AT_ONCE: Final = 16

# Run by itself, so that nothing but the store is in its memory.
_OPEN: Final = """
import asyncio, os, sys
from time import perf_counter
from contract.backends import Place
place = Place(sys.argv[1], sys.argv[2])
store = place.store()
def mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before = mib()
async def main():
    started = perf_counter()
    await store.open()
    await store.newest("vit", "concept-0")
    seconds = perf_counter() - started
    print(seconds, mib() - before)
    await store.close()
asyncio.run(main())
"""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        store: Which database.
        what: What was measured.
        value: The figures, for people.
        figures: The same for programs: in seconds, MiB, or a second.
    """

    store: str
    what: str
    value: str
    figures: dict[str, float]


def registration(number: int) -> Registration:
    """A concept like no other."""
    draw = np.random.default_rng(number)
    facts = ConceptFacts(
        id=digest("concept", number),
        model_fingerprint=digest("model"),
        resize="model",
        input_size=(224, 224),
        example_count=EXAMPLES,
        negative_count=0,
        spread=float(draw.uniform(0, 1)),
        content_digest=digest("content", number),
    )
    examples = tuple(Example(digest("image", number, i), draw.uniform(0, 1)) for i in range(EXAMPLES))
    return Registration(
        model="vit",
        name=f"concept-{number}",
        content=Content(facts, draw.standard_normal(SIZE, np.float32), examples),
        description=f"The concept with the number {number}.",
        labels={"dataset": "imagenet", "tenth": str(number % 10 == 0), "number": str(number)},
    )


async def measure(place: Place, concepts: int, calls: int) -> list[Row]:
    """All rows of a database."""
    store = place.store()
    await store.open()
    rows = [await _register(place.kind, store, concepts)]
    names = sorted(f"concept-{number}" for number in range(concepts))
    draw = random.Random(0)

    async def row(what: str, call: Callable[[], Awaitable[object]], times: int = calls) -> None:
        rows.append(Row(place.kind, what, *await _timed(call, times)))

    def page(after: str | None, **labels: str) -> Awaitable[Sequence[object]]:
        return store.page(model="", labels=labels, after=None if after is None else ("vit", after), limit=PAGE)

    pages = max(10, calls // 5)
    await row(f"page of {PAGE}, the first", lambda: page(None), pages)
    await row("..., nine tenths down the list", lambda: page(names[concepts * 9 // 10]), pages)
    await row("..., of those with a label that a tenth has", lambda: page(None, tenth="True"), pages)
    await row("..., likewise, and one that all have", lambda: page(None, dataset="imagenet", tenth="True"), pages)
    await row("..., likewise, half way down", lambda: page(names[concepts // 2], tenth="True"), pages)
    await row(
        "..., of those with a label that one has", lambda: page(None, number=str(draw.randrange(concepts))), pages
    )
    await row("newest version of a name", lambda: store.newest("vit", draw.choice(names)))
    await row("concept by name", lambda: store.by_name("vit", draw.choice(names)))
    await row("concept by id", lambda: store.by_id(digest("concept", draw.randrange(concepts))))
    cached = CachedStore(store)
    for number in range(1000):
        await cached.by_name("vit", f"concept-{number}")
        await cached.by_id(digest("concept", number))
    await row("concept by name, known", lambda: cached.by_name("vit", "concept-999"))
    await row("concept by id, known", lambda: cached.by_id(digest("concept", 999)))
    share = cached.bytes / 1000
    rows.append(Row(place.kind, "memory of a concept that is known", f"{share / 1024:.1f} KiB", {"bytes": share}))
    await cached.close()
    rows.append(await asyncio.to_thread(_open, place))
    return rows


async def _register(kind: str, store: ConceptStore, concepts: int) -> Row:
    seconds: list[float] = []
    todo = iter([registration(number) for number in range(concepts)])

    async def register() -> None:
        for item in todo:
            started = perf_counter()
            await store.register(item)
            seconds.append(perf_counter() - started)

    started = perf_counter()
    await asyncio.gather(*(register() for _ in range(AT_ONCE)))
    rate = concepts / (perf_counter() - started)
    value, figures = _summary(seconds)
    return Row(kind, f"register, {AT_ONCE} at once", f"{rate:.0f} a second; {value}", {"per_second": rate, **figures})


async def _timed(call: Callable[[], Awaitable[object]], times: int) -> tuple[str, dict[str, float]]:
    seconds = []
    for number in range(times + 3):
        started = perf_counter()
        found = await call()
        took = perf_counter() - started
        if not found:
            raise RuntimeError("nothing was found")
        if number >= 3:
            seconds.append(took)
    return _summary(seconds)


def _summary(seconds: Sequence[float]) -> tuple[str, dict[str, float]]:
    p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
    return f"p50 {1000 * p50:.3f} ms, p99 {1000 * p99:.3f} ms", {"p50": p50, "p99": p99}


def _open(place: Place) -> Row:
    command = [sys.executable, "-c", _OPEN, place.kind, place.address]
    runs = [
        [
            float(word)
            for word in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
        ]
        for _ in range(5)
    ]
    seconds, mib = statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)
    value = f"{1000 * seconds:.0f} ms, {mib:.0f} MiB"
    return Row(place.kind, "open with all these, and the memory that it takes", value, {"seconds": seconds, "mib": mib})


@contextmanager
def _place(kind: str) -> Iterator[Place]:
    with ExitStack() as stack:
        if kind == "sqlite":
            yield Place("sqlite", stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            yield Place("postgres", stack.enter_context(postgres_server()).new_database())


def _machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": platform.python_version(), "sqlite": sqlite3.sqlite_version}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", nargs="+", choices=["sqlite", "postgres"], default=["sqlite", "postgres"])
    parser.add_argument("--concepts", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path("results/store.json"))
    arguments = parser.parse_args()
    kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    print(f"{arguments.concepts} concepts\n\n| store | what | measured |\n|---|---|---|")
    for kind in arguments.stores:
        with _place(kind) as place:
            rows = asyncio.run(measure(place, arguments.concepts, arguments.calls))
        for row in rows:
            print(f"| {row.store} | {row.what} | {row.value} |", flush=True)
        kept[kind] = {"machine": _machine(), "concepts": arguments.concepts, "rows": [asdict(row) for row in rows]}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
