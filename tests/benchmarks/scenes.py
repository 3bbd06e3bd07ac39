"""The papers' benchmarks on scenes of two digits: `python tests/benchmarks/scenes.py measure`, then `... report`.

`measure` goes through held-out scenes with the engine, one after the other, and appends what it finds of each to a file
in `results/scenes/`; it goes on where it stopped. A scene's right target is its first digit, the wrong one its second.
`--shard 0/2` takes every second scene: processes of one thread each are faster than one of several on small models.
`report` prints the tables, puts them into `docs/benchmarks/scenes.md`, and draws the figures.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from benchmarks.sheets import (
    FAMILY,
    Column,
    Journal,
    Results,
    as_lists,
    draw_curves,
    insert,
    lines,
    markdown,
    mean_curves,
    together,
)
from benchmarks.table_claims import Quantity, indices, of_several
from benchmarks.verdicts import Claim
from cdam.statistics import Statistics
from cdam_engine import (
    METHODS,
    Explainer,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    Output,
    SmoothCdam,
    SmoothGrad,
)
from cdam_engine.evaluation import (
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Evaluated,
    Evaluator,
    Fidelity,
    InsertionDeletion,
    MaskAgreement,
    Measured,
    Metric,
    Protocol,
    Randomisation,
    Sample,
    Sparseness,
)
from cdam_server.demo import model as demo_model
from cdam_server.demo.scenes import draw_scene

FIRST_SEED: Final = 700_000  # far from those of the other figures
RESULTS: Final = Path("results/scenes")
DOCUMENT: Final = Path("docs/benchmarks/scenes.md")
IMAGES: Final = Path("docs/images")

_PARAMETERS: Final[Mapping[type[Method], Method]] = {
    SmoothCdam: SmoothCdam(samples=20),
    IntegratedCdam: IntegratedCdam(steps=20),
    SmoothGrad: SmoothGrad(samples=8),
    IntegratedGradients: IntegratedGradients(steps=8),
}
_ALL: Final[tuple[Method, ...]] = tuple(_PARAMETERS.get(method) or method() for method in METHODS.values())
_SLOW: Final = ("smooth_grad", "integrated_gradients", "token_ablation")
_FIDELITY: Final = Fidelity()
_BOXES: Final = BoxSensitivity(boxes=50)


@dataclass(frozen=True)
class Part:
    """Some of the metrics, on some of the scenes.

    Attributes:
        scenes: How many.
        methods: What is compared, besides the anchors.
        metrics: What is measured.
    """

    scenes: int
    methods: tuple[Method, ...]
    metrics: tuple[Metric, ...]

    @property
    def protocol(self) -> Protocol:
        """With the anchors."""
        evaluated: tuple[Evaluated, ...] = (*self.methods, *Anchor)
        return Protocol(evaluated, self.metrics)

    @property
    def names(self) -> list[str]:
        """Of all that is compared."""
        return [*(method.kind for method in self.methods), *(anchor.value for anchor in Anchor)]


PARTS: Final = {
    "papers": Part(
        500,
        _ALL,
        (
            _FIDELITY,
            _BOXES,
            ClassDiscrimination(_FIDELITY, _BOXES),
            Compactness(),
            Compactness(absolute=True),
            Sparseness(),
            MaskAgreement(),
            Counterfactual(),
        ),
    ),
    "others": Part(
        100,
        tuple(method for method in _ALL if method.kind not in _SLOW),
        (InsertionDeletion(steps=16), Randomisation()),
    ),
}


@dataclass(frozen=True)
class Sheet:
    """A table of the document."""

    name: str
    part: str
    columns: tuple[Column, ...]


SHEETS: Final = (
    Sheet(
        "correctness",
        "papers",
        (
            Column("A_MIF", 0, "a_mif", -1, 0),
            Column("A_LIF", 0, "a_lif", 1, 0),
            Column("A_LIF-MIF", 0, "a_lif_mif", 1, 0),
            Column("box: mean r", 1, "box_mean", 1),
            Column("box: area", 1, "box_area", 1),
        ),
    ),
    Sheet(
        "class_discrimination",
        "papers",
        (
            Column("delta A_MIF", 2, "delta_a_mif", -1, 0),
            Column("delta A_LIF", 2, "delta_a_lif", 1, 0),
            Column("delta A_LIF-MIF", 2, "delta_a_lif_mif", 1, 0),
            Column("delta box: mean r", 2, "delta_box_mean", 1),
            Column("delta box: area", 2, "delta_box_area", 1),
        ),
    ),
    Sheet(
        "compactness",
        "papers",
        (
            Column("signed", 3, "compactness", 1),
            Column("absolute", 4, "compactness", 1),
            Column("Gini", 5, "gini", 1),
        ),
    ),
    Sheet(
        "masks",
        "papers",
        (
            Column("energy", 6, "energy", 1),
            Column("pointing game", 6, "pointing_game", 1),
            Column("AUROC", 6, "auroc", 1),
            Column("patch IoU", 6, "patch_iou", 1),
            Column("removal: same sign", 7, "sign_agreement", 1),
            Column("removal: r", 7, "change_correlation", 1),
        ),
    ),
    Sheet(
        "others",
        "others",
        (
            Column("insertion", 0, "insertion", 1, 3),
            Column("deletion", 0, "deletion", -1, 3),
            Column("insertion - deletion", 0, "insertion_deletion", 1, 3),
            Column("randomised: mean rho", 1, "randomisation_mean", 0),
            Column("randomised: all", 1, "randomisation_all", 0),
        ),
    ),
)


# --- measuring


def sample(number: int) -> Sample:
    """The sample of a scene: its first digit is the right target, its second the wrong one."""
    scene = draw_scene("test", FIRST_SEED + number, 2)
    right, wrong = scene.objects
    return Sample(
        id=f"scene-{scene.seed}",
        image=scene.image,
        target=Output(right.label),
        wrong_target=Output(wrong.label),
        mask=right.mask,
        counterfactual=scene.without(0).image,
        wrong_mask=wrong.mask,
    )


def measure(part: Part, explainer: Explainer, numbers: Iterable[int], out: Path) -> None:
    """Append what is found of each scene that is not there yet."""
    journal = Journal(out)
    evaluator = Evaluator(explainer, part.protocol)
    for number in numbers:
        its = sample(number)
        if its.id in journal.known:
            continue
        (found,) = evaluator.evaluate([its])
        if not isinstance(found, Measured):
            raise found
        journal.add({"id": its.id, "values": as_lists(found)})
        print(its.id, file=sys.stderr)


# --- reporting


@dataclass(frozen=True, eq=False)
class Found(Results):
    """What was found of a part.

    Attributes:
        curves: By method, metric and quantity: abscissae, mean ordinates and their standard errors, shape (3, points).
        changes: By method: the map's change and the true one of each scene, shape (scenes, 2).
    """

    curves: Mapping[tuple[int, int, str], NDArray[np.float64]]
    changes: Mapping[int, NDArray[np.float64]]


def read(part: Part, paths: Sequence[Path]) -> Found:
    """All that was found of a part."""
    statistics = Statistics(len(part.names))
    curves: dict[tuple[int, int, str], list[Any]] = defaultdict(list)
    changes: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for line in lines(path):
            statistics.add(line["id"], [tuple(value[:4]) for value in line["values"]])
            for method, metric, quantity, value, *curve in line["values"]:
                if curve:
                    curves[method, metric, quantity].append(curve[0])
                if quantity in {"map_change", "true_change"}:
                    changes[method][quantity].append(value)
    pairs = {method: np.array([its["map_change"], its["true_change"]]).T for method, its in changes.items()}
    methods = [method.kind for method in part.methods]
    return Found(methods, [anchor.value for anchor in Anchor], statistics.table(), mean_curves(curves), pairs)


def claims(paths: Sequence[Path]) -> list[Claim]:
    """What the CDAM paper says of images that show two classes, and what was found of the part `papers`."""
    part = PARTS["papers"]
    found: list[dict[tuple[str, int, str], float]] = [
        {(part.names[method], metric, quantity): value for method, metric, quantity, value, *_ in line["values"]}
        for line in together(paths)
    ]
    where = indices(part.metrics)

    def values(methods: Sequence[str], quantity: Quantity) -> NDArray[np.float64]:
        keys = [(method, where[quantity.metric], quantity.name) for method in methods]
        return np.array([[scene[key] for key in keys] for scene in found])

    return list(of_several(values))


# --- figures


def draw(papers: Found, folder: Path) -> list[Path]:
    """The curves and the scatter, as PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [
        draw_curves(papers, papers.curves, "the right digit", folder / "scenes_curves.png"),
        _draw_changes(papers, folder / "scenes_removal.png"),
    ]


def _draw_changes(found: Found, path: Path) -> Path:
    from matplotlib import pyplot as plt

    column = Column("", 7, "change_correlation", 1)
    methods = len(found.methods)
    figure, axes = plt.subplots(3, 4, figsize=(13, 9.4), layout="constrained", sharey=True)
    for index, axis in zip(range(methods), axes.flat, strict=True):
        name = found.names[index]
        told, true = found.changes[index].T
        axis.scatter(told, true, s=5, alpha=0.4, color=FAMILY[name], lw=0)
        axis.axhline(0, color="#999999", lw=0.6)
        axis.axvline(0, color="#999999", lw=0.6)
        axis.set_title(f"{name.replace('_', ' ')}   r = {found.row(index, column).mean:.2f}", fontsize=11)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("sum of the map where the digit is")
    figure.supylabel("change of the digit's logit when it is taken out")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# --- the command


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="shipped", help="of the model, in the results' file names")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--part", choices=PARTS, default="papers")
    measuring.add_argument("--weights", type=Path, help="of a demo model trained anew; default: the shipped one")
    measuring.add_argument("--shard", default="0/1", help="every how manieth scene, as 0/2 and 1/2")
    measuring.add_argument("--scenes", type=int, help="default: as many as the document's")
    reporting = commands.add_parser("report")
    reporting.add_argument("--write", action="store_true", help="put the tables and figures into the documents")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        _measure(arguments)
    else:
        _report(arguments)


def _measure(arguments: argparse.Namespace) -> None:
    part = PARTS[arguments.part]
    first, step = map(int, arguments.shard.split("/"))
    if step > 1:
        torch.set_num_threads(1)
    model = demo_model.load()
    if arguments.weights:
        model.load_state_dict(load_file(arguments.weights))
    out = arguments.results / f"{arguments.name}-{arguments.part}-{first}of{step}.jsonl"
    numbers = islice(range(arguments.scenes or part.scenes), first, None, step)
    measure(part, Explainer(model), numbers, out)


def _report(arguments: argparse.Namespace) -> None:
    found = {
        name: read(part, sorted(arguments.results.glob(f"{arguments.name}-{name}-*.jsonl")))
        for name, part in PARTS.items()
    }
    blocks = {}
    for sheet in SHEETS:
        its = found[sheet.part]
        blocks[sheet.name] = f"{its.table.samples} scenes:\n\n{markdown(its, sheet.columns)}"
        print(f"\n{sheet.name}: {blocks[sheet.name]}")
    if arguments.write:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), blocks))
        for path in draw(found["papers"], IMAGES):
            print("wrote", path)


if __name__ == "__main__":
    main()
