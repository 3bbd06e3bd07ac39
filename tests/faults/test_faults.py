"""Real faults under a real server: each hits its cause and nobody else, and what can't be mended ends the process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from google.rpc import error_details_pb2
from safetensors.torch import save_file
from timm.models import VisionTransformer

from calls import Stub, refused
from faults.callers import Innocents, noise, raw_request
from faults.faulty_server import Fault, marked
from processes import ServerProcess, free_ports, serving

PROGRAM = (sys.executable, str(Path(__file__).with_name("faulty_server.py")))
STALL_SECONDS = 12
SERVING, NOT_SERVING = 1, 2
AT_ONCE = 5.0  # seconds; bounds what takes a small part of one here
OTHER_SIZE = 72  # another size is another bucket, about which the scheduler has learned nothing yet


def _environment(folder: Path) -> dict[str, str]:
    return {"FAULTS_MEMORY": str(folder / "memory"), "FAULTS_STALL": str(STALL_SECONDS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with serving(
        folder / "log", "--token-cache-mib", "0", program=PROGRAM, environment=_environment(folder)
    ) as running:
        yield running


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[Stub]:
    with grpc.insecure_channel(server.address) as channel:
        yield Stub(channel)


def _batches_with(server: ServerProcess, fault: str) -> list[int]:
    """The sizes of the batches that a fault has hit."""
    return [int(str(line["batch"])) for line in server.log_lines() if line.get("fault") == fault]


def _internal_error(server: ServerProcess, error_id: str) -> dict[str, object]:
    (line,) = (line for line in server.log_lines() if line.get("error_id") == error_id)
    return line


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.POISON, "RuntimeError: poison"),
        (Fault.LOGITS, "NonFiniteError"),
        (Fault.SCORES, "NonFiniteError"),
    ],
)
def test_an_image_that_fails_fails_alone(server: ServerProcess, stub: Stub, fault: Fault, reason: str) -> None:
    culprit = raw_request(marked(noise(1000), fault))
    with Innocents(server.address) as innocents:
        for _ in range(3):
            code, message, (info,) = refused(lambda: stub.Explain(culprit, timeout=60), error_details_pb2.ErrorInfo)
            stub.Explain(raw_request(noise(1)), timeout=AT_ONCE)
            assert code is grpc.StatusCode.INTERNAL
            assert message == f"internal error {info.metadata['error_id']}"
            assert reason in str(_internal_error(server, info.metadata["error_id"])["exception"])
        innocents.wait_for_more()
    assert set(innocents.codes) == {"OK"}
    assert max(_batches_with(server, fault.name)) > 1


def test_memory_that_a_batch_does_not_fit_into(server: ServerProcess, folder: Path) -> None:
    """Batches become smaller, and larger again when there is memory; nobody but the operator notices."""
    memory, fits = folder / "memory", 3
    with Innocents(server.address, count=4 * fits, size=OTHER_SIZE) as innocents:
        innocents.wait_for_batch(larger_than=fits)
        (folder / "new").write_text(str(fits))
        (folder / "new").rename(memory)
        try:
            while not _batches_with(server, "MEMORY"):
                innocents.wait_for_more()
            assert innocents.largest_batch() <= fits
        finally:
            memory.unlink()
        innocents.wait_for_batch(larger_than=fits)
    assert set(innocents.codes) == {"OK"}


@pytest.mark.parametrize("fault", [Fault.HUNGRY, Fault.HOST_MEMORY])
def test_an_image_that_does_not_fit_into_memory_is_refused_alone(
    server: ServerProcess, stub: Stub, fault: Fault
) -> None:
    culprit = raw_request(marked(noise(1001), fault))
    with Innocents(server.address) as innocents:
        for _ in range(3):
            code, message, (info,) = refused(lambda: stub.Explain(culprit, timeout=60), error_details_pb2.ErrorInfo)
            stub.Explain(raw_request(noise(1)), timeout=AT_ONCE)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert info.reason == "OUT_OF_MEMORY"
            assert "image" in message
        # What others ask for is not made to go one by one for it.
        innocents.wait_for_batch(larger_than=1)
    assert set(innocents.codes) == {"OK"}


def test_an_event_loop_that_stands_still(server: ServerProcess, stub: Stub) -> None:
    """The admin port says so while it lasts, since it has threads of its own; afterwards all is as before."""
    with Innocents(server.address, count=2) as innocents:
        assert server.get("/livez")[0] == 200
        call = stub.Explain.future(raw_request(marked(noise(1002), Fault.STALL)), timeout=60)
        seen = set()
        while not call.done():
            seen.add(server.get("/livez")[0])
            time.sleep(0.1)
        assert seen == {200, 503}
        assert call.result().maps
        assert server.get("/livez")[0] == 200
        stub.Explain(raw_request(noise(1)), timeout=AT_ONCE)
        innocents.wait_for_more()
    assert set(innocents.codes) == {"OK"}


@pytest.mark.parametrize(
    ("fault", "event"),
    [
        (Fault.DEVICE_LOST, "failed"),
        (Fault.EXIT, "failed"),
        (Fault.INTERRUPT, "failed"),
        (Fault.STUCK, "stuck"),
    ],
)
def test_what_cannot_be_mended_ends_the_process(tmp_path: Path, fault: Fault, event: str) -> None:
    """All who wait are told, no probe says that all is well, and the exit code says that it is not."""
    flags = ("--watchdog-seconds", "1", "--token-cache-mib", "0")
    with (
        serving(tmp_path / "log", *flags, program=PROGRAM, environment=_environment(tmp_path)) as server,
        grpc.insecure_channel(server.address) as channel,
        Innocents(server.address) as innocents,
    ):
        culprit = Stub(channel).Explain.future(raw_request(marked(noise(1003), fault)), timeout=60)
        assert culprit.code() is grpc.StatusCode.UNAVAILABLE
        assert {_probe(server, "/readyz"), _probe(server, "/livez")} <= {503, None}
        assert server.process.wait(timeout=30) == 1
    # Each of them asks until it fails. gRPC itself cancels calls that arrive in the very moment of closing; none of those was let in.
    assert {"UNAVAILABLE"} <= set(innocents.codes) <= {"OK", "UNAVAILABLE", "CANCELLED"}
    (line,) = (line for line in server.log_lines() if line["event"] == event)
    assert line["level"] == "critical"
    assert all(line["code"] in {"OK", "UNAVAILABLE"} for line in server.log_lines() if line["event"] == "rpc")


def _probe(server: ServerProcess, path: str) -> int | None:
    """What a probe is answered; None if nobody is there to answer."""
    try:
        return server.get(path)[0]
    except (urllib.error.URLError, ConnectionError):
        return None


def test_weights_that_give_no_finite_maps_are_refused_at_once(tmp_path: Path) -> None:
    shape = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    weights = VisionTransformer(patch_size=16, num_classes=3, **shape).state_dict()
    weights["head.weight"] += 3e38  # finite, but no product with a number above 1.2 is
    save_file(weights, tmp_path / "weights.safetensors")
    model = {
        "name": "broken",
        "architecture": "vit_small_patch16_224",
        "checkpoint": "weights.safetensors",
        "num_outputs": 3,
        "model_kwargs": shape,
    }
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": [model]}))
    api, admin = free_ports(2)
    command = [sys.executable, "-m", "cdam_cli", "serve", "--models-file", str(tmp_path / "models.yaml")]
    command += ["--address", f"127.0.0.1:{api}", "--admin-address", f"127.0.0.1:{admin}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "'broken' (the model's outputs for an image of noise are not finite)" in done.stderr.splitlines()[-1]
    assert "not finite" in done.stderr.splitlines()[-1]
