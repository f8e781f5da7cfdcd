"""How many KV pages an instance is left by prewarming beside it. Pure.

Pages that no instance was promised may hold other models' weights. What an instance needs beyond its promise it takes
back when it needs it, so the promise does not decide whether requests run: it decides how often weights that were
copied in have to go again.
"""

from __future__ import annotations

import math


def promised_pages(total: int, running: int, max_batch: int, in_use: int, expected: float) -> int:
    """Pages to leave to an instance, those it has included: the published bound, or what the forecast asks for.

    total (C): pages that could be its KV; running (Q): its sequences, at most max_batch (B) at once; in_use (T): pages
    that they fill; expected: sequences that the forecast says will run at once. The published bound is
    max(C * Q / B, T + C / B) (arXiv 2512.09472). The forecast's sequences are taken to be as large as those that run
    are on average, or, where none runs, to need a B-th of all.
    """
    share = total / max_batch
    published = max(share * running, in_use + share)
    of_one = in_use / running if running else share
    forecast = min(expected, max_batch) * of_one
    return min(total, math.ceil(max(published, forecast)))
