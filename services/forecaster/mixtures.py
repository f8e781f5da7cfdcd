"""Further series to learn from: sums of a few, for models' traffic is a sum of their clients' too. Pure."""

from __future__ import annotations

import numpy as np

from services.forecaster.features import Floats

_COUNT = 40  # at most, and no more than there are series to mix
_PARTS = (2, 3)
_UNEVEN = 0.7  # standard deviation of the log of parts' shares


def mixtures(series: Floats) -> Floats:
    """Sums of two or three of `series`, shape (n, windows), in uneven shares, each as large as some series of these.

    Shape (at most 40, windows); NaN where a part is. The same series give the same mixtures.
    """
    counts = (~np.isnan(series)).sum(axis=1)
    mean = np.nansum(series, axis=1) / np.maximum(counts, 1)
    usable = np.flatnonzero(mean > 0)
    if len(usable) < max(_PARTS):
        return np.empty((0, series.shape[1]))
    rng = np.random.default_rng(1)
    sums = []
    for _ in range(min(_COUNT, len(usable))):
        parts = rng.choice(usable, rng.integers(min(_PARTS), max(_PARTS) + 1), replace=False)
        shares = np.exp(rng.normal(0, _UNEVEN, len(parts)))
        shares *= mean[rng.choice(usable)] / shares.sum()
        sums.append(shares / mean[parts] @ series[parts])
    return np.array(sums)
