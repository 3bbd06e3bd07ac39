"""What the CDAM paper has in its tables (Brocki, Binda and Chung, TMLR 2024: tables 1 to 3 and S1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

METHODS: Final = (
    "cdam",
    "integrated_cdam",
    "smooth_cdam",
    "relevance_propagation",
    "partial_lrp",
    "attention",
    "smooth_grad",
    "integrated_gradients",
    "input_x_gradient",
)
CDAM: Final = METHODS[:3]
"""The three variants of CDAM."""


def _of(*values: float) -> Mapping[str, float]:
    return dict(zip(METHODS, values, strict=True))


COMPACTNESS: Final = _of(0.88, 0.88, 0.75, 0.48, 0.74, 0.56, 0.80, 0.84, 0.88)
"""Table 1; of X_multi, like the next ones."""
A_MIF: Final = _of(404, 375, 282, 315, 489, 452, 534, 226, 273)
A_LIF: Final = _of(1038, 1045, 1110, 957, 837, 846, 529, 802, 713)
A_LIF_MIF: Final = _of(632, 669, 827, 643, 348, 393, -4, 574, 439)
A_BOX: Final = _of(12.2, 13.0, 12.4, 10.0, 4.5, 4.8, 0.4, 7.6, 3.5)
DELTA_A_LIF_MIF: Final = _of(739, 708, 823, 293, 3, 0, -11, 540, 433)
DELTA_A_BOX: Final = _of(14.6, 14.8, 13.4, 6.6, 0.0, -0.2, -0.1, 7.6, 3.4)
VAL_A_MIF: Final = _of(801, 696, 591, 475, 654, 580, 796, 411, 470)
"""Table S1, of X_val, like the next ones."""
VAL_A_LIF: Final = _of(1423, 1459, 1482, 1432, 1329, 1352, 786, 1055, 935)
VAL_A_LIF_MIF: Final = _of(623, 753, 890, 957, 674, 771, -10, 644, 465)
VAL_A_BOX: Final = _of(11.3, 12.9, 11.9, 12.7, 8.4, 9.1, 0.2, 8.3, 3.1)
