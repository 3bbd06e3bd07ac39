"""Concepts from the Python client and the command line, on real servers of the demo model."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cdam
from in_this_process import served

SAMPLES = files("cdam_server.demo") / "assets" / "samples"

Cdam = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(data_dir=tmp_path_factory.mktemp("one")) as address:
        yield address


@pytest.fixture(scope="module")
def other_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another server of the same model, with a store of its own."""
    with served(data_dir=tmp_path_factory.mktemp("two")) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[cdam.Client]:
    """A client of a server that knows no concept."""
    with cdam.Client(address) as client:
        for concept in list(client.concepts()):
            client.delete_concept(concept.name, model=concept.model)
        yield client


@pytest.fixture
def run(address: str, tmp_path: Path) -> Cdam:
    def run(*words: object, server: str = address) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cdam_cli", *map(str, words)]
        environment = {**os.environ, "CDAM_SERVER": server, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env=environment
        )

    return run


def picture(number: int, size: int = 64) -> bytes:
    """A PNG file of random colours."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def scenes() -> list[bytes]:
    """The scenes that ship with the package."""
    return [path.read_bytes() for path in sorted(SAMPLES.iterdir(), key=str) if path.name.endswith(".png")]


def test_a_concept_from_its_registration_to_its_end(client: cdam.Client) -> None:
    images = scenes()
    examples, negatives = images[:2], images[2:4]
    concept = client.register_concept("first", examples, negatives=negatives, labels={"a": "b"}, description="two")
    assert (concept.name, concept.version, concept.created, concept.imported) == ("first", 1, True, False)
    assert (concept.example_count, concept.negative_count, concept.resize) == (2, 2, "model")
    assert concept.model_fingerprint == client.model().fingerprint
    assert concept.vector is not None
    assert concept.vector.shape == (client.model().latent_size,)
    assert concept.spread == pytest.approx(np.mean([example.cosine for example in concept.examples]))
    again = client.register_concept("first", iter(reversed(examples)), negatives=negatives)
    assert (again.created, again.id, again.version) == (False, concept.id, 1)
    with pytest.raises(cdam.AlreadyExists) as taken:
        client.register_concept("first", examples)
    assert (taken.value.kind, taken.value.name) == ("concept", "first")
    with pytest.raises(cdam.VersionMismatch) as mismatch:
        client.register_concept("first", examples, replace=True, expected_version=7)
    assert mismatch.value.current_version == 1
    second = client.register_concept("first", examples, replace=True, expected_version=1)
    assert (second.version, second.created) == (2, True)
    assert client.concept("first") == second
    assert client.concept(id=concept.id).version == 1
    assert list(client.concepts(labels={"a": "b"})) == []  # those of the newest version count
    assert list(client.concepts()) == [second]
    assert client.delete_concept("first") == second
    with pytest.raises(cdam.NotFound):
        client.concept("first")
    assert client.concept(id=concept.id).vector is not None


def test_concepts_explain(client: cdam.Client) -> None:
    image, *others = scenes()
    concept = client.register_concept("scenes", others[:3])
    by_vector = cdam.Concept(vector=concept.vector)
    explanation = client.explain(
        image,
        [
            *(concept, cdam.Concept("scenes"), cdam.Concept("scenes", similarity="cosine"), by_vector),
            cdam.Contrast(concept, "7"),
        ],
    )
    own = cdam.Concept(id=concept.id)
    cosine = cdam.Concept(id=concept.id, similarity="cosine")
    assert [target.target for target in explanation.targets] == [
        *(own, own, cosine, by_vector),
        cdam.Contrast(own, 7),
    ]
    assert [target.label for target in explanation.targets][:3] == ["scenes", "scenes", "scenes (cosine)"]
    assert explanation["scenes - 7"].limit > 0
    by_name, by_its_vector = explanation.maps[1].scores, explanation.maps[3].scores
    np.testing.assert_allclose(by_name, by_its_vector, atol=1e-5 * np.abs(by_its_vector).max())
    np.testing.assert_array_equal(explanation["scenes"].scores, by_name)
    client.register_concept("everybody", others[:3])  # another name of the same content
    rust = dataclasses.replace(concept, name="rust")
    targets = [rust, own, cdam.Contrast(concept, rust), cdam.Contrast("3", concept)]
    labels = ["rust", concept.id[:12], "scenes - rust", "3 - scenes"]
    assert [target.label for target in client.explain(image, targets).targets] == labels
    (streamed,) = client.explain_stream([image], targets)
    assert [target.label for target in streamed.result().targets] == labels
    assert -1 <= explanation.targets[2].value <= 1


def test_in_one_message_or_as_a_stream_it_is_the_same_concept(client: cdam.Client) -> None:
    images = [picture(number) for number in range(70)]  # a few more than one message holds
    done: list[int] = []
    streamed = client.register_concept("many", images, negatives=images[:3], progress=done.append)
    assert (streamed.created, streamed.example_count, done[-1]) == (True, 70, 73)
    assert [example.digest for example in streamed.examples] == [_sha(image) for image in images]
    again = client.register_concept("many", map(bytes, images), negatives=images[:3])
    assert (again.created, again.id) == (False, streamed.id)
    large = [picture(number, 1400) for number in range(3)]  # 5.9 MB each
    one_by_one = client.register_concept("large", large)
    small = client.register_concept("small", large[:1], vector=None)
    assert (one_by_one.example_count, small.example_count) == (3, 1)

    async def register() -> cdam.RegisteredConcept:
        async with cdam.AsyncClient(client.connection.address) as other:
            return await other.register_concept("many", images, negatives=images[:3])

    assert asyncio.run(register()) == again


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_bad_image_is_named_in_both_ways(client: cdam.Client) -> None:
    broken = picture(0)[:200]
    for count in (2, 80):
        images = [*map(picture, range(count)), broken, picture(99)]
        with pytest.raises(cdam.InvalidArgument) as caught:
            client.register_concept("broken", images)
        assert caught.value.field.startswith(f"examples[{count}]")
        with pytest.raises(cdam.InvalidArgument) as caught:
            client.register_concept("broken", images[:count], negatives=[picture(1), broken])
        assert caught.value.field.startswith("negatives[1]")
    assert list(client.concepts()) == []


class _OwnError(Exception):
    pass


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_what_was_given_up_is_not_registered(client: cdam.Client, kind: str) -> None:
    def images() -> Iterator[bytes]:
        yield from map(picture, range(90))
        raise _OwnError

    async def register() -> None:
        async with cdam.AsyncClient(client.connection.address) as other:
            with pytest.raises(_OwnError):
                await other.register_concept("partial", images())

    for _ in range(5):
        if kind == "asyncio":
            asyncio.run(register())
        else:
            with pytest.raises(_OwnError):
                client.register_concept("partial", images())
        # Whatever the server makes of the rest, it has done once it has registered another.
        client.register_concept("whole", map(picture, range(90)), replace=True)
    assert [concept.name for concept in client.concepts()] == ["whole"]


def test_pages(client: cdam.Client) -> None:
    size = client.model().latent_size
    names = [f"c{number:02}" for number in range(7)]
    for number, name in enumerate(reversed(names)):
        client.register_concept(name, vector=np.eye(size)[number], labels={"odd": str(number % 2)})
    assert [concept.name for concept in client.concepts(page_size=3)] == names
    assert [concept.name for concept in client.concepts(page_size=2, labels={"odd": "1"})] == ["c01", "c03", "c05"]
    assert list(client.concepts(model="elsewhere")) == []

    async def listed() -> list[str]:
        async with cdam.AsyncClient(client.connection.address) as other:
            return [concept.name async for concept in other.concepts(page_size=3)]

    assert asyncio.run(listed()) == names


def test_many_register_the_same_at_once(client: cdam.Client) -> None:
    images = [picture(number) for number in range(10)]
    found: list[cdam.RegisteredConcept] = []
    threads = [threading.Thread(target=lambda: found.append(client.register_concept("same", images))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({concept.id for concept in found}) == 1
    assert [concept.created for concept in found].count(True) == 1


def test_a_concept_moves_to_another_server(client: cdam.Client, other_address: str, tmp_path: Path) -> None:
    images = [picture(number) for number in range(6)]
    here = client.register_concept("loops", images[:4], negatives=images[4:], labels={"a": "b"}, resize="squash")
    axis = client.register_concept("axis", vector=np.linspace(-1, 1, client.model().latent_size))
    file = client.export_concept("loops", tmp_path / "loops.safetensors")
    with cdam.Client(other_address) as other:
        there = other.import_concept(file)
        assert (there.id == here.id, there.created, there.imported, there.resize) == (False, True, True, "squash")
        assert (dict(there.labels), there.examples, there.negatives) == ({"a": "b"}, here.examples, here.negatives)
        assert there.spread == pytest.approx(here.spread)
        np.testing.assert_array_equal(there.vector, here.vector)
        assert other.import_concept(file).created is False
        renamed = other.import_concept(here, name="rings", labels={})
        assert (renamed.name, renamed.id, dict(renamed.labels)) == ("rings", there.id, {})
        seen = other.register_concept("seen", images[:4], negatives=images[4:], resize="squash")
        assert (seen.id, other.import_concept(file, name="seen").created) == (here.id, False)
        plain = other.import_concept(axis)
        assert (plain.id, plain.spread) == (axis.id, None)
        map_here = client.explain(images[0], here).maps[0].scores
        map_there = other.explain(images[0], there).maps[0].scores
        np.testing.assert_allclose(map_there, map_here, atol=1e-5 * np.abs(map_here).max())
        stranger = dataclasses.replace(here, model_fingerprint="0" * 64, name="stranger")
        with pytest.raises(cdam.FailedPrecondition) as caught:
            other.import_concept(stranger)
        assert caught.value.reason == "CONCEPT_OF_ANOTHER_MODEL"


def test_the_commands(run: Cdam, client: cdam.Client, other_address: str, tmp_path: Path) -> None:
    for number in range(80):
        folder = tmp_path / ("loops" if number < 70 else "others")
        folder.mkdir(exist_ok=True)
        (folder / f"{number:02}.png").write_bytes(picture(number))
    scene = tmp_path / "scene.png"
    scene.write_bytes(scenes()[0])
    done = run("concept", "register", "loops", "loops", "--negative", "others/*.png", "--label", "team=vision")
    assert (done.returncode, done.stderr) == (0, "")
    concept = client.concept("loops")
    assert concept.id in done.stdout
    assert "loops/" in done.stdout  # the example that fits worst
    again = ("concept", "register", "loops", "loops", "--negatives", "others")
    assert "nothing changed" in run(*again).stdout
    assert "registered, with another description; --replace takes yours" in run(*again, "--description", "x").stdout
    taken = run("concept", "register", "loops", "others")
    assert (taken.returncode, taken.stdout) == (1, "")
    assert taken.stderr == "Error: loops is there already, with other content; --replace makes a new version\n"
    (tmp_path / "others" / "broken.png").write_bytes(picture(0)[:300])
    broken = run("concept", "register", "others", "others")
    assert broken.returncode == 1
    assert broken.stderr.startswith("Error: example others/broken.png: ")
    assert "there is no model 'nope'" in run("concept", "list", "--model", "nope").stderr
    (listed,) = json.loads(run("concept", "list", "--json", "--label", "team=vision").stdout)
    assert (listed["name"], listed["example_count"], listed["negative_count"]) == ("loops", 70, 10)
    shown = run("concept", "show", "loops").stdout
    assert "70 examples" in shown
    assert "█" in shown or "#" in shown

    explained = run("explain", scene, "-t", "concept:loops", "-t", "concept:loops:cosine", "--json")
    maps = json.loads(explained.stdout)["maps"]
    assert [relevance["label"] for relevance in maps] == ["loops", "loops (cosine)"]
    minus = run("explain", scene, "-t", "7", "--minus", "concept:loops", "--json")
    assert json.loads(minus.stdout)["maps"][0]["label"] == "7 - loops"
    assert maps[1]["target"] == {"concept": {"id": concept.id, "name": "loops", "similarity": "cosine"}}
    unknown = run("explain", scene, scene, "-t", "concept:lops", "--json")
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (1, 1)
    assert unknown.stderr.startswith("Error: --target concept:lops: ")
    assert unknown.stderr.endswith("; did you mean 'loops'?\n")
    assert "; for the concept: -t concept:loops" in run("explain", scene, "-t", "loops").stderr

    assert run("concept", "export", "--all", "-o", "out").stdout == "out/demo/loops.safetensors\n"
    imported = run("concept", "import", "out", "--name", "circles", server=other_address)
    assert (imported.returncode, imported.stderr) == (0, "")
    shown = json.loads(run("concept", "show", "circles", "--json", server=other_address).stdout)
    assert (shown["imported"], shown["examples"][0]["digest"]) == (True, concept.examples[0].digest)
    deleted = run("concept", "delete", "loops", "--model", "demo", "--yes")
    assert (deleted.returncode, deleted.stderr) == (0, "")
    assert run("concept", "list").stdout == "no concepts\n"
    assert run("concept", "show", "--id", concept.id).returncode == 0
