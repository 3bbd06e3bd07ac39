"""How long a batch will take, learned from those before."""

import math
from collections.abc import Hashable
from typing import Final

_WEIGHT: Final = 0.2  # of the newest batch
_OUTLIER: Final = 4.0  # a machine that stood still for a moment is not so much slower now


class Estimator:
    """Running estimates of the time of a batch by kind and cost.

    A batch's time grows more slowly than its cost while the device is not full, so each power of two of the cost has a rate of its own.
    """

    def __init__(self) -> None:
        self._rates: dict[Hashable, dict[int, float]] = {}

    def observe(self, kind: Hashable, cost: float, seconds: float) -> None:
        """Learn from a batch that took so long."""
        rates = self._rates.setdefault(kind, {})
        size, rate = _size(cost), seconds / cost
        known = rates.get(size, rate)
        rates[size] = (1 - _WEIGHT) * known + _WEIGHT * min(rate, _OUTLIER * known)

    def seconds(self, kind: Hashable, cost: float) -> float | None:
        """What a batch of this cost will take; None if there was none of its kind."""
        rates = self._rates.get(kind)
        if not rates:
            return None
        size = _size(cost)
        # At worst no more efficient than smaller batches, and no slower than larger ones.
        known = [rate * 2.0**other for other, rate in rates.items() if other > size]
        known += [rates[other] * cost for other in sorted(rates, reverse=True) if other <= size][:1]
        return min(known)


def _size(cost: float) -> int:
    return math.ceil(math.log2(cost)) if cost > 0 else -16
