"""Concepts of the demo: scenes that show one, and whether concept CDAM points at it.

Examples are scenes of one digit from training sources, maps are measured on scenes of two digits from test sources.
`tools/demo_figures.py` measures and prints all of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count, islice
from typing import Final, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cdam_engine import Concept, Explainer, Output, mean_concept
from cdam_engine.targets import Similarity
from cdam_server.demo.scenes import Scene, Split, draw_scene
from demo_model import figures

LOOPS: Final = (0, 6, 8, 9)
"""Digits with a closed loop."""

NO_LOOPS: Final = (1, 2, 3, 5, 7)
"""Digits without one. A handwritten 4 may have one or not, so it is neither."""

EXAMPLES: Final = 30
"""Images that show a concept, and as many that don't."""

_DRAWS: Final = 5
_SEED: Final = 2_000_000
_APART: Final = 100_000
_ALL: Final = tuple(range(10))
_SIMILARITIES: Final[tuple[Similarity, ...]] = get_args(Similarity)

Latents = dict[int, NDArray[np.float32]]
"""Of a draw's example scenes, by digit, shape (n, D) each."""


class Question(NamedTuple):
    """A map to ask for.

    Attributes:
        made: What it is counted under.
        draw: Of the examples.
        place: Which of a scene's digits it should point at.
        target: What is explained.
    """

    made: str
    draw: int
    place: int
    target: Output | Concept


@dataclass(frozen=True)
class Rate:
    """How often maps are right, as fractions between 0 and 1.

    Attributes:
        maps: How many maps there are.
        right: The map sums higher inside the mask of the digit that it should point at than inside the other's.
        signed: It sums above zero inside the former and not above zero inside the latter.
        by_draw: `right`, for each draw of the examples.
        by_digit: `right`, by the digit that it should point at.
    """

    maps: int
    right: float
    signed: float
    by_draw: tuple[float, ...]
    by_digit: dict[str, float]


@dataclass(frozen=True)
class Figures:
    """How often maps of concepts are right, by what the concept is made of and by similarity.

    Attributes:
        split: Whose sources the measured scenes are of.
        scenes: How many there are of each kind.
        examples: How many images each concept is made of, and how many negatives, if it has any.
        draws: How often examples were drawn anew; all is explained with each draw's concepts.
        digits: Each digit of a scene as a concept: of examples "alone", "less other digits", or "less backdrops",
            scenes without a digit. And its class, to compare with.
        digits_spread: Mean over the digits and draws.
        loops: "loops", in scenes of one digit with a loop and one without: of examples "alone", or "less no loops".
        loops_unseen: The same, of examples among which are neither of the scene's two digits.
        loops_spread: Mean over the draws.
    """

    split: Split
    scenes: int
    examples: int
    draws: int
    digits: dict[str, Rate]
    digits_spread: float
    loops: dict[str, Rate]
    loops_unseen: dict[str, Rate]
    loops_spread: float


def example_scenes(digits: Sequence[int], draw: int = 0) -> list[Scene]:
    """`EXAMPLES` scenes of one digit from training sources: of each of these digits as many, the first ones by seed.

    Args:
        digits: Which; where the number can't be shared out, the first ones have one scene more.
        draw: Each has other seeds.

    Raises:
        ImportError: scikit-learn is not installed (extra `demo`).
    """
    shares = _shares(digits)
    kept: dict[int, list[Scene]] = {digit: [] for digit in digits}
    for scene in map(_single, count(_seed(draw))):
        (digit,) = scene.labels
        if len(kept.get(digit, ())) < shares.get(digit, 0):
            kept[digit].append(scene)
        if all(len(kept[digit]) == share for digit, share in shares.items()):
            break
    return [scene for digit in digits for scene in kept[digit]]


def loop_place(scene: Scene) -> int | None:
    """Which of a scene's two digits has a loop; None unless the other one has none."""
    for place in (0, 1):
        if scene.labels[place] in LOOPS and scene.labels[1 - place] in NO_LOOPS:
            return place
    return None


def loop_scenes(split: Split) -> Iterator[Scene]:
    """Scenes of one digit with a loop and one without, no end of them, by seed."""
    drawn = (draw_scene(split, seed, 2) for seed in count(figures.SEED))
    return (scene for scene in drawn if loop_place(scene) is not None)


def measure(explainer: Explainer, split: Split = "test", scenes: int = 1000, draws: int = _DRAWS) -> Figures:
    """Measure a demo model's concepts.

    Args:
        explainer: Of the model.
        split: Whose sources the scenes are of.
        scenes: How many of them: of any two digits, and again as many of one with a loop and one without.
        draws: How often to draw examples.

    Raises:
        ImportError: scikit-learn is not installed (extra `demo`).
    """
    latents = [{digit: latents_of(explainer, example_scenes([digit], draw)) for digit in _ALL} for draw in range(draws)]
    backdrops = [
        latents_of(explainer, [_single(_seed(draw) + place).without(0) for place in range(EXAMPLES)])
        for draw in range(draws)
    ]
    pairs = [draw_scene(split, figures.SEED + place, 2) for place in range(scenes)]
    mixed = list(islice(loop_scenes(split), scenes))
    return Figures(
        split=split,
        scenes=scenes,
        examples=EXAMPLES,
        draws=draws,
        digits=_rates(explainer, pairs, _digit_questions(latents, backdrops)),
        digits_spread=float(np.mean([mean_concept(its).spread for drawn in latents for its in drawn.values()])),
        loops=_rates(explainer, mixed, _loop_questions(latents, unseen=False)),
        loops_unseen=_rates(explainer, mixed, _loop_questions(latents, unseen=True)),
        loops_spread=float(np.mean([mean_concept(_share(drawn, LOOPS)).spread for drawn in latents])),
    )


def table(found: Figures) -> str:
    """The figures to read, in per cent."""
    lines = [
        f"{found.scenes} scenes of two digits; {found.draws} draws of {found.examples} examples for each concept",
        f"{'concept, similarity':42}right  of a draw     signed   right, by digit",
        f"{'':42}{'':29}{''.join(f'{digit:6}' for digit in _ALL)}",
    ]
    for name, rates in (("digit", found.digits), ("loops", found.loops), ("unseen loops", found.loops_unseen)):
        for made, rate in rates.items():
            low, high = 100 * min(rate.by_draw), 100 * max(rate.by_draw)
            by_digit = (f"{100 * rate.by_digit[str(d)]:6.1f}" if str(d) in rate.by_digit else " " * 6 for d in _ALL)
            whole = f"{100 * rate.right:5.1f}  {low:4.1f} to {high:5.1f} {100 * rate.signed:6.1f}  "
            lines.append(f"{name + ' ' + made:42}{whole}{''.join(by_digit)}".rstrip())
    return "\n".join([*lines, f"spread: digits {found.digits_spread:.2f}, loops {found.loops_spread:.2f}"])


def latents_of(explainer: Explainer, scenes: Sequence[Scene]) -> NDArray[np.float32]:
    """Their latents, shape (n, D)."""
    inputs = figures.to_input(np.stack([scene.image for scene in scenes]))
    found = [explanation.latent for explanation in explainer.explain(inputs, [[]] * len(scenes))]
    return np.stack(found).astype(np.float32)


def _seed(draw: int) -> int:
    return _SEED + draw * _APART


@lru_cache(maxsize=1000)  # the examples of one digit are drawn from the same scenes as those of the next
def _single(seed: int) -> Scene:
    return draw_scene("train", seed, 1)


def _shares(digits: Sequence[int]) -> dict[int, int]:
    return {digit: len(range(place, EXAMPLES, len(digits))) for place, digit in enumerate(digits)}


def _share(latents: Latents, digits: Sequence[int]) -> NDArray[np.float32]:
    """Of the scenes that `example_scenes` draws of these digits."""
    return np.concatenate([latents[digit][:share] for digit, share in _shares(digits).items()])


def _concept(examples: NDArray[np.float32], negatives: NDArray[np.float32] | None, kind: Similarity) -> Concept:
    return Concept(torch.from_numpy(mean_concept(examples, negatives).vector), kind)


def _digit_questions(
    latents: Sequence[Latents], backdrops: Sequence[NDArray[np.float32]]
) -> Callable[[Scene], list[Question]]:
    """For each digit of a scene the maps of its class and of its concepts."""

    @cache
    def concepts(digit: int) -> list[tuple[str, int, Concept]]:
        others = [other for other in _ALL if other != digit]
        return [
            (f"{made}, {kind}", draw, _concept(drawn[digit], negatives, kind))
            for draw, drawn in enumerate(latents)
            for made, negatives in (
                ("alone", None),
                ("less other digits", _share(drawn, others)),
                ("less backdrops", backdrops[draw]),
            )
            for kind in _SIMILARITIES
        ]

    def ask(scene: Scene) -> list[Question]:
        classes = [Question("class", 0, place, Output(digit)) for place, digit in enumerate(scene.labels)]
        return classes + [
            Question(made, draw, place, target)
            for place, digit in enumerate(scene.labels)
            for made, draw, target in concepts(digit)
        ]

    return ask


def _loop_questions(latents: Sequence[Latents], *, unseen: bool) -> Callable[[Scene], list[Question]]:
    """For each scene the maps of "loops"; unseen: as other digits than the scene's show it."""

    @cache
    def concepts(hidden: frozenset[int]) -> list[tuple[str, int, Concept]]:
        loops, no_loops = ([digit for digit in digits if digit not in hidden] for digits in (LOOPS, NO_LOOPS))
        return [
            (f"{made}, {kind}", draw, _concept(_share(drawn, loops), negatives, kind))
            for draw, drawn in enumerate(latents)
            for made, negatives in (("alone", None), ("less no loops", _share(drawn, no_loops)))
            for kind in _SIMILARITIES
        ]

    def ask(scene: Scene) -> list[Question]:
        place = loop_place(scene)
        assert place is not None
        asked = concepts(frozenset(scene.labels if unseen else ()))
        return [Question(made, draw, place, target) for made, draw, target in asked]

    return ask


def _rates(explainer: Explainer, scenes: Sequence[Scene], ask: Callable[[Scene], list[Question]]) -> dict[str, Rate]:
    """By what the questions are counted under."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for batch in figures.batches(scenes):
        questions = [ask(scene) for scene in batch]
        inputs = figures.to_input(np.stack([scene.image for scene in batch]))
        explanations = explainer.explain(inputs, [[question.target for question in its] for its in questions])
        for scene, its, explanation in zip(batch, questions, explanations, strict=True):
            weights = np.stack([figures.patch_weights(thing.mask, explanation.grid.h) for thing in scene.objects])
            sums = np.einsum("khw,jhw->kj", np.stack([relevance.scores for relevance in explanation.maps]), weights)
            for (made, draw, place, _), row in zip(its, sums.tolist(), strict=True):
                found.setdefault(made, []).append((draw, scene.labels[place], row[place], row[1 - place]))
    return {made: _rate(np.array(rows)) for made, rows in found.items()}


def _rate(rows: NDArray[np.float64]) -> Rate:
    """Of rows of draw, digit, sum inside its mask, sum inside the other's."""
    draws, digits, own, other = rows.T
    right = own > other
    return Rate(
        maps=len(rows),
        right=float(right.mean()),
        signed=float(((own > 0) & (other <= 0)).mean()),
        by_draw=tuple(round(float(right[draws == draw].mean()), 4) for draw in np.unique(draws)),
        by_digit={str(int(digit)): round(float(right[digits == digit].mean()), 4) for digit in np.unique(digits)},
    )
