"""Which files are images: folders as systems and people leave them, for all commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import cdam
from cdam.v1 import concept_pb2
from cdam_cli import main
from cdam_cli.evaluation.dataset import open_dataset
from cdam_cli.images import Found, find_images
from cdam_images.folders import once, walk
from scripted_server import Script, serving

Run = Callable[..., Result]

IMAGES = ["cats/a.png", "cats/b.PNG", "dogs/d.png", "dogs/deep/c.png"]
LEAVINGS = [
    ".DS_Store",
    "._cats",
    "cats/._a.png",
    "cats/.hidden.png",
    "cats/Thumbs.db",
    "cats/desktop.ini",
    "dogs/.ipynb_checkpoints/d-checkpoint.png",
    "dogs/@eaDir/d.png/SYNOPHOTO_THUMB_M.png",
    "__MACOSX/cats/._a.png",
    ".git/objects/e.png",
    ".ipynb_checkpoints/a-checkpoint.png",
    "dogs/.AppleDouble/d.png",
]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four images of two classes, each of another colour, and what systems leave beside them."""
    folder = tmp_path / "photos"
    for name in IMAGES + LEAVINGS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\x05\x16\x07 no image")
    for place, name in enumerate(IMAGES):
        Image.new("RGB", (60, 40), (60 * place, 9, 9)).save(folder / name)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def run(script: Script, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("CDAM_SERVER", script.address)
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


def below(folder: Path, names: Sequence[str] = IMAGES) -> list[Path]:
    return [folder / name for name in names]


def test_what_systems_leave_is_not_found(photos: Path) -> None:
    """pytorch/vision#109, Pillow#4807, motioneye#89, immich#30690, meetps/pytorch-semseg#83: neither images nor worth a word."""
    assert walk(photos) == (below(photos), [])
    assert find_images(["photos"]) == Found(below(Path("photos")), [])
    assert find_images(["photos/**/*.png", "photos/*/*.PNG"]).images == below(
        Path("photos"), ["cats/a.png", "dogs/d.png", "dogs/deep/c.png", "cats/b.PNG"]
    )


def test_what_is_named_is_taken_hidden_or_not(photos: Path) -> None:
    """A folder that lies below a hidden one, as caches and annexes do, is not hidden itself."""
    assert find_images(["photos/cats/.hidden.png"]).images == [Path("photos/cats/.hidden.png")]
    assert find_images(["photos/.git/objects"]).images == [Path("photos/.git/objects/e.png")]
    assert walk(photos / ".ipynb_checkpoints") == ([photos / ".ipynb_checkpoints" / "a-checkpoint.png"], [])


def test_a_link_and_its_target_are_one(photos: Path, tmp_path: Path) -> None:
    """blissd/fotema#444, P3HPC/code-base-investigator#132: images in an annex of links, and beside it, were there twice."""
    (photos / "cats" / "z.png").symlink_to(photos / "cats" / "a.png")
    (tmp_path / "link.png").symlink_to(photos / "dogs" / "d.png")
    (tmp_path / "again").symlink_to(photos, target_is_directory=True)
    (photos / "cats" / "gone.png").symlink_to(photos / "nowhere.png")
    assert walk(photos)[0] == below(photos)
    words = ["link.png", "photos", "again", str(photos), "photos/../photos/cats", "./photos/cats/a.png"]
    found = find_images(words).images
    assert found == [Path("link.png"), *below(Path("photos"), ["cats/a.png", "cats/b.PNG", "dogs/deep/c.png"])]
    assert once([Path("photos/cats/a.png"), photos / "cats" / "z.png"]) == [Path("photos/cats/a.png")]


def test_folders_of_links_are_walked(tmp_path: Path) -> None:
    """blissd/fotema#444: in an annex each image is a link into a hidden folder, and is found once."""
    folder = tmp_path / "annex"
    (folder / ".git" / "annex").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(folder / ".git" / "annex" / name)
        (folder / name).symlink_to(folder / ".git" / "annex" / name)
    assert walk(folder) == ([folder / "a.png", folder / "b.png"], [])


def test_explain_takes_a_folder_and_asks_once_of_each(run: Run, script: Script, photos: Path) -> None:
    """adrianlopezroche/fdupes#173: a path that is given twice, or once and with its folder."""
    result = run("explain", "photos", photos / "cats" / "a.png", "photos/cats/../cats/a.png", "--json", "-t", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(script.requests) == len({request.image.encoded for request in script.requests}) == 4


def test_register_takes_each_once(run: Run, script: Script, photos: Path) -> None:
    """pytorch/vision#2831: hidden files would have been examples of the concept."""
    result = run("concept", "register", "cats", "photos/cats", photos / "cats", "--negative", "photos/dogs")
    assert (result.exit_code, result.stderr) == (0, "")
    (request,) = (r for r in script.requests if isinstance(r, concept_pb2.ConceptRegisterRequest))
    assert [len(request.examples), len(request.negatives)] == [2, 2]
    twice = run("concept", "register", "cats", "photos/cats", "--negative", photos / "cats" / "a.png")
    assert twice.exit_code == 2
    assert "a.png: both an example and a negative" in twice.stderr


def test_evaluate_has_each_once_and_no_hidden_class(photos: Path) -> None:
    """tensorflow#46595, open-mmlab/mmpretrain#507, bmaltais/kohya_ss#406: .ipynb_checkpoints was a class, the others' numbers shifted."""
    (photos / "__MACOSX" / "x.png").write_bytes(b"")
    (photos / "cats" / "z.png").symlink_to(photos / "cats" / "a.png")
    dataset = open_dataset(str(photos), _model(), lambda concept: concept)
    assert [(sample.id, sample.target) for sample in dataset] == [
        ("cats/a.png", cdam.Output("cats")),
        ("dogs/d.png", cdam.Output("dogs")),
        ("cats/b.PNG", cdam.Output("cats")),
        ("dogs/deep/c.png", cdam.Output("dogs")),
    ]


def _model() -> Any:
    with serving(Script()) as script, cdam.Client(script.address) as client:
        model = client.model()
    return dataclasses.replace(model, output_names=("cats", "dogs"), output_count=2)


def test_a_folder_of_nothing_but_leavings_is_empty(run: Run, photos: Path) -> None:
    for name in IMAGES:
        (photos / name).unlink()
    for command in (["explain", "photos"], ["concept", "register", "cats", "photos"], ["bench", "photos"]):
        result = run(*command)
        assert result.exit_code != 0
        assert "photos: no JPEG, PNG or WebP file below this folder" in result.stderr


def test_concept_files_are_found_by_the_same_walk(run: Run, script: Script, photos: Path) -> None:
    """pytorch/vision#109's sibling: ._loops.safetensors beside loops.safetensors, and a link to it."""
    run("concept", "register", "loops", "photos/cats")
    assert run("concept", "export", "loops", "-o", "concepts/loops.safetensors").exit_code == 0
    (file,) = (photos.parent / "concepts").rglob("*.safetensors")
    (file.parent / f"._{file.name}").write_bytes(b"\0\x05\x16\x07")
    (file.parent / "again.safetensors").symlink_to(file)
    result = run("concept", "import", "concepts", file)
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1
