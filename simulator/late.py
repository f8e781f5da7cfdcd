"""Why the latest requests were late: what they found, and where those that found an instance spent most of the time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.results import Found, Results

_FOUND = {
    Found.COLD: "nothing of the model was resident: all was loaded",
    Found.PARTIAL: "a part was resident: the rest was loaded",
    Found.WARM: "resident, and had to be woken",
    Found.WAKING: "was being woken for a request before",
    Found.OPEN: "was being woken for a request before",
}
_SLOT = "active, and all its instances' slots were taken"
_KV = "active, and KV pages were lacking"
_BEHIND = "active, and it waited for prompts before it"
_COMPUTED = "active, and its prompt took that long, with what shared the GPU"
_UNSERVED = "not served"


@dataclass(frozen=True)
class Cause:
    """One cause among the latest requests."""

    text: str
    requests: int
    ttft_s: float  # their median; inf where they were not served


def causes(results: Results, percentile: float = 99.0) -> list[Cause]:
    """Of the requests whose time to the first token is at this percentile or above: how many by cause, most first."""
    if not len(results.ttft_s):
        return []
    late = np.flatnonzero(results.ttft_s >= results.ttft(percentile))
    why = np.array([_cause(results, at) for at in late.tolist()])
    found = [
        Cause(str(text), int((why == text).sum()), float(np.median(results.ttft_s[late[why == text]])))
        for text in np.unique(why)
    ]
    return sorted(found, key=lambda cause: (-cause.requests, cause.text))


def _cause(results: Results, at: int) -> str:
    if not np.isfinite(results.ttft_s[at]):
        return _UNSERVED
    found = Found(int(results.found[at]))
    if found is not Found.ACTIVE:
        return _FOUND[found]
    arrival, taken, begun = results.arrival_s[at], results.taken_s[at], results.begun_s[at]
    parts = {
        _SLOT: taken - arrival,
        _KV if results.short[at] else _BEHIND: begun - taken,
        _COMPUTED: arrival + results.ttft_s[at] - begun,
    }
    return max(parts, key=lambda text: parts[text])
