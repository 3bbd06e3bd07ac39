"""The report's figures: SVG by matplotlib, whose colours and fonts the page sets."""

import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from html import escape
from io import StringIO
from typing import Any, Final

import numpy as np

from cdam_cli.evaluation.about import About
from cdam_cli.evaluation.quantities import quantity
from cdam_cli.evaluation.results import Results

COLOURS: Final = 8
"""Methods that have a colour of their own; further ones share theirs with a dashed line."""

_DASHES: Final[Sequence[Any]] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)))
_ANCHOR_DASHES: Final[Sequence[Any]] = ((0, (1, 1.6)), (0, (6, 2)), (0, (6, 2, 1, 2)))
# Colours that nothing else has; in the page they are variables, so that light and dark can have their own.
_INK, _MUTED, _GRID, _ANCHOR = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
_VARIABLES: Final = {_INK: "ink", _MUTED: "muted", _GRID: "rule", _ANCHOR: "anchor"}
_METHODS: Final = tuple(f"#0b00{index:02x}" for index in range(COLOURS))
_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cdam",
    "font.size": 10,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlecolor": _INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
}


def variable(about: About, method: int) -> str:
    """The page's variable for a method's colour."""
    return "anchor" if about.is_anchor(method) else f"m{_place(about, method) % COLOURS}"


def dashes(about: About, method: int) -> Any:
    """How a method's line is dashed, in matplotlib's words."""
    if about.is_anchor(method):
        return _ANCHOR_DASHES[_place(about, method) % len(_ANCHOR_DASHES)]
    return _DASHES[_place(about, method) // COLOURS % len(_DASHES)]


def curves(about: About, results: Results, metric: int) -> list[str]:
    """A figure for each quantity of a metric that has curves: their means, with bands of one standard error."""
    names = [
        name
        for name in results.quantities(metric)
        if any((m, metric, name) in results.curves for m in range(len(about.methods)))
    ]
    return [_curve(about, results, metric, name) for name in names]


def _curve(about: About, results: Results, metric: int, name: str) -> str:
    known = quantity(name)

    def draw(axes: Any) -> None:
        for method in reversed(range(len(about.methods))):  # the first on top
            curve = results.curves.get((method, metric, name))
            if curve is None:
                continue
            colour, error = _colour(about, method), curve.standard_error
            if error.any():
                axes.fill_between(curve.x, curve.mean - error, curve.mean + error, color=colour, alpha=0.16, lw=0)
            marker = "o" if len(curve.x) <= 8 else None
            style = {"color": colour, "ls": dashes(about, method), "lw": 1.8, "marker": marker, "ms": 4}
            axes.plot(curve.x, curve.mean, **style)
        axes.set(title=known.curve or name, xlabel=known.axes[0], ylabel=known.axes[1])
        axes.margins(x=0.02)

    return _svg(draw, (4.6, 3.1), f"{known.curve or name}: curves of {', '.join(about.method_names)}")


def scatter(about: About, results: Results, metric: int) -> list[tuple[int, str]]:
    """For each method, what its map says of the change against the true change, sample by sample."""
    found = [
        (method, results.points[method, metric])
        for method in range(len(about.methods))
        if (method, metric) in results.points
    ]
    if not found:
        return []
    ends = _range([true for _, points in found for _, true in points])

    def drawing(method: int, points: Sequence[tuple[float, float]]) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            said, true = np.array(points, np.float64).T
            axes.axhline(0, color=_MUTED, lw=0.8)
            axes.axvline(0, color=_MUTED, lw=0.8)
            axes.plot(true, said, "o", color=_colour(about, method), ms=3.4, alpha=0.55, mew=0)
            axes.set(xlabel="true change", ylabel="the map's", xlim=ends, ylim=_range(said))
            row = results.row((method, metric, "change_correlation"))
            axes.set_title("" if row is None else f"r = {row.mean:.2f}", color=_MUTED, fontsize=10)
            axes.locator_params(nbins=5)

        return draw

    return [
        (method, _svg(drawing(method, points), (2.7, 2.3), f"{about.method_names[method]}: map change by true change"))
        for method, points in found
    ]


def _range(values: Iterable[float]) -> tuple[float, float]:
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.06 * (high - low or 1.0)
    return low - margin, high + margin


def _place(about: About, method: int) -> int:
    """A method's place among the methods, an anchor's among the anchors."""
    return sum(about.is_anchor(other) == about.is_anchor(method) for other in range(method))


def _colour(about: About, method: int) -> str:
    return _ANCHOR if about.is_anchor(method) else _METHODS[_place(about, method) % COLOURS]


def _svg(draw: Callable[[Any], None], size: tuple[float, float], title: str) -> str:
    """A figure as an SVG element, for a page that has the variables."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        text = StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    return _for_page(text.getvalue(), title)


def _for_page(svg: str, title: str) -> str:
    """What stands between other things in a page: no prolog, colours by variables, ids that no other figure has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    own = sha256(f"{title}{svg}".encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>f{own}-", svg)
    for colour, name in (*_VARIABLES.items(), *((colour, f"m{index}") for index, colour in enumerate(_METHODS))):
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        lambda found: (
            f'<svg viewBox="{found[1]}" role="img" aria-label="{escape(title)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
        ),
        svg,
        count=1,
    ).strip()
