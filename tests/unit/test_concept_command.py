"""`cdam concept`, and concepts in `cdam explain`, against a scripted server."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import click
import grpc
import numpy as np
import pytest
from click.testing import CliRunner, Result
from google.rpc import error_details_pb2 as details
from PIL import Image

import cdam
from cdam_server.cli import main
from cdam_server.cli.concept_report import histogram, is_loose
from cdam_server.cli.images import find_images
from cdam_server.cli.spelling import parse_minus, parse_target, spelled
from scripted_server import Failure, Script, serving

Run = Callable[..., Result]
ID = "0123456789abcdef" * 4


@pytest.fixture
def script() -> Iterator[Script]:
    with serving(Script()) as script:
        yield script


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


def test_registering_a_folder(run: Run, script: Script, photos: Path) -> None:
    result = run("concept", "register", "loops", "photos", "--negative", "photos/notes.txt", "--timeout", 7)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: photos/notes.txt: not an image that can be read, send a JPEG, PNG or WebP file\n"
    Image.new("L", (2, 2)).save(photos.parent / "other.png")
    result = run(
        *("concept", "register", "loops", "photos", "--negative", "other.png", "--model", "second"),
        *("--description", "round things", "--label", "team=vision", "--label", "of=a=b", "--resize", "squash"),
        *("--input-size", "32x48", "--replace", "--expected-version", "0", "--timeout", "7"),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    (sent,) = script.requests
    files = [photos / name for name in ("a.PNG", "b.jpg", "more/c.webp")]
    assert [image.encoded for image in sent.examples] == list(map(data, files))
    assert [image.encoded for image in sent.negatives] == [data(photos.parent / "other.png")]
    assert (sent.spec.name, sent.spec.model, sent.spec.description) == ("loops", "second", "round things")
    assert dict(sent.spec.labels) == {"team": "vision", "of": "a=b"}
    assert (sent.spec.preprocessing.resize_mode, sent.spec.preprocessing.input_size.width) == (2, 48)
    assert (sent.spec.replace, sent.spec.HasField("expected_version"), sent.spec.expected_version) == (True, True, 0)
    assert script.seconds_left[0] < 7.1
    head, whole, made_of, spread, _, *worst = result.stdout.splitlines()
    concept_id = hashlib.sha256(b"loops").hexdigest()
    assert head == f"loops  version 1 of model second, id {concept_id[:12]}"
    assert concept_id in whole
    assert made_of.strip() == "made of 3 examples, 1 negative"
    assert spread.split()[:2] == ["spread", "0.990,"]
    assert "about 0.58" in spread
    assert [line.split() for line in worst] == [  # the worst first
        ["0.980", "photos/more/c.webp"],
        ["0.990", "photos/b.jpg"],
        ["1.000", "photos/a.PNG"],
    ]


def test_the_examples_that_fit_worst_are_named_however_they_travel(run: Run, script: Script, tmp_path: Path) -> None:
    for number in range(40):
        Image.new("L", (2, 2), number).save(tmp_path / f"{number:02}.bmp")  # travels as pixels
    result = run("concept", "register", "loops", "*.bmp")
    assert len(script.requests[0].examples) == 40
    assert "next to nothing in common" not in result.stdout
    worst = [line.split()[1] for line in result.stdout.splitlines()[-5:]]
    assert worst == ["39.bmp", "38.bmp", "37.bmp", "36.bmp", "35.bmp"]


def test_registered_already(run: Run, script: Script, photos: Path) -> None:
    script.created = False
    result = run("concept", "register", "loops", "photos")
    assert result.stdout.splitlines()[0].endswith(": already registered, nothing changed")


def test_a_vector(run: Run, script: Script, tmp_path: Path) -> None:
    np.save(tmp_path / "axis.npy", np.arange(8.0))
    result = run("concept", "register", "axis", "--vector", "axis.npy")
    assert (result.exit_code, result.stderr) == (0, "")
    assert np.frombuffer(script.requests[0].spec.vector.data, "<f4").tolist() == list(range(8))
    assert result.stdout.splitlines()[-1].strip() == "made of a vector"


def test_files_folders_and_patterns(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    below = [Path("a.PNG"), Path("b.jpg"), Path("more/c.webp")]
    assert find_images(["."]) == below
    assert find_images(["**/*.webp", "*.jpg"]) == [below[2], below[1]]
    assert find_images(["b.jpg", ".", "b.jpg"]) == [below[1], below[0], below[2]]
    assert find_images(["*.txt"]) == [Path("notes.txt")]  # it is asked for
    assert find_images(["mor[e]"]) == [below[2]]
    assert find_images([]) == []
    (photos / "[1].png").write_bytes(b"")
    assert find_images(["[1].png"]) == [Path("[1].png")]
    (photos / "empty").mkdir()
    for wrong, said in (("nowhere.png", "no such file"), ("*.gif", "no such file"), ("empty", "below this folder")):
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
        (["import", "axis.npy", "axis.npy", "--name", "x"], "--name is for a single file"),
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
            "the newest version is 3, not the expected one",
        ),
        (
            Failure(
                grpc.StatusCode.ABORTED,
                details=[details.ErrorInfo(reason="VERSION_MISMATCH", metadata={"current_version": "0"})],
            ),
            "the name is free, and has no version as expected",
        ),
        (Failure(grpc.StatusCode.FAILED_PRECONDITION, "of another model\nat length"), "of another model"),
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
                ("examples", "example"),
                ("spec.name", "NAME"),
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
    result = run("concept", "register", "loops", "photos", "--negative", "other.png")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {said}\n")


@pytest.mark.parametrize(
    "words",
    [
        ["register", "loops", "photos"],
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
    assert result.stderr.startswith("Error: 127.0.0.1:1: no server answers there (")
    assert len(result.stderr.splitlines()) == 1


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
    assert strokes.split()[3:5] == ["1", "1"]
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
    assert "as an export says" not in result.stdout
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
    assert max(map(len, lines)) <= max(width, 50)
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
    ("count", "pair", "loose"), [(2, 0.0, True), (2, 0.3, False), (40, 0.05, True), (40, 0.15, False), (1, 1.0, False)]
)
def test_a_low_spread_depends_on_the_number_of_examples(count: int, pair: float, loose: bool) -> None:
    """Directions with the same cosine between any two."""
    gram = np.full((count, count), pair) + (1 - pair) * np.eye(count)
    cosines = gram.mean(axis=1) / np.sqrt(gram.mean())
    assert is_loose(_concept(cosines.tolist())) is loose


def test_deleting(run: Run, script: Script, photos: Path) -> None:
    run("concept", "register", "loops", "photos")
    result = run("concept", "delete", "loops", "--model", "second", "--expected-version", "7", "--yes")
    assert (result.exit_code, result.stderr) == (0, "")
    assert hashlib.sha256(b"loops").hexdigest() in result.stdout
    (sent,) = script.requests[1:]
    assert (sent.name, sent.model, sent.expected_version) == ("loops", "second", 7)
    again = run("concept", "delete", "loops", "--model", "second", "--yes")
    assert (again.exit_code, again.stderr) == (1, "Error: no concept 'loops'\n")


def _on_a_terminal(script: Script, folder: Path, *words: object, typed: str = "") -> tuple[int, str]:
    """Run a command on a terminal; its exit code, and what is seen there."""
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "cdam_server.cli", "concept", *map(str, words)]
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


def test_a_bar_on_a_terminal_for_many_images(run: Run, script: Script, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(80):
        Image.new("L", (2, 2), number).save(tmp_path / "many" / f"{number:02}.png")
    code, seen = _on_a_terminal(script, tmp_path, "register", "loops", "many")
    assert code == 0
    assert len(script.uploads[0]) == 81
    assert "80/80" in seen
    result = run("concept", "register", "loops", "many")
    assert result.stderr == ""  # none elsewhere


def test_an_export_of_all_overwrites_nothing_of_its_own(run: Run, photos: Path) -> None:
    for name, model in (("loops", "a b"), ("LOOPS", "a b"), ("Loops", "a_b")):
        run("concept", "register", name, "photos", "--model", model)
    files = [Path(line) for line in run("concept", "export", "--all", "-o", "out").stdout.splitlines()]
    assert len({str(file).casefold() for file in files}) == 3
    exported = {(found.name, found.model) for found in map(cdam.load_concept, (photos.parent / file for file in files))}
    assert exported == {("loops", "a b"), ("LOOPS", "a b"), ("Loops", "a_b")}


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
    assert "3 examples, as an export says" in shown
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
    result = run("explain", "photos/b.jpg", "-t", "concept:loops", "-t", "concept:loops:cosine", "-o", "out")
    assert (result.exit_code, result.stderr) == (0, "")
    (sent,) = script.requests
    assert [(t.concept.name, t.concept.similarity) for t in sent.targets] == [("loops", 1), ("loops", 2)]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["b.json", "b.loops.cdam.png", "b.loops_cosine.cdam.png"]
    assert "loops (cosine)" in result.stdout
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
