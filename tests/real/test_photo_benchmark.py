"""The benchmark on photographs, on one of them: what its journal keeps is enough to compute from."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.photographs import choice, concepts, measuring
from benchmarks.photographs.reading import GEOMETRY, Part, read
from benchmarks.sheets import Journal, decode
from cdam_engine import Attention, Cdam, Concept, Explainer, Output
from cdam_engine.evaluation import (
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Fidelity,
    MaskAgreement,
    Protocol,
)
from cdam_server.compute.loading import load_backbone
from cdam_server.compute.weights.trained import Trained, write_trained
from real.backbone import ARCHITECTURE, INPUT
from real.voc import Photographs

pytestmark = pytest.mark.usefixtures("one_thread")

FIDELITY, BOXES = Fidelity(points=3), BoxSensitivity(boxes=3)


@pytest.fixture(scope="module")
def explainer(voc: Photographs, tmp_path_factory: pytest.TempPathFactory) -> Explainer:
    """Random weights: what the numbers are is not the question here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(ARCHITECTURE, img_size=INPUT, num_classes=len(voc.classes))
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(model.state_dict(), path)
    return measuring.load(path)


def test_a_file_of_cdam_train_is_the_same_model(voc: Photographs, explainer: Explainer, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in explainer.vit.model.state_dict().items()}
    save_file(weights, tmp_path / "whole.safetensors")
    backbone, head = tmp_path / "backbone.safetensors", tmp_path / "head.safetensors"
    tuned = {name: tensor for name, tensor in weights.items() if name.startswith(("blocks.11.", "norm."))}
    save_file({name: tensor * 2 if name in tuned else tensor for name, tensor in weights.items()}, backbone)
    spec = measuring.spec(backbone, None)
    trained = Trained("multi_label", voc.classes, ARCHITECTURE, load_backbone(spec).fingerprint)
    write_trained(head, trained, weights["head.weight"], weights["head.bias"], tuned)
    x = torch.randn(1, 3, *INPUT)
    expected = measuring.load(tmp_path / "whole.safetensors").outputs(x).logits
    assert torch.equal(measuring.load(head, backbone).outputs(x).logits, expected)


@pytest.fixture(scope="module")
def part(voc: Photographs, explainer: Explainer, tmp_path_factory: pytest.TempPathFactory) -> Part:
    its = Protocol(
        (Cdam(), Attention(), Anchor.RANDOM, Anchor.MASK),
        (FIDELITY, BOXES, Compactness(), MaskAgreement(), ClassDiscrimination(FIDELITY, BOXES)),
    )
    path = tmp_path_factory.mktemp("journal") / "x-multi-0of1.jsonl"
    head = measuring.header(explainer, its, classes=voc.classes, sigmas={})
    for _ in range(2):  # the second time there is nothing left to do
        done = list(
            measuring.measure(measuring.Measuring(explainer, its), choice.several(voc)[:1], Journal(path, head))
        )
    assert done == []
    found = read([path])
    assert found is not None
    return found


def test_several_photographs_show_two_classes(voc: Photographs) -> None:
    found = choice.several(voc)
    assert len(found) >= 120
    assert not {one.id for one in found} & {one.id for one in choice.alone(voc, 120)}
    assert not {one.id for one in found} & {one.path.stem for one in voc.train}
    for one in found[:10]:
        for index in one.classes:
            with Image.open(one.photograph.mask) as opened:
                expected = (np.asarray(opened) == index + 1).mean()
            assert choice.mask(one.photograph.mask, index, INPUT).mean() == pytest.approx(expected, abs=0.003)
            assert expected == pytest.approx(one.photograph.shares[voc.classes[index]], abs=0.03)


def test_what_is_kept_gives_the_same_values(part: Part) -> None:
    (record,) = part.records
    for turn in record.turns:
        for name in ("cdam", "attention", "mask"):
            scores = record.maps[name][turn]
            for metric, index in ((BOXES, 1), (Compactness(), 2), (MaskAgreement(), 3)):
                for quantity, value in record.measured(metric, turn, scores, BOXES).items():
                    assert value == pytest.approx(record.values[turn][name, index, quantity], abs=1e-4), quantity
        assert record.maps["mask"][turn] == pytest.approx(GEOMETRY.shares(record.masks[turn]), abs=1e-6)


def test_both_classes_take_their_turn(part: Part, voc: Photographs, explainer: Explainer) -> None:
    (record,) = part.records
    chosen = choice.several(voc)[0]
    assert record.classes == chosen.classes
    images = torch.from_numpy(choice.pixels(chosen.photograph.path, explainer.data_config))[None]
    (found,) = explainer.explain(images, [[Output(index) for index in chosen.classes]])
    assert found.logits == pytest.approx(record.logits, abs=1e-5)
    for turn, relevance in enumerate(found.maps):
        assert relevance.scores == pytest.approx(record.maps["cdam"][turn], abs=1e-6)
        assert record.boxes[turn][0] == pytest.approx(record.right[turn], abs=1e-5)
        deltas = [record.values[turn]["attention", 4, quantity] for quantity in ("delta_a_lif_mif", "delta_box_mean")]
        assert deltas == [0, 0]
    assert record.norms.min() > 0
    assert len(record.norms) == GEOMETRY.grid.h * GEOMETRY.grid.w


def test_concepts_of_photographs(voc: Photographs, explainer: Explainer, tmp_path: Path) -> None:
    people = [one for one in voc.train if list(one.shares) == ["person"]][:2]
    birds = [one for one in voc.train if list(one.shares) == ["bird"]][:2]
    few = replace(voc, classes=("bird", "person"), train=(*people, *birds))
    trained = concepts.outputs(explainer, few, "train", tmp_path / "x.npz")
    again = concepts.outputs(explainer, few, "train", tmp_path / "x.npz")
    assert (again.latents == trained.latents).all()
    plain, centred = concepts.vectors(few, trained)
    means = np.stack([trained.latents[2:].mean(0), trained.latents[:2].mean(0)])
    assert plain == pytest.approx(means, abs=1e-5)
    assert centred == pytest.approx(means - trained.latents.mean(0), abs=1e-5)
    chosen = choice.Chosen(people[0], (1, 0))
    line = concepts.record(explainer, chosen, plain, centred)
    maps = [[decode(text) for text in kinds] for kinds in line["maps"]]
    assert np.shape(maps) == (2, len(concepts.KINDS), GEOMETRY.grid.h * GEOMETRY.grid.w)
    # The gradient of a dot product is linear in the concept.
    mean = torch.from_numpy(trained.latents.mean(0))
    images = torch.from_numpy(choice.pixels(people[0].path, explainer.data_config))[None]
    (found,) = explainer.explain(images, [[Concept(mean, "dot")]])
    assert maps[0][1] - maps[0][4] == pytest.approx(found.maps[0].scores.ravel(), rel=1e-3, abs=1e-5)


def test_outputs_of_another_model_are_refused(voc: Photographs, explainer: Explainer, tmp_path: Path) -> None:
    few = replace(voc, train=voc.train[:1])
    concepts.outputs(explainer, few, "train", tmp_path / "x.npz")
    other = copy.deepcopy(explainer.vit.model)
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(ValueError, match=r"x.npz: of model \w+, not \w+: give another --name, or remove it$"):
        concepts.outputs(Explainer(other, data_config=explainer.data_config), few, "train", tmp_path / "x.npz")
