"""`cdam concept`, and concepts in `cdam explain`, against a scripted server."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
import pytest
from click.testing import CliRunner, Result
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details
from PIL import Image

import cdam
from cdam.v1 import model_pb2
from cdam_cli import main
from cdam_cli.concept_report import histogram, outliers, registered
from cdam_cli.images import Found, digests, find_images
from cdam_cli.spelling import parse_minus, parse_target, spelled
from processes import interruptible
from scripted_server import Failure, Script, fail, not_found

Run = Callable[..., Result]
HEADS = ["for", "against", "file"]  # of a table of maps, at its end
ID = "0123456789abcdef" * 4
ADMIN_PORT = "this port does not serve cdam's API; is it the admin port? The API's is 8001 if it was not told otherwise"


@pytest.fixture
def run(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder of its own, not on a terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDAM_SERVER", script.address)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *words, **more: CliRunner().invoke(main, [str(word) for word in words], **more)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three files in two folders, of which one is no image."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["b.jpg", "a.PNG", "more/c.webp"]):
        image = Image.new("RGB", (6, 4), (40 * number, 0, 0))
        image.save(folder / name, {"b": "JPEG", "a": "PNG", "m": "WEBP"}[name[0]])
    (folder / "notes.txt").write_text("no image")
    return folder


def data(file: Path) -> bytes:
    return file.read_bytes()


def asked(script: Script) -> list[Any]:
    """What was asked, but for what a model is."""
    return [request for request in script.requests if not isinstance(request, model_pb2.GetModelRequest)]


def test_registering_a_folder(run: Run, script: Script, photos: Path) -> None:
    result = run("concept", "register", "loops", "photos", "--negative", "photos/notes.txt", "--timeout", 7)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: can't be read as JPEG, PNG or WebP: photos/notes.txt; nothing was registered\n"
    assert not script.requests
    Image.new("L", (2, 2)).save(photos.parent / "other.png")
    result = run(
        *("concept", "register", "loops", "photos", "--negative", "other.png", "--model", "second"),
        *("--description", "round things", "--label", "team=vision", "--label", "of=a=b", "--resize", "squash"),
        *("--input-size", "32x48", "--replace", "--expected-version", "0", "--timeout", "7"),
    )
    assert result.exit_code == 0
    assert result.stderr == "left out: 1 file that is no JPEG, PNG or WebP: photos/notes.txt\n"
    (sent,) = asked(script)
    files = [photos / name for name in ("a.PNG", "b.jpg", "more/c.webp")]
    assert [image.encoded for image in sent.examples] == list(map(data, files))
    assert [image.encoded for image in sent.negatives] == [data(photos.parent / "other.png")]
    assert (sent.spec.name, sent.spec.model, sent.spec.description) == ("loops", "second", "round things")
    assert dict(sent.spec.labels) == {"team": "vision", "of": "a=b"}
    assert (sent.spec.preprocessing.resize_mode, sent.spec.preprocessing.input_size.width) == (2, 48)
    assert (sent.spec.replace, sent.spec.HasField("expected_version"), sent.spec.expected_version) == (True, True, 0)
    assert script.seconds_left[0] < 7.1
    assert result.stdout.splitlines() == [
        "loops  version 1 of model second",
        f"  id      {hashlib.sha256(b'loops').hexdigest()}",
        "  made of 3 examples, 1 negative",
        "  spread  0.990, the mean cosine of the examples to their mean",
        "  lowest cosine 0.980: photos/more/c.webp",
    ]


def test_what_can_not_be_read_is_named_before_anything_is_sent(run: Run, script: Script, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.png").write_bytes(b"no image")
    Image.new("L", (2, 2)).save(folder / "good.png")
    Image.new("L", (2, 2)).save(folder / "other.tiff")
    Image.new("L", (2, 2)).save(folder / "renamed.jpg", "TIFF")
    (folder / "closed.webp").symlink_to("nowhere")
    result = run("concept", "register", "loops", "mixed/*")
    names = ", ".join(f"mixed/{number:02}.png" for number in range(16))
    assert result.stderr == f"Error: can't be read as JPEG, PNG or WebP: {names}, and 7 more; nothing was registered\n"
    result = run("concept", "register", "loops", "mixed/good.png", "mixed/other.tiff", "mixed/renamed.jpg")
    said = "mixed/other.tiff, mixed/renamed.jpg; nothing was registered"
    assert (result.exit_code, result.stderr) == (1, f"Error: can't be read as JPEG, PNG or WebP: {said}\n")
    assert not script.requests


def test_large_images_are_left_to_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (300, 300)).save(tmp_path / "large.png")
    for pixels in (50_000, 10_000):  # PIL warns, and PIL refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
        assert list(digests([tmp_path / "large.png"])) == [tmp_path / "large.png"]


def test_what_is_left_out_is_named(run: Run, script: Script, photos: Path) -> None:
    (photos / "copy.jpg").write_bytes(data(photos / "b.jpg"))
    (photos / ".DS_Store").write_bytes(b"")
    result = run("concept", "register", "loops", "photos", "photos/b.jpg")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "left out: 1 file that is no JPEG, PNG or WebP: photos/notes.txt",
        "left out: 1 duplicate: photos/copy.jpg",
    ]


def test_one_example_is_no_concept_yet(run: Run, script: Script, photos: Path) -> None:
    result = run("concept", "register", "loops", "photos/b.jpg")
    assert result.stdout.splitlines()[-1].strip() == "one example: this is that image, not yet a concept"
    assert "spread" not in result.stdout
    assert run("concept", "list").stdout.splitlines()[1].split()[5] == "-"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ", nothing changed"),
        (["--description", "round", "--label", "a=b"], ", nothing changed"),
        (["--description", "other"], ", with another description; --replace takes yours"),
        (["--label", "a=c"], ", with other labels; --replace takes yours"),
        (
            ["--label", "a=c", "--description", "other"],
            ", with another description and other labels; --replace takes yours",
        ),
    ],
)
def test_registered_already(run: Run, script: Script, photos: Path, words: list[str], said: str) -> None:
    run("concept", "register", "loops", "photos", "--description", "round", "--label", "a=b")
    script.created = False
    result = run("concept", "register", "loops", "photos", *words)
    assert result.stdout.splitlines()[0] == f"loops  version 1 of model first: already registered{said}"


def test_a_vector(run: Run, script: Script, tmp_path: Path) -> None:
    np.save(tmp_path / "axis.npy", np.arange(8.0))
    result = run("concept", "register", "axis", "--vector", "axis.npy")
    assert (result.exit_code, result.stderr) == (0, "")
    assert np.frombuffer(asked(script)[0].spec.vector.data, "<f4").tolist() == list(range(8))
    assert result.stdout.splitlines()[-1].strip() == "made of a vector"


def test_files_folders_and_patterns(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    below = [Path("a.PNG"), Path("b.jpg"), Path("more/c.webp")]
    assert find_images(["."]) == Found(below, [Path("notes.txt")])
    assert find_images(["**/*.webp", "*.jpg"]) == Found([below[2], below[1]], [])
    assert find_images(["b.jpg", ".", "b.jpg"]).images == [below[1], below[0], below[2]]
    assert find_images(["*.txt", "."]) == Found([Path("notes.txt"), *below], [])  # it is asked for
    assert find_images(["mor[e]"]).images == [below[2]]
    assert find_images([]) == Found([], [])
    (photos / "[1].png").write_bytes(b"")
    assert find_images(["[1].png"]).images == [Path("[1].png")]
    (photos / "empty").mkdir()
    for wrong, said in (
        ("nowhere.png", "no such file or folder"),
        ("*.gif", "matches no file"),
        ("empty", "below this folder"),
    ):
        with pytest.raises(click.UsageError, match=said):
            find_images([wrong])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["register", "loops"], "made of IMAGEs"),
        (["register", "loops", "photos", "--vector", "axis.npy"], "made of IMAGEs"),
        (["register", "loops", "--vector", "axis.npy", "--negative", "photos"], "made of IMAGEs"),
        (["register", "loops", "--negative", "photos"], "made of IMAGEs"),
        (["register", "loops", "nowhere"], "nowhere: no such file"),
        (["register", "loops", "photos", "--negative", "photos/b.jpg"], "photos/b.jpg: both an example and a negative"),
        (["register", "loops", "photos", "--label", "team"], "'team' is not KEY=VALUE"),
        (["register", "loops", "photos", "--label", "a=1", "--label", "a=2"], "'a' is given twice"),
        (["show", "--id", ID[:12]], "the whole id, 64 digits; `cdam concept show NAME` prints it"),
        (["register", "loops", "photos", "--expected-version", "-1"], "--expected-version"),
        (["register", "loops", "--vector", "photos/notes.txt"], "numpy.save"),
        (["register", "loops", "--vector", "pickled.npy"], "numpy.save"),
        (["register", "loops", "--vector", "square.npy"], "one row of numbers"),
        (["register", "loops", "--vector", "words.npy"], "one row of numbers"),
        (["show"], "NAME or --id"),
        (["show", "loops", "--id", ID], "NAME or --id"),
        (["show", "--id", ID, "--model", "first"], "--id goes without --model"),
        (["delete", "loops"], "--model"),
        (["delete", "loops", "--model", "first"], "--yes"),
        (["export"], "NAME or --all"),
        (["export", "loops", "--all"], "NAME or --all"),
        (["export", "--all", "-o", "axis.npy"], "a folder"),
        (["import"], "FILE"),
        (["import", "nowhere"], "nowhere"),
        (["import", "photos"], "no .safetensors file below photos"),
        (["import", "axis.npy", "photos/notes.txt", "--name", "x"], "--name is for a single file"),
        (["list", "--token", "t", "--server", "far:1"], "refusing to send a token in plaintext"),
    ],
)
def test_usage_errors(run: Run, script: Script, photos: Path, tmp_path: Path, words: list[str], said: str) -> None:
    np.save(tmp_path / "axis.npy", np.arange(8.0))
    np.save(tmp_path / "square.npy", np.ones((2, 2)))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "pickled.npy", np.array([print], object))
    result = run("concept", *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not script.requests


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            Failure(
                grpc.StatusCode.ALREADY_EXISTS,
                details=[details.ResourceInfo(resource_type="cdam.v1.concept", resource_name="loops")],
            ),
            "loops is there already, with other content; --replace makes a new version",
        ),
        (
            Failure(
                grpc.StatusCode.ABORTED,
                details=[details.ErrorInfo(reason="VERSION_MISMATCH", metadata={"current_version": "3"})],
            ),
            "loops is at version 3, not 2",
        ),
        (
            Failure(
                grpc.StatusCode.ABORTED,
                details=[details.ErrorInfo(reason="VERSION_MISMATCH", metadata={"current_version": "0"})],
            ),
            "loops is free, and has no version 2",
        ),
        (Failure(grpc.StatusCode.FAILED_PRECONDITION, "of another model\nat length"), "of another model"),
        (Failure(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"), ADMIN_PORT),
        (
            Failure(
                grpc.StatusCode.INVALID_ARGUMENT,
                details=[
                    details.BadRequest(
                        field_violations=[
                            details.BadRequest.FieldViolation(field="examples", description="more than 1000 images")
                        ]
                    )
                ],
            ),
            "more than 1000 images",
        ),
        *(
            (
                Failure(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    details=[
                        details.BadRequest(
                            field_violations=[details.BadRequest.FieldViolation(field=field, description="wrong")]
                        )
                    ],
                ),
                f"{option}: wrong",
            )
            for field, option in (
                ("examples[1].encoded", "example photos/b.jpg"),
                ("negatives[0]", "negative other.png"),
                ("spec.name", "NAME 'loops'"),
                ("spec.labels['team']", "--label"),
                ("spec.model", "--model"),
                ("spec.preprocessing.input_size", "--input-size"),
                ("spec.expected_version", "--expected-version"),
            )
        ),
    ],
)
def test_a_refusal_is_one_line(run: Run, script: Script, photos: Path, failure: Failure, said: str) -> None:
    Image.new("L", (2, 2)).save(photos.parent / "other.png")
    script.failures = [failure]
    result = run("concept", "register", "loops", "photos/[ab].*", "--negative", "other.png", "--expected-version", "2")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {said}\n")


@pytest.mark.parametrize(
    "words",
    [
        ["register", "loops", "photos/b.jpg"],
        ["list"],
        ["show", "loops"],
        ["delete", "loops", "--model", "m", "--yes"],
        ["export", "loops"],
        ["export", "--all"],
        ["import", "loops.safetensors", "loops.safetensors"],
    ],
)
def test_without_a_server(run: Run, photos: Path, tmp_path: Path, words: list[str]) -> None:
    assert run("concept", "register", "loops", "photos").exit_code == 0
    assert run("concept", "export", "loops").exit_code == 0
    result = run("concept", *words, "--server", "127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (1, "")
    said = "no server answers there (Connection refused); start one: cdam serve"
    assert result.stderr == f"Error: 127.0.0.1:1: {said}\n"


def test_listing(run: Run, script: Script, photos: Path, tmp_path: Path) -> None:
    assert run("concept", "list").stdout == "no concepts\n"
    assert json.loads(run("concept", "list", "--json").stdout) == []
    np.save(tmp_path / "axis.npy", np.arange(8.0))
    run("concept", "register", "axis", "--vector", "axis.npy")
    run("concept", "register", "loops", "photos", "--label", "team=vision", "--label", "a=b")
    run("concept", "register", "bars", "photos", "--negative", "photos/b.jpg")
    run("concept", "register", "strokes", "photos/a.PNG", "--negative", "photos/b.jpg")
    result = run("concept", "list", "--label", "team=vision", "--model", "first")
    assert dict(script.requests[-1].labels) == {"team": "vision"}
    assert script.requests[-1].model == "first"
    head, axis, loops, strokes = result.stdout.splitlines()
    assert head.split() == ["concept", "version", "model", "examples", "negatives", "spread", "stored", "id", "labels"]
    assert axis.split()[:6] == ["axis", "1", "first", "vector", "-", "-"]
    assert loops.split()[:6] == ["loops", "1", "first", "3", "-", "0.990"]
    assert loops.split()[-2:] == ["a=b,", "team=vision"]
    assert strokes.split()[3:6] == ["1", "1", "-"]
    listed = json.loads(run("concept", "list", "--json").stdout)
    assert [one["name"] for one in listed] == ["axis", "loops", "strokes"]
    assert listed[1]["labels"] == {"team": "vision", "a": "b"}
    assert listed[1]["create_time"] == "2024-05-06T07:08:09.500000+00:00"
    assert not {"vector", "examples", "negatives", "created"} & set(listed[1])


def test_what_others_wrote_does_not_steer_the_terminal(run: Run, photos: Path) -> None:
    evil = "\x1b[2J\x9b\u202efine\r\nfake  1\u2028"
    run("concept", "register", "evil", "photos", "--description", evil, "--label", f"team={evil}")
    for shown in (run("concept", "list").output, run("concept", "show", "evil").output):
        assert "\\x1b[2J\\x9b\\u202efine\\r\\nfake  1\\u2028" in shown
        assert not any(letter in shown for letter in "\x1b\x9b\u202e\r\u2028")


def test_showing(run: Run, script: Script, photos: Path) -> None:
    Image.new("L", (2, 2)).save(photos.parent / "other.png")
    run("concept", "register", "loops", "photos", "--negative", "other.png", "--description", "round things")
    result = run("concept", "show", "loops", "--model", "first")
    assert (result.exit_code, result.stderr) == (0, "")
    for said in ("round things", "3 examples, 1 negative", "32 x 48 pixels", "8 numbers, length 14.28", "f00d"):
        assert said in result.stdout
    assert "imported" not in result.stdout
    assert result.stdout.count("█") > result.stdout.count("░") > 0
    shown = json.loads(run("concept", "show", "--id", hashlib.sha256(b"loops").hexdigest(), "--json").stdout)
    assert (shown["name"], shown["vector"], len(shown["examples"])) == ("loops", list(range(1, 9)), 3)
    assert shown["negatives"][0]["cosine"] == 1
    missing = run("concept", "show", "strokes")
    assert (missing.exit_code, missing.stderr) == (1, "Error: no concept 'strokes'\n")


def _concept(cosines: list[float], negatives: list[float] = []) -> cdam.RegisteredConcept:  # noqa: B006 - not changed
    from datetime import UTC, datetime

    return cdam.RegisteredConcept(
        id=ID,
        name="loops",
        version=1,
        model="first",
        model_fingerprint="f00d",
        create_time=datetime.now(UTC),
        example_count=len(cosines),
        negative_count=len(negatives),
        spread=float(np.mean(cosines)),
        examples=tuple(cdam.ConceptExample(ID, cosine) for cosine in cosines),
        negatives=tuple(cdam.ConceptExample(ID, cosine) for cosine in negatives),
    )


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("negatives", [[], [0.3, 0.31, 0.9]])
def test_the_histogram_fits_and_counts(width: int, negatives: list[float]) -> None:
    cosines = np.linspace(-0.2, 1, 300) ** 2
    lines = list(histogram(_concept(cosines.tolist(), negatives), width))
    assert max(map(len, lines)) <= max(width, 95)
    rows = [line.split() for line in lines[1:]]
    assert [row[0] for row in rows] == [f"{n / 10:.2f}" for n in range(9, -1, -1)]  # the best above, in round numbers
    assert [row[2] for row in rows] == [f"{n / 10:.2f}" for n in range(10, 0, -1)]
    assert sum(int(row[3]) for row in rows if len(row) > 3 and row[4][0] == "█") == 300
    assert sum(line.count("░") > 0 for line in lines) == (2 if negatives else 0)
    longest = max(rows, key=lambda row: int(row[3]))
    assert longest[4].count("█") == max(line.count("█") for line in lines)


@pytest.mark.parametrize("cosines", [[1.0], [0.5, 0.5], [1.0] * 2000, [-1.0, 1.0], [0.29, 0.57, 0.58], [1 + 1e-9]])
def test_histograms_of_few_or_equal_cosines(cosines: list[float]) -> None:
    lines = list(histogram(_concept(cosines), 80))
    assert max(map(len, lines)) <= 80
    assert sum(int(line.split()[3]) for line in lines[1:] if "█" in line) == len(cosines)


@pytest.mark.parametrize(
    ("cosines", "far"),
    [
        ([0.98, 0.99, 0.99, 0.97, 0.985, 0.99], []),  # as of noise
        ([0.38, 0.28, 0.35, 0.42, 0.31, 0.4, 0.25], []),  # low, and all alike
        ([0.9, 0.95, 0.92, -0.2, 0.94, 0.1], [-0.2, 0.1]),
        ([0.4, 0.1, 0.7, 0.5, -0.01, 0.6], [-0.01]),
        ([0.7, 0.7], []),
        ([-1.0, 1.0], [-1.0]),
        ([1.0], []),
    ],
)
def test_outliers_are_far_below_the_others(cosines: list[float], far: list[float]) -> None:
    assert [example.cosine for example in outliers(_concept(cosines).examples)] == far


def test_outliers_are_aligned_and_few() -> None:
    concept = _concept([0.9 + number / 1000 for number in range(40)] + [0.07, -0.11, 0.05, 0.06, 0.04, 0.03])
    lines = registered(concept, {ID: Path("a.jpg")}).splitlines()[-6:]
    assert lines == [
        "  far from the others, by cosine to the mean: 6 of 46 examples",
        *(f"    {cosine}  a.jpg" for cosine in ("-0.110", " 0.030", " 0.040", " 0.050", " 0.060")),
    ]


def test_deleting(run: Run, script: Script, photos: Path) -> None:
    run("concept", "register", "loops", "photos")
    result = run("concept", "delete", "loops", "--model", "second", "--expected-version", "7", "--yes")
    assert (result.exit_code, result.stderr) == (0, "")
    assert hashlib.sha256(b"loops").hexdigest() in result.stdout
    (sent,) = asked(script)[1:]
    assert (sent.name, sent.model, sent.expected_version) == ("loops", "second", 7)
    again = run("concept", "delete", "loops", "--model", "second", "--yes")
    assert (again.exit_code, again.stderr) == (1, "Error: no concept 'loops'\n")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """More images than travel in one message, and than can be under way unheard."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(80):
        Image.new("L", (2, 2), number).save(folder / f"{number:02}.png")
        with (folder / f"{number:02}.png").open("ab") as file:
            file.write(bytes(500_000))
    return folder


def test_a_registration_that_is_interrupted(script: Script, many: Path) -> None:
    heard, over = threading.Event(), threading.Event()

    def take(requests: Iterator[Any], context: Any) -> Iterator[Any]:
        context.add_callback(over.set)
        yield from itertools.islice(requests, 5)
        heard.set()
        over.wait(60)

    script.take = take  # type: ignore[method-assign]
    command = [sys.executable, "-m", "cdam_cli", "concept", "register", "loops", "many"]
    environment = {**os.environ, "CDAM_SERVER": script.address, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with interruptible():
        process = subprocess.Popen(command, cwd=many.parent, env=environment, text=True, **pipes)
    with process:
        assert heard.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "Aborted: nothing was registered.\n")
    assert process.returncode == 1


def test_a_server_that_goes_away_in_the_middle(run: Run, script: Script, many: Path) -> None:
    soon = Failure(grpc.StatusCode.UNAVAILABLE, "going down", [details.RetryInfo(retry_delay=Duration(nanos=1))])

    def take(requests: Iterator[Any], context: Any) -> Iterator[Any]:
        yield from itertools.islice(requests, 5)
        fail(context, soon)

    script.take = take  # type: ignore[method-assign]
    result = run("concept", "register", "loops", "many")
    said = f"Error: {script.address}: going down; nothing was registered; repeat the command\n"
    assert (result.exit_code, result.output) == (1, said)
    assert len(script.uploads) == 11


def _on_a_terminal(script: Script, folder: Path, *words: object, typed: str = "") -> tuple[int, str]:
    """Run a command on a terminal; its exit code, and what is seen there."""
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "cdam_cli", "concept", *map(str, words)]
    environment = {**os.environ, "CDAM_SERVER": script.address, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, cwd=folder, env=environment) as process:
        os.close(its)
        os.write(ours, typed.encode())
        seen = b""
        with suppress(OSError):  # how Linux says that nobody writes there any more
            while piece := os.read(ours, 4096):
                seen += piece
        os.close(ours)
        return process.wait(60), seen.decode()


@pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("n\n", False)])
def test_deleting_asks_on_a_terminal(run: Run, script: Script, photos: Path, answer: str, gone: bool) -> None:
    run("concept", "register", "loops", "photos")
    code, seen = _on_a_terminal(script, photos, "delete", "loops", "--model", "first", typed=answer)
    assert (code == 0, "loops" not in script.concepts) == (gone, gone)
    assert "Delete loops, version 1 of model first?" in seen
    if gone:
        assert script.requests[-1].expected_version == 1  # the one that was asked about


def test_a_bar_on_a_terminal_for_many_images(run: Run, script: Script, many: Path, tmp_path: Path) -> None:
    code, seen = _on_a_terminal(script, tmp_path, "register", "loops", "many")
    assert code == 0
    assert len(script.uploads[0]) == 81
    assert "80/80" in seen
    result = run("concept", "register", "loops", "many")
    assert result.stderr == ""  # none elsewhere


def test_an_export_of_all_overwrites_nothing_of_its_own(run: Run, photos: Path) -> None:
    for name, model in (("loops", "a b"), ("LOOPS", "a b"), ("Loops", "a_b"), ("loops_2", "a b")):
        run("concept", "register", name, "photos", "--model", model)
    files = [Path(line) for line in run("concept", "export", "--all", "-o", "out").stdout.splitlines()]
    assert len({str(file).casefold() for file in files}) == 4
    exported = {(found.name, found.model) for found in map(cdam.load_concept, (photos.parent / file for file in files))}
    assert exported == {("loops", "a b"), ("LOOPS", "a b"), ("Loops", "a_b"), ("loops_2", "a b")}


def test_export_and_import(run: Run, script: Script, photos: Path, tmp_path: Path) -> None:
    run("concept", "register", "loops", "photos", "--label", "team=vision")
    run("concept", "register", "bars", "photos/a.PNG", "--model", "se/cond")
    assert run("concept", "export", "loops").stdout == "loops.safetensors\n"
    assert run("concept", "export", "loops", "-o", "mine").stdout == "mine\n"
    assert run("concept", "export", "loops", "-o", "photos").stdout == "photos/loops.safetensors\n"
    result = run("concept", "export", "--all", "-o", "all/of/them")
    assert result.stdout.split() == ["all/of/them/se_cond/bars.safetensors", "all/of/them/first/loops.safetensors"]
    missing = run("concept", "export", "strokes")
    assert (missing.exit_code, missing.stderr) == (1, "Error: no concept 'strokes'\n")
    script.requests.clear()
    result = run("concept", "import", "mine", "--name", "rings", "--replace", "--model", "second")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("mine  rings  version 1 of model second, id ")
    (sent,) = script.requests
    assert (sent.spec.name, sent.spec.replace, len(sent.spec.origin.examples)) == ("rings", True, 3)
    shown = run("concept", "show", "rings").stdout
    assert "3 examples, imported: as the export says, not verified here" in shown
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    result = run("concept", "import", "broken.safetensors", "all", "mine")
    assert result.exit_code == 1
    (said,) = result.stderr.splitlines()
    assert said.startswith("Error: broken.safetensors: no safetensors file")
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["loops", "bars", "loops"]
    script.failures = [Failure(grpc.StatusCode.FAILED_PRECONDITION, "of another model")]
    result = run("concept", "import", "mine", "all", "--model", "first")
    assert result.stderr == "Error: mine: of another model\n"
    assert len(result.stdout.splitlines()) == 2


def test_an_export_makes_folders(run: Run, script: Script, photos: Path, tmp_path: Path) -> None:
    run("concept", "register", "loops", "photos")
    run("concept", "register", ".loops", "photos")
    assert run("concept", "export", "loops", "-o", "new/er/").stdout == "new/er/loops.safetensors\n"
    assert run("concept", "export", ".loops", "-o", "other/x").stdout == "other/x\n"
    assert run("concept", "export", ".loops").stdout == "_.loops.safetensors\n"
    missing = run("concept", "export", "strokes", "-o", "nothing/")
    assert missing.exit_code == 1
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").write_text("")
    wrong = run("concept", "export", "loops", "-o", "file/x")
    assert (wrong.exit_code, wrong.stderr) == (1, "Error: file: File exists\n")


def test_where_there_is_no_concept_or_no_model(run: Run, script: Script) -> None:
    nothing = run("concept", "export", "--all", "--model", "first")
    assert (nothing.exit_code, nothing.output) == (0, "no concepts\n")
    assert run("concept", "list", "--model", "first").stdout == "no concepts\n"
    script.unknown_models = ("nope",)
    for words in (["export", "--all"], ["list"]):
        result = run("concept", *words, "--model", "nope")
        assert (result.exit_code, result.output) == (1, "Error: there is no model 'nope'\n")


def test_what_was_meant(run: Run, script: Script, photos: Path) -> None:
    run("concept", "register", "loops", "photos", "--model", "first")
    run("concept", "register", "rings", "photos", "--model", "second")
    said = "Error: no concept 'lops'; did you mean 'loops'?\n"
    assert run("concept", "show", "lops").stderr == said
    assert run("concept", "delete", "lops", "--model", "first", "--yes").stderr == said
    assert run("concept", "export", "lops").stderr == said
    assert run("concept", "show", "lops", "--model", "second").stderr == "Error: no concept 'lops'\n"
    script.failures = [not_found("rings")]
    assert run("concept", "show", "rings").stderr.endswith("; model 'second' has one: --model second\n")
    script.failures = [not_found("rings")]
    result = run("explain", "photos/b.jpg", "photos/a.PNG", "-t", "concept:rings", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: no concept 'rings'; model 'second' has one: --model second\n"
    output = details.ResourceInfo(resource_type="cdam.v1.output", resource_name="loops")
    script.failures = [Failure(grpc.StatusCode.NOT_FOUND, "no output named 'loops'", [output])]
    result = run("explain", "photos/b.jpg", "-t", "loops", "--json")
    assert result.stderr == "Error: no output named 'loops'; for the concept: -t concept:loops\n"
    script.failures = [not_found("rings"), Failure(grpc.StatusCode.INTERNAL)]  # a hint is not owed
    assert run("concept", "show", "rings").stderr == "Error: no concept 'rings'\n"


def test_a_name_of_a_concept_is_no_path(run: Run, script: Script, photos: Path, tmp_path: Path) -> None:
    run("concept", "register", "loops", "photos")
    script.concepts["loops"].name = "../loops"
    result = run("concept", "export", "--all", "-o", "out")
    assert result.exit_code == 1
    assert "'../loops'" in result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


# --- in cdam explain


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("concept:loops", cdam.Concept("loops")),
        ("concept:loops:cosine", cdam.Concept("loops", similarity="cosine")),
        ("concept:l2:l2", cdam.Concept("l2", similarity="l2")),
        ("concept:a.b-c_D7:dot", cdam.Concept("a.b-c_D7")),
        (f"concept:id={ID}", cdam.Concept(id=ID)),
        (f"concept:id={ID}:cosine", cdam.Concept(id=ID, similarity="cosine")),
        (f"concept:{ID}", cdam.Concept(ID)),
        ("name:concept:loops", cdam.Output("concept:loops")),
        ("concept car", cdam.Output("concept car")),
        ("concept", cdam.Output("concept")),
    ],
)
def test_concepts_as_targets(text: str, target: cdam.Target) -> None:
    assert parse_target(text) == parse_minus(text) == target
    if isinstance(target, cdam.Concept):
        assert parse_target(spelled(target)) == target


@pytest.mark.parametrize(
    "text",
    ["concept:", "concept:a b", "concept:loops:", "concept:loops:l1", "concept:id=12", "concept:ü", "concept:a:b:c"],
)
def test_what_is_no_concept(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_target(text)


def test_explaining_concepts(run: Run, script: Script, photos: Path, tmp_path: Path) -> None:
    run("concept", "register", "loops", "photos")
    script.requests.clear()
    by_id = f"concept:id={hashlib.sha256(b'loops').hexdigest()}"
    result = run("explain", "photos/b.jpg", "-t", "concept:loops", "-t", "concept:loops:cosine", "-o", "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[1].split() == ["target", "method", "value", "probability", *HEADS]
    (sent,) = script.requests
    assert [(t.concept.name, t.concept.similarity) for t in sent.targets] == [("loops", 1), ("loops", 2)]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["b.json", "b.loops.cdam.png", "b.loops_cosine.cdam.png"]
    assert "loops (cosine)" in result.stdout
    mixed = run("explain", "photos/b.jpg", "-t", by_id, "-t", "7", "-t", "concept:loops", "-o", "out").stdout
    head, first, output, _ = mixed.splitlines()[1:5]
    assert head.split() == ["target", "method", "value", "probability", "for", "against", "concept", "file"]
    assert (first.split()[6], output.split()[6]) == (by_id[11:23], "-")
    assert "logit" in run("explain", "photos/b.jpg", "-t", "7", "-o", "out").stdout
    written = run("explain", "photos/b.jpg", "--json", "-t", f"{by_id}:cosine", "-t", "7", "--minus", by_id)
    one, other = (relevance["target"]["contrast"] for relevance in json.loads(written.stdout)["maps"])
    concept_id = by_id.removeprefix("concept:id=")
    assert one["positive"] == {"concept": {"id": concept_id, "name": None, "similarity": "cosine"}}
    assert other["positive"] == {"output": "7"}
    assert other["negative"] == {"concept": {"id": concept_id, "name": None, "similarity": "dot"}}
    run("explain", "photos/b.jpg", "--json", "-t", "7", "-t", "concept:loops", "--minus", "concept:bars:l2")
    first, second = script.requests[-1].targets
    assert (first.contrast.positive.output.name, first.contrast.negative.concept.name) == ("7", "bars")
    assert (second.contrast.positive.concept.name, second.contrast.negative.concept.similarity) == ("loops", 3)
    run("bench", "--duration", "0.2", "--warm-up", "0", "--callers", "1", "-t", "concept:loops")
    assert script.requests[-1].targets[0].concept.name == "loops"


def test_help(run: Run) -> None:
    for command in ("register", "list", "show", "delete", "export", "import"):
        assert command in run("concept", "--help").stdout
        result = run("concept", command, "--help")
        assert result.exit_code == 0
        assert "--token-file" in result.stdout
    assert "concept:loops:cosine" in run("explain", "--help").stdout
