"""Architectures that are named as no ViT before their weights are fetched or read."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest
import timm

from cdam_engine.families import FAMILIES
from cdam_server.compute.architectures import _REASONS, check_explainable, why_not
from cdam_server.compute.loading import LoadError, ModelSpec


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("resnet50", "convolutional"),
        ("resnet50.a1_in1k", "convolutional"),
        ("convnext_tiny", "convolutional"),
        ("swin_tiny_patch4_window7_224", "hierarchical"),
        ("maxvit_tiny_tf_224", "hierarchical"),
        ("hiera_tiny_224", "hierarchical"),
        ("mixer_b16_224", "other means than attention"),
    ],
)
def test_reasons(architecture: str, words: str) -> None:
    assert words in why_not(architecture)


@pytest.mark.parametrize(
    "architecture",
    ["demo", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "cait_xxs24_224", "vitamin_small_224", "no_such_model"],
)
def test_nothing_speaks_against_them(architecture: str) -> None:
    assert not why_not(architecture)


def test_no_family_that_can_be_explained_is_refused() -> None:
    modules = {timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    families = tuple(family.model_class for family in FAMILIES)
    for name in modules:
        if name.rpartition(".")[2] in _REASONS:
            classes = inspect.getmembers(importlib.import_module(name), inspect.isclass)
            assert not [each for _, each in classes if issubclass(each, families)], name


def test_a_folder_of_timms_is_looked_into(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    spec = ModelSpec(name="m", architecture=f"local-dir:{tmp_path}")
    with pytest.raises(LoadError, match="convolutional"):
        check_explainable([spec])
    (tmp_path / "config.json").write_text("{")
    assert not why_not(spec.architecture)


def test_one_among_others_is_told_not_refused() -> None:
    specs = [
        ModelSpec(name=name, architecture=name, random_weights=True) for name in ("resnet18", "vit_tiny_patch16_224")
    ]
    assert list(check_explainable(specs)) == ["resnet18"]
