"""How good plans are and how fast they are made: `python -m benchmarks.placer [--json FILE]`.

Quality: random small clusters (at most 8 GPUs, 8 models, tensor parallelism 1 to 4), on which some instances serve and
nothing is warm. Plans are made and carried out until there is nothing left to do; the expected value of what is warm
then (`services.placer.value.expected_value`) is divided by the optimum that a mixed-integer program finds for the same
objective (HiGHS; where it is not done in time, by the best it found and by its bound, in rows of their own). The
published rule goes the same way. A second run begins with what an earlier forecast left warm: a plan then moves things
only where that pays, and is held against the same free optimum.

Speed: one plan of a cluster that has come to rest and now gets other forecasts, so that much is to be decided.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.plan_optimum import SECONDS, Optimum, optimum
from benchmarks.report import Row, report
from services.placer import lending
from services.placer.decisions import Do, Plan
from services.placer.groups import groups
from services.placer.planner import plan, plan_by, wake
from services.placer.published_rule import PublishedRule
from services.placer.snapshot import (
    Agent,
    GroupIds,
    Model,
    Node,
    Quantiles,
    Replica,
    Snapshot,
    State,
    Tier,
    WindowLoad,
)
from services.placer.value import expected_value, stakes

_PAGE = 1 << 30
_PAGES = 76
_NOW = 1_000_000.0
_NOTHING = 1e-9  # expected seconds: nothing is to be gained


def cluster(seed: int, num_gpus: int, num_models: int, sizes: tuple[int, ...] = (1, 1, 2, 4)) -> Snapshot:
    """A random cluster of nodes of up to 8 GPUs, with power-law popularity; a few instances serve.

    They were woken a moment ago and nothing is queued, so that plans leave them as they are: what is compared is what
    is warm beside them.
    """
    rng = random.Random(seed)
    per_node = min(num_gpus, 8)
    agents = [
        Agent(f"n{i // per_node}-g{i % per_node}", f"n{i // per_node}", i % per_node, _PAGE, _PAGES)
        for i in range(num_gpus)
    ]
    nodes = sorted({agent.node for agent in agents})
    models = [_model(rng, f"m{i:03}", i, num_gpus, num_models, sizes, nodes) for i in range(num_models)]
    replicas: list[Replica] = []
    free = {agent.id: _PAGES * 3 // 4 for agent in agents}
    for model in models:
        if rng.random() < 0.25:
            fitting = [g for g in groups(agents, model.tp) if all(free[a] >= model.shard_bytes // _PAGE for a in g)]
            if fitting:
                _put(replicas, free, model, rng.choice(fitting), State.ACTIVE)
    return Snapshot(
        _NOW,
        {agent.id: agent for agent in agents},
        {model.name: model for model in models},
        tuple(replicas),
        nodes={name: Node(name) for name in nodes},
    )


def _put(replicas: list[Replica], free: dict[str, int], model: Model, group: GroupIds, state: State) -> None:
    pages = model.shard_bytes // _PAGE
    running = 2 if state is State.ACTIVE else 0
    replicas.append(
        Replica(
            model.name,
            group,
            state,
            pages,
            pages,
            kv_pages=running,
            running=running,
            since_s=_NOW - 1,
            used_s=_NOW - 60,
            slots=32,
        )
    )
    for agent_id in group:
        free[agent_id] -= pages


def _model(
    rng: random.Random, name: str, rank: int, num_gpus: int, num_models: int, sizes: tuple[int, ...], nodes: list[str]
) -> Model:
    tp = min(rng.choice(sizes), 1 << (min(num_gpus, 8).bit_length() - 1))
    pages = rng.randint(4, 48)
    host_s = pages / 50 + 0.01
    load_s = {Tier.PEER: pages / 330 + 0.01, Tier.HOST: host_s, Tier.DISK: pages * tp / 1.67 + 0.5}
    if rng.random() < 0.5:
        del load_s[Tier.PEER]
    popularity = 1 / (rank + 1) ** rng.uniform(0.5, 1.2)
    return Model(
        name,
        pages * _PAGE,
        tp=tp,
        capacity=rng.choice([4, 8, 16, 32]),
        priority=rng.choice([1, 1, 1, 3]),
        max_replicas=rng.choice([0, 0, 0, 2]),
        ttft_p95_s=rng.choice([0, 0, 0, 0.5]),
        cold_load_s=host_s,
        load_s=load_s,
        images={node: rng.choice([Tier.HOST, Tier.HOST, Tier.DISK]) for node in nodes},
        service_s=rng.uniform(2, 20),
        kv_bytes_per_request=rng.uniform(0.1, 1) * _PAGE,
        windows=_forecast(rng, popularity * 12 * num_gpus / max(1, num_models) ** 0.5),
    )


def _forecast(rng: random.Random, scale: float) -> tuple[WindowLoad, ...]:
    windows = []
    for i in range(4):
        mean = rng.expovariate(1 / scale) if rng.random() < 0.8 else 0.0
        spread = rng.uniform(0.1, 1.5)
        p50, p90 = mean * rng.uniform(1, 2), mean * (1 + spread) * 2 + rng.choice([0, 0, 1])
        peak = Quantiles(p50, max(p50, p90), max(p50, p90) * (1 + spread))
        start = _NOW - 20 + 300 * i
        windows.append(
            WindowLoad(start, start + 300, Quantiles(mean, mean * (1 + spread), mean * (1 + 2 * spread)), peak)
        )
    return tuple(windows)


def at_rest(snapshot: Snapshot, planner: Callable[[Snapshot], Plan]) -> Snapshot:
    """The cluster once plans have been carried out until there is nothing left to do."""
    for _ in range(200):
        actions = planner(snapshot).actions
        if not actions:
            return snapshot
        there = {replica.key: replica for replica in snapshot.replicas}
        for action in actions:
            key = action.model, action.group
            pages = snapshot.models[action.model].shard_bytes // _PAGE
            if action.do is Do.WARM:
                there[key] = Replica(*key, State.WARM, pages, pages, since_s=_NOW - 60, used_s=_NOW - 60)
            elif action.do is Do.EVICT:
                keep = round(action.keep * pages)
                there[key] = replace(there[key], resident=keep)
                if not keep:
                    del there[key]
            elif action.do is Do.DRAIN:
                there[key] = replace(
                    there[key], state=State.WARM, running=0, kv_pages=0, since_s=_NOW - 60, used_s=_NOW - 60
                )
        snapshot = replace(snapshot, replicas=tuple(there[key] for key in sorted(there)))
    raise RuntimeError("plans do not come to rest")


def plan_published(snapshot: Snapshot) -> Plan:
    """By the published rule, but with as much KV kept as ours keeps: what is compared is the placement alone."""
    lent = lending.Foreseen(snapshot, stakes(snapshot, snapshot.replicas))
    return plan_by(snapshot, partial(PublishedRule, lent=lent))


@dataclass(frozen=True)
class Compared:
    """One small cluster: expected values of what is warm."""

    ours: float
    published: float
    best: Optimum
    later: float  # of ours after other forecasts
    best_later: Optimum


def small_cluster(seed: int) -> Snapshot:
    """A cluster of at most 8 GPUs and 8 models."""
    rng = random.Random(seed)
    return cluster(seed, rng.choice([1, 2, 3, 4, 6, 8]), rng.randint(2, 8))


def compare(seed: int) -> Compared:
    """A cluster of its own; everything follows from the seed, unless the program is not done in time."""
    start = small_cluster(seed)
    rest, theirs = at_rest(start, plan), at_rest(start, plan_published)
    changed = with_forecasts(rest, seed + 1_000_000)
    later = at_rest(changed, plan) if seed % 5 == 0 else changed
    return Compared(
        expected_value(rest, rest.replicas),
        expected_value(theirs, theirs.replicas),
        optimum(start),
        expected_value(later, later.replicas),
        optimum(changed) if seed % 5 == 0 else Optimum(0.0, 0.0, True),
    )


def quality(number: int, processes: int) -> list[Row]:
    """How the expected value of plans compares to the optimum, over so many random clusters."""
    found: list[Compared] = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for one in pool.map(compare, range(number)):
            found.append(one)
            if len(found) % 25 == 0:
                print(f"{len(found)} of {number} clusters", file=sys.stderr, flush=True)
    some = [one for one in found if one.best.bound > _NOTHING]
    done = [one for one in some if one.best.proved]
    # Parts that evictions left may be worth more than the program's whole replicas: no credit for that.
    ours = [min(1.0, one.ours / one.best.bound) for one in done]
    published = [min(1.0, one.published / one.best.bound) for one in done]
    behind = [1 - one.ours / one.published for one in found if one.ours < one.published * (1 - 1e-9)]
    what, source = f"{len(done)} clusters", "optimum by HiGHS"
    rows = [
        Row(f"value missed, mean ({what})", 100 * (1 - statistics.mean(ours)), "%", target=3.0, limit_source=source),
        Row(f"value missed, worst ({what})", 100 * (1 - min(ours)), "%", target=10.0, limit_source=source),
        Row(f"clusters worse than by the published rule, of {number}", len(behind), "clusters", target=0),
        Row("value missed against the published rule, worst", 100 * max(behind, default=0.0), "%"),
        Row(f"value missed by the published rule, mean ({what})", 100 * (1 - statistics.mean(published)), "%"),
    ]
    open_ = [one for one in some if not one.best.proved]
    if open_:
        late = f"{len(open_)} more, where HiGHS was not done in {SECONDS:g} s"
        least = min(one.ours / one.best.found if one.best.found > 0 else 1.0 for one in open_)
        bound = min(one.ours / one.best.bound for one in open_)
        rows += [
            Row(
                f"value missed, worst ({late})",
                100 * (1 - least),
                "%",
                target=10.0,
                limit_source="the best that it found",
            ),
            Row(
                f"value missed, worst ({late})",
                100 * (1 - bound),
                "%",
                limit_source="its bound, which nothing may reach",
            ),
        ]
    ratios = [min(1.0, one.later / one.best_later.bound) for one in found if one.best_later.bound > _NOTHING]
    what = f"value missed after other forecasts, mean ({len(ratios)} clusters, warm ones moved only where it pays)"
    rows.append(Row(what, 100 * (1 - statistics.mean(ratios)), "%", limit_source="optimum that moves for nothing"))
    return rows


def with_forecasts(snapshot: Snapshot, seed: int) -> Snapshot:
    """The cluster with other forecasts."""
    rng = random.Random(seed)
    scale = 12 * len(snapshot.agents) / max(1, len(snapshot.models)) ** 0.5
    models = {
        name: replace(model, windows=_forecast(rng, scale / rng.randint(1, len(snapshot.models))))
        for name, model in snapshot.models.items()
    }
    return replace(snapshot, models=models)


def speed(num_gpus: int, num_models: int, target_ms: float, repeats: int = 5) -> list[Row]:
    """Seconds of one core for a plan, and for the decision about one wake."""
    rest = at_rest(cluster(1, num_gpus, num_models, (1, 1, 1, 2, 4)), plan)
    times, wakes = [], []
    for i in range(repeats):
        changed = with_forecasts(rest, i)
        began = time.process_time()
        plan(changed)
        times.append(time.process_time() - began)
        name = _asleep(changed, i)
        asked = replace(changed, models={**changed.models, name: replace(changed.models[name], waiting=1)})
        began = time.process_time()
        wake(asked, name)
        wakes.append(time.process_time() - began)
    size = f"{num_gpus:,} GPUs, {num_models} models, {len(rest.replicas)} replicas"
    return [
        Row(f"plan after other forecasts ({size})", 1e3 * statistics.median(times), "ms", target=target_ms),
        Row(f"decision about one wake ({size})", 1e3 * statistics.median(wakes), "ms"),
    ]


def _asleep(snapshot: Snapshot, i: int) -> str:
    """One of the models that do not serve."""
    serving = {replica.model for replica in snapshot.replicas if replica.state is State.ACTIVE}
    return [name for name in sorted(snapshot.models) if name not in serving][i]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placer", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--clusters", type=int, default=500, help="random small clusters (500: two minutes)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="clusters at a time (all cores)")
    parser.add_argument("--speed-only", action="store_true", help="leave out how good plans are")
    options = parser.parse_args()
    rows = [*speed(64, 60, 50.0), *speed(1000, 300, 1000.0)]
    if not options.speed_only:
        rows += quality(options.clusters, options.processes)
    report("placer", rows, options.json)


if __name__ == "__main__":
    main()
