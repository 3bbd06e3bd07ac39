"""What benchmarks on samples share: journals, tables of means with intervals, and documents that they are put into."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdam.statistics import Comparison, Row, Table
from cdam_engine.evaluation import Measured


@dataclass(frozen=True, eq=False)
class Column:
    """A quantity in a table.

    Attributes:
        title: What stands above it.
        metric: Index of the metric.
        quantity: Its name.
        better: 1 if higher is better, -1 if lower is, 0 if nearer to 0 is.
        digits: After the point.
        published: What a paper has of it, by method; shown in a column of its own.
    """

    title: str
    metric: int
    quantity: str
    better: int
    digits: int = 2
    published: Mapping[str, float] = field(default_factory=dict)

    def merit(self, value: float) -> float:
        """More is better."""
        return self.better * value if self.better else -abs(value)


@dataclass(frozen=True, eq=False)
class Results:
    """Statistics over samples.

    Attributes:
        methods: Names of the methods compared.
        anchors: Names of the anchors, which come after them.
        table: The statistics.
    """

    methods: Sequence[str]
    anchors: Sequence[str]
    table: Table

    @property
    def names(self) -> list[str]:
        """Of all that is compared."""
        return [*self.methods, *self.anchors]

    def row(self, method: int, column: Column) -> Row:
        """The numbers of one method."""
        key = (method, column.metric, column.quantity)
        return next(row for row in self.table.rows if (row.method_index, row.metric_index, row.quantity) == key)

    def fit(self, column: Column) -> bool:
        """Whether the quantity tells the object's mask from a random map."""
        names = self.names
        pair = {names.index("mask"), names.index("random")}
        its = next(
            c
            for c in self.table.comparisons
            if {c.method_index, c.other_method_index} == pair
            and (c.metric_index, c.quantity) == (column.metric, column.quantity)
        )
        return _for_mask(its, names.index("mask"), column.better)


def _for_mask(its: Comparison, mask: int, better: int) -> bool:
    if its.interval_low is None or its.interval_high is None:  # of one sample nothing is sure
        return False
    sign = better if its.method_index == mask else -better
    return min(sign * its.interval_low, sign * its.interval_high) > 0


def markdown(results: Results, columns: Sequence[Column]) -> str:
    """The table: mean and half of the 95 % interval; the best method of each column in bold."""
    methods = len(results.methods)
    best = {column: max(range(methods), key=lambda m: column.merit(results.row(m, column).mean)) for column in columns}
    titles = [title for column in columns for title in (column.title, *["paper"] * bool(column.published))]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for index, name in enumerate(results.names):
        cells = []
        for column in columns:
            text = cell(results.row(index, column), column.digits)
            cells.append(f"**{text}**" if best[column] == index else text)
            if column.published:
                cells.append(_published(column, name))
        title = f"`{name}`" if index < methods else f"*{name.replace('_', ' ')}*"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    words = {1: "higher", -1: "lower", 0: "nearer 0"}
    fitness = [
        text
        for column in columns
        for text in (words[column.better] + _mark(results, column), *[""] * bool(column.published))
    ]
    lines.append("| better; mask against random | " + " | ".join(fitness) + " |")
    return "\n".join(lines)


def _published(column: Column, name: str) -> str:
    if name not in column.published:
        return ""
    value = column.published[name]
    best = max(column.published.values(), key=column.merit)
    text = f"{value:g}"
    return f"**{text}**" if value == best else text


def _mark(results: Results, column: Column) -> str:
    """Of what the anchors can't be asked, none: they know no model whose weights could be random."""
    if not column.better:
        return ""
    return "; fit" if results.fit(column) else "; **unfit**"


def cell(row: Row, digits: int) -> str:
    """Mean and half of the 95 % interval."""
    if row.interval_low is None or row.interval_high is None:
        return f"{row.mean:.{digits}f}"
    half = (row.interval_high - row.interval_low) / 2
    return f"{row.mean:.{digits}f} ± {half:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def insert(document: str, blocks: Mapping[str, str]) -> str:
    """The document with what stands between the markers of each block replaced.

    Raises:
        ValueError: The document has no such markers.
    """
    for name, block in blocks.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        document, count = marked.subn(lambda match, text=block: f"{match[1]}{text}\n{match[2]}", document)
        if not count:
            raise ValueError(f"the document has no block {name!r}")
    return document


def encode(values: Any) -> str:
    """Numbers as text: float32, little-endian, base64."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def decode(text: str) -> NDArray[np.float32]:
    """The numbers of a text, (n,)."""
    return np.frombuffer(base64.b64decode(text), "<f4")


class Journal:
    """A file of JSON lines that a process appends to, and goes on with when it is started again.

    Args:
        path: Where; its folder is made.
        header: What all its lines have in common, kept as the first one; None: nothing.

    Attributes:
        known: Ids of the lines that are there.

    Raises:
        ValueError: The file was begun with another header.
    """

    def __init__(self, path: Path, header: Mapping[str, Any] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):  # a process that was killed left half a line
            self._write("")
        if header is not None:
            self._begin(header)
        self.known = {line["id"] for line in lines(path)} if path.exists() else set()

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line, which has an id."""
        self._write(json.dumps(line))
        self.known.add(line["id"])

    def _begin(self, header: Mapping[str, Any]) -> None:
        if not self._path.exists():
            self._write(json.dumps({"header": header}))
        its = header_of(self._path)
        for key in header:
            if its.get(key) != json.loads(json.dumps(header[key])):
                raise ValueError(
                    f"{self._path}: begun with {key} {its.get(key)!r}, not {header[key]!r}: name another, or remove it"
                )

    def _write(self, line: str) -> None:
        with self._path.open("a") as file:
            file.write(line + "\n")


def header_of(path: Path) -> dict[str, Any]:
    """What a journal was begun with; empty if with nothing."""
    first = next(_whole(path), {})
    its: dict[str, Any] = first.get("header", {})
    return its


def common_header(paths: Sequence[Path]) -> dict[str, Any]:
    """What journals of one thing were begun with; empty if there are none.

    Raises:
        ValueError: They are of different models or protocols.
    """
    headers = [header_of(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        for key in ("model", "protocol"):
            if header.get(key) != headers[0].get(key):
                raise ValueError(f"{path}: of another {key} than {paths[0]}: remove one of them")
    return headers[0] if headers else {}


def together(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """All whole lines of journals of one thing.

    Raises:
        ValueError: They are of different models or protocols, or two have a line of the same id.
    """
    common_header(paths)
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in paths:
        for line in lines(path):
            if line["id"] in found:
                raise ValueError(f"{path}: {line['id']} is in {found[line['id']][0]}, too: remove one of them")
            found[line["id"]] = path, line
    return [line for _, line in found.values()]


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines of a journal but its header."""
    return (line for line in _whole(path) if "header" not in line)


def _whole(path: Path) -> Iterator[dict[str, Any]]:
    """A process that was killed may leave half a line."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


FAMILY: Mapping[str, str] = {
    "cdam": "#d1495b",
    "smooth_cdam": "#f08a4b",
    "integrated_cdam": "#8f2d56",
    "attention": "#2b59c3",
    "attention_rollout": "#7ea0e8",
    "relevance_propagation": "#1b998b",
    "partial_lrp": "#7cc6b8",
    "input_x_gradient": "#8d6b94",
    "smooth_grad": "#b185a7",
    "integrated_gradients": "#5c4d7d",
    "token_ablation": "#5f6b3a",
    "patch_mask_prediction": "#b0a160",
    "unnormalised_cdam": "#999999",
}
"""The colour of each method in figures."""

ANCHOR_STYLE: Mapping[str, str] = {"random": ":", "mask": "-", "inverted_mask": "--"}
"""How the anchors' curves are drawn."""


Curve = tuple[int, int, str]
"""Method, metric and quantity that a curve is of."""


def as_lists(measured: Measured) -> list[list[Any]]:
    """What was measured of a sample, for a journal: method, metric, quantity, value, and its curve if it has one."""
    return [
        [v.method_index, v.metric_index, v.quantity, v.value]
        + ([] if v.curve is None else [np.round(v.curve, 5).tolist()])
        for v in measured.values
    ]


def mean_curves(curves: Mapping[Curve, Sequence[Any]]) -> dict[Curve, NDArray[np.float64]]:
    """Of each, from a curve (2, points) of every sample: abscissae, mean ordinates, standard errors, (3, points)."""
    means = {}
    for key, its in curves.items():
        stack = np.array(its)
        error = stack[:, 1].std(0, ddof=min(1, len(stack) - 1)) / np.sqrt(len(stack))
        means[key] = np.stack([stack[0, 0], stack[:, 1].mean(0), error])
    return means


def draw_curves(results: Results, curves: Mapping[Curve, NDArray[np.float64]], what: str, path: Path) -> Path:
    """Draw fidelity (metric 0) and box sensitivity (metric 1), of each with its standard error, as PNG.

    Args:
        results: What is compared.
        curves: As of `mean_curves`.
        what: Whose logit it is.
        path: Where to.
    """
    from matplotlib import pyplot as plt

    panels = (
        ("most important first", 0, "a_mif", "pixels blurred, %", f"logit of {what}"),
        ("least important first", 0, "a_lif", "pixels blurred, %", f"logit of {what}"),
        ("box sensitivity", 1, "box_area", "side of the box, % of the image's", "Pearson's r"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.4), layout="constrained")
    for axis, (title, metric, quantity, across, up) in zip(axes, panels, strict=True):
        for index, name in enumerate(results.names):
            x, y, error = curves[index, metric, quantity]
            colour = "#222222" if name in ANCHOR_STYLE else FAMILY[name]
            width = 2.4 if "cdam" in name else 1.4
            axis.plot(x, y, color=colour, ls=ANCHOR_STYLE.get(name, "-"), lw=width, label=name.replace("_", " "))
            axis.fill_between(x, y - error, y + error, color=colour, alpha=0.15, lw=0)
        axis.set(title=title, xlabel=across, ylabel=up)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
