"""How many instances a model needs, by the forecast and by what is in progress."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from services.placer.chances import Chances
from services.placer.snapshot import Model, Quantiles, Rules, WindowLoad

_NO_LOAD = 0.1  # requests in progress; a mean below this leaves an instance idle nine tenths of the time, or more
_NOTHING = Quantiles.exactly(0.0)
_FORGOTTEN_S = 86400.0  # a forecast that ended longer ago says nothing
_WIDEST = 3.0  # a forecast's spread grows to so many times what it was
_LEAST_SPREAD = 0.5  # of the median, by which a forecast that was sure of itself widens while its spread doubles


@dataclass(frozen=True)
class Expectation:
    """What the forecast says of a model's load, in requests in progress."""

    mean: Quantiles = _NOTHING  # highest of the windows that count as now
    peak: Quantiles = _NOTHING  # likewise
    later: Quantiles = _NOTHING  # highest peak of all windows
    ends_s: float = 0.0  # Unix time at which the windows that count as now have ended
    known: bool = False  # whether there is a forecast at all
    problem: str = ""  # what is wrong with the forecast, for people
    since_s: float = field(default=-math.inf, compare=False)  # from which Unix time on it says the same, with the
    until_s: float = field(default=math.inf, compare=False)  # same lookahead, and until when

    def holds(self, now_s: float) -> bool:
        """Whether the forecast still says this."""
        return self.since_s <= now_s < self.until_s


_UNKNOWN = Expectation()
_UNUSABLE = Expectation(problem="its forecast holds no usable number")


@dataclass(frozen=True)
class Demand:
    """What a model needs."""

    capacity: int  # requests that one instance carries
    expected: Expectation
    foundation: int  # instances for the median of the mean load
    burst: int  # further ones for a peak that one window in ten exceeds
    wake: int  # instances to have active at least: fewer are made up for
    keep: int  # instances to keep active if they are: more are drained
    unbounded: int  # instances that the forecast or what is in progress asks for, were there no maximum
    least: int  # of `keep`, how many keep requests from waiting for slots; the rest keep the target for their tokens

    @property
    def mean(self) -> float:
        """Median of the mean load."""
        return self.expected.mean.p50

    @property
    def peak(self) -> float:
        """The peak load that one window in ten exceeds."""
        return max(self.expected.peak.p90, self.mean)

    @property
    def replicas(self) -> int:
        """Replicas for the mean and the peak."""
        return self.foundation + self.burst

    @property
    def burstiness(self) -> float:
        """The share of what its replicas carry that only the peak would fill, 0 to 1."""
        return min(1.0, (self.peak - self.mean) / (self.replicas * self.capacity)) if self.replicas else 0.0


def demand(model: Model, now_s: float, active: int, rules: Rules, lookahead_s: float | None = None) -> Demand:
    """What `model` needs, of which `active` instances serve or are being woken.

    Forecast windows that begin within `lookahead_s` (the rules' unless said) count as now.
    """
    expected = expect(model.windows, now_s, rules, rules.lookahead_s if lookahead_s is None else lookahead_s)
    foundation = instances(expected.mean.p50, model.capacity)
    replicas = max(foundation, instances(max(expected.peak.p90, expected.mean.p50), model.capacity))
    wanted = replicas
    if model.max_replicas:
        replicas = min(replicas, model.max_replicas)
        foundation = min(foundation, replicas)
    load = model.waiting + (model.running if active else 0)  # without an instance, what runs is draining
    overloaded = load > rules.scale_up * model.capacity * active
    wake = min(math.ceil(load / (rules.scale_up * model.capacity)), load) if overloaded else 0
    unbounded = max(wanted, wake)
    wake = max(wake, model.min_replicas)
    # The forecast keeps an instance that is there, but wakes none.
    keep = max(wake, foundation, math.ceil(load / (rules.scale_down * model.capacity)))
    if model.max_replicas:
        wake, keep = min(wake, model.max_replicas), min(keep, model.max_replicas)
    least = keep
    if model.batch > model.capacity:
        for_slots = max(instances(expected.mean.p50, model.batch), math.ceil(load / (rules.scale_up * model.batch)))
        least = min(keep, max(1, model.min_replicas, for_slots))
    return Demand(model.capacity, expected, foundation, replicas - foundation, wake, keep, unbounded, least)


def expect(windows: Sequence[WindowLoad], now_s: float, rules: Rules, lookahead_s: float) -> Expectation:
    """What a forecast says, whatever state it is in.

    Windows that are not finite, negative or without length are left out. After the last window its values go on for a
    day, widened with its age. As long as the same windows give the same, it is the same object.
    """
    forecast = _forecast(tuple(windows))
    if not forecast.usable:
        return _UNUSABLE if windows else _UNKNOWN
    ahead = forecast.ahead(now_s, lookahead_s)
    if ahead is not None:
        return ahead
    last = max(forecast.usable, key=lambda window: window.end_s)
    age_s = now_s - last.end_s
    if age_s > _FORGOTTEN_S:
        return Expectation(problem=f"its forecast ended {age_s / 3600:.0f} h ago", until_s=-math.inf)
    old = _widened(last, age_s, rules)
    problem = f"its forecast ended {age_s:.0f} s ago and is widened"
    ends_s = now_s + last.end_s - last.start_s
    return Expectation(old.mean, old.peak, old.peak, ends_s, True, problem, until_s=-math.inf)


@functools.lru_cache(maxsize=4096)  # forecasts outlive many plans
def needed(expected: Quantiles, capacity: int, most: int, least_chance: float) -> tuple[tuple[float, float], ...]:
    """For each of a model's instances, the first first: (P(needed), expected requests for it).

    The n-th instance is for the load above what n - 1 carry, as far as it carries it. A load of less than one request
    counts as a chance of one. At most `most` instances, and none that is needed with less than `least_chance`.
    """
    chances, found = Chances(expected), []
    for low in range(0, most * capacity, capacity):
        chance = chances.between(low, low + 1)
        if chance < least_chance:
            break
        found.append((chance, chances.between(low, low + capacity)))
    return tuple(found)


def instances(load: float, capacity: int) -> int:
    """Instances that carry a load of requests in progress."""
    return math.ceil(load / capacity) if load >= _NO_LOAD else 0


class _Forecast:
    """A model's windows. A forecast stays for minutes and each plan asks for all of them: answers are kept."""

    def __init__(self, windows: Iterable[WindowLoad]) -> None:
        self.usable = tuple(window for window in map(_cleaned, windows) if window is not None)
        self._last: dict[float, Expectation] = {}  # by lookahead

    def ahead(self, now_s: float, lookahead_s: float) -> Expectation | None:
        """What the windows say that have not ended; None where all have."""
        known = self._last.get(lookahead_s)
        if known is not None and known.holds(now_s):
            return known
        ahead = [window for window in self.usable if window.end_s > now_s]
        if not ahead:
            return None
        near = [window for window in ahead if window.start_s < now_s + lookahead_s]
        ends_s = min(window.end_s for window in ahead)
        comes_s = min((w.start_s for w in ahead if w.start_s >= now_s + lookahead_s), default=math.inf)
        found = self._last[lookahead_s] = Expectation(
            _highest(window.mean for window in near),
            _highest(window.peak for window in near),
            _highest(window.peak for window in ahead),
            max((window.end_s for window in near), default=0.0),
            known=True,
            since_s=now_s,
            until_s=min(ends_s, comes_s - lookahead_s),
        )
        return found


_KEPT = 4096  # forecasts
# By identity: comparing windows would cost more than all else that is done with them.
_same: dict[int, tuple[tuple[WindowLoad, ...], _Forecast]] = {}


def _forecast(windows: tuple[WindowLoad, ...]) -> _Forecast:
    known = _same.get(id(windows))
    if known is None:
        if len(_same) >= _KEPT:
            _same.clear()
        known = _same[id(windows)] = windows, _equal(windows)  # which it keeps, so that no other has its identity
    return known[1]


@functools.lru_cache(maxsize=_KEPT)
def _equal(windows: tuple[WindowLoad, ...]) -> _Forecast:
    return _Forecast(windows)


def _cleaned(window: WindowLoad) -> WindowLoad | None:
    mean, peak = window.mean, window.peak
    numbers = (window.start_s, window.end_s, mean.p50, mean.p90, mean.p99, peak.p50, peak.p90, peak.p99)
    if not all(map(math.isfinite, numbers)) or min(numbers[2:]) < 0 or window.end_s <= window.start_s:
        return None
    peak = _highest((_uncrossed(peak), _uncrossed(mean)))  # a peak is no lower than the mean
    return replace(window, mean=_uncrossed(mean), peak=peak)


def _uncrossed(quantiles: Quantiles) -> Quantiles:
    p90 = max(quantiles.p50, quantiles.p90)
    return Quantiles(quantiles.p50, p90, max(p90, quantiles.p99))


def _highest(quantiles: Iterable[Quantiles]) -> Quantiles:
    many = list(quantiles) or [_NOTHING]
    return Quantiles(max(q.p50 for q in many), max(q.p90 for q in many), max(q.p99 for q in many))


def _widened(window: WindowLoad, age_s: float, rules: Rules) -> WindowLoad:
    grown = min(_WIDEST, 1 + rules.widening_per_hour * age_s / 3600)

    def widen(old: Quantiles) -> Quantiles:
        least = old.p50 * _LEAST_SPREAD * (grown - 1)
        p90 = old.p50 + max((old.p90 - old.p50) * grown, least)
        return Quantiles(old.p50, p90, max(p90, old.p50 + max((old.p99 - old.p50) * grown, 2 * least)))

    return replace(window, mean=widen(window.mean), peak=widen(window.peak))
