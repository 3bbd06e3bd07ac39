"""The Python client and its commands against a real server of the demo model."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cdam

SAMPLES = files("cdam_server.demo") / "assets" / "samples"


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[cdam.Client]:
    with cdam.Client(server_address) as client:
        client.wait_until_ready(60)
        yield client


@pytest.fixture(scope="module")
def scene() -> bytes:
    return (SAMPLES / "scene1.png").read_bytes()


def _pixels(scene: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(scene)) as image:
        return np.asarray(image.convert("RGB"))


def test_models(client: cdam.Client) -> None:
    first, *_ = client.models()
    assert first.is_default
    assert first.output_names == tuple("0123456789")
    assert (first.patch_grid, first.input_size, first.task) == ((16, 16), (64, 64), "multi_class")
    assert "cdam" in first.methods
    assert client.model() == client.model(first.name) == first


def test_explain(client: cdam.Client, scene: bytes) -> None:
    explanation = client.explain(scene, ["7", 3, cdam.TopK(3)], request_id="r1")
    assert (explanation.request_id, explanation.fingerprint) == ("r1", client.model().fingerprint)
    assert (explanation.patch_grid, explanation.image_size) == ((16, 16), (64, 64))
    assert explanation.region == cdam.Region(0, 0, 64, 64)
    assert [t.request_index for t in explanation.targets] == [0, 1, 2, 2, 2]
    assert [t.label for t in explanation.targets][:2] == ["7", "3"]
    assert explanation.targets[0].output_index == 7
    assert all(relevance.scores.shape == (16, 16) for relevance in explanation)
    assert all(np.isfinite(relevance.scores).all() and relevance.limit > 0 for relevance in explanation)
    top = explanation.targets[2:]
    assert top[0].value >= top[1].value >= top[2].value
    assert 0 < sum(t.probability or 0 for t in top) <= 1 + 1e-6
    assert explanation.timing.total >= explanation.timing.tail > 0


def test_all_ways_to_give_an_image_give_the_same_map(client: cdam.Client, scene: bytes, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    path.write_bytes(scene)
    pixels = _pixels(scene)
    maps = [client.explain(image, "7").maps[0].scores for image in (scene, path, pixels, Image.fromarray(pixels))]
    for other in maps[1:]:
        np.testing.assert_allclose(other, maps[0], atol=1e-5 * np.abs(maps[0]).max())


async def test_asyncio(server_address: str, client: cdam.Client, scene: bytes) -> None:
    async with cdam.AsyncClient(server_address) as asynchronous:
        await asynchronous.wait_until_ready(60)
        explanation = await asynchronous.explain(scene, "7")
    expected = client.explain(scene, "7").maps[0].scores
    np.testing.assert_allclose(explanation.maps[0].scores, expected, atol=1e-5 * np.abs(expected).max())


def test_an_overlay_of_a_wide_photo_covers_what_the_model_saw(client: cdam.Client, scene: bytes) -> None:
    wide = np.full((64, 128, 3), 128, np.uint8)
    wide[:, 32:96] = _pixels(scene)
    crop = client.explain(wide, "7", resize="model")
    squash = client.explain(wide, "7", resize="squash")
    assert crop.image_size == squash.image_size == (64, 128)
    assert crop.region == cdam.Region(32, 0, 96, 64)
    assert squash.region == cdam.Region(0, 0, 128, 64)
    overlay = np.asarray(crop.maps[0].overlay(), int)
    assert overlay.shape == wide.shape
    colourful = (np.ptp(overlay, axis=2) > 40).nonzero()[1]
    assert colourful.min() >= 32
    assert colourful.max() < 96


def test_errors_are_typed_and_name_their_field(client: cdam.Client, scene: bytes) -> None:
    with pytest.raises(cdam.NotFound) as not_found:
        client.explain(scene, "unicorn")
    assert (not_found.value.kind, not_found.value.name) == ("output", "unicorn")
    with pytest.raises(cdam.NotFound) as not_found:
        client.explain(scene, "7", model="unicorn")
    assert (not_found.value.kind, not_found.value.name) == ("model", "unicorn")
    with pytest.raises(cdam.InvalidArgument) as invalid:
        client.explain(scene, ["7", cdam.TopK(99)])
    assert invalid.value.field.startswith("targets[1]")
    with pytest.raises(cdam.InvalidArgument) as invalid:
        client.explain(scene[:200], "7")
    assert invalid.value.field.startswith("image")
    with pytest.raises(cdam.InvalidArgument) as invalid:
        client.explain(scene, "7", input_size=(63, 64))
    assert invalid.value.field.startswith("preprocessing.input_size")


def test_every_method_and_target(client: cdam.Client, scene: bytes) -> None:
    model = client.model()
    assert set(model.methods) == set(cdam.METHODS)
    concept = cdam.Concept(vector=np.ones(model.latent_size), similarity="cosine")
    targets = ["7", cdam.Contrast("7", 1), concept, cdam.Contrast(concept, "1")]
    quick = {"smooth_grad": cdam.SmoothGrad(samples=2), "integrated_gradients": cdam.IntegratedGradients(steps=2)}
    methods = [cdam.Cdam(parts=True), *(quick.get(kind, kind) for kind in model.methods)]
    explanation = client.explain(scene, targets, methods=methods)
    assert [target.target for target in explanation.targets] == [
        cdam.Output(7),
        cdam.Contrast(7, 1),
        concept,
        cdam.Contrast(concept, 1),
    ]
    assert [target.label for target in explanation.targets] == [
        "7",
        "7 - 1",
        "concept (cosine)",
        "concept (cosine) - 1",
    ]
    needless = sum(not cdam.METHODS[kind].needs_target for kind in model.methods)
    assert len(explanation) == 4 * (len(methods) - needless) + needless
    parts = explanation.maps[0].parts
    assert parts is not None
    np.testing.assert_allclose(parts.value + parts.key, explanation.maps[0].scores, atol=1e-5)
    assert explanation["7", "smooth_cdam"].standard_error is not None
    assert explanation["7", "integrated_cdam"].steps == 50
    assert explanation["", "attention"].target is None
    assert (
        0
        <= explanation["7", "patch_mask_prediction"].scores.min()
        <= explanation["7", "patch_mask_prediction"].limit
        <= 1
    )


def test_a_concept_that_is_not_there(client: cdam.Client, scene: bytes) -> None:
    with pytest.raises(cdam.NotFound, match="stripes"):
        client.explain(scene, cdam.Concept("stripes"))


def _cdam(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cdam_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_commands(server_address: str, scene: bytes, tmp_path: Path) -> None:
    (tmp_path / "scene.png").write_bytes(scene)
    out = tmp_path / "out"
    result = _cdam(
        "explain", tmp_path / "scene.png", "-t", "7", "-t", "top:2", "--sheet", "-o", out, "--server", server_address
    )
    assert (result.returncode, result.stderr) == (0, "")
    answer = json.loads((out / "scene.json").read_text())
    assert len(answer["maps"]) == 3
    assert all(Path(relevance["overlay"]).exists() for relevance in answer["maps"])
    assert (out / "scene.sheet.png").exists()
    contrast = _cdam(
        *("explain", tmp_path / "scene.png", "-t", "7", "--minus", "1", "-m", "integrated_cdam:steps=8", "--json"),
        *("--server", server_address),
    )
    (relevance,) = json.loads(contrast.stdout)["maps"]
    assert (relevance["label"], relevance["steps"], relevance["parameters"]) == ("7 - 1", 8, {"steps": 8})
    listed = _cdam("models", "--server", server_address, "--json")
    assert json.loads(listed.stdout)[0]["output_count"] == 10


def test_a_wrong_target_is_one_friendly_line(server_address: str, scene: bytes, tmp_path: Path) -> None:
    (tmp_path / "scene.png").write_bytes(scene)
    result = _cdam("explain", tmp_path / "scene.png", "-t", "7", "-t", "top:99", "--json", "--server", server_address)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "--target top:99" in result.stderr


def test_local_needs_no_server(scene: bytes, tmp_path: Path) -> None:
    (tmp_path / "scene.png").write_bytes(scene)
    result = _cdam("explain", tmp_path / "scene.png", "-t", "7", "--local", "--json")
    assert result.returncode == 0, result.stderr
    (relevance,) = json.loads(result.stdout)["maps"]
    assert np.shape(relevance["scores"]) == (16, 16)
