"""The simulations that `python -m benchmarks.cluster` compares: settings, policies, and running many at once.

Every run is a process's own work and follows from its case alone: any number of processes gives the same figures. What
a run gave is kept in a file named after its case and the code, so that a comparison that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from services.forecaster.learned import dumps, fit, loads
from services.forecaster.predictors import Predictor, PublishedPredictor
from services.placer import planner
from simulator import scenarios
from simulator.policies.base import Policy
from simulator.policies.oracle import Oracle
from simulator.policies.ours import Ours
from simulator.policies.serverless import Serverless
from simulator.policies.static import Dedicated, Muxserve
from simulator.results import Found, Results
from simulator.run import simulate
from simulator.spec import Forecasting, Settings
from simulator.workloads import Workload

ENGINE_STARTS_S = (2.0, 10.0, 55.0)
KEPT_S = (60.0, 3600.0)  # how long autoscaling may keep instances without requests
FULL = (0.8, 0.4)  # share of an instance's capacity above which it may start another
_ROOT = Path(__file__).resolve().parents[1]
_CODE = ("simulator", "services/placer", "services/forecaster", "sdk/warmserve/traces")


def autoscaling(start_s: float) -> list[str]:
    """Names of autoscaling's variants with an engine start, of which the best is compared."""
    return [f"autoscaling, start {start_s:g} s, kept {kept:g} s, full {full:g}" for kept in KEPT_S for full in FULL]


# By name: how a policy is made, and which predictor it has.
POLICIES: dict[str, tuple[Callable[[], Policy], str]] = {
    "ours": (Ours, "learned"),
    "published": (
        lambda: Ours("published", plan=planner.plan_published, wake=planner.wake_published),
        "published",
    ),
    **{
        name: (functools.partial(Serverless, start, kept, full), "none")
        for start in (0.0, *ENGINE_STARTS_S)
        for name, (kept, full) in zip(autoscaling(start), [(k, f) for k in KEPT_S for f in FULL], strict=True)
    },
    "static, by means": (Muxserve, "none"),
    "static, by peaks": (functools.partial(Muxserve, by_peak=True), "none"),
    "dedicated": (Dedicated, "none"),
    "told the future": (Oracle, "none"),
    # Ours with a part taken away.
    "no forecast": (Ours, "none"),
    "published predictor": (Ours, "published"),
    "published placement": (
        lambda: Ours("published placement", plan=planner.plan_published, wake=planner.wake_published),
        "learned",
    ),
    "no lending": (lambda: Ours("no lending", lends=False), "learned"),
    "no partial residency": (lambda: Ours("no partial residency", partial=False), "learned"),
}


@dataclass(frozen=True)
class Setting:
    """Which workload. `at` is (day, hour) where it has days."""

    kind: str  # paper, fine-tunes, small fine-tunes, flash crowd, silent forecaster
    rate_per_s: float
    at: tuple[int, float] = (scenarios.FIRST_TEST_DAY, 0.0)
    hours: float = 1.0
    window_s: float = 600.0

    @property
    def name(self) -> str:
        """For tables."""
        if self.kind == "paper":
            return f"paper, {self.rate_per_s:.3g}/s"
        windows = "" if self.window_s == 600.0 else f", windows {self.window_s:g} s"
        return f"{self.kind}, {self.rate_per_s:.3g}/s, day {self.at[0]} {self.at[1]:g} h, {self.hours:g} h{windows}"


@dataclass(frozen=True)
class Case:
    """One run."""

    setting: Setting
    policy: str
    seed: int
    traces: Path


@dataclass(frozen=True)
class Outcome:
    """What a run has shown. Times in seconds; inf where requests were not served."""

    says: str  # what the workload is
    requests: int
    duration_s: float
    ttft_s: tuple[float, ...]  # at the percentiles of CURVE
    floor_s: float  # p99 of the time to the first token if each request were alone on an idle instance
    within: float  # share of requests within 10 times their unloaded time to the first, 4 times per further token
    unserved: float  # share
    found: tuple[int, ...]  # requests by what they found, as simulator.results.Found
    wakes: tuple[int, int, int]  # warm, partial, cold
    copied_bytes: float
    wasted_bytes: float
    preemptions: int
    drains: int
    busy: float  # share of all GPUs' time that they computed
    plans: int
    plan_s: float  # of the processor's time
    cpu_s: float  # likewise, all in all

    def ttft(self, percentile: float) -> float:
        """One of CURVE's."""
        return self.ttft_s[CURVE.index(percentile)]

    @property
    def p99(self) -> float:
        """The 99th percentile; what was never served has waited for as long as the run took."""
        value = self.ttft(99)
        return value if math.isfinite(value) else self.duration_s


CURVE = (*range(0, 90, 2), *(90 + at / 5 for at in range(45)), 99, *(99 + at / 10 for at in range(1, 10)), 99.95, 99.99)


class Runner:
    """Runs cases, several at a time."""

    def __init__(self, processes: int, kept: Path | None) -> None:
        """What lies in the folder `kept` is not run again, and what is run is put there at once."""
        self._processes = processes
        self._kept = kept
        self._learnt: dict[Case, bytes] = {}  # by past, which is learnt from once

    def run(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Outcome]]:
        """Each case and what came of it, as they end."""
        found = {case: outcome for case in cases if self._kept and (outcome := _read(self._kept, case)) is not None}
        yield from found.items()
        left = [case for case in cases if case not in found]
        if not left:
            return
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # LightGBM's threads in each process
        with ProcessPoolExecutor(self._processes, multiprocessing.get_context("spawn")) as pool:
            try:
                for case, outcome in self._all(pool, left):
                    if self._kept:
                        _write(self._kept, case, outcome)
                    yield case, outcome
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _all(self, pool: ProcessPoolExecutor, cases: Sequence[Case]) -> Iterator[tuple[Case, Outcome]]:
        """First what is to be learnt, which is waited for while that runs which learns nothing."""
        pasts = dict.fromkeys(_past(case) for case in cases if _learns(case))
        for past in pasts:
            if self._kept and past not in self._learnt and _learnt_file(self._kept, past).exists():
                self._learnt[past] = _learnt_file(self._kept, past).read_bytes()
        learning = {past: pool.submit(learn, past) for past in pasts if past not in self._learnt}
        runs = {pool.submit(run, case): case for case in cases if not _learns(case)}
        for past, future in learning.items():
            self._learnt[past] = future.result()
            if self._kept:
                _put(_learnt_file(self._kept, past), self._learnt[past])
        runs |= {pool.submit(run, case, self._learnt[_past(case)]): case for case in cases if _learns(case)}
        for done in as_completed(runs):
            yield runs[done], done.result()


def _learns(case: Case) -> bool:
    return POLICIES[case.policy][1] == "learned" and case.setting.kind != "paper"


def _past(case: Case) -> Case:
    """The case that stands for all with the same clients before they begin: what is learnt is how their traffic goes,
    whatever its rate and the models' sizes, and each run has its own history to go on from."""
    usual = replace(case.setting, kind="fine-tunes", rate_per_s=scenarios.FINE_TUNES_PER_S, hours=1.0)
    return replace(case, policy="ours", setting=usual)


def learn(case: Case) -> bytes:
    """The learned predictor, fitted to what came before a case begins."""
    work = workload(case.traces, case.setting, case.seed)
    history = np.stack([work.history[model.name] for model in work.models])
    return dumps(fit(history, work.season_windows))


def run(case: Case, learnt: bytes | None = None) -> Outcome:
    """One run. In the paper's setting there is too little to learn from: ours has the published predictor there."""
    work = workload(case.traces, case.setting, case.seed)
    make, kind = POLICIES[case.policy]
    predictor: Predictor | None = None if kind == "none" else PublishedPredictor(work.season_windows)
    if learnt is not None:
        predictor = loads(learnt, work.season_windows)
    silent = work.silent or (math.inf, math.inf)
    forecasting = Forecasting(predictor, work.history, work.window_s, 12, *silent)
    settings = Settings(forecasting=forecasting)
    began = time.process_time()
    results = simulate(work.cluster, work.models, work.traffic, make(), settings=settings, seed=case.seed)
    return _outcome(work, results, time.process_time() - began)


def _outcome(work: Workload, results: Results, cpu_s: float) -> Outcome:
    return Outcome(
        says=work.says,
        requests=len(results.arrival_s),
        duration_s=results.duration_s,
        ttft_s=tuple(results.ttft(percentile) for percentile in CURVE),
        floor_s=float(np.percentile(results.unloaded_ttft_s, 99, method="inverted_cdf")),
        within=results.within(),
        unserved=float((~results.served).mean()),
        found=tuple(int((results.found == state).sum()) for state in Found),
        wakes=(results.wakes.warm, results.wakes.partial, results.wakes.cold),
        copied_bytes=sum(results.copied_bytes.values()),
        wasted_bytes=results.wasted_bytes,
        preemptions=results.preemptions,
        drains=results.drains,
        busy=float(results.busy_gpu_s.sum()) / (results.duration_s * results.gpus),
        plans=results.plans,
        plan_s=results.plan_seconds,
        cpu_s=cpu_s,
    )


@functools.lru_cache(maxsize=2)
def workload(traces: Path, setting: Setting, seed: int) -> Workload:
    """The setting's traffic, made once in each process."""
    if setting.kind == "paper":
        return scenarios.paper(traces, setting.rate_per_s, seed)
    day, hour = setting.at
    base = scenarios.fine_tunes(
        traces,
        seed,
        rate_per_s=setting.rate_per_s,
        first_day=day,
        from_hour=hour,
        hours=setting.hours,
        window_s=setting.window_s,
        sizes=scenarios.SMALL_FINE_TUNES if setting.kind == "small fine-tunes" else scenarios.FINE_TUNES,
    )
    length_s = base.duration_s
    if setting.kind == "flash crowd":
        counts = np.bincount(base.traffic.model, minlength=len(base.models))
        rare = next(m.name for m, n in zip(reversed(base.models), counts[::-1], strict=True) if n and m.tp == 1)
        return scenarios.flash_crowd(base, rare, 0.3 * length_s, rate_per_s=setting.rate_per_s, lasts_s=0.3 * length_s)
    if setting.kind == "silent forecaster":
        return scenarios.silent_forecaster(base, setting.window_s, length_s)
    return base


# What is kept


@functools.cache
def _code() -> str:
    """Of all that a run's figures depend on."""
    files = [file for folder in _CODE for file in sorted((_ROOT / folder).rglob("*.py"))]
    digest = hashlib.sha256()
    for file in [Path(__file__), *files]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _file(kept: Path, case: Case) -> Path:
    told = json.dumps([_code(), dataclasses.asdict(case.setting), case.policy, case.seed])
    return kept / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.json"


def _learnt_file(kept: Path, past: Case) -> Path:
    return _file(kept, past).with_suffix(".learnt")


def _write(kept: Path, case: Case, outcome: Outcome) -> None:
    _put(_file(kept, case), json.dumps(dataclasses.asdict(outcome)).encode())


def _put(file: Path, content: bytes) -> None:
    """All of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_bytes(content)
    unfinished.replace(file)


def _read(kept: Path, case: Case) -> Outcome | None:
    try:
        told: dict[str, Any] = json.loads(_file(kept, case).read_text())
    except FileNotFoundError:
        return None
    for name in ("ttft_s", "found", "wakes"):
        told[name] = tuple(told[name])
    return Outcome(**told)
