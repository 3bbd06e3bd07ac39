"""`cdam bench` against a real server of the demo model, and against one that refuses as it is told."""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import grpc
import pytest

import cdam
from scripted_server import Failure, Script, fail, serving

SAMPLES = files("cdam_server.demo") / "assets" / "samples"


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cdam_cli", "bench", *map(str, arguments)]


def _bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*arguments), capture_output=True, text=True, check=False, timeout=120)


def _measure(tmp_path: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """What a bench that succeeds writes and prints."""
    result = _bench(*arguments, "-o", tmp_path / "out.json")
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads((tmp_path / "out.json").read_text()), result.stdout


def _cells(text: str, row: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{row}  "))
    return line.strip().removeprefix(row).split()


def test_a_closed_loop(server_address: str, tmp_path: Path) -> None:
    told, text = _measure(tmp_path, "--server", server_address, "--callers", 3, "--duration", 1, "--warm-up", 0.3)
    assert told["counts"] == {"OK": told["requests"]}
    assert told["requests"] == told["latency"]["count"] > 3
    assert (told["seconds"], told["interrupted"], told["version"]) == (1.0, False, cdam.__version__)
    assert told["model"]["name"] == "demo"
    assert (told["parameters"]["loop"], told["parameters"]["callers"]) == ("closed", 3)
    assert told["throughput"] == told["maps_per_second"] > 0
    assert 1 <= told["batch_size"] <= 3
    assert {stage["count"] for stage in told["on_server"].values()} == {told["requests"]}
    assert told["on_server"]["tail"]["p50"] <= told["on_server"]["total"]["p50"] <= told["latency"]["p50"]
    assert "demo, 3 callers: 1.0 s after 0.3 s of warm-up" in text
    assert f"{told['requests']} requests: {told['requests']} OK" in text
    assert f"{told['throughput']:.2f} answers/s" in text
    milliseconds = [f"{1000 * told['latency'][name]:.1f}" for name in ("mean", "p50", "p90", "p99", "p99.9", "max")]
    assert _cells(text, "OK") == [str(told["requests"]), *milliseconds]
    assert "sent late by" not in text


def test_an_open_loop_of_a_mixture(server_address: str, tmp_path: Path) -> None:
    told, text = _measure(
        tmp_path,
        *("--server", server_address, "--rate", 30, "--duration", 1, "--warm-up", 0, "--connections", 2, "--seed", 5),
        *("--request", "-t top:2 -m cdam -m smooth_cdam:samples=2 --priority high --weight 3"),
        *("--request", "-m attention"),
        *(SAMPLES / "scene1.png", SAMPLES / "scene2.png"),
    )
    one, other = told["by_request"]
    assert told["counts"] == {"OK": told["requests"]}
    assert one["requests"] + other["requests"] == told["requests"]
    assert one["requests"] > other["requests"] > 0
    assert told["parameters"]["requests"][1] == {
        "targets": [],
        "methods": ["attention"],
        "model": "",
        "priority": None,
        "weight": 1.0,
    }
    assert (told["parameters"]["rate"], told["parameters"]["images"]) == (30, 2)
    maps = (4 * one["requests"] + other["requests"]) / told["requests"]
    assert told["maps_per_second"] == pytest.approx(maps * told["throughput"])
    assert told["token_cache_hit_share"] > 0
    assert _cells(text, "-m attention")[0] == str(other["requests"])
    assert _cells(text, "sent late by")[0] == str(told["requests"])


def test_fresh_images_miss_the_token_cache(server_address: str, tmp_path: Path) -> None:
    flags = ("--server", server_address, "--callers", 2, "--duration", 2, "--warm-up", 1, "--images", 2)
    assert _measure(tmp_path, *flags)[0]["token_cache_hit_share"] > 0.5
    for _ in range(2):  # nor does the second run send what the first has sent
        told, text = _measure(tmp_path, *flags, "--fresh")
        assert told["token_cache_hit_share"] == 0
        assert "0.0% from the token cache" in text


def test_a_folder_of_images(server_address: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("scene1.png", "scene2.png", "scene3.png"):
        (tmp_path / "photos" / name).write_bytes((SAMPLES / name).read_bytes())
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    told, _ = _measure(
        tmp_path, tmp_path / "photos", "--server", server_address, "--duration", 0.3, "--warm-up", 0, "--model", "demo"
    )
    assert told["parameters"]["images"] == 3
    assert told["counts"] == {"OK": told["requests"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-t", "unicorn"], "Error: -t unicorn: .*no output named 'unicorn'"),
        (["-t", "7", "-t", "top:99"], "Error: -t 7 -t top:99: --target top:99: "),
        (["--request", "-t 7", "--request", "-t '#99' -m cdam"], "Error: -t '#99' -m cdam: "),
        (["--model", "unicorn"], r"Error: 127\.0\.0\.1:\d+: there is no model 'unicorn'"),
    ],
)
def test_what_every_request_would_be_refused_for_is_said_at_once(
    server_address: str, tmp_path: Path, arguments: list[str], said: str
) -> None:
    result = _bench(*arguments, "--server", server_address, "--duration", 1000, "-o", tmp_path / "out.json")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.match(said, result.stderr)
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


def test_without_a_server_it_ends_at_once() -> None:
    result = _bench("--server", "127.0.0.1:1")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: 127.0.0.1:1: no server answers there (")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--callers", "2", "--rate", "3"], 2, "give one of them"),
        (["--request", "-t 7", "-t", "3"], 2, "stand inside its quotes"),
        (["--request", "-m nonsense"], 2, "'nonsense' is no method"),
        (["--request", "-t 'open"], 2, "No closing quotation"),
        (["--request", "-o file"], 2, "No such option"),
        (["--request", "-t 7 --weight nan"], 2, "nan is no finite number"),
        (["--rate", "inf"], 2, "inf is no finite number"),
        (["--duration", "nan"], 2, "nan is no finite number"),
        (["-o", "nowhere/out.json"], 2, "is no folder"),
        (["nowhere.png"], 2, "no such file or folder"),
        ([__file__], 1, "not an image that can be read"),
        ([str(Path(__file__).parent)], 2, "no JPEG, PNG or WebP file below this folder"),
        (["--token", "t", "--server", "far:1"], 2, "refusing to send a token in plaintext"),
    ],
)
def test_wrong_options(server_address: str, arguments: list[str], code: int, said: str) -> None:
    result = _bench("--server", server_address, *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert said in result.stderr


class Refusing(Script):
    """Answers the first requests, the probe among them; refuses the others."""

    def __init__(self, *, answered: int, code: grpc.StatusCode) -> None:
        super().__init__()
        self.answered, self.code = answered, code
        self.asked = 0
        self.turn = threading.Lock()

    def Explain(self, request: Any, context: Any) -> Any:  # noqa: N802 - the generated base class sets names
        with self.turn:
            self.asked += 1
            refused = self.asked > self.answered
        if refused:
            fail(context, Failure(self.code))
        return super().Explain(request, context)


def _refusing(answered: int) -> Iterator[Refusing]:
    # UNAVAILABLE is what a client would try again.
    with serving(Refusing(answered=answered, code=grpc.StatusCode.UNAVAILABLE)) as script:
        assert isinstance(script, Refusing)
        yield script


@pytest.fixture
def refusing() -> Iterator[Refusing]:
    yield from _refusing(6)


@pytest.fixture
def all_refusing() -> Iterator[Refusing]:
    yield from _refusing(1)


def test_every_refusal_is_counted_once(refusing: Refusing, tmp_path: Path) -> None:
    told, text = _measure(tmp_path, "--server", refusing.address, "--rate", 100, "--duration", 0.5, "--warm-up", 0)
    refused = refusing.asked - 6
    assert refused > 0
    assert told["counts"] == {"UNAVAILABLE": refused, "OK": 5}
    assert told["failures"]["UNAVAILABLE"]["count"] == refused
    assert told["latency"]["count"] == 5
    assert f"{refused + 5} requests: {refused} UNAVAILABLE, 5 OK" in text
    assert _cells(text, "UNAVAILABLE")[0] == str(refused)


def test_a_run_without_an_answer_fails(all_refusing: Refusing, tmp_path: Path) -> None:
    result = _bench("--server", all_refusing.address, "--duration", 0.2, "--warm-up", 0, "-o", tmp_path / "out.json")
    assert (result.returncode, result.stderr) == (1, "")
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["counts"] == {"UNAVAILABLE": told["requests"]}
    assert (told["latency"]["p50"], told["batch_size"], told["throughput"]) == (None, None, 0)


def test_ctrl_c_tells_what_was_measured_so_far(tmp_path: Path) -> None:
    class Watched(Script):
        def Explain(self, request: Any, context: Any) -> Any:  # noqa: N802 - as above
            if len(self.requests) > 30:
                enough.set()
            return super().Explain(request, context)

    enough = threading.Event()
    with serving(Watched()) as script:
        command = _command("--server", script.address, "--duration", 1000, "--warm-up", 0, "-o", tmp_path / "out.json")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert enough.wait(60)
                process.send_signal(signal.SIGINT)
                text, errors = process.communicate(timeout=30)
            finally:
                process.kill()
    assert (process.returncode, errors) == (0, "")
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["interrupted"]
    assert 0 < told["seconds"] < 1000
    assert 20 < told["counts"]["OK"] < len(script.requests)
    assert "of warm-up, interrupted" in text
