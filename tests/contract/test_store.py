from __future__ import annotations

import asyncio
import random
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest

from cdam_server.store import (
    ConceptFacts,
    ConceptStore,
    Content,
    NameTakenError,
    Registration,
    StoreUnusableError,
    Version,
    VersionMismatchError,
)
from contract.backends import Place, content, digest, digest_of, registration, same
from contract.workers import at_once, register_many, register_one

# --- register


async def test_what_was_registered_is_found_by_name_and_by_id(store: ConceptStore) -> None:
    before = datetime.now(UTC)
    wanted = registration(description="black and white", labels={"kind": "animal"})
    stored, created = await store.register(wanted)

    assert created
    assert same(stored.content, wanted.content)
    version = stored.version
    assert before <= version.create_time <= datetime.now(UTC)
    assert version.create_time.utcoffset() == timedelta(0)
    assert version == Version(
        model="vit",
        name="zebra",
        number=1,
        description="black and white",
        labels={"kind": "animal"},
        create_time=version.create_time,
        facts=wanted.content.facts,
    )
    for found in (await store.by_name("vit", "zebra"), await store.by_id(wanted.content.facts.id)):
        assert found is not None
        assert found.version == version
        assert same(found.content, wanted.content)
    assert await store.newest("vit", "zebra") == version


async def test_a_vector_alone(store: ConceptStore) -> None:
    facts = ConceptFacts(
        id=digest("vector"),
        model_fingerprint=digest("model", 1),
        resize="",
        input_size=None,
        example_count=0,
        negative_count=0,
        spread=None,
        content_digest=digest("vector digest"),
        imported=True,
    )
    odd = np.array([0.0, -0.0, 1e-45, -3.4028235e38, np.pi], np.float32)
    stored, _ = await store.register(Registration(model="vit", name="v", content=Content(facts, odd)))
    assert same(stored.content, Content(facts, odd))
    found = await store.by_name("vit", "v")
    assert found is not None
    assert same(found.content, Content(facts, odd))


async def test_a_vector_of_another_layout_is_stored_by_its_values(store: ConceptStore) -> None:
    wanted = content(1)
    spread_out = Content(
        wanted.facts, np.repeat(wanted.vector.astype(">f4"), 2)[::2], wanted.examples, wanted.negatives
    )
    stored, _ = await store.register(Registration(model="vit", name="v", content=spread_out))
    assert same(stored.content, wanted)


async def test_what_is_unknown_is_not_found(store: ConceptStore) -> None:
    for _ in range(2):  # before the first write, and after
        assert await store.newest("vit", "zebra") is None
        assert await store.by_name("vit", "zebra") is None
        assert await store.by_id(digest("unknown")) is None
        assert await store.delete("vit", "zebra", None) is None
        assert list(await store.page(model="vit", labels={"a": "b"}, after=None, limit=10)) == []
        await store.register(registration("other", 7))


async def test_the_same_content_again_changes_nothing(store: ConceptStore) -> None:
    first, _ = await store.register(registration(description="one", labels={"a": "1"}))
    for again in (
        registration(description="one", labels={"a": "1"}),
        registration(description="other words"),  # without `replace`, words do not count
        registration(expected_version=7),  # nor what is expected
        registration(description="one", labels={"a": "1"}, replace=True, expected_version=0),
    ):
        stored, created = await store.register(again)
        assert not created
        assert stored.version == first.version
        assert same(stored.content, first.content)


@pytest.mark.parametrize("words", [{"description": "new"}, {"labels": {"a": "2"}}, {"labels": {}}])
async def test_other_words_make_a_version_with_replace(store: ConceptStore, words: dict[str, object]) -> None:
    first, _ = await store.register(registration(labels={"a": "1"}))
    stored, created = await store.register(registration(**{"labels": {"a": "1"}, "replace": True, **words}))
    assert created
    assert stored.version.number == 2
    assert stored.version.facts == first.version.facts
    assert await store.newest("vit", "zebra") == stored.version


async def test_other_content_needs_replace(store: ConceptStore) -> None:
    first, _ = await store.register(registration())
    with pytest.raises(NameTakenError, match=r"'zebra' of model 'vit'") as refused:
        await store.register(registration(seed=2))
    assert refused.value.newest == first.version
    assert await store.by_id(content(2).facts.id) is None

    stored, created = await store.register(registration(seed=2, replace=True))
    assert created
    assert stored.version.number == 2
    assert await store.newest("vit", "zebra") == stored.version
    earlier = await store.by_id(content(1).facts.id)
    assert earlier is not None
    assert earlier.version == first.version


async def test_the_expected_version_is_looked_at_before_the_content(store: ConceptStore) -> None:
    with pytest.raises(VersionMismatchError) as refused:
        await store.register(registration(expected_version=1))
    assert refused.value.current == 0
    assert await store.newest("vit", "zebra") is None

    await store.register(registration(expected_version=0))
    for replace in (False, True):
        for expected in (0, 2, 2**64 - 1):
            with pytest.raises(VersionMismatchError) as refused:
                await store.register(registration(seed=2, replace=replace, expected_version=expected))
            assert refused.value.current == 1
    with pytest.raises(NameTakenError):
        await store.register(registration(seed=2, expected_version=1))
    with pytest.raises(VersionMismatchError):  # the same content with other words is a new version, too
        await store.register(registration(description="new", replace=True, expected_version=0))
    stored, _ = await store.register(registration(seed=2, replace=True, expected_version=1))
    assert stored.version.number == 2


async def test_names_of_two_models_are_two(store: ConceptStore) -> None:
    await store.register(registration())
    stored, created = await store.register(registration(seed=2, model="eva"))
    assert (created, stored.version.number) == (True, 1)
    other = await store.newest("vit", "zebra")
    assert other is not None
    assert other.facts.id == content(1).facts.id


async def test_content_that_is_known_stays_as_it_was_stored_first(store: ConceptStore) -> None:
    await store.register(registration())
    other = content(1)
    other.vector[:] = 0
    stored, created = await store.register(Registration(model="vit", name="horse", content=other))
    assert created
    assert same(stored.content, content(1))


# --- delete


async def test_a_deleted_name_is_free_and_goes_on_counting(store: ConceptStore) -> None:
    await store.register(registration())
    second, _ = await store.register(registration(seed=2, replace=True))
    assert await store.delete("vit", "zebra", None) == second.version
    assert await store.newest("vit", "zebra") is None
    assert await store.by_name("vit", "zebra") is None
    assert await store.delete("vit", "zebra", None) is None
    assert await store.delete("vit", "zebra", 2) is None
    with pytest.raises(VersionMismatchError) as refused:
        await store.register(registration(seed=3, expected_version=2))
    assert refused.value.current == 0

    stored, created = await store.register(registration(seed=2, expected_version=0))
    assert (created, stored.version.number) == (True, 3)


async def test_deleting_an_unexpected_version_changes_nothing(store: ConceptStore) -> None:
    await store.register(registration())
    for expected in (0, 2):
        with pytest.raises(VersionMismatchError) as refused:
            await store.delete("vit", "zebra", expected)
        assert refused.value.current == 1
    assert await store.newest("vit", "zebra") is not None
    assert await store.delete("vit", "zebra", 1) is not None


async def test_content_outlives_its_names(store: ConceptStore) -> None:
    first, _ = await store.register(registration())
    await store.delete("vit", "zebra", None)
    found = await store.by_id(first.content.facts.id)
    assert found is not None
    assert found.version == first.version
    assert same(found.content, first.content)


async def test_by_id_tells_of_the_version_that_was_stored_last(store: ConceptStore) -> None:
    concept_id = content(1).facts.id
    for name in ("zebra", "horse", "ass"):
        stored, _ = await store.register(registration(name))
        found = await store.by_id(concept_id)
        assert found is not None
        assert found.version == stored.version
    await store.delete("vit", "ass", None)
    found = await store.by_id(concept_id)
    assert found is not None
    assert found.version.name == "ass"
    stored, _ = await store.register(registration("zebra", description="again", replace=True))
    found = await store.by_id(concept_id)
    assert found is not None
    assert (found.version.name, found.version.number) == ("zebra", 2)


# --- page


async def _names(store: ConceptStore, *, model: str = "", limit: int = 3, **labels: str) -> list[tuple[str, str]]:
    """All names, page by page."""
    found: list[tuple[str, str]] = []
    after = None
    while page := await store.page(model=model, labels=labels, after=after, limit=limit):
        assert len(page) <= limit
        found += [(version.model, version.name) for version in page]
        after = found[-1]
    return found


async def test_pages_are_in_the_order_of_code_points(store: ConceptStore) -> None:
    names = [
        "a",
        "B",
        "Z",
        "a-b",
        "a.b",
        "a_b",
        "ab",
        "b",
        "10",
        "9",
        "é",
        "e\u0301",
        "ß",
        "ss",
        "\uffff",
        "\U0001f993",
        "日本",
    ]
    keys = [(model, name) for model in ("vit", "Eva", "eva-02", "eva") for name in names]
    for number, (model, name) in enumerate(keys):
        await store.register(registration(name, number, model=model))
    assert await _names(store) == sorted(keys)
    assert await _names(store, model="eva", limit=5) == sorted(key for key in keys if key[0] == "eva")
    assert await _names(store, model="ev") == []
    everything = await store.page(model="", labels={}, after=None, limit=2**31)
    assert [(version.model, version.name) for version in everything] == sorted(keys)


@pytest.mark.parametrize("labels", [{}, {"a": "1"}])
async def test_a_page_of_one_model_begins_behind_any_key(store: ConceptStore, labels: dict[str, str]) -> None:
    for name in ("a", "b", "c"):
        await store.register(registration(name, model="m", labels={"a": "1"}))
    for after, wanted in [
        (("l", "z"), "abc"),
        (("m", "a"), "bc"),
        (("m", "aa"), "bc"),
        (("m", "c"), ""),
        (("n", ""), ""),
    ]:
        page = await store.page(model="m", labels=labels, after=after, limit=10)
        assert "".join(version.name for version in page) == wanted


async def test_pages_by_labels(store: ConceptStore) -> None:
    await store.register(registration("a", labels={"kind": "animal", "colour": "red"}))
    await store.register(registration("b", labels={"kind": "animal", "colour": "blue"}))
    await store.register(registration("c", labels={"kind": "plant", "colour": "red"}))
    await store.register(registration("d", model="eva", labels={"kind": "animal"}))
    await store.register(registration("e"))
    assert await _names(store, kind="animal", limit=1) == [("eva", "d"), ("vit", "a"), ("vit", "b")]
    assert await _names(store, kind="animal", model="vit") == [("vit", "a"), ("vit", "b")]
    assert await _names(store, kind="animal", colour="red") == [("vit", "a")]
    assert await _names(store, colour="red", kind="animal") == [("vit", "a")]
    assert await _names(store, kind="") == []
    assert await _names(store, animal="kind") == []


async def test_pages_show_newest_versions_of_names_that_are_taken(store: ConceptStore) -> None:
    await store.register(registration("a", labels={"kind": "old"}))
    newest, _ = await store.register(registration("a", seed=2, replace=True, labels={"kind": "new"}))
    await store.register(registration("b", labels={"kind": "new"}))
    await store.delete("vit", "b", None)
    assert list(await store.page(model="", labels={}, after=None, limit=10)) == [newest.version]
    assert await _names(store, kind="new") == [("vit", "a")]
    assert await _names(store, kind="old") == []
    await store.register(registration("b", seed=3))
    assert await _names(store, kind="new") == [("vit", "a")]


async def test_a_walk_through_the_pages_misses_no_name_while_others_come_and_go(store: ConceptStore) -> None:
    stays = [f"stays{number:03}" for number in range(0, 100, 2)]
    for name in stays:
        await store.register(registration(name))
    walking = True

    async def disturb() -> None:
        number = 1
        while walking:
            name = f"stays{number % 100:03}x"
            await store.register(registration(name))
            await store.delete("vit", name, None)
            await store.register(registration(name))
            number += 14

    disturbing = asyncio.create_task(disturb())
    found = await _names(store, limit=2)
    walking = False
    await disturbing
    names = [name for _, name in found]
    assert names == sorted(set(names))
    assert [name for name in names if not name.endswith("x")] == stays


async def test_thousands_of_names(store: ConceptStore) -> None:
    names = [f"concept-{number}" for number in range(2000)]
    for start in range(0, len(names), 100):
        these = names[start : start + 100]
        await asyncio.gather(
            *(store.register(registration(name, 1, labels={"even": str(int(name[8:]) % 2 == 0)})) for name in these)
        )
    assert [name for _, name in await _names(store, limit=300)] == sorted(names)
    assert [name for _, name in await _names(store, limit=300, even="True")] == sorted(names[::2])


# --- text

ODD = [
    "'",
    '"',
    "\\",
    "%s %(a)s ?",
    ":name",
    "--",
    "a\nb\r\n\t",
    "\x01\x7f",
    "\u202e",
    "e\u0301",
    "\ufeff",
    "\U0010ffff",
    " ",
    "x" * 5000,
]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
async def test_any_text_is_kept_as_it_is(store: ConceptStore, text: str) -> None:
    name = text[:128]
    stored, _ = await store.register(registration(name, description=text, labels={text: text, "": ""}))
    assert stored.version.name == name
    assert stored.version.description == text
    assert stored.version.labels == {text: text, "": ""}
    found = await store.by_name("vit", name)
    assert found is not None
    assert found.version == stored.version
    assert list(await store.page(model="", labels={text: text}, after=None, limit=2)) == [stored.version]
    assert list(await store.page(model="", labels={"": ""}, after=("vit", "\x01"[:0]), limit=2)) == [stored.version]
    assert await store.delete("vit", name, 1) == stored.version


# --- several stores on one database


async def test_two_stores_see_what_each_other_writes_at_once(place: Place) -> None:
    one, two = place.store(), place.store()
    await one.open()
    await two.open()
    try:
        for number in range(1, 20):
            writer, reader = (one, two) if number % 2 else (two, one)
            assert await reader.newest("vit", "zebra") == await writer.newest("vit", "zebra")
            stored, _ = await writer.register(registration(seed=number, replace=True, expected_version=number - 1))
            assert await reader.newest("vit", "zebra") == stored.version
            assert len(await reader.page(model="vit", labels={}, after=None, limit=2)) == 1
        await one.delete("vit", "zebra", 19)
        assert await two.by_name("vit", "zebra") is None
    finally:
        await one.close()
        await two.close()


async def test_a_store_that_is_opened_again_has_it_all(place: Place) -> None:
    for number in range(1, 4):
        store = place.store()
        await store.open()
        stored, created = await store.register(registration(seed=number, replace=True))
        assert (created, stored.version.number) == (True, number)
        await store.close()


def test_of_writers_of_one_name_in_many_processes_one_wins(place: Place) -> None:
    """Each opens the database that is not there yet: they also make it, once."""
    came_of_it = at_once(register_one, [(place, "zebra", seed) for seed in range(16)])
    assert sorted(came_of_it) == ["taken"] * 15 + ["won 1"]


def test_a_database_that_many_processes_make_at_once_is_made_once(place: Place) -> None:
    came_of_it = at_once(register_one, [(place, f"name{seed}", seed) for seed in range(8)])
    assert came_of_it == ["won 1"] * 8


def test_versions_of_one_name_from_many_processes_have_no_gaps(place: Place) -> None:
    seeds = [range(start, start + 20) for start in range(0, 160, 20)]
    numbers = at_once(register_many, [(place, its) for its in seeds])
    assert sorted(number for its in numbers for number in its) == list(range(1, 161))


async def test_of_tasks_that_register_one_name_one_wins(store: ConceptStore) -> None:
    answers = await asyncio.gather(
        *(store.register(registration(seed=seed)) for seed in range(16)), return_exceptions=True
    )
    won = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(won) == 1
    assert all(isinstance(answer, NameTakenError) for answer in answers if isinstance(answer, BaseException))


# --- who stops waiting


async def test_a_register_that_is_cancelled_is_done_or_not(store: ConceptStore) -> None:
    draw = random.Random(1)
    for number in range(60):
        waiting = asyncio.create_task(store.register(registration(f"name{number}", number, labels={"a": "1"})))
        await asyncio.sleep(draw.uniform(0, 0.008))
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
    await asyncio.gather(*(store.register(registration(f"after{number}")) for number in range(8)))
    listed = await store.page(model="", labels={"a": "1"}, after=None, limit=100)
    for number in range(60):
        version = await store.newest("vit", f"name{number}")
        found = await store.by_id(content(number).facts.id)
        if version is None:
            assert f"name{number}" not in {item.name for item in listed}
            assert found is None or number == 1  # which is stored under other names, too
        else:
            assert version in listed
            assert found is not None
            assert same(found.content, content(number))


# --- schemas


async def test_a_newer_schema_is_refused(place: Place) -> None:
    store = place.store()
    await store.register(registration())
    await store.close()
    if place.kind == "sqlite":
        file = Path(place.address, "concepts.sqlite3")
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA user_version = 7")
        before = digest_of(file)
    else:
        with psycopg.connect(place.address) as connection:
            connection.execute("INSERT INTO cdam.migrations VALUES (7, now())")
    for use in (lambda store: store.open(), lambda store: store.newest("vit", "zebra")):
        store = place.store()
        with pytest.raises(StoreUnusableError, match=r"schema version 7, and this program knows none above 1"):
            await use(store)
        await store.close()
    if place.kind == "sqlite":
        assert digest_of(file) == before
