"""What warming was worth: how often it was there when it was needed, and how much of it went unused."""

from __future__ import annotations

import threading

from prometheus_client import Counter

_WAKES = Counter(
    "warmserve_gpu_agent_wakes_total",
    "Wakes, by how much of the weights they found there: all (a prewarm hit), some, or none (a miss)",
    ["model", "found"],
)
_SAVED = Counter(
    "warmserve_gpu_agent_prewarmed_bytes_used_total",
    "Bytes that wakes found there, and so need not copy; found=some is what partial residency saved",
    ["model", "found"],
)
_WASTED = Counter(
    "warmserve_gpu_agent_prewarmed_bytes_wasted_total", "Bytes that warming copied and no wake found", ["model"]
)


class Prewarming:
    """The accounts of one shard. Bytes are counted once: as used by the first wake behind the copy, or as wasted.

    Thread-safe, for pages are counted as they are copied.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._unused = 0
        self._lock = threading.Lock()

    def copied(self, nbytes: int) -> None:
        """Warming copied so much."""
        with self._lock:
            self._unused += nbytes

    def woken(self, resident: int, total: int) -> None:
        """A wake found `resident` bytes of `total`."""
        found = "all" if resident == total else "some" if resident else "none"
        _WAKES.labels(self._model, found).inc()
        _SAVED.labels(self._model, found).inc(resident)
        with self._lock:
            self._unused = 0

    def lost(self, nbytes: int) -> None:
        """So much was taken away, from the end, which was copied last."""
        with self._lock:
            wasted = min(nbytes, self._unused)
            self._unused -= wasted
        _WASTED.labels(self._model).inc(wasted)
