"""How forecasts are adapted to what came of those before them, for all models, from what is kept on disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.forecaster.adaptive import REMEMBERED, adapted, follow, unmoved, usual_traffic
from services.forecaster.past import LEARNT_AHEAD, PastForecasts
from services.forecaster.predictors import MEAN_LOAD, PEAK_LOAD, QUANTITIES, Floats, with_peaks_above_means

_LOADS = PEAK_LOAD + 1  # quantities of which past forecasts are kept
_AT_ONCE = 50  # windows read at once, for the memory's sake
_LIKE = [PEAK_LOAD if quantity == PEAK_LOAD else MEAN_LOAD for quantity in range(len(QUANTITIES))]


class Following:
    """Factors of the models forecast last. After a start they are learnt anew from the forecasts that are kept, so that
    nothing is lost with the process. Reads the disk: to be called in threads, one at a time."""

    def __init__(self, past: PastForecasts) -> None:
        self._past = past
        self._models: tuple[str, ...] = ()
        self._next = 0  # the window to learn from next
        self._logs = unmoved(1, len(LEARNT_AHEAD), _LOADS)  # of the models, and last of a model that is new

    def adapt(self, models: Sequence[str], history: Floats, last: int, quantiles: Floats) -> Floats:
        """Forecasts of the windows after that numbered `last`, shape (n, horizon, 5, 3), adapted to what has come.

        `history`: shape (n, windows, 5), up to the window `last`, NaN where unknown. Rates and tokens are adapted as
        the mean load is. Announced load is no forecast: nothing is learnt from it.
        """
        self._learn(tuple(models), history[:, :, :_LOADS], last)
        steps = np.arange(1, quantiles.shape[1] + 1)
        shares = np.array([np.interp(steps, LEARNT_AHEAD, one) for one in np.eye(len(LEARNT_AHEAD))])
        logs = np.einsum("as,naql->nsql", shares, self._logs[:-1])
        return with_peaks_above_means(adapted(quantiles, logs[:, :, _LIKE]))

    def _learn(self, models: tuple[str, ...], loads: Floats, last: int) -> None:
        if models != self._models:
            before = dict(zip(self._models, self._logs, strict=False))
            new = self._logs[-1]
            self._logs = np.array([before.get(name, new) for name in models] + [new])
            self._models = models
        # A clock that went back has it learn a few windows twice, rather than nothing for as long as it had leapt.
        first = max(min(self._next, last + 1), last + 1 - min(REMEMBERED, loads.shape[1]))
        usual = _with_new(usual_traffic(loads), 0.0)[:, None]
        for begin in range(first, last + 1 if models else first, _AT_ONCE):
            end = min(begin + _AT_ONCE, last + 1)
            made = np.stack([self._past.unannounced(models, begin, end - 1, ahead) for ahead in LEARNT_AHEAD], axis=2)
            made = _with_new(made, np.nan)
            at = loads.shape[1] - (last + 1 - begin)
            came = _with_new(loads[:, at : at + end - begin], np.nan)
            for window in range(end - begin):
                self._logs = follow(self._logs, made[:, window], came[:, window, None], usual)
            self._next = end
        self._next = last + 1


def _with_new(values: Floats, of_new: float) -> Floats:
    """`values`, models first, and those of a model of which nothing is known."""
    return np.concatenate([values, np.full((1, *values.shape[1:]), of_new)])
