"""The demo's concepts: where their examples come from, and that maps for them point at the right digit."""

import json
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from cdam_engine import Explainer, Output, mean_concept
from cdam_server.demo import model as demo_model
from cdam_server.demo.tour import loop_images

SIMILARITIES = ("dot", "cosine", "l2")


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    return Explainer(demo_model.load())


def test_shipped_figures_meet_the_bars() -> None:
    found = demo_model.shipped_figures()["concepts"]
    assert found["split"] == "test"
    assert found["scenes"] >= 1000
    assert found["examples"] == 30
    for made in ("alone", "less other digits", "less backdrops"):
        for kind in SIMILARITIES:
            rate = found["digits"][f"{made}, {kind}"]
            assert rate["maps"] == 2 * found["scenes"] * found["draws"]
            assert rate["right"] >= 0.95
            assert min(rate["by_draw"]) >= 0.95
            assert min(rate["by_digit"].values()) >= 0.85
    for kind in SIMILARITIES:
        assert found["loops"][f"less no loops, {kind}"]["right"] >= 0.90
        assert found["loops"][f"alone, {kind}"]["right"] >= 0.80


def test_shipped_figures_own_up_to_what_the_concept_does_not_know() -> None:
    found = demo_model.shipped_figures()["concepts"]
    for made in ("alone", "less no loops"):
        for kind in ("dot", "cosine"):
            assert found["loops_unseen"][f"{made}, {kind}"]["right"] < 0.6


def test_sample_images_are_thirty_of_each_and_small() -> None:
    positives, negatives = loop_images()
    assert len(positives) == len(negatives) == 30
    assert sum(len(image.read_bytes()) for image in positives + negatives) < 400_000


class TestOnScenes:
    """What needs scenes, and so scikit-learn."""

    @pytest.fixture(autouse=True)
    def _need_scikit_learn(self) -> None:
        pytest.importorskip("sklearn", reason="demo scenes need the extra `demo`")

    @pytest.mark.parametrize("digits", [[4], [0, 6, 8, 9], [1, 2, 3, 5, 7]])
    def test_examples_are_shared_out_among_the_digits(self, digits: list[int]) -> None:
        from demo_model import concepts

        labels = [scene.labels for scene in concepts.example_scenes(digits)]
        assert len(labels) == concepts.EXAMPLES
        counts = [labels.count((digit,)) for digit in digits]
        assert sum(counts) == len(labels)
        assert max(counts) - min(counts) <= 1

    def test_examples_are_drawn_of_training_sources_the_same_each_time(self) -> None:
        from cdam_server.demo.scenes import load_digits
        from demo_model import concepts

        first, again, other = (concepts.example_scenes([3, 5], draw) for draw in (0, 0, 1))
        assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
        assert not {scene.seed for scene in first} & {scene.seed for scene in other}
        trained = set(load_digits("train").sources.tolist())
        assert {thing.source for scene in first + other for thing in scene.objects} <= trained

    def test_scenes_of_a_loop_and_none(self) -> None:
        from demo_model import concepts

        places = set()
        for scene in islice(concepts.loop_scenes("test"), 20):
            place = concepts.loop_place(scene)
            assert scene.split == "test"
            assert scene.labels[place] in {0, 6, 8, 9}
            assert scene.labels[1 - place] in {1, 2, 3, 5, 7}
            places.add(place)
        assert places == {0, 1}

    @pytest.mark.parametrize("labels", [(0, 8), (1, 7), (4, 8), (6, 4), (4, 2)])
    def test_no_place_of_a_loop(self, labels: tuple[int, int]) -> None:
        from cdam_server.demo.scenes import draw_scene
        from demo_model import concepts

        scene = next(s for s in (draw_scene("test", seed, 2) for seed in range(10_000)) if s.labels == labels)
        assert concepts.loop_place(scene) is None

    def test_measured_again_on_fewer_scenes(self, explainer: Explainer) -> None:
        from demo_model import concepts

        again = concepts.measure(explainer, scenes=100, draws=1)
        for kind in SIMILARITIES:
            assert again.digits[f"alone, {kind}"].right >= 0.93
            assert again.digits[f"less other digits, {kind}"].right >= 0.93
            assert again.digits[f"less backdrops, {kind}"].right >= 0.93
            assert again.loops[f"less no loops, {kind}"].right >= 0.85
        assert again.digits["class"].maps == 200
        assert again.loops["alone, dot"].maps == 100
        assert 0.85 <= again.digits_spread <= 0.95
        assert 0.3 <= again.loops_spread <= 0.4
        assert len(concepts.table(again).splitlines()) == 3 + 10 + 6 + 6 + 1

    def test_a_class_is_right_as_often_as_the_other_figures_say(self, explainer: Explainer) -> None:
        from cdam_server.demo.scenes import Scene, draw_scene
        from demo_model import concepts, figures

        scenes = [draw_scene("test", figures.SEED + place, 2) for place in range(60)]
        sums = figures.map_sums(explainer.vit.model, scenes)
        own, other = np.stack([sums[:, 0, 0], sums[:, 1, 1]]), np.stack([sums[:, 0, 1], sums[:, 1, 0]])

        def ask(scene: Scene) -> list[concepts.Question]:
            return [concepts.Question("own", 0, place, Output(digit)) for place, digit in enumerate(scene.labels)] + [
                concepts.Question("other's", 0, 1 - place, Output(digit)) for place, digit in enumerate(scene.labels)
            ]

        found = concepts._rates(explainer, scenes, ask)
        assert found["own"].right == pytest.approx((own > other).mean())
        assert found["own"].signed == pytest.approx(((own > 0) & (other <= 0)).mean())
        assert found["other's"].right == pytest.approx((own < other).mean())

    def test_sample_images_are_the_scenes_that_are_measured(self, explainer: Explainer) -> None:
        from demo_model import concepts

        for images, digits in zip(loop_images(), (concepts.LOOPS, concepts.NO_LOOPS), strict=True):
            for image, scene in zip(images, concepts.example_scenes(digits), strict=True):
                with image.open("rb") as file:
                    assert np.array_equal(np.asarray(Image.open(file)), scene.image)

    def test_no_original_of_the_examples_is_in_a_sample(self) -> None:
        from demo_model import concepts

        samples = json.loads((demo_model.ASSETS / "samples" / "samples.json").read_text())["samples"]
        shown = {thing["source"] for sample in samples for thing in sample["objects"]}
        examples = [*concepts.example_scenes(concepts.LOOPS), *concepts.example_scenes(concepts.NO_LOOPS)]
        assert not shown & {thing.source for scene in examples for thing in scene.objects}

    def test_the_spread_tells_a_mixed_concept_from_one_digit(self, explainer: Explainer) -> None:
        from demo_model import concepts

        one, mixed = (
            mean_concept(concepts.latents_of(explainer, concepts.example_scenes(digits))).spread
            for digits in ([8], concepts.LOOPS)
        )
        assert mixed < 0.5
        assert one > 0.8
