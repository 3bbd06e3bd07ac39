"""Scenes: pure functions of their arguments, with disjoint sources and exact masks."""

import sys

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="demo scenes need the extra `demo`")

from cdam_server.demo import scenes
from cdam_server.demo.scenes import SIZE, Scene, Split, draw_scene, load_digits

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def some_scenes() -> list[Scene]:
    return [draw_scene("test", seed, 1 + seed % 3) for seed in range(30)]


def test_splits_share_no_source_and_cover_all() -> None:
    sources = [load_digits(split).sources for split in SPLITS]
    assert [len(s) for s in sources] == [1197, 200, 400]
    assert len(np.unique(np.concatenate(sources))) == 1797


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_stratified(split: Split) -> None:
    counts = np.bincount(load_digits(split).labels, minlength=10)
    assert counts.max() - counts.min() <= 0.1 * counts.mean() + 1


@pytest.mark.parametrize("split", SPLITS)
def test_objects_come_from_their_split(split: Split) -> None:
    digits = load_digits(split)
    label_of = dict(zip(digits.sources.tolist(), digits.labels.tolist(), strict=True))
    for seed in range(10):
        for o in draw_scene(split, seed, 3).objects:
            assert label_of[o.source] == o.label


def test_same_arguments_same_scene() -> None:
    first, second = draw_scene("val", 7, 3), draw_scene("val", 7, 3)
    assert np.array_equal(first.image, second.image)
    assert first.labels == second.labels
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(first.objects, second.objects, strict=True))


def test_each_argument_matters() -> None:
    base = draw_scene("val", 7, 2).image
    for other in (draw_scene("val", 8, 2), draw_scene("test", 7, 2), draw_scene("val", 7, 3)):
        assert not np.array_equal(base, other.image)


def test_shapes_labels_and_sizes() -> None:
    for scene in some_scenes():
        assert scene.image.shape == (SIZE, SIZE, 3)
        assert scene.image.dtype == np.uint8
        assert len(set(scene.labels)) == len(scene.objects) == 1 + scene.seed % 3
        for o in scene.objects:
            assert o.mask.shape == (SIZE, SIZE)
            assert o.mask.dtype == np.bool_
            top, left, bottom, right = o.box
            assert o.mask.sum() == o.mask[top:bottom, left:right].sum()
            assert 14 <= max(bottom - top, right - left) <= 32


def test_objects_never_overlap() -> None:
    for scene in some_scenes():
        assert np.sum([o.mask for o in scene.objects], axis=0).max() == 1


def test_taking_an_object_out_changes_its_mask_only() -> None:
    for scene in some_scenes():
        for i, o in enumerate(scene.objects):
            rest = scene.without(i)
            changed = (rest.image != scene.image).any(-1)
            assert not (changed & ~o.mask).any()
            assert changed[o.alpha > 0.1].mean() > 0.99
            assert rest.labels == scene.labels[:i] + scene.labels[i + 1 :]


def test_taking_all_objects_out_leaves_the_backdrop() -> None:
    scene = draw_scene("test", 3, 2)
    assert np.array_equal(scene.without(0).without(0).image, scene.backdrop)


def test_digits_stand_out_from_their_backdrop() -> None:
    luma = np.array([0.299, 0.587, 0.114])
    for scene in some_scenes():
        for o in scene.objects:
            assert abs(np.dot(o.colour, luma) - (scene.backdrop[o.mask] @ luma).mean()) > 80


@pytest.mark.parametrize("index", [-1, 2])
def test_without_needs_an_object_of_the_scene(index: int) -> None:
    with pytest.raises(IndexError, match="2 objects"):
        draw_scene("test", 0, 2).without(index)


@pytest.mark.parametrize("digits", [0, 4])
def test_number_of_digits_is_checked(digits: int) -> None:
    with pytest.raises(ValueError, match="1 to 3"):
        draw_scene("test", 0, digits)


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    scenes.load_digits.cache_clear()
    with pytest.raises(ImportError, match=r"extra `demo`"):
        load_digits("test")
