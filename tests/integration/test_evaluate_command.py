"""`cdam evaluate` on a real server of the demo model."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cdam_server.demo.scenes import Scene, draw_scene
from in_this_process import served
from processes import interruptible

Evaluate = Callable[..., subprocess.CompletedProcess[str]]
CHEAP = ("-m", "cdam", "-m", "random", "--metric", "fidelity:points=3,unit=patch", "--metric", "sparseness")
KEPT = "samples are measured and kept; the same command goes on from there"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with served(data_dir=folder) as address:
        yield address


@pytest.fixture
def begin(address: str, tmp_path: Path) -> Callable[..., Any]:
    """Begins the command, in a folder of its own."""

    def begin(*words: object, server: str = address, **pipes: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "CDAM_SERVER": server, "PYTHONPATH": os.pathsep.join(sys.path)}
        line = [sys.executable, "-m", "cdam_cli", "evaluate", *map(str, words)]
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
        with interruptible():
            return subprocess.Popen(line, text=True, cwd=tmp_path, env=environment, **given)

    return begin


@pytest.fixture
def evaluate(begin: Callable[..., Any]) -> Evaluate:
    def evaluate(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        with begin(*words, **options) as process:
            stdout, stderr = process.communicate(timeout=240)
        return subprocess.CompletedProcess(words, process.returncode, stdout, without_progress(stderr))

    return evaluate


def without_progress(stderr: str) -> str:
    """What was said, but for the lines that a slow run writes every 15 s."""
    return re.sub(r"(?m)^\d+ of \d+ samples(, \d+ failed)?, \S+ a second, \d+ s left\n", "", stderr)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def same_numbers(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Rows and comparisons are the same, to 1e-6."""
    assert (one["samples"], one["failures"]) == (other["samples"], other["failures"])
    for name in ("rows", "comparisons"):
        assert len(one[name]) == len(other[name]) > 0
        for mine, its in zip(one[name], other[name], strict=True):
            assert mine.keys() == its.keys()
            for key, value in mine.items():
                close = pytest.approx(its[key], rel=1e-6, abs=1e-6) if isinstance(value, float) else its[key]
                assert value == close, (key, mine, its)


def lines(folder: Path) -> list[dict[str, Any]]:
    """What the journal has on samples, whole lines alone."""
    path = folder / "samples.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return [line for line in map(json.loads, whole) if "id" in line]


def save(scene: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(path)


def test_the_demo_scenes_from_end_to_end(evaluate: Evaluate, tmp_path: Path) -> None:
    words = (
        "demo-scenes:4",
        "--metric",
        "fidelity:points=3",
        "--metric",
        "mask_agreement",
        "--metric",
        "counterfactual",
    )
    done = evaluate(*words, "--resamples", 50, "--examples", 2, "-o", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("demo-scenes:4  demo, 4 samples; mean ± standard error\n")
    written = [line for line in done.stdout.splitlines() if line.startswith("out/")]
    assert written == ["out/report.html", "out/summary.json", "out/samples.csv", "out/samples.parquet"]
    assert all((tmp_path / name).stat().st_size for name in written)
    said = summary(tmp_path / "out")
    methods = ["cdam", "smooth_cdam", "integrated_cdam", "attention", "random", "mask"]
    assert (said["samples"], said["failures"]) == (4, 0)
    fidelity, *_ = measured = said["protocol"]["metrics"]
    assert (fidelity["name"], fidelity["points"], fidelity["unit"]) == ("fidelity:points=3", 3, "pixel")
    assert not any(None in metric.values() for metric in measured)  # with every default filled in
    assert " -o out " in said["command"]
    assert list(dict.fromkeys(row["method"] for row in said["rows"])) == methods
    means = {(row["method"], row["quantity"]): row["mean"] for row in said["rows"]}
    assert means["mask", "pointing_game"] == 1
    assert means["mask", "auroc"] > 0.98 > means["random", "auroc"]
    assert means["cdam", "a_lif"] > means["cdam", "a_mif"]
    with (tmp_path / "out" / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 6 * (5 + 4 + 3)
    mean = sum(float(row["value"]) for row in rows if (row["method"], row["quantity"]) == ("cdam", "a_mif")) / 4
    assert mean == pytest.approx(means["cdam", "a_mif"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") == 2 * (2 + 4)  # of two samples: the image, the object, and the methods' maps
    # Once more: nothing is left to measure, and other resamples or fewer examples are no other evaluation.
    before = (tmp_path / "out" / "samples.jsonl").read_text()
    done = evaluate(*words, "--resamples", 60, "--examples", 0, "-o", "out")
    assert (done.returncode, done.stderr) == (0, "going on: 4 of 4 samples are known\n")
    assert summary(tmp_path / "out")["protocol"] == {**said["protocol"], "resamples": 60}
    assert "<img " not in (tmp_path / "out" / "report.html").read_text()
    after = (tmp_path / "out" / "samples.jsonl").read_text()
    assert [line for line in after.splitlines() if line not in before.splitlines() and "run" not in line] == []
    refused = evaluate(*words, "--seed", 1, "-o", "out")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        "Error: out/samples.jsonl is of another evaluation: its seed: 0, now: 1; -o another folder, or --overwrite\n"
    )
    assert (tmp_path / "out" / "samples.jsonl").read_text() == after


@contextmanager
def interrupted(begin: Callable[..., Any], folder: Path, words: tuple[object, ...], how: int) -> Iterator[Any]:
    """A run that got this signal once it had measured two samples, and that has ended."""
    with begin(*words) as process:
        try:
            while len(lines(folder)) < 2:
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            process.send_signal(how)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_interrupted_goes_on(
    begin: Callable[..., Any], evaluate: Evaluate, tmp_path: Path, how: int
) -> None:
    words = ("samples.csv", *CHEAP, "--resamples", 50, "--examples", 0)
    rows = ["image,target"]
    for seed in range(40):
        scene = draw_scene("test", seed, 1)
        save(scene, tmp_path / f"images/{seed}.png")
        rows.append(f"images/{seed}.png,{scene.labels[0]}")
    (tmp_path / "samples.csv").write_text("\n".join(rows) + "\n")
    # A pipe that nobody writes to stops the run here, however slow these tests are to interrupt it. To take this sample it
    # must have the results of those before, but for a window of 32.
    late = tmp_path / "images/36.png"
    image = late.read_bytes()
    late.unlink()
    os.mkfifo(late)
    with interrupted(begin, tmp_path / "cut", (*words, "-o", "cut"), how) as process:
        stdout, stderr = process.communicate(timeout=120)
    late.unlink()
    late.write_bytes(image)
    there = len(lines(tmp_path / "cut"))
    assert 2 <= there < 40  # else the test is not one
    assert stdout == ""
    if how == signal.SIGINT:
        assert (process.returncode, without_progress(stderr)) == (1, f"Aborted: {there} of 40 {KEPT}.\n")
    assert not (tmp_path / "cut" / "report.html").exists()
    for folder in ("cut", "whole"):
        assert evaluate(*words, "-o", folder).returncode == 0
    same_numbers(summary(tmp_path / "cut"), summary(tmp_path / "whole"))
    assert len(lines(tmp_path / "cut")) == len(lines(tmp_path / "whole")) == 40  # none was measured twice


def test_a_folder_whose_images_are_not_all_sound(evaluate: Evaluate, tmp_path: Path) -> None:
    for seed in range(4):
        scene = draw_scene("test", seed, 1)
        save(scene, tmp_path / "photos" / str(scene.labels[0]) / f"{seed}.png")
    broken = next((tmp_path / "photos").glob("*/1.png"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[:300])
    (broken.parent / "text.png").write_text("no image")
    words = ("photos", *CHEAP, "--resamples", 50, "--examples", 1, "-o", "out")
    done = evaluate(*words)
    assert done.returncode == 0
    name = broken.relative_to(tmp_path / "photos")
    said = summary(tmp_path / "out")
    assert (said["samples"], said["failures"]) == (3, 2)
    assert {failed["id"]: failed["code"] for failed in said["failed"]} == {
        str(name): "INVALID_ARGUMENT",
        str(name.with_name("text.png")): "INVALID_ARGUMENT",
    }
    assert done.stderr.startswith("2 failed: ")
    assert f"{name}: image: is damaged or truncated" in done.stderr
    assert said["dataset"]["notes"] == ["classes by the folders' names"]
    measured = len(lines(tmp_path / "out"))
    broken.write_bytes(whole)  # what failed is tried again, and nothing else
    assert evaluate(*words).returncode == 0
    assert (summary(tmp_path / "out")["samples"], summary(tmp_path / "out")["failures"]) == (4, 1)
    assert {line["id"] for line in lines(tmp_path / "out")[measured:]} == {failed["id"] for failed in said["failed"]}
    (broken.parent / "text.png").unlink()
    measured = len(lines(tmp_path / "out"))
    save(draw_scene("test", 4, 1), broken.with_name("4.png"))
    other = evaluate(*words)
    assert (other.returncode, other.stderr) == (0, "going on: 4 of 5 samples are known\n")
    assert (summary(tmp_path / "out")["samples"], summary(tmp_path / "out")["failures"]) == (5, 0)
    assert [line["id"] for line in lines(tmp_path / "out")[measured:]] == [str(name.with_name("4.png"))]


def test_a_table_with_masks(evaluate: Evaluate, tmp_path: Path) -> None:
    rows = ["image,target,mask,counterfactual,wrong_target,id"]
    for seed in range(3):
        scene = draw_scene("test", seed, 2)
        save(scene, tmp_path / f"images/{seed}.png")
        save(scene.without(0), tmp_path / f"images/{seed}_without.png")
        Image.fromarray(scene.objects[0].mask).save(tmp_path / f"images/{seed}_mask.png")
        right, wrong = scene.labels
        rows.append(f"images/{seed}.png,{right},images/{seed}_mask.png,images/{seed}_without.png,#{wrong},")
    rows.append("images/nowhere.png,3,images/0_mask.png,images/0_without.png,4,")
    rows.append("images/0.png,3,,images/0_without.png,4,without a mask")
    (tmp_path / "samples.csv").write_text("\n".join(rows) + "\n")
    words = ("samples.csv", "-m", "cdam", "-m", "attention", "--metric", "mask_agreement", "--metric", "counterfactual")
    done = evaluate(*words, "--metric", "sparseness", "--resamples", 50, "--examples", 1, "-o", "out")
    assert done.returncode == 0, done.stderr
    said = summary(tmp_path / "out")
    assert (said["samples"], said["failures"]) == (3, 2)
    reasons = {failed["id"]: failed["message"] for failed in said["failed"]}
    assert reasons["images/nowhere.png"] == "images/nowhere.png: No such file or directory"
    assert reasons["without a mask"] == "mask: is required by mask_agreement"
    # What a file's sample measures is what the same pixels do from memory.
    rest = [str(tmp_path / "samples.csv"), *words[1:]]
    again = evaluate(*rest, "--metric", "sparseness", "--limit", 2, "--resamples", 50, "--examples", 0, "-o", "two")
    assert (again.returncode, again.stderr) == (0, "")
    assert summary(tmp_path / "two")["samples"] == 2


def test_nothing_can_be_measured(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text("image,target\n" + "".join(f"{name}.png,3\n" for name in "abcde"))
    done = evaluate("samples.csv", *CHEAP, "-o", "out")
    assert (done.returncode, done.stdout) == (1, "")
    reasons = "; ".join(f"{name}.png: {name}.png: No such file or directory" for name in "abc")
    assert done.stderr == f"Error: no sample could be measured: {reasons}; and 2 more in out/samples.jsonl\n"
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-m", "attention:heads=9", "--metric", "sparseness"), "--method attention:heads=9: "),
        (("-m", "cdam", "--metric", "fidelity:points=1"), "--metric fidelity:points=1: must be from 2"),
        (("-m", "cdam", "--metric", "box_sensitivity:box_sizes=65"), "--metric box_sensitivity:box_sizes=65: 65, but"),
        (("--model", "nope"), "there is no model 'nope'"),
    ],
)
def test_refusals_name_the_option(evaluate: Evaluate, words: tuple[str, ...], said: str) -> None:
    done = evaluate("demo-scenes:2", *words, "-o", "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {said}")
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_concept_is_told_before_anything_is_measured(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text("image,target\na.png,concept:loops\n")
    done = evaluate("samples.csv", *CHEAP, "-o", "out")
    assert (done.returncode, "loops" in done.stderr) == (1, True)
    assert not (tmp_path / "out").exists()


def test_several_servers_share_the_work(evaluate: Evaluate, address: str, tmp_path: Path) -> None:
    words = ("demo-scenes:12", *CHEAP, "--resamples", 50, "--examples", 0)
    with served(data_dir=tmp_path / "data") as other:
        done = evaluate(*words, "--server", "127.0.0.1:1", "--server", address, "--server", other, "-o", "two")
    assert (done.returncode, done.stderr) == (0, "no server answers at 127.0.0.1:1; going on with the others\n")
    assert evaluate(*words, "-o", "one").returncode == 0
    same_numbers(summary(tmp_path / "two"), summary(tmp_path / "one"))


def test_a_server_that_goes_away_keeps_what_was_measured(
    begin: Callable[..., Any], evaluate: Evaluate, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CDAM_DATA_DIR": str(tmp_path / "data")}
    api = f"unix:{tmp_path}/api"
    line = [sys.executable, "-m", "cdam_cli", "serve", "--address", api, "--admin-address", "127.0.0.1:0"]
    words = ("demo-scenes:40", *CHEAP, "--resamples", 50, "--examples", 0, "-o", "out")
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while evaluate("demo-scenes:1", *words[1:-1], "ready", "--overwrite", server=api).returncode:
                assert server.poll() is None
            with begin(*words, server=api) as process:
                while len(lines(tmp_path / "out")) < 2:
                    assert process.poll() is None, process.communicate()
                    time.sleep(0.01)
                server.kill()
                stderr = without_progress(process.communicate(timeout=240)[1])
        finally:
            server.kill()
    there = len(lines(tmp_path / "out"))
    assert (process.returncode, 2 <= there < 40) == (1, True)
    assert stderr.startswith(f"Error: {api}: ")
    assert stderr.endswith(f"; {there} of 40 {KEPT}\n")
    assert evaluate(*words).returncode == 0  # by another server of the same model
    assert (summary(tmp_path / "out")["samples"], len(lines(tmp_path / "out"))) == (40, 40)


def test_a_bar_on_a_terminal(begin: Callable[..., Any], tmp_path: Path) -> None:
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    try:
        words = ("demo-scenes:8", *CHEAP, "--resamples", 50, "--examples", 0, "-o", "out")
        with begin(*words, stderr=its_end, stdout=subprocess.DEVNULL) as process:
            shown = b""
            while process.poll() is None:  # or it waits for room on the terminal
                if select.select([terminal], [], [], 0.1)[0]:
                    shown += os.read(terminal, 65536)
        while select.select([terminal], [], [], 0)[0]:
            shown += os.read(terminal, 65536)
    finally:
        os.close(terminal)
        os.close(its_end)
    assert process.returncode == 0
    assert b"8/8" in shown
