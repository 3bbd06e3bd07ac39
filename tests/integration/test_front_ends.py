"""A server of several processes: one server to those who call it, whichever process they meet, and whichever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

import cdam
from calls import SAMPLES, Stub, contrast, method, output, request, vector
from cdam.v1 import common_pb2, concept_pb2, evaluation_pb2, target_pb2
from evaluations import metric, protocol, requests, sample
from faults.callers import noise, raw_request
from processes import ServerProcess, free_ports, serving

CONNECTIONS = 12
IMAGE = (SAMPLES / "scene1.png").read_bytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("front-ends")
    flags = (
        "--front-ends",
        "2",
        "--data-dir",
        str(folder / "data"),
        "--token-cache-mib",
        "0",
    )  # whose maps differ in the last bits
    with serving(folder / "log", *flags) as server:
        yield server


@contextmanager
def stubs(server: ServerProcess, count: int = CONNECTIONS) -> Iterator[list[Stub]]:
    """Each with a connection of its own, so that both front ends have some, but for one time in two thousand."""
    with ExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        yield [Stub(stack.enter_context(grpc.insecure_channel(server.address, options))) for _ in range(count)]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_every_front_end_answers_as_one_process_does(server: ServerProcess, tmp_path: Path) -> None:
    methods = [
        method("cdam", parts=True),
        method("smooth_cdam", seed=3),
        method("integrated_cdam"),
        method("attention"),
    ]
    asked = request(IMAGE, output(3), contrast(3, 5), vector(np.ones(128)), methods=methods, request_id="x")
    flags = ("--front-ends", "0", "--data-dir", str(tmp_path), "--token-cache-mib", "0")
    with serving(tmp_path / "log", *flags) as other, stubs(other, 1) as its:
        alone = its[0].Explain(asked)
    with stubs(server) as its:
        answers = [stub.Explain(asked) for stub in its]
    for answer in answers:
        for message in (answer, alone):
            message.ClearField("timing")
            message.ClearField("token_cache_hit")
        different = [
            (one, other)
            for one, other in zip(str(answer).splitlines(), str(alone).splitlines(), strict=True)
            if one != other
        ]
        assert not different
    used = [pid for pid in server.children("front") if _connections(pid) > 0]
    assert len(used) == 2


def _connections(pid: int) -> int:
    """Sockets that a process has, but for the few that it always has."""
    links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(link.startswith("socket:") for link in links) - 4


def test_clients_have_connections_of_their_own(server: ServerProcess) -> None:
    """So that those of one process use all front ends."""
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            client = stack.enter_context(cdam.Client(server.address))
            client.explain(IMAGE, targets=[3])
        assert all(_connections(pid) > 0 for pid in server.children("front"))


def test_images_that_do_not_fit_into_the_ring(server: ServerProcess) -> None:
    """They go through the socket."""
    size = common_pb2.Size(height=192, width=192)
    asked = request(IMAGE, output(3), preprocessing=common_pb2.Preprocessing(input_size=size))
    with stubs(server, 4) as its:
        calls = [stub.Explain.future(asked) for stub in its for _ in range(32)]
        assert len({call.result().maps[0].scores.data for call in calls}) == 1


def test_a_concept_is_seen_by_every_front_end_at_once(server: ServerProcess) -> None:
    named = target_pb2.Target(concept=target_pb2.ConceptTarget(name="seven"))
    with stubs(server) as its:
        for round_ in range(6):
            vector_ = np.eye(128, dtype="<f4")[round_]
            spec = concept_pb2.ConceptSpec(
                name="seven", replace=True, vector=common_pb2.FloatTensor(shape=[128], data=vector_.tobytes())
            )
            stored = its[round_].ConceptRegister(concept_pb2.ConceptRegisterRequest(spec=spec)).concept
            for stub in its:
                (target,) = stub.Explain(request(IMAGE, named)).targets
                assert target.target.concept.id == stored.id
        its[0].DeleteConcept(concept_pb2.DeleteConceptRequest(model="demo", name="seven"))
        for stub in its:
            with pytest.raises(grpc.RpcError) as caught:
                stub.Explain(request(IMAGE, named))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_metrics_are_of_the_whole_server(server: ServerProcess) -> None:
    name = 'grpc_server_handled_total{code="OK",method="Explain"}'
    before = server.metrics()
    with stubs(server) as its:
        for stub in its * 3:
            stub.Explain(request(IMAGE, output(3)))
    after = server.metrics()
    assert after[name] - before.get(name, 0) == 3 * CONNECTIONS
    assert after["cdam_admitted_total"] - before["cdam_admitted_total"] == 3 * CONNECTIONS
    assert after["cdam_pending_requests"] == 0
    assert after["cdam_store_up"] == 1
    pids = [server.process.pid, *server.children("front"), *server.children("compute")]
    assert after["process_resident_memory_bytes"] > 1.5 * _resident(pids[-1])


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_an_evaluation_ends_with_its_table(server: ServerProcess) -> None:
    image = Image.open(BytesIO(IMAGE)).convert("RGB")
    with cdam.Client(server.address) as client:
        samples = [cdam.Sample(str(number), image, target=3) for number in range(4)]
        evaluation = client.evaluate(samples, methods=[cdam.Cdam()], metrics=[cdam.Fidelity()])
        assert len(list(evaluation)) == 4
        assert evaluation.table.samples == 4


def test_a_second_server_on_the_port_is_a_mistake(server: ServerProcess, tmp_path: Path) -> None:
    (admin,) = free_ports(1)
    command = [sys.executable, "-m", "cdam_cli", "serve", "--address", server.address]
    command += ["--admin-address", f"127.0.0.1:{admin}", "--front-ends", "2", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        f"can't listen on {server.address} (address): is another server there?"
    )


def test_a_front_end_that_is_killed_is_replaced_and_nobody_notices(server: ServerProcess) -> None:
    """With the client's default retries, that is."""
    failed: list[BaseException] = []
    answers: set[bytes] = set()
    stop = threading.Event()

    def call() -> None:
        with cdam.Client(server.address) as client:
            while not stop.is_set():
                try:
                    answers.add(client.explain(IMAGE, targets=[3]).maps[0].scores.tobytes())
                except cdam.RpcError as error:
                    failed.append(error)

    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    try:
        for _ in range(4):
            time.sleep(1.5)
            before = server.children("front")
            os.kill(before[0], signal.SIGKILL)
            wait_for(lambda: len(server.children("front")) == 2 and server.children("front") != before)  # noqa: B023
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert not failed
    assert len(answers) == 1
    assert server.get("/readyz")[0] == 200


def test_the_death_of_the_only_device_ends_the_server(tmp_path: Path) -> None:
    flags = ("--front-ends", "2", "--data-dir", str(tmp_path))
    with serving(tmp_path / "log", *flags) as server, grpc.insecure_channel(server.address) as channel:
        call = Stub(channel).Explain.future(request(IMAGE, output(3), methods=[method("token_ablation")]))
        os.kill(server.children("compute")[0], signal.SIGKILL)
        with suppress(grpc.RpcError):
            call.result()
        assert call.code() in {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert server.process.wait(timeout=60) == 1
        assert server.children("front") == []
    (died,) = (line for line in server.log_lines() if line["event"] == "the compute process died")
    assert (died["device"], died["exit_code"]) == ("auto", -signal.SIGKILL)


def test_an_image_goes_where_its_tokens_are(tmp_path: Path) -> None:
    flags = ("--device", "cpu,cpu", "--front-ends", "2", "--data-dir", str(tmp_path))
    with serving(tmp_path / "log", *flags) as server, stubs(server, 6) as its:
        for number in range(12):  # each of them new to the server
            asked = raw_request(noise(number))
            hits = [stub.Explain(asked).token_cache_hit for stub in its]
            assert hits == [False, *[True] * 5]
        metrics = server.metrics()
    assert metrics['cdam_token_cache_misses_total{model="demo"}'] == 12


def test_one_of_two_devices_may_die(tmp_path: Path) -> None:
    flags = ("--device", "cpu,cpu", "--front-ends", "2", "--data-dir", str(tmp_path))
    with serving(tmp_path / "log", *flags) as server, stubs(server, 6) as its:
        expected = its[0].Explain(request(IMAGE, output(3))).maps[0].scores.data
        first, second = server.children("compute")
        os.kill(first, signal.SIGKILL)
        lost = 0
        until = time.monotonic() + 3
        while time.monotonic() < until:
            for stub in its:
                found = _answer(stub)
                lost += found is None
                assert found in {None, expected}
        assert lost <= 1
        assert server.get("/readyz")[0] == 200
        wait_for(lambda: len(server.children("compute")) == 2)
        wait_for(lambda: "cdam_admitted_total" in server.metrics())
        os.kill(second, signal.SIGKILL)  # now the other one must do it all
        wait_for(lambda: _answer(its[0]) == expected)


def test_an_evaluation_on_a_device_that_dies_ends_and_stands_in_nobodys_way(tmp_path: Path) -> None:
    flags = ("--device", "cpu,cpu", "--front-ends", "1", "--data-dir", str(tmp_path))
    plan = protocol(metric("fidelity"), seed=3)
    leave = threading.Event()

    def idle() -> Iterator[evaluation_pb2.EvaluateRequest]:
        yield evaluation_pb2.EvaluateRequest(protocol=plan)
        leave.wait(60)

    with serving(tmp_path / "log", *flags) as server, stubs(server, 1) as (stub,):
        before = server.children("compute")
        held = stub.Evaluate(idle(), timeout=60)
        assert next(held).HasField("started")
        server.process.send_signal(signal.SIGSTOP)  # so that they are started again only when all have been told
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        for call in (
            lambda: stub.Explain(request(IMAGE, output(3)), timeout=30),
            lambda: stub.ConceptRegister(concept_pb2.ConceptRegisterRequest(spec=_ones("lost")), timeout=30),
            lambda: list(stub.Evaluate(requests(plan, [sample(1)]), timeout=30)),
            lambda: list(held),
        ):
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        server.process.send_signal(signal.SIGCONT)
        wait_for(lambda: _answer(stub) is not None)
        assert list(stub.Evaluate(requests(plan, [sample(1)]), timeout=60))[-1].HasField("table")
        leave.set()


def _ones(name: str) -> concept_pb2.ConceptSpec:
    vector_ = common_pb2.FloatTensor(shape=[128], data=np.ones(128, "<f4").tobytes())
    return concept_pb2.ConceptSpec(name=name, vector=vector_)


def test_without_what_all_are_forked_from_it_is_not_ready_until_it_has_started_again(tmp_path: Path) -> None:
    flags = ("--device", "cpu,cpu", "--front-ends", "2", "--data-dir", str(tmp_path))
    with serving(tmp_path / "log", *flags) as server:
        (fork_server,) = (pid for pid in server.children() if b"forkserver" in _command(pid) and not _named(pid))
        os.kill(fork_server, signal.SIGKILL)
        wait_for(lambda: server.get("/readyz")[0] == 503, 10)
        wait_for(lambda: server.get("/readyz")[0] == 200)
        with stubs(server, 1) as (stub,):
            assert stub.Explain(request(IMAGE, output(3))).maps
        wait_for(lambda: server.metrics()['cdam_processes{kind="front_end"}'] == 2)
        wait_for(lambda: server.metrics()['cdam_process_restarts_total{kind="compute"}'] == 2)
    died = [line for line in server.log_lines() if "died" in str(line["event"])]
    assert len(died) == 4


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _named(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().startswith("cdam-")


def _answer(stub: Stub) -> bytes | None:
    """A map; None if nobody could compute it."""
    try:
        return bytes(stub.Explain(request(IMAGE, output(3))).maps[0].scores.data)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:  # type: ignore[attr-defined]
            return None
        raise


def test_a_signal_to_all_processes_at_once_drains(tmp_path: Path) -> None:
    flags = ("--front-ends", "2", "--data-dir", str(tmp_path))
    environment = {"TMPDIR": str(tmp_path)}
    with serving(tmp_path / "log", *flags, environment=environment) as server, stubs(server, 4) as its:
        long = request(IMAGE, output(3), methods=[method("smooth_cdam", samples=200)])
        calls = [stub.Explain.future(long) for stub in its]
        wait_for(lambda: server.metrics()["cdam_admitted_total"] == len(its))
        for pid in [*server.children(), server.process.pid]:
            os.kill(pid, signal.SIGTERM)
        assert all(call.result().maps for call in calls)
        assert server.process.wait(timeout=60) == 0
    assert not [*tmp_path.glob("cdam-*"), *tmp_path.glob("pymp-*")]


def test_a_device_that_hangs_gets_nothing_new_and_is_replaced(tmp_path: Path) -> None:
    flags = ("--device", "cpu,cpu", "--front-ends", "1", "--data-dir", str(tmp_path))
    with serving(tmp_path / "log", *flags) as server, stubs(server, 1) as (stub,):
        before = server.children("compute")
        os.kill(before[0], signal.SIGSTOP)
        time.sleep(3)  # it may get a request until it has been silent for two
        for _ in range(5):
            assert stub.Explain(request(IMAGE, output(3)), timeout=10).maps
        assert server.get("/readyz")[0] == 200
        wait_for(lambda: len(server.children("compute")) == 2 and server.children("compute") != before)
        wait_for(lambda: server.metrics()['cdam_process_restarts_total{kind="compute"}'] == 1)


def test_without_the_supervisor_nobody_stays(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--front-ends", "2", "--data-dir", str(tmp_path)) as server:
        orphans = [*server.children("front"), *server.children("compute")]
        assert len(orphans) == 3
        server.process.kill()
        wait_for(lambda: not any(map(_runs, orphans)), 10)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
