"""What stands in the databases of `released/`, and how they are made.

    python tests/migration/history.py sqlite                          # prints what 000N.sqlite.sql is to hold
    python tests/migration/history.py postgresql://user@host/database  # an empty one; likewise 000N.postgres.sql

Run it with the last program of a schema before the schema changes, and keep what it prints: from then on every program must read it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import structlog

from cdam_server.store import ConceptStore, Content, Registration
from contract.backends import Place, content, registration

IMPORTED = content(4, imported=True)
BARE = Content(
    facts=replace(content(5).facts, resize="", input_size=None, example_count=0, negative_count=0, spread=None),
    vector=content(5).vector,
)
STEPS: tuple[Registration | tuple[str, str], ...] = (
    registration("zebra", 1, description="stripes", labels={"animal": "zebra", "ümlaut": "ß"}),
    registration("zebra", 2, replace=True, description="more stripes", labels={"animal": "zebra"}),
    registration("horse", 3),
    ("vit", "horse"),  # deleted
    Registration(model="vit", name="imported", content=IMPORTED),
    Registration(model="other", name="bare", content=BARE),
)
"""In this order: what is registered, and which name is deleted."""


async def fill(store: ConceptStore) -> None:
    """Bring about what the files hold."""
    await store.open()
    for step in STEPS:
        if isinstance(step, Registration):
            await store.register(step)
        else:
            await store.delete(*step, None)
    await store.close()


def _sqlite() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(fill(Place("sqlite", folder).store()))
        with closing(sqlite3.connect(Path(folder, "concepts.sqlite3"))) as connection:
            print(*(line for line in connection.iterdump() if line.startswith("INSERT")), sep="\n")


def _postgres(url: str) -> None:
    asyncio.run(fill(Place("postgres", url).store()))
    command = ["pg_dump", "--data-only", "--inserts", "--schema=cdam", "--exclude-table=cdam.migrations", url]
    dumped = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(*(line for line in dumped.splitlines() if line.startswith(("INSERT", "SELECT pg_catalog.setval"))), sep="\n")


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    (where,) = sys.argv[1:]
    _sqlite() if where == "sqlite" else _postgres(where)
