"""The simulations that `python -m benchmarks.cluster` compares: settings, policies, and running many at once."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

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
from simulator.results import Results
from simulator.run import simulate
from simulator.spec import Forecasting, Settings
from simulator.workloads import Workload

ENGINE_STARTS_S = (2.0, 10.0, 55.0)

# By name: how a policy is made, and which predictor it has.
POLICIES: dict[str, tuple[Callable[[], Policy], str]] = {
    "ours": (Ours, "learned"),
    "published": (
        lambda: Ours("published", plan=planner.plan_published, wake=planner.wake_published),
        "published",
    ),
    "autoscaling": (Serverless, "none"),
    **{f"autoscaling, engine {start:g} s": (functools.partial(Serverless, start), "none") for start in ENGINE_STARTS_S},
    "static": (Muxserve, "none"),
    "dedicated": (Dedicated, "none"),
    "oracle": (Oracle, "none"),
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

    kind: str  # paper, fine-tunes, flash crowd, silent forecaster
    rate_per_s: float
    at: tuple[int, float] = (scenarios.FIRST_TEST_DAY, 0.0)
    hours: float = 1.0
    window_s: float = 600.0

    @property
    def name(self) -> str:
        """For tables."""
        if self.kind == "paper":
            return f"paper, {self.rate_per_s:.3g}/s"
        return f"{self.kind}, {self.rate_per_s:.3g}/s, day {self.at[0]} {self.at[1]:g} h"


@dataclass(frozen=True)
class Case:
    """One run."""

    setting: Setting
    policy: str
    seed: int
    traces: Path


@dataclass(frozen=True)
class Done:
    """A run that is over."""

    case: Case
    results: Results
    says: str  # what the workload is

    @property
    def rate_per_s(self) -> float:
        """Requests per second on average."""
        return self.case.setting.rate_per_s


def run_all(cases: Sequence[Case], processes: int) -> Iterator[Done]:
    """Runs the cases, several at a time; in their order. What is to be learnt is learnt before, once for each past."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # LightGBM's threads in each process
    pasts = dict.fromkeys(_past(case) for case in cases if _learns(case))
    with ProcessPoolExecutor(processes) as pool:
        learnt = dict(zip(pasts, pool.map(learn, pasts), strict=True))
        yield from pool.map(run, cases, [learnt.get(_past(case)) if _learns(case) else None for case in cases])


def _learns(case: Case) -> bool:
    return POLICIES[case.policy][1] == "learned" and case.setting.kind != "paper"


def _past(case: Case) -> Case:
    """The case that stands for all with the same traffic before they begin."""
    return replace(case, policy="ours", setting=replace(case.setting, kind="fine-tunes"))


def learn(case: Case) -> bytes:
    """The learned predictor, fitted to what came before a case begins."""
    work = workload(case.traces, case.setting, case.seed)
    history = np.stack([work.history[model.name] for model in work.models])
    return dumps(fit(history, work.season_windows))


def run(case: Case, learnt: bytes | None = None) -> Done:
    """One run. In the paper's setting there is too little to learn from: ours has the published predictor there."""
    work = workload(case.traces, case.setting, case.seed)
    make, kind = POLICIES[case.policy]
    predictor: Predictor | None = None if kind == "none" else PublishedPredictor(work.season_windows)
    if learnt is not None:
        predictor = loads(learnt, work.season_windows)
    silent = work.silent or (math.inf, math.inf)
    forecasting = Forecasting(predictor, work.history, work.window_s, 12, *silent)
    settings = Settings(forecasting=forecasting)
    results = simulate(work.cluster, work.models, work.traffic, make(), settings=settings, seed=case.seed)
    return Done(case, results, work.says)


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
    )
    length_s = base.duration_s
    if setting.kind == "flash crowd":
        counts = np.bincount(base.traffic.model, minlength=len(base.models))
        rare = next(m.name for m, n in zip(reversed(base.models), counts[::-1], strict=True) if n and m.tp == 1)
        return scenarios.flash_crowd(base, rare, 0.3 * length_s, rate_per_s=setting.rate_per_s, lasts_s=0.3 * length_s)
    if setting.kind == "silent forecaster":
        return scenarios.silent_forecaster(base, setting.window_s, length_s)
    return base
