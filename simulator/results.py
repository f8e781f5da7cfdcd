"""What a run has shown: numbers per request and per model, and their summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_PERCENTILES = (50, 90, 95, 99)


class Found(IntEnum):
    """What a request found of its model when it arrived: the best that there was."""

    COLD = 0  # nothing resident, or only on its way without an order to serve
    PARTIAL = 1  # a part of a replica
    WARM = 2  # all weights of a replica, not serving
    WAKING = 3  # an instance about to serve
    OPEN = 4  # an instance that takes requests while its last weights are on their way: services call it active
    ACTIVE = 5  # an instance


@dataclass
class Wakes:
    """Instances begun, by how much of their weights was resident when the order came."""

    warm: int = 0  # all
    partial: int = 0
    cold: int = 0  # nothing

    @property
    def all(self) -> int:
        """Instances begun."""
        return self.warm + self.partial + self.cold


@dataclass
class Results:
    """One run. Arrays have one entry per request, in order of arrival. A request that was not served, because nothing
    had room for it or the run ended, has an infinite time to the first token."""

    policy: str
    models: list[str]
    duration_s: float  # from the first arrival to the last request's end
    gpus: int
    model: Ints  # index in `models`
    arrival_s: Floats
    ttft_s: Floats  # from arrival to the first token; inf: unserved
    finished_s: Floats  # when the last token came; inf: unserved
    prompt_tokens: Ints
    output_tokens: Ints
    found: Ints  # Found
    taken_s: Floats  # when an instance took it; inf: none did
    begun_s: Floats  # when its prompt was begun; likewise
    short: NDArray[np.bool_]  # whether its prompt had to wait for KV pages
    unloaded_ttft_s: Floats  # time to the first token on an idle active instance, by the same cost model
    unloaded_tpot_s: Floats  # time per further token alone on it
    busy_gpu_s: Floats  # per model: GPU-seconds computing
    active_gpu_s: Floats  # per model: GPU-seconds that instances were there (active or draining)
    resident_gpu_s: Floats  # per model: arena share x seconds that weights or KV took
    wakes: Wakes = field(default_factory=Wakes)
    wakes_by_model: list[Wakes] = field(default_factory=list)
    copied_bytes: Mapping[str, float] = field(default_factory=dict)  # by tier: host, peer, disk
    wasted_bytes: float = 0.0  # copied and evicted without having served
    preemptions: int = 0
    drains: int = 0
    plans: int = 0
    plan_seconds: float = 0.0  # of the processor, spent in the policy
    wall_seconds: float = 0.0  # of real time, all in all
    seed: int = 0

    @property
    def served(self) -> NDArray[np.bool_]:
        """Which requests came to their end."""
        return np.isfinite(self.finished_s)

    @property
    def tpot_s(self) -> Floats:
        """Seconds per token after the first; 0 where there was none, inf where unserved."""
        more = np.maximum(self.output_tokens - 1, 1)
        first = self.arrival_s + self.ttft_s
        with np.errstate(invalid="ignore"):
            took = np.where(self.served, self.finished_s - first, np.inf)
        return np.where(self.output_tokens > 1, took / more, np.where(self.served, 0.0, np.inf))

    def ttft(self, percentile: float, model: str | None = None) -> float:
        """A percentile of the time to the first token, over all requests or one model's; NaN where there is none."""
        chosen = self.ttft_s if model is None else self.ttft_s[self.model == self.models.index(model)]
        return float(np.percentile(chosen, percentile, method="inverted_cdf")) if chosen.size else float("nan")

    def within(self, ttft_factor: float = 10.0, tpot_factor: float = 4.0) -> float:
        """Share of requests under that many times their unloaded time to the first and per further token."""
        if not self.ttft_s.size:
            return 1.0
        good = (self.ttft_s <= ttft_factor * self.unloaded_ttft_s) & (self.tpot_s <= tpot_factor * self.unloaded_tpot_s)
        return float(np.mean(good))

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of served requests over the duration."""
        return float(self.output_tokens[self.served].sum() / self.duration_s) if self.duration_s else 0.0

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite percentile is None."""
        return {
            "policy": self.policy,
            "seed": self.seed,
            "gpus": self.gpus,
            "duration_s": self.duration_s,
            "requests": len(self.arrival_s),
            "unserved": int((~self.served).sum()),
            "requests_per_s": len(self.arrival_s) / self.duration_s if self.duration_s else 0.0,
            "tokens_per_s": self.tokens_per_s,
            "ttft_s": {"mean": _finite(float(np.mean(self.ttft_s))) if self.ttft_s.size else None}
            | {f"p{p}": _finite(self.ttft(p)) for p in _PERCENTILES},
            "tpot_s": {f"p{p}": _finite(_percentile(self.tpot_s, p)) for p in _PERCENTILES},
            "within_target": self.within(),
            "found": {state.name.lower(): int((self.found == state).sum()) for state in Found},
            "wakes": {"warm": self.wakes.warm, "partial": self.wakes.partial, "cold": self.wakes.cold},
            "copied_bytes": dict(self.copied_bytes),
            "wasted_bytes": self.wasted_bytes,
            "preemptions": self.preemptions,
            "drains": self.drains,
            "plans": self.plans,
            "plan_seconds": self.plan_seconds,
            "wall_seconds": self.wall_seconds,
            "models": {name: self._of(index, name) for index, name in enumerate(self.models)},
        }

    def _of(self, index: int, name: str) -> dict[str, Any]:
        own = self.model == index
        wakes = self.wakes_by_model[index]
        return {
            "requests": int(own.sum()),
            "unserved": int((own & ~self.served).sum()),
            "ttft_s": {f"p{p}": _finite(self.ttft(p, name)) for p in _PERCENTILES},
            "tpot_s": {f"p{p}": _finite(_percentile(self.tpot_s[own], p)) for p in _PERCENTILES},
            "busy_gpu_s": float(self.busy_gpu_s[index]),
            "active_gpu_s": float(self.active_gpu_s[index]),
            "resident_gpu_s": float(self.resident_gpu_s[index]),
            "wakes": {"warm": wakes.warm, "partial": wakes.partial, "cold": wakes.cold},
        }


def _percentile(values: Floats, percentile: float) -> float:
    return float(np.percentile(values, percentile, method="inverted_cdf")) if values.size else float("nan")


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
