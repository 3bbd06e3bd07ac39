"""Points and weights for an integral over 0..1."""

from __future__ import annotations

from typing import get_args

import numpy as np

from cdam_engine.methods.base import Quadrature


def nodes(quadrature: Quadrature, steps: int) -> tuple[list[float], list[float]]:
    """Points and weights, `steps` of each.

    "riemann_right": k / n for k = 1..n, each 1 / n, as in the papers. "gauss_legendre": the nodes of the n-th Legendre
    polynomial, exact for polynomials of degree 2n - 1.

    Raises:
        ValueError: There is no such quadrature.
    """
    if quadrature not in get_args(Quadrature):
        raise ValueError(f"a quadrature is one of {', '.join(get_args(Quadrature))}, not {quadrature!r}")
    if quadrature == "riemann_right":
        return [k / steps for k in range(1, steps + 1)], [1 / steps] * steps
    points, weights = np.polynomial.legendre.leggauss(steps)
    return ((points + 1) / 2).tolist(), (weights / 2).tolist()
