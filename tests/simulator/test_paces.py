"""A target for the time per token, in virtual time: instances measure their pace, and plans heed it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from simulator.cost import H100
from simulator.engine import Engine
from simulator.paces import Told
from simulator.policies.ours import Ours
from simulator.policies.static import Muxserve
from simulator.replica import ModelState
from simulator.results import Results
from simulator.run import simulate
from simulator.spec import ClusterSpec, ModelSpec, Settings, llama2_7b
from warmserve.traces import Request

ONE, TWO = llama2_7b("one"), llama2_7b("two")
QUICK = Settings(tick_s=1.0, warmup_s=20.0, drain_s=300.0)
PROMPT, ANSWER = 400, 200


def poisson(rate: float, seconds: float, name: str = "one", seed: int = 3) -> list[Request]:
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, int(rate * seconds)))
    return [Request(float(time), name, PROMPT, ANSWER) for time in times]


def ours(model: ModelSpec, rate: float, gpus: int = 4) -> tuple[Results, list[int]]:
    """A run, and what the planner was told that an instance carries, in order."""
    told: list[int] = []
    capacity = Told.capacity

    def noted(self: Told, model: ModelState, now: float) -> int:
        told.append(capacity(self, model, now))
        return told[-1]

    with patch.object(Told, "capacity", noted):
        return simulate(ClusterSpec(1, gpus), [model], poisson(rate, 60), Ours(), settings=QUICK), told


def test_a_tight_target_is_met_more_often_with_it_than_without() -> None:
    target = 0.0075
    without, _ = ours(ONE, rate=14)
    with_, _ = ours(replace(ONE, tpot_s=target), rate=14)
    met = [float(np.mean(results.tpot_s <= target)) for results in (without, with_)]
    assert met[0] < 0.5
    assert met[1] > 0.95
    assert with_.active_gpu_s.sum() > 1.5 * without.active_gpu_s.sum()  # more instances do it


def test_what_is_measured_is_what_the_cost_model_says() -> None:
    """Alone on its GPUs, with requests of mean length: as simulator.capacity computes it."""
    _, told = ours(replace(ONE, tpot_s=0.0075), rate=14)
    assert told[0] > 10  # as computed, before anything was measured
    assert told[-1] == pytest.approx(told[0], rel=0.2)
    assert len(set(told)) > 1


def test_few_requests_at_a_time_wake_nothing_further() -> None:
    results, _ = ours(replace(ONE, tpot_s=0.0075), rate=2)
    assert results.active_gpu_s.sum() < 1.2 * results.duration_s


def test_a_target_that_all_slots_keep_changes_nothing() -> None:
    _, told = ours(replace(ONE, tpot_s=10.0, max_batch=16), rate=6)
    assert set(told) == {16}


def waves(rates: list[float], seconds: float = 400) -> list[Request]:
    """Traffic of several models that comes and goes, each at its time."""
    random, found = np.random.default_rng(5), []
    for index, rate in enumerate(rates):
        time = 0.0
        while time < seconds:
            wave = rate * (1 + math.sin(2 * math.pi * (time / 200 + index / len(rates))))
            time += random.exponential(1 / (wave + 0.05))
            found.append(Request(time, f"m{index}", int(random.integers(100, 700)), int(random.integers(20, 300))))
    return sorted(found, key=lambda request: request.time_s)


@pytest.mark.parametrize(("gpus", "rates"), [(2, [4, 4, 4]), (4, [6, 6, 6])])
def test_where_gpus_are_short_a_tight_target_does_no_harm(gpus: int, rates: list[float]) -> None:
    """Further instances on GPUs that others use would have everybody's tokens come later."""
    met = []
    for target in (0.0, 0.008):
        models = [replace(llama2_7b(f"m{index}"), tpot_s=target) for index in range(len(rates))]
        results = simulate(ClusterSpec(1, gpus), models, waves(rates), Ours(), settings=QUICK)
        met.append(float(np.mean(results.tpot_s <= 0.008)))
    assert met[1] > met[0]


def paces(requests: list[Request], policy: Muxserve) -> dict[str, list[float]]:
    """Seconds per token with eight sequences, by model, as its engines measured in the end."""
    engines: list[Engine] = []
    init = Engine.__init__

    def noted(self: Engine, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        engines.append(self)

    models = [replace(model, tpot_s=1.0) for model in (ONE, TWO)]
    with patch.object(Engine, "__init__", noted):
        simulate(ClusterSpec(1, 1), models, requests, policy, settings=QUICK)
    found: dict[str, list[float]] = {}
    for engine in engines:
        assert engine.meter is not None
        assert engine.replica is not None
        pace = engine.meter.pace()
        if pace is not None:
            found.setdefault(engine.replica.model.name, []).append(pace.seconds(8))
    return found


def test_a_neighbour_on_the_gpu_is_not_measured() -> None:
    burst = [Request(0.01 * index, "one", PROMPT, 1000) for index in range(8)]
    beside = [Request(0.01 * index, "two", PROMPT, 1000) for index in range(8)]
    alone = paces(burst, Muxserve())["one"]
    both = paces(sorted(burst + beside, key=lambda request: request.time_s), Muxserve())
    assert alone == [pytest.approx(H100.steps(ONE).decode(8, 8 * (PROMPT + 500)), rel=0.1)]
    assert both["one"] == [pytest.approx(alone[0], rel=0.05)]
