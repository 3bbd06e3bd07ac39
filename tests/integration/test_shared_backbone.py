"""Several entries of models.yaml with one backbone: its weights once, one trunk for all heads, maps of each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import cdam
from cdam_engine import Cdam, Explainer, Output
from cdam_server.compute.catalog import load_catalog
from cdam_server.compute.loading import share_weights
from cdam_server.compute.models import Catalog, ImageQuery
from cdam_server.compute.work import image_bucket
from cdam_server.settings.config import Settings
from processes import serving

SHAPE: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
HEADS = {"malignancy": 2, "biomarkers": 8, "type": 3}


def _network(outputs: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=outputs, **SHAPE)
    return model.eval()


@pytest.fixture
def models_file(tmp_path: Path) -> Path:
    backbone = _network(0, seed=1)
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    lines = ["models:"]
    for name, outputs in HEADS.items():
        save_file(nn.Linear(48, outputs).state_dict(), tmp_path / f"{name}.safetensors")
        lines += [
            f"  - name: {name}",
            "    architecture: vit_tiny_patch16_224",
            "    model_kwargs: {depth: 2, embed_dim: 48, num_heads: 3, img_size: 32}",
            "    checkpoint: backbone.safetensors",
            f"    head: {name}.safetensors",
            f"    task: {'regression' if name == 'biomarkers' else 'multi_class'}",
        ]
    other = tmp_path / "other.safetensors"
    save_file(_network(4, seed=2).state_dict(), other)
    lines += ["  - name: other", "    architecture: vit_tiny_patch16_224", "    checkpoint: other.safetensors"]
    lines += ["    model_kwargs: {depth: 2, embed_dim: 48, num_heads: 3, img_size: 32}"]
    path = tmp_path / "models.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def catalog(models_file: Path) -> Catalog:
    return load_catalog(Settings.load(models_file=models_file))


def test_the_backbones_weights_are_kept_once(catalog: Catalog) -> None:
    tensors = {name: dict(catalog.get(name).loaded.module.named_parameters()) for name in (*HEADS, "other")}
    for name, weight in tensors["malignancy"].items():
        for head in ("biomarkers", "type"):
            assert (tensors[head][name] is weight) == (not name.startswith("head."))
        if weight.ndim > 1:  # norms that were never trained are all ones, in any model
            assert tensors["other"][name] is not weight
    assert {catalog.get(name).trunk_of for name in ("malignancy", "other")} == {None}
    assert catalog.get("type").trunk_of is catalog.get("biomarkers").trunk_of is catalog.get("malignancy")
    assert len({served.loaded.fingerprint for served in catalog}) == 4  # a concept is still one model's


def test_one_batch_serves_all_heads(catalog: Catalog) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
    sizes: list[int] = []
    catalog.get("malignancy").loaded.module.blocks[0].register_forward_hook(
        lambda _module, given, _out: sizes.append(len(given[0]))
    )
    buckets = {image_bucket(catalog.get(name).facts, (32, 32)) for name in HEADS}
    assert len(buckets) == 1
    assert image_bucket(catalog.get("other").facts, (32, 32)) not in buckets
    jobs = [
        ImageQuery(pictures[place], (Output(1),), (Cdam(),), name)
        for place, name in enumerate(["biomarkers", "malignancy", "type"])
    ]
    jobs.append(ImageQuery(pictures[0], (Output(0),), (Cdam(),), "malignancy"))  # of a picture that is there already
    answers = catalog.compute(buckets.pop(), jobs, lambda: 1)
    assert sizes == [3]
    for job, answer in zip(jobs, answers, strict=True):
        assert not isinstance(answer, Exception)
        loaded = catalog.get(job.model).loaded
        alone = Explainer(loaded.module, data_config=loaded.data_config)
        (expected,) = alone.explain(torch.from_numpy(job.pixels)[None], [job.targets])
        np.testing.assert_allclose(answer.maps[0].scores, expected.maps[0].scores, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(answer.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_weights_that_differ_are_not_shared() -> None:
    first, second = _network(2, seed=1), _network(2, seed=1)
    with torch.no_grad():
        second.blocks[0].mlp.fc1.weight[0, 0] += 1
    before = second(torch.ones(1, 3, 32, 32))
    share_weights(second, [first])
    assert second.blocks[0].mlp.fc1.weight is not first.blocks[0].mlp.fc1.weight
    assert second.blocks[1].mlp.fc1.weight is first.blocks[1].mlp.fc1.weight
    assert torch.equal(second(torch.ones(1, 3, 32, 32)), before)


def test_served_over_the_wire(models_file: Path, tmp_path: Path) -> None:
    """Callers of three heads ask about one image: the second and third find its tokens in the cache."""
    picture = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    with (
        serving(tmp_path / "log", "--models-file", str(models_file)) as server,
        cdam.Client(server.address, timeout=60) as client,
    ):
        answers = {name: client.explain(picture, [0, 1], model=name) for name in HEADS}
        assert [answer.token_cache_hit for answer in answers.values()] == [False, True, True]
        assert not client.explain(picture, 0, model="other").token_cache_hit
        with ThreadPoolExecutor(8) as pool:
            again = list(pool.map(lambda name: (name, client.explain(picture, [0, 1], model=name)), [*HEADS] * 8))
    for name, answer in again:
        for found, expected in zip(answer.maps, answers[name].maps, strict=True):
            np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-6)
