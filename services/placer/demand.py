"""How many instances a model needs, by the forecast and by what is in progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.placer.snapshot import Model, Rules

_NO_LOAD = 0.1  # requests in progress; a mean below this leaves an instance idle nine tenths of the time, or more


@dataclass(frozen=True)
class Demand:
    """What a model needs."""

    capacity: int  # requests that one instance carries
    mean: float  # forecast mean load, the highest of the windows that count
    peak: float  # forecast peak load, likewise
    foundation: int  # instances for the mean
    burst: int  # further ones for the peak alone
    wake: int  # instances to have active at least: fewer are made up for
    keep: int  # instances to keep active if they are: more are drained

    @property
    def replicas(self) -> int:
        """Replicas to have warm or active."""
        return self.foundation + self.burst

    @property
    def burstiness(self) -> float:
        """The share of what its replicas carry that only the peak would fill, 0 to 1."""
        return min(1.0, (self.peak - self.mean) / (self.replicas * self.capacity)) if self.replicas else 0.0


def demand(model: Model, now_s: float, active: int, rules: Rules) -> Demand:
    """What `model` needs, of which `active` instances serve or are being woken."""
    counted = [w for w in model.windows if w.end_s > now_s and w.start_s < now_s + rules.lookahead_s]
    mean = max((w.mean.p50 for w in counted), default=0.0)
    peak = max((max(w.peak.p90, w.mean.p50) for w in counted), default=0.0)
    foundation = instances(mean, model.capacity)
    replicas = max(foundation, instances(peak, model.capacity))
    if model.max_replicas:
        replicas = min(replicas, model.max_replicas)
        foundation = min(foundation, replicas)
    load = model.waiting + (model.running if active else 0)  # without an instance, what runs is draining
    overloaded = load > rules.scale_up * model.capacity * active
    wake = math.ceil(load / (rules.scale_up * model.capacity)) if overloaded else 0
    wake = max(wake, model.min_replicas)
    # The forecast keeps an instance that is there, but wakes none.
    keep = max(wake, foundation, math.ceil(load / (rules.scale_down * model.capacity)))
    if model.max_replicas:
        wake, keep = min(wake, model.max_replicas), min(keep, model.max_replicas)
    return Demand(model.capacity, mean, peak, foundation, replicas - foundation, wake, keep)


def instances(load: float, capacity: int) -> int:
    """Instances that carry a load of requests in progress."""
    return math.ceil(load / capacity) if load >= _NO_LOAD else 0
