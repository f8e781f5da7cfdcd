"""How likely a load is exceeded, from the quantiles of its forecast."""

from __future__ import annotations

from services.placer.snapshot import Quantiles


class Chances:
    """The distribution that three quantiles stand for.

    P(load > x) falls in straight lines through the quantiles. Below the median it mirrors what is above, as far as 0:
    where the mirror ends at 0, that much of the chance is a load of exactly 0. Above p99 it goes on to 0 over as much
    as lies between p90 and p99.
    """

    def __init__(self, quantiles: Quantiles) -> None:
        p50, p90, p99 = quantiles.p50, quantiles.p90, quantiles.p99
        self._xs = (max(0.0, 2 * p50 - p99), max(0.0, 2 * p50 - p90), p50, p90, p99, 2 * p99 - p90)
        self._above = (0.99, 0.9, 0.5, 0.1, 0.01, 0.0)
        areas = [self._xs[0]]  # of P(load > x) from 0 to each of the points
        for i in range(5):
            areas.append(areas[-1] + (self._xs[i + 1] - self._xs[i]) * (self._above[i] + self._above[i + 1]) / 2)
        self._areas = tuple(areas)

    def between(self, low: float, high: float) -> float:
        """Expected load above `low`, of which no more than `high - low` counts. 0 <= low <= high."""
        return self._area(high) - self._area(low)

    def _area(self, x: float) -> float:
        xs = self._xs
        if x <= xs[0]:
            return x
        if x >= xs[5]:
            return self._areas[5]
        i = next(i for i in range(5) if x < xs[i + 1])
        width = xs[i + 1] - xs[i]
        part = x - xs[i]
        fall = (self._above[i] - self._above[i + 1]) * (part / width)  # whose slope may be no number
        return self._areas[i] + part * (self._above[i] - fall / 2)
