"""The store when processes are killed, servers restarted, disks full and files damaged: nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psycopg
import pytest

from cdam_server.store import (
    ConceptStore,
    Registration,
    StoreBusyError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnusableError,
    StoreUnwritableError,
    sqlite,
)
from cdam_server.store import postgres as postgres_store
from cdam_server.store.sqlite import SqliteStore
from contract.backends import Place, content, digest_of, registration, same, until
from contract.workers import CONTEXT
from faults.store_writer import kill_a_writer
from postgres import PostgresServer


@contextmanager
def _may_mount() -> Iterator[bool]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
        mounted = (
            shutil.which("mount") is not None
            and subprocess.run(command, capture_output=True, check=False).returncode == 0
        )
        yield mounted
        if mounted:
            subprocess.run(["umount", folder], check=True)


with _may_mount() as _MOUNTS:
    # A small disk where we may mount one; and everywhere a limit to a file's size, which fails in the same places.
    _SPACE = ["disk", "limit"] if _MOUNTS else ["limit"]


def _place(kind: str, folder: Path, request: pytest.FixtureRequest) -> Place:
    if kind == "sqlite":
        return Place("sqlite", str(folder))
    return Place("postgres", request.getfixturevalue("postgres").new_database())


async def _assert_all_there(store: ConceptStore, seeds: list[int]) -> None:
    for seed in seeds:
        stored = await store.by_name("vit", f"name{seed}")
        assert stored is not None, f"name{seed} was acknowledged"
        assert same(stored.content, content(seed))
        assert stored.version.labels == {"a": str(seed)}


def _assert_integrity(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


# --- processes that are killed


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_what_a_killed_process_was_told_is_stored_is_there(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place, draw = _place(kind, tmp_path, request), random.Random(1)
    acknowledged: list[int] = []
    for number in range(100):
        acknowledged += kill_a_writer(place, 1000 * number, draw)
    assert len(acknowledged) > 200
    store = place.store()
    await store.open()
    await _assert_all_there(store, acknowledged)
    listed = await store.page(model="", labels={}, after=None, limit=10_000)
    for version in listed:  # also what was stored and not yet acknowledged is whole
        stored = await store.by_id(version.facts.id)
        assert stored is not None
    await store.close()
    if kind == "sqlite":
        _assert_integrity(tmp_path / "concepts.sqlite3")


# --- a server that is restarted


async def test_a_restarted_server_loses_nothing_and_is_found_again(postgres: PostgresServer) -> None:
    place = Place("postgres", postgres.new_database())
    store = place.store()
    await store.open()
    acknowledged: list[int] = []
    failures = 0
    over = False

    async def write(first: int) -> None:
        nonlocal failures
        seed = first
        while not over:
            try:
                await store.register(registration(f"name{seed}", seed, labels={"a": str(seed)}))
            except StoreUnavailableError:
                failures += 1  # and once more: it may have been done, or not
                await asyncio.sleep(0.05)
            else:
                acknowledged.append(seed)
                seed += 1

    async def progress() -> None:
        enough = len(acknowledged) + 20
        await until(lambda: len(acknowledged) >= enough)

    writers = [asyncio.create_task(write(10_000 * number)) for number in range(4)]
    for stop in (lambda: postgres.stop("immediate"), postgres.kill, lambda: postgres.stop("fast"), postgres.kill):
        await progress()
        before = failures
        await asyncio.to_thread(stop)
        await until(lambda: failures > before)  # noqa: B023 - called in this turn of the loop only
        await asyncio.to_thread(postgres.start)
        await progress()
    over = True
    await asyncio.gather(*writers)
    await _assert_all_there(store, acknowledged)
    await store.close()


async def test_a_server_that_comes_later_is_used_then(postgres: PostgresServer) -> None:
    place = Place("postgres", postgres.new_database())
    postgres.stop()
    store = place.store()
    try:
        await store.open()
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match=rf"127\.0\.0\.1:{postgres.port}/test\d+ can't be reached"):
                await store.register(registration())
    finally:
        postgres.start()
    await store.register(registration())
    await store.close()


@contextmanager
def _hanging(server: PostgresServer) -> Iterator[None]:
    processes = server.processes()
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


async def test_a_server_that_hangs_is_not_waited_for(postgres: PostgresServer) -> None:
    place = Place("postgres", postgres.new_database())
    store, other = place.store(), place.store()
    await store.register(registration())
    with _hanging(postgres):
        for use in (
            lambda: store.newest("vit", "zebra"),  # with a connection that was well
            lambda: store.newest("vit", "zebra"),  # with a new one
            lambda: store.register(registration("horse", 2)),
            other.open,
            other.close,
        ):
            async with asyncio.timeout(9):  # a request to cancel what hangs would wait for ten by itself
                with suppress(StoreUnavailableError):
                    await use()
                    assert use in (other.open, other.close)
    async with asyncio.timeout(30):
        while True:
            with suppress(StoreUnavailableError):
                assert await store.newest("vit", "zebra") is not None
                break
    await store.close()


async def test_closing_cuts_off_what_hangs(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("postgres", postgres.new_database())
    store = place.store()
    await store.register(registration())
    monkeypatch.setattr("cdam_server.store.postgres_connections._BEGIN_SECONDS", 1000)
    monkeypatch.setattr("cdam_server.store.postgres._READ", replace(postgres_store._READ, seconds=1000))
    with _hanging(postgres):
        reading = [asyncio.create_task(store.newest("vit", "zebra")) for _ in range(3)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(9):
            await store.close()
            answers = await asyncio.gather(*reading, return_exceptions=True)
    assert all(isinstance(answer, StoreUnavailableError) for answer in answers), answers
    with pytest.raises(StoreBusyError):
        await store.newest("vit", "zebra")


async def test_a_name_that_another_has_locked_is_busy_and_all_else_goes_on(postgres: PostgresServer) -> None:
    store = Place("postgres", postgres.new_database()).store()
    await store.register(registration("hot"))
    with psycopg.connect(postgres.url(postgres.newest_database)) as other:
        other.execute("UPDATE cdam.names SET newest = newest")
        hot = [asyncio.create_task(store.register(registration("hot", 2, replace=True))) for _ in range(8)]
        await asyncio.sleep(0.2)
        for seed in range(3, 10):
            await store.register(registration("cold", seed, replace=True))
            assert await store.newest("vit", "hot") is not None
        answers = await asyncio.gather(*hot, return_exceptions=True)
        assert all(isinstance(answer, StoreBusyError) for answer in answers), answers
    await store.register(registration("hot", 2, replace=True))
    await store.close()


async def test_a_standby_is_read_and_busy_when_written(postgres: PostgresServer) -> None:
    place = Place("postgres", postgres.new_database())
    store = place.store()
    await store.register(registration())
    await store.close()
    postgres.execute(f"ALTER DATABASE {postgres.newest_database} SET default_transaction_read_only = on")
    store = place.store()
    await store.open()
    for _ in range(3):
        with pytest.raises(StoreBusyError, match="read-only"):
            await store.register(registration("horse", 2))
        assert await store.newest("vit", "zebra") is not None
    postgres.execute(f"ALTER DATABASE {postgres.newest_database} SET default_transaction_read_only = off")
    with suppress(StoreBusyError):  # by the connection that has read
        await store.register(registration("horse", 2))
    await store.register(registration("horse", 2))  # by a new one: the other was let go
    await store.close()


async def test_a_connection_that_was_cut_is_replaced(postgres: PostgresServer) -> None:
    place = Place("postgres", postgres.new_database())
    store = place.store()
    await store.register(registration())
    postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cdam'")
    assert await store.newest("vit", "zebra") is not None  # nobody notices
    await store.close()


async def _open_and_register(place: Place) -> None:
    store = place.store()
    try:
        await store.open()
        await store.register(registration())
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://cdam:hunter2@127.0.0.1:{port}/missing", "can't be reached"),
        ("postgresql://nobody:hunter2@127.0.0.1:{port}/postgres", "can't be reached"),
        ("postgresql://cdam:hunter2@127.0.0.1:1/postgres", "127.0.0.1:1/postgres can't be reached"),
        ("host=127.0.0.1 port=1 password=hunter2", "can't be reached"),
        ("postgres//cdam:hunter2@here", "not valid"),
        # Not escaped: libpq takes part of the password for a host, a port or a database.
        ("postgresql://cdam:s@hunter2@127.0.0.1:{port}/postgres", "%40"),
        ("postgresql://cdam:s@hunter2:x@127.0.0.1/postgres", "%40"),
        ("postgresql://cdam:hunter2/t@127.0.0.1:{port}/postgres", "%2F"),
        ("postgresql://cdam:17/hunter2@127.0.0.1:{port}/postgres", "%2F"),
        ("postgresql://cdam:17/hunter2:x/postgres", "%2F"),
        ("postgresql://cdam:hunter2#t@127.0.0.1:1/postgres", "can't be reached"),
        ("postgresql://cdam:hunter2%t@127.0.0.1:{port}/postgres", "not valid"),
        ("postgresql://cdam:hunter2@127.0.0.1:port/", "not valid"),
        ("host=127.0.0.1:5432 password=hunter2", "not valid"),
    ],
)
async def test_no_error_tells_the_password(
    postgres: PostgresServer, url: str, said: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    place = Place("postgres", url.format(port=postgres.port))
    with pytest.raises((StoreUnavailableError, StoreUnusableError), match=said) as refused:
        await _open_and_register(place)
    assert "hunter2" not in f"{refused.value}{capsys.readouterr()}{caplog.text}"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://cdam:p%40%2F%3A%23%25@db.example:6432/concepts",
        "postgresql://cdam@[::1]:5432/concepts",
        "postgresql://cdam@[fe80::1%25eth0]/concepts",
        "postgresql://cdam@one:5432,two:5433/concepts?target_session_attrs=read-write",
        "postgresql://cdam@one,two,/concepts",
        "postgresql://%2Fvar%2Frun%2Fpost%3Agres/concepts",
        "host=/var/run/postgresql dbname=concepts",
        "hostaddr=::1,127.0.0.1 port=5432",
        "service=concepts",
        "postgresql:///",
    ],
)
def test_urls_that_are_well_formed(url: str) -> None:
    Place("postgres", url).store()


# --- no space left


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[Callable[[], None]]:
    """A disk at a folder; what it yields makes it large."""

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)

    status = folder.stat()
    mount(f"size={size},uid={status.st_uid},gid={status.st_gid},mode=700")
    try:
        yield lambda: mount("remount,size=256m")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def _small_files(limit: Callable[[int | None], None], size: int) -> Iterator[Callable[[], None]]:
    """A limit to the size of files, set by a function; what it yields lifts it."""
    limit(size)
    try:
        yield lambda: limit(None)
    finally:
        limit(None)


def _limit_own_files(size: int | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


async def _fill(store: ConceptStore, make_space: Callable[[], None], size: int) -> None:
    def large(seed: int) -> Registration:
        vector = np.random.default_rng(seed).standard_normal(size, np.float32)
        return Registration(model="vit", name=f"name{seed}", content=replace(content(seed), vector=vector))

    seed = refused = 0
    while refused < 3:  # running, for the same: what was refused may fit in after a log has been taken in
        assert seed < 1000
        try:
            await store.register(large(seed))
        except StoreFullError:
            refused += 1
        else:
            seed, refused = seed + 1, 0
            continue
        for number in range(seed):
            stored = await store.by_name("vit", f"name{number}")
            assert stored is not None
            assert same(stored.content, large(number).content)
        assert await store.newest("vit", f"name{seed}") is None
        assert len(await store.page(model="", labels={}, after=None, limit=10_000)) == seed
    make_space()
    stored, created = await store.register(large(seed))
    assert created
    assert same(stored.content, large(seed).content)


@pytest.mark.parametrize("space", _SPACE)
async def test_a_full_disk_under_sqlite(space: str, tmp_path: Path) -> None:
    full = _small_disk(tmp_path, "1m") if space == "disk" else _small_files(_limit_own_files, 700_000)
    with full as make_space:
        store = SqliteStore(tmp_path)
        await _fill(store, make_space, 10_000)
        await store.close()
        _assert_integrity(store.file)


@pytest.mark.parametrize("space", _SPACE)
async def test_a_full_disk_under_postgres(space: str, fresh_postgres: PostgresServer) -> None:
    if space == "disk":
        folder = fresh_postgres.folder / "small"
        folder.mkdir()
        shutil.chown(folder, fresh_postgres.data.owner())
        full = _small_disk(folder, "12m")
    else:
        full = _small_files(fresh_postgres.limit_file_size, 3_000_100)
    with full as make_space:
        options = ""
        if space == "disk":
            fresh_postgres.execute(f"CREATE TABLESPACE small LOCATION '{folder}'")
            options = "TABLESPACE small"
        store = Place("postgres", fresh_postgres.new_database(options)).store()
        await _fill(store, make_space, 50_000)
        await store.close()
        if space == "disk":
            fresh_postgres.execute(f"DROP DATABASE {fresh_postgres.newest_database}")
            fresh_postgres.execute("DROP TABLESPACE small")


# --- files that are no store


async def _stored(folder: Path, count: int = 40) -> Path:
    store = SqliteStore(folder)
    for seed in range(count):
        await store.register(registration(f"name{seed}", seed))
    await store.close()
    return store.file


def _overwrite(file: Path, where: float, size: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(int(where * file.stat().st_size))
        opened.write(random.Random(1).randbytes(size))


def _another_programs(file: Path) -> None:
    file.unlink()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")


_DAMAGES: dict[str, Callable[[Path], object]] = {
    "first bytes": lambda file: _overwrite(file, 0, 16),
    "header": lambda file: _overwrite(file, 0, 100),
    "rest of the header": lambda file: _overwrite(file, 16 / file.stat().st_size, 84),
    "middle": lambda file: _overwrite(file, 0.5, 20_000),
    "a few bytes of a vector": lambda file: _overwrite(
        file, file.read_bytes().index(content(7).vector.tobytes()[:64]) / file.stat().st_size, 5
    ),
    "truncated": lambda file: os.truncate(file, file.stat().st_size * 2 // 3),
    "truncated within the header": lambda file: os.truncate(file, 50),
    "text": lambda file: file.write_text("These are not the concepts that you are looking for.\n" * 100),
    "zeros": lambda file: file.write_bytes(bytes(100_000)),
    "another program's": _another_programs,
}


def _state(folder: Path) -> dict[str, str]:
    return {file.name: digest_of(file) for file in folder.iterdir()}


@pytest.mark.parametrize("damage", _DAMAGES.values(), ids=_DAMAGES)
async def test_a_damaged_file_is_refused_and_left_as_it_is(damage: Callable[[Path], object], tmp_path: Path) -> None:
    file = await _stored(tmp_path)
    damage(file)
    before = _state(tmp_path)
    for use in (
        lambda store: store.open(),
        lambda store: store.newest("vit", "name1"),
        lambda store: store.register(registration()),
    ):
        store = SqliteStore(tmp_path)
        with pytest.raises(StoreUnusableError, match=r"backup.*\.recover") as refused:
            await use(store)
        assert str(file) in str(refused.value)
        await store.close()
        assert _state(tmp_path) == before


async def test_a_damaged_file_with_a_log_is_left_as_it_is(tmp_path: Path) -> None:
    draw = random.Random(2)
    place = Place("sqlite", str(tmp_path))
    await _stored(tmp_path)
    while not (tmp_path / "concepts.sqlite3-wal").exists() or (tmp_path / "concepts.sqlite3-wal").stat().st_size == 0:
        kill_a_writer(place, draw.randrange(1000, 1_000_000), draw)
    _overwrite(tmp_path / "concepts.sqlite3", 0.5, 20_000)
    (tmp_path / "concepts.sqlite3-shm").unlink(missing_ok=True)
    before = _state(tmp_path)
    store = SqliteStore(tmp_path)
    with pytest.raises(StoreUnusableError):
        await store.open()
    await store.close()
    assert _state(tmp_path) == before


async def test_no_flipped_bit_makes_another_concept(tmp_path: Path) -> None:
    """Of a byte that has changed it is told when the store is opened, or it did not matter."""
    whole = (await _stored(tmp_path / "whole")).read_bytes()
    draw = random.Random(3)
    refused = 0
    for number in range(150):
        folder = tmp_path / str(number)
        folder.mkdir()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (folder / "concepts.sqlite3").write_bytes(damaged)
        store = SqliteStore(folder)
        try:
            await store.open()
            for seed in range(40):
                stored = await store.by_id(content(seed).facts.id)
                assert stored is None or same(stored.content, content(seed))
        except StoreUnusableError:
            refused += 1
        await store.close()
    assert refused > 75


# --- files that are locked, or replaced, while they are used


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


async def test_a_locked_file_is_busy_and_a_line_waits_no_longer_than_who_is_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdam_server.store.sqlite.BUSY_SECONDS", 0.5)
    store = SqliteStore(tmp_path)
    await store.register(registration())
    with _locked(store.file):
        writing = [asyncio.create_task(store.register(registration(f"name{seed}", seed))) for seed in range(60)]
        assert await store.newest("vit", "zebra") is not None
        async with asyncio.timeout(15):  # half a second each would be thirty
            answers = await asyncio.gather(*writing, return_exceptions=True)
        assert all(isinstance(answer, StoreBusyError) for answer in answers), answers
    await store.register(registration("horse", 2))
    await store.close()


async def test_closing_refuses_writes_that_have_not_begun(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.register(registration())
    with _locked(store.file):
        writing = [asyncio.create_task(store.register(registration(f"name{seed}", seed))) for seed in range(6)]
        await asyncio.sleep(0.1)
        closing_it = asyncio.create_task(store.close())
        refused = await asyncio.gather(*writing[1:], return_exceptions=True)
        assert all(isinstance(answer, StoreBusyError) for answer in refused), refused
        assert not writing[0].done()
    await writing[0]  # it had begun
    await closing_it
    with pytest.raises(StoreBusyError):
        await store.newest("vit", "zebra")
    store = SqliteStore(tmp_path)
    assert len(await store.page(model="", labels={}, after=None, limit=10)) == 2
    await store.close()


def _put_another_in_its_place(file: Path) -> None:
    asyncio.run(_stored(file.parent.parent / "another", 3))
    (file.parent.parent / "another" / file.name).replace(file)


_REPLACEMENTS: dict[str, Callable[[Path], object]] = {
    "folder deleted": lambda file: shutil.rmtree(file.parent),
    "folder renamed": lambda file: file.parent.rename(file.parent.parent / "renamed"),
    "file deleted": Path.unlink,
    "file renamed": lambda file: file.rename(file.parent / "renamed"),
    "another file": _put_another_in_its_place,
}


@pytest.mark.parametrize("replace_it", _REPLACEMENTS.values(), ids=_REPLACEMENTS)
@pytest.mark.parametrize("at", ["between", "before the commit"])
async def test_nothing_is_written_to_a_file_that_was_replaced(
    replace_it: Callable[[Path], object],
    at: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = SqliteStore(tmp_path / "data")
    await store.register(registration("before", 100))
    assert await store.newest("vit", "before") is not None
    expected = ["name0", "name1", "name2"] if replace_it is _put_another_in_its_place else []
    if at == "between":
        await asyncio.to_thread(replace_it, store.file)
        assert await store.newest("vit", "before") is None
        assert [version.name for version in await store.page(model="", labels={}, after=None, limit=9)] == expected
        assert store.file.exists() == bool(expected)  # reading makes none
    else:
        run, replacements = sqlite._run, [replace_it]

        def run_and_replace(connection: sqlite3.Connection, operation: sqlite.Operation[object]) -> object:
            result = run(connection, operation)
            if replacements:
                replacements.pop()(store.file)
            return result

        monkeypatch.setattr("cdam_server.store.sqlite._run", run_and_replace)
    for seed in range(10, 13):
        _, created = await store.register(registration(f"name{seed}", seed))
        assert created
        with closing(sqlite3.connect(store.file)) as connection:  # what another process finds there
            names = {name for (name,) in connection.execute("SELECT name FROM names WHERE taken")}
        assert names == {*expected, *(f"name{number}" for number in range(10, seed + 1))}
        assert await store.newest("vit", "before") is None
    await store.close()
    assert capsys.readouterr().out.count("store replaced") == 1
    _assert_integrity(store.file)
    for moved in (tmp_path / "renamed" / store.file.name, tmp_path / "data" / "renamed"):
        if moved.exists():
            _assert_integrity(moved)
            with closing(sqlite3.connect(moved)) as connection:
                assert ("before",) in connection.execute("SELECT name FROM names WHERE taken").fetchall()


async def test_a_damaged_file_in_the_place_of_a_good_one_is_refused(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "data")
    await store.register(registration())
    (tmp_path / "bad").write_text("not a database\n" * 100)
    (tmp_path / "bad").replace(store.file)
    for use in (lambda: store.newest("vit", "zebra"), lambda: store.register(registration("horse", 2))):
        with pytest.raises(StoreUnusableError):
            await use()
    store.file.unlink()
    await store.register(registration("horse", 2))
    await store.close()
    _assert_integrity(store.file)


# --- nowhere to write


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = SqliteStore(tmp_path / "file" / "data")
    await store.open()
    assert await store.by_name("vit", "zebra") is None
    with pytest.raises(StoreUnwritableError, match=r"--data-dir.*--store"):
        await store.register(registration())
    await store.close()


def _as_nobody(folder: Path, expected: type[Exception]) -> None:
    wanted = registration()
    if os.geteuid() == 0:
        os.setuid(65534)

    async def use() -> None:
        store = SqliteStore(folder)
        try:
            await store.open()
            await store.register(wanted)
        except expected as error:
            assert str(folder) in str(error)  # noqa: PT017 - in a process without pytest
        else:
            raise AssertionError("it was written")
        finally:
            await store.close()

    asyncio.run(use())


@pytest.mark.parametrize("there", [False, True])
def test_without_the_right_to_write(there: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if there:
            asyncio.run(_stored(folder)).chmod(0o400)
        folder.chmod(0o555)
        before = _state(folder)
        process = CONTEXT.Process(
            target=_as_nobody, args=(folder, StoreUnusableError if there else StoreUnwritableError)
        )
        process.start()
        process.join()
        assert process.exitcode == 0
        process.close()
        assert _state(folder) == before
        folder.chmod(0o755)


async def test_a_server_that_never_writes_needs_no_folder(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "data")
    await store.open()
    assert await store.by_id(content(1).facts.id) is None
    await store.close()
    assert not (tmp_path / "data").exists()
