"""What `python -m benchmarks.cluster` makes of its runs: which variants are the best, rows, a line for each run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from benchmarks.cluster_runs import ENGINE_STARTS_S, Outcome, Setting, autoscaling
from benchmarks.report import Row

STATIC = ("static, by means", "static, by peaks", "dedicated")  # what an optimizer of static placements chooses from
ABLATIONS = ("no forecast", "published predictor", "published placement", "no lending", "no partial residency")
LED = ("ours", "published", "static", "autoscaling", "told the future")  # whose highest rate is sought
WITHIN = 0.99

Runs = Mapping[tuple[Setting, str], Outcome]


@dataclass(frozen=True)
class Sweep:
    """Settings that differ in their rate alone, lowest first."""

    name: str
    settings: tuple[Setting, ...]


class Compared:
    """All runs, and competitors tuned on them."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    def of(self, setting: Setting, policy: str) -> Outcome:
        """One run."""
        return self._runs[setting, policy]

    def best_autoscaling(self, settings: Sequence[Setting], start_s: float) -> str:
        """Autoscaling as an operator would have set it for all of these: the least product of p99s."""
        return min(autoscaling(start_s), key=lambda name: sum(math.log(self.of(s, name).p99) for s in settings))

    def best_static(self, setting: Setting) -> str:
        """Chosen anew for each rate, as an optimizer that is told all loads would."""
        return max(STATIC, key=lambda name: (self.of(setting, name).within, -self.of(setting, name).p99))

    def oracle_p99(self, setting: Setting) -> float:
        """Of who knows the future, and with it what each policy would make of it: the best of all, and of our planner
        told the truth."""
        return min(outcome.p99 for (at, _), outcome in self._runs.items() if at == setting)

    def at_all_rates(self, like: Setting, policies: Sequence[str]) -> list[Setting]:
        """Settings that differ from one in their rate alone, and of which all these policies were run; by rate."""
        alike = {s for s, _ in self._runs if replace(s, rate_per_s=like.rate_per_s) == like}
        return sorted((s for s in alike if all((s, p) in self._runs for p in policies)), key=lambda s: s.rate_per_s)


def goodput(shares: Sequence[tuple[float, float]]) -> float:
    """Requests per second up to which 99 % are within target, from (rate, share within), lowest rate first: between the
    last rate that is and the first that is not, where a straight line over the rate's logarithm crosses; 0 where the
    lowest is not within, the highest where all are."""
    before: tuple[float, float] | None = None
    for rate, share in shares:
        if share < WITHIN:
            if before is None:
                return 0.0
            part = (before[1] - WITHIN) / (before[1] - share)
            return float(before[0] * (rate / before[0]) ** part)
        before = rate, share
    return before[0] if before else 0.0


def next_rate(shares: Sequence[tuple[float, float]]) -> float | None:
    """Where to try next for a closer `goodput`: between the two rates; None where no two enclose it."""
    for (below, kept), (above, share) in pairwise(shares):
        if kept < WITHIN:
            return None
        if share < WITHIN:
            return math.sqrt(below * above)
    return None


def shares(compared: Compared, sweep: Sweep, who: str) -> list[tuple[float, float]]:
    """(rate, share within target) of one of LED, lowest rate first, wherever it was run."""
    names = policies(compared, sweep, who)
    found = compared.at_all_rates(sweep.settings[0], names)
    return [(s.rate_per_s, max(compared.of(s, name).within for name in names)) for s in found]


def policies(compared: Compared, sweep: Sweep, who: str) -> Sequence[str]:
    """Whose best at each rate a competitor is."""
    if who == "autoscaling":
        return [compared.best_autoscaling(sweep.settings, 0.0)]
    return STATIC if who == "static" else [who]


def sweep_rows(compared: Compared, sweep: Sweep) -> list[Row]:
    """The issue's table for one sweep, and what the setting allows at all."""
    settings, found = sweep.settings, []

    def ratios(above: str, below: str = "ours") -> list[float]:
        return [compared.of(s, above).p99 / compared.of(s, below).p99 for s in settings]

    for start_s in (*reversed(ENGINE_STARTS_S), 0.0):
        name = compared.best_autoscaling(settings, start_s)
        times = ratios(name)
        most = [compared.of(s, name).p99 / compared.of(s, name).floor_s for s in settings]
        if start_s:
            at = int(np.argmax(times))
            what = f"p99 TTFT, (c) with an engine start of {start_s:g} s / ours, best rate"
            target = 50.8 if start_s == max(ENGINE_STARTS_S) else None
            found.append(_times(f"{what} ({settings[at].rate_per_s:.3g}/s)", times[at], target))
        else:
            found.append(_times("p99 TTFT, (c) with our engine's start / ours, median over rates", _median(times), 5.0))
            found.append(
                _times("  the same if all had been alone on idle instances: no policy gets more", _median(most))
            )
    good = {who: goodput(shares(compared, sweep, who)) for who in LED}
    best = max(good.values())
    found += [Row(f"requests within target, {who}", rate, "requests/s") for who, rate in good.items()]
    for who, letter, target in (("static", "d", 2.5), ("published", "b", 1.1)):
        if good[who]:
            found.append(_times(f"requests within target, ours / ({letter})", good["ours"] / good[who], target))
            found.append(_times(f"  the same, best of all policies / ({letter})", best / good[who]))
    times = ratios("ours", "published")
    found.append(Row("p99 TTFT, ours / (b), worst rate", max(times), "times", target=1.0))
    times = [compared.of(s, "ours").p99 / compared.oracle_p99(s) for s in settings]
    found.append(Row("p99 TTFT, ours / oracle, worst rate", max(times), "times", target=2.0))
    found.append(Row("p99 TTFT, ours / oracle, median over rates", _median(times), "times"))
    return [_named(sweep.name, row) for row in found]


def beside(compared: Compared, setting: Setting, policies: Sequence[str]) -> list[Row]:
    """p99 and share within target of policies in one setting, with ours as the limit."""
    ours, rows = compared.of(setting, "ours"), []
    for policy in policies:
        other = compared.of(setting, policy)
        what = f"{setting.name}: {{}}, {policy}"
        rows.append(Row(what.format("p99 TTFT"), other.p99, "s", ours.p99, "ours"))
        rows.append(Row(what.format("within target"), other.within, "of requests", ours.within, "ours"))
    return rows


def run_lines(runs: Runs) -> str:
    """Each run in a line."""
    header = f"{'setting':52} {'policy':46} {'p50':>7} {'p99':>8} {'within':>7} {'unserved':>8}"
    lines = [f"{header} {'wakes w/p/c':>16} {'TB':>6} {'busy':>5} {'us/req':>6} {'plans':>6} {'ms':>5}"]
    for (setting, policy), run in sorted(runs.items(), key=lambda item: (item[0][0].kind, item[0][0].rate_per_s)):
        lines.append(
            f"{setting.name:52} {policy:46} {run.ttft(50):7.3f} {run.ttft(99):8.3f} {run.within:7.4f} "
            f"{run.unserved:8.4f} {'/'.join(map(str, run.wakes)):>16} {run.copied_bytes / 1e12:6.1f} {run.busy:5.2f} "
            f"{1e6 * (run.cpu_s - run.plan_s) / run.requests:6.0f} {run.plans:6} {1e3 * run.plan_s / run.plans:5.1f}"
        )
    return "\n".join(lines)


def run_values(runs: Runs, seed: int) -> list[dict[str, object]]:
    """For the JSON file; None for what is infinite."""
    return [
        {
            "setting": setting.name,
            "policy": policy,
            "seed": seed,
            "says": run.says,
            "requests": run.requests,
            "ttft_s": {f"p{p}": run.ttft(p) if math.isfinite(run.ttft(p)) else None for p in (50, 90, 95, 99)},
            "p99_floor_s": run.floor_s,
            "within_target": run.within,
            "unserved": run.unserved,
            "found": dict(zip(("cold", "partial", "warm", "waking", "open", "active"), run.found, strict=True)),
            "wakes": dict(zip(("warm", "partial", "cold"), run.wakes, strict=True)),
            "copied_bytes": run.copied_bytes,
            "wasted_bytes": run.wasted_bytes,
            "preemptions": run.preemptions,
            "drains": run.drains,
            "busy": run.busy,
            "plans": run.plans,
        }
        for (setting, policy), run in runs.items()
    ]


def _times(what: str, value: float, target: float | None = None) -> Row:
    return Row(what, value, "times", target=target, more=True)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _named(sweep: str, row: Row) -> Row:
    indent = row.what.startswith("  ")
    return Row(
        ("  " if indent else "") + f"{sweep}: {row.what.strip()}",
        row.value,
        row.unit,
        row.limit,
        row.limit_source,
        row.target,
        row.more,
    )
