"""A database of every released schema, with what a program of its time had put there, is brought to today's."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from cdam_server.store import ConceptStore, postgres, sqlite_file
from cdam_server.store.migrations import Database, Migration, migrations
from contract.backends import Place, content, registration, same
from migration.history import BARE, IMPORTED

RELEASED = Path(__file__).parent / "released"
FILES = sorted(RELEASED.glob("*.sql"))


def released(file: Path) -> tuple[int, Database]:
    """Number and database of a file such as 0001.sqlite.sql."""
    number, database = file.stem.split(".")
    return int(number), "sqlite" if database == "sqlite" else "postgres"


def lay(file: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """A database as the file's program left it."""
    number, database = released(file)
    steps, data = migrations(database)[:number], file.read_text(encoding="utf-8")
    if database == "sqlite":
        with closing(sqlite3.connect(tmp_path / "concepts.sqlite3")) as connection:
            for step in steps:
                connection.executescript(step.sql)
            connection.execute(f"PRAGMA application_id = {sqlite_file.APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {number}")
            connection.executescript(data)
        return Place("sqlite", str(tmp_path))
    place = Place("postgres", request.getfixturevalue("postgres").new_database())
    with psycopg.connect(place.address) as connection:
        connection.execute("CREATE SCHEMA cdam")
        connection.execute("CREATE TABLE cdam.migrations (number BIGINT PRIMARY KEY, applied TIMESTAMPTZ)")
        for step in steps:
            connection.execute(step.sql.encode())
            connection.execute("INSERT INTO cdam.migrations VALUES (%s, now())", [step.number])
        connection.execute(data.encode())
    return place


async def check(store: ConceptStore) -> None:
    """All that was stored is there, and what comes goes on from it."""
    page = await store.page(model="", labels={}, after=None, limit=10)
    assert [(its.model, its.name, its.number) for its in page] == [
        ("other", "bare", 1),
        ("vit", "imported", 1),
        ("vit", "zebra", 2),
    ]
    assert [its.name for its in await store.page(model="", labels={"animal": "zebra"}, after=None, limit=10)] == [
        "zebra"
    ]
    zebra = await store.by_name("vit", "zebra")
    assert zebra is not None
    assert same(zebra.content, content(2))
    assert (zebra.version.description, dict(zebra.version.labels)) == ("more stripes", {"animal": "zebra"})
    for expected in (content(1), content(3), IMPORTED, BARE):  # replaced and deleted ones, too
        found = await store.by_id(expected.facts.id)
        assert found is not None
        assert same(found.content, expected)
    assert await store.newest("vit", "horse") is None
    again, stored = await store.register(registration("horse", 6))
    assert (again.version.number, stored) == (2, True), "a name goes on counting after it was free"
    replaced, _ = await store.register(registration("zebra", 7, replace=True))
    assert replaced.version.number == 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
async def test_what_an_older_program_stored_is_read(file: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store = lay(file, tmp_path, request).store()
    await store.open()
    await check(store)
    await store.close()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
async def test_a_step_that_is_to_come_keeps_it(
    file: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the next schema is: the program that brings it finds the database of today's."""
    _, database = released(file)
    place = lay(file, tmp_path, request)
    table = "versions" if database == "sqlite" else "cdam.versions"
    following = Migration(len(migrations(database)) + 1, f"ALTER TABLE {table} ADD COLUMN note TEXT DEFAULT 'none';")
    steps = (*migrations(database), following)
    monkeypatch.setattr(sqlite_file if database == "sqlite" else postgres, "migrations", lambda _: steps)
    for _ in range(2):  # the second time there is nothing to do
        store = place.store()
        await store.open()
        assert await store.newest("vit", "zebra") is not None
        await store.close()
    store = place.store()
    await store.open()
    await check(store)
    await store.close()


def test_there_is_a_database_of_every_schema() -> None:
    for database in ("sqlite", "postgres"):
        numbers = [number for number, its in map(released, FILES) if its == database]
        assert numbers == [step.number for step in migrations(database)]
