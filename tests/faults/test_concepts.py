"""Concepts are never lost, nor wrong: servers that are killed, servers that share a database, a database that is away."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from calls import Stub, array, output, refused, vector
from cdam.v1 import concept_pb2, target_pb2
from faults.callers import noise, raw_request
from faults.registrars import Promises, explained, kill_writing_servers, register_until_it_fails, registration
from postgres import PostgresServer
from processes import ServerProcess, serving

NOTICED_SECONDS = 1.0
ROUNDS = 3


def _named(name: str) -> target_pb2.Target:
    return target_pb2.Target(concept=target_pb2.ConceptTarget(name=name))


def _request(*targets: target_pb2.Target) -> object:
    request = raw_request(noise(0))
    del request.targets[:]
    request.targets.extend(targets)
    return request


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.new_database()


def test_a_killed_server_loses_nothing_with_sqlite(tmp_path: Path) -> None:
    flags = ("--data-dir", str(tmp_path / "data"))
    promises, broken = kill_writing_servers(tmp_path, *flags, rounds=ROUNDS, longest=0.7)
    assert promises.concepts
    assert broken == []


def test_a_killed_server_loses_nothing_with_postgres(tmp_path: Path, url: str) -> None:
    promises, broken = kill_writing_servers(tmp_path, rounds=ROUNDS, longest=0.7, environment={"CDAM_STORE": url})
    assert promises.concepts
    assert broken == []


@pytest.fixture
def pair(tmp_path: Path, url: str) -> Iterator[tuple[Stub, Stub]]:
    """Two servers on one database."""
    with (
        serving(tmp_path / "log-0", "--store", url) as first,
        serving(tmp_path / "log-1", "--store", url) as second,
        grpc.insecure_channel(first.address) as one,
        grpc.insecure_channel(second.address) as other,
    ):
        yield Stub(one), Stub(other)


def test_two_servers_on_one_database(pair: tuple[Stub, Stub]) -> None:
    here, there = pair
    # Registered on one, explained on the other at once.
    for seed in range(10):
        concept = here.ConceptRegister(registration(f"at-once-{seed}", seed)).concept
        scores = explained(there, _request(_named(concept.name)))
        truth = explained(here, _request(vector(array(concept.vector))))
        np.testing.assert_allclose(scores, truth, atol=1e-5 * np.abs(truth).max())
    # Replaced on one, noticed by the other within a second; and so is a deletion.
    new = here.ConceptRegister(registration("at-once-0", 1000, replace=True)).concept
    replaced = time.monotonic()
    answer = there.Explain(_request(_named("at-once-0")))
    while answer.targets[0].target.concept.id != new.id:
        asked = time.monotonic()
        assert asked - replaced < NOTICED_SECONDS
        answer = there.Explain(_request(_named("at-once-0")))
    here.DeleteConcept(concept_pb2.DeleteConceptRequest(name="at-once-0", model="demo"))
    time.sleep(NOTICED_SECONDS)
    assert refused(lambda: there.Explain(_request(_named("at-once-0"))))[0] is grpc.StatusCode.NOT_FOUND


def test_sixteen_writers_of_one_name(pair: tuple[Stub, Stub]) -> None:
    codes: Counter[str] = Counter()
    winners: list[concept_pb2.Concept] = []
    together = threading.Barrier(16)

    def write(number: int) -> None:
        stub = pair[number % 2]
        together.wait()
        try:
            winners.append(stub.ConceptRegister(registration("contested", 4 * number + 1), timeout=60).concept)
            codes["OK"] += 1
        except grpc.RpcError as error:
            codes[error.code().name] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {"OK": 1, "ALREADY_EXISTS": 15}
    for stub in pair:
        assert stub.GetConcept(concept_pb2.GetConceptRequest(name="contested")).concept == winners[0]


def test_a_database_that_is_away(tmp_path: Path, postgres: PostgresServer, url: str) -> None:
    """What needs it is told to come back; all else goes on; and it goes on by itself when the database is back."""
    with serving(tmp_path / "log", "--store", url) as server, grpc.insecure_channel(server.address) as channel:
        stub = Stub(channel)
        known = stub.ConceptRegister(registration("known", 1)).concept
        before = explained(stub, _request(_named("known")))
        postgres.stop("immediate")
        try:
            for _ in range(3):
                np.testing.assert_allclose(explained(stub, _request(_named("known"))), before, rtol=1e-5)
                by_id = target_pb2.Target(concept=target_pb2.ConceptTarget(id=known.id))
                np.testing.assert_allclose(explained(stub, _request(by_id)), before, rtol=1e-5)
                assert stub.Explain(_request(output(3)), timeout=30).maps
                for call in (
                    lambda: stub.ConceptRegister(registration("new", 2), timeout=30),
                    lambda: stub.Explain(_request(_named("unknown")), timeout=30),
                    lambda: stub.ListConcepts(concept_pb2.ListConceptsRequest(), timeout=30),
                ):
                    code, message, (info,) = refused(call, error_details_pb2.RetryInfo)
                    assert code is grpc.StatusCode.UNAVAILABLE
                    assert info.retry_delay.ToTimedelta().total_seconds() > 0
                    assert "127.0.0.1" not in message
                assert server.get("/readyz")[0] == 200
                assert server.metrics()["cdam_store_up"] == 0
        finally:
            postgres.start()
        registered = _until_it_works(stub)
        assert explained(stub, _request(_named(registered))).any()
        until = time.monotonic() + 30
        while server.metrics()["cdam_store_up"] != 1:  # each front end sees for itself, within a second
            assert time.monotonic() < until
            time.sleep(0.1)


def _until_it_works(stub: Stub) -> str:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        call = stub.ConceptRegister.future(registration("new", 2), timeout=30)
        if call.code() is grpc.StatusCode.OK:
            return str(call.result().concept.name)
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        time.sleep(0.2)
    raise TimeoutError("the database is back, and not used")


def test_a_server_starts_while_the_database_is_away(tmp_path: Path, postgres: PostgresServer, url: str) -> None:
    postgres.stop("fast")
    try:
        with serving(tmp_path / "log", "--store", url) as server, grpc.insecure_channel(server.address) as channel:
            stub = Stub(channel)
            assert stub.Explain(_request(output(3)), timeout=30).maps
            assert refused(lambda: stub.ConceptRegister(registration("new", 2)))[0] is grpc.StatusCode.UNAVAILABLE
            postgres.start()
            assert _until_it_works(stub) == "new"
    finally:
        if not (postgres.data / "postmaster.pid").exists():
            postgres.start()


def test_a_database_that_is_restarted_under_load(tmp_path: Path, postgres: PostgresServer, url: str) -> None:
    promises = Promises()
    with serving(tmp_path / "log", "--store", url) as server, grpc.insecure_channel(server.address) as channel:
        for stop in (postgres.kill, lambda: postgres.stop("immediate")):
            caller = threading.Thread(target=register_until_it_fails, args=(server.address, promises))
            caller.start()
            time.sleep(0.5)
            stop()
            caller.join()
            postgres.start()
            _until_it_works(Stub(channel))
        assert promises.concepts
        assert promises.broken(Stub(channel)) == []


def _refuses_to_start(log: Path, *flags: str) -> str:
    server = ServerProcess(log, *flags)
    try:
        assert server.process.wait(timeout=120) not in {0, None}
    finally:
        server.process.kill()
        server.process.wait()
    return log.read_text()


def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    flags = ("--data-dir", str(data))
    with serving(tmp_path / "log", *flags) as server, grpc.insecure_channel(server.address) as channel:
        for seed in range(20):
            Stub(channel).ConceptRegister(registration(f"name-{seed}", 4 * seed + 1))
        server.process.terminate()
        assert server.process.wait() == 0
    (file,) = data.iterdir()
    content = bytearray(file.read_bytes())
    shutil.copy(file, tmp_path / "backup")
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    file.write_bytes(content)
    said = _refuses_to_start(tmp_path / "refusal", *flags)
    assert str(file) in said
    assert "backup" in said
    assert "Traceback" not in said
    assert [path.name for path in data.iterdir()] == [file.name]
    assert file.read_bytes() == content
    # What the message advises.
    shutil.copy(tmp_path / "backup", file)
    with serving(tmp_path / "log-2", *flags) as server, grpc.insecure_channel(server.address) as channel:
        assert len(Stub(channel).ListConcepts(concept_pb2.ListConceptsRequest()).concepts) == 20
