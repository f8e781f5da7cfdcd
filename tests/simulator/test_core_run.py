"""Whole runs: nothing is lost or counted twice, pages are exact at every event, queues are as long as theory says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import simulator.run
from services.placer.decisions import Action, Do, Reason
from services.placer.snapshot import Key, State
from simulator.clock import Clock
from simulator.cluster import Cluster
from simulator.cost import H100
from simulator.engine import Engine
from simulator.policies.base import Future, Policy
from simulator.policies.oracle import Oracle
from simulator.policies.ours import Ours
from simulator.policies.serverless import Serverless
from simulator.policies.static import Dedicated, Muxserve
from simulator.results import Found, Results
from simulator.run import simulate
from simulator.spec import ClusterSpec, Delays, ImpossibleError, ModelSpec, Settings, llama2_7b
from warmserve.traces import Request
from warmserve.v1 import common_pb2

PAGE = 32 << 20
SMALL = ModelSpec("small", 300_000_000, 12, 64_000, max_batch=8, context_tokens=2000)
MEDIUM = ModelSpec("medium", 700_000_000, 24, 128_000, max_batch=8, context_tokens=2000)
LARGE = ModelSpec("large", 1_500_000_000, 32, 128_000, tp=2, max_batch=8, context_tokens=2000)
MODELS = [SMALL, MEDIUM, LARGE]
TIGHT = ClusterSpec(1, 2, arena_bytes=80 * PAGE, page_bytes=PAGE)  # holds one of the larger ones and little beside
QUICK = Settings(tick_s=1.0, warmup_s=20.0, drain_s=300.0)


def requests(count: int, seconds: float, seed: int, models: list[ModelSpec], longest: int = 300) -> list[Request]:
    random = np.random.default_rng(seed)
    times = np.sort(random.uniform(0, seconds, count))
    names = random.choice([model.name for model in models], count)
    lengths = random.integers(1, longest, (count, 2))
    return [Request(float(t), str(m), int(p), int(o)) for t, m, (p, o) in zip(times, names, lengths, strict=True)]


@contextmanager
def pages_checked() -> Iterator[list[int]]:
    """Looks at every arena after every event. Yields a list whose length is the number of events."""
    clusters: list[Cluster] = []
    looked: list[int] = []

    class Watched(Cluster):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            clusters.append(self)

    step = Clock.step

    def checked(clock: Clock) -> None:
        step(clock)
        looked.append(1)
        for gpu in clusters[0].gpus.values():
            assert gpu.weights == sum(replica.pages for replica in gpu.replicas.values())
            assert gpu.kv == sum(r.engine.kv_pages for r in gpu.replicas.values() if r.engine is not None)
            assert gpu.free >= 0
        for model in clusters[0].models:
            for replica in model.replicas.values():
                assert 0 <= clusters[0].resident(replica) <= replica.pages <= model.shard_pages
                if replica.engine is not None:
                    assert replica.state in (State.ACTIVE, State.DRAINING)
                    assert replica.resident == model.shard_pages
                    assert replica.running <= model.spec.max_batch

    with patch.object(simulator.run, "Cluster", Watched), patch.object(Clock, "step", checked):
        yield looked


def policies() -> list[Policy]:
    return [
        Ours(),
        Ours(lends=False),
        Ours(partial=False),
        Serverless(),
        Serverless(start_s=2.0),
        Muxserve(),
        Dedicated(),
        Oracle(),
    ]


def conserved(results: Results, given_: list[Request]) -> None:
    assert results.arrival_s.tolist() == [request.time_s for request in given_]
    assert results.output_tokens.tolist() == [request.output_tokens for request in given_]
    assert results.prompt_tokens.tolist() == [request.prompt_tokens for request in given_]
    served = results.served
    assert (np.isfinite(results.ttft_s) == served).all()
    assert (results.ttft_s[served] > 0).all()
    # Nothing is faster than alone on an idle instance.
    assert (results.ttft_s[served] >= results.unloaded_ttft_s[served] * (1 - 1e-6)).all()
    assert (results.finished_s[served] >= (results.arrival_s + results.ttft_s)[served] - 1e-9).all()
    assert results.busy_gpu_s.sum() <= results.active_gpu_s.sum() * (1 + 1e-9)


@pytest.mark.parametrize("policy", policies(), ids=lambda policy: policy.name)
def test_each_request_ends_once_with_each_policy(policy: Policy) -> None:
    given_ = requests(300, 120.0, 3, MODELS)
    with pages_checked() as looked:
        results = simulate(TIGHT, MODELS, given_, policy, settings=QUICK)
    assert looked
    conserved(results, given_)
    if not isinstance(policy, Dedicated | Muxserve):  # those have no room for all
        assert results.served.all()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 120),
    seconds=st.floats(1.0, 60.0),
    pages=st.integers(75, 140),
    kind=st.integers(0, 4),
)
def test_pages_are_exact_at_every_event(seed: int, count: int, seconds: float, pages: int, kind: int) -> None:
    policy: Policy = (Ours(), Serverless(keep_alive_s=5.0), Ours(partial=False), Ours(lends=False), Oracle())[kind]
    cluster = replace(TIGHT, arena_bytes=pages * PAGE, host_bytes=[0, 10**12][seed % 2])
    given_ = requests(count, seconds, seed, MODELS, longest=900)
    with pages_checked() as looked:
        results = simulate(cluster, MODELS, given_, policy, settings=QUICK)
    assert looked
    conserved(results, given_)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not() -> None:
    given_ = requests(200, 60.0, 5, MODELS)
    first, again, other = (simulate(TIGHT, MODELS, given_, Ours(), settings=QUICK, seed=s) for s in (1, 1, 2))
    assert first.ttft_s.tolist() == again.ttft_s.tolist()
    assert first.finished_s.tolist() == again.finished_s.tolist()
    assert first.ttft_s.tolist() != other.ttft_s.tolist()
    summaries = [result.summary() for result in (first, again)]
    for summary in summaries:
        del summary["plan_seconds"], summary["wall_seconds"]
    assert summaries[0] == summaries[1]


def test_one_server_waits_as_long_as_an_m_d_1_queue() -> None:
    """With one sequence at a time and equal requests, an instance is an M/D/1 queue: mean wait = r S / (2 (1 - r))."""
    model = replace(llama2_7b("one"), max_batch=1)
    cost = H100.steps(model)
    service = cost.prefill(200) + sum(cost.decode(1, 201 + step) for step in range(20))
    load, count = 0.7, 40_000
    random = np.random.default_rng(11)
    times = np.cumsum(random.exponential(service / load, count))
    given_ = [Request(float(t), "one", 200, 21) for t in times]
    results = simulate(ClusterSpec(1, 1), [model], given_, Dedicated(), settings=QUICK)
    waits = results.ttft_s - results.unloaded_ttft_s
    assert waits.mean() == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)
    busy = results.busy_gpu_s[0] / results.duration_s
    assert busy == pytest.approx(load, rel=0.03)


def test_a_lone_request_takes_what_the_cost_model_says() -> None:
    model = llama2_7b("one")
    cost, delays = H100.steps(model), Delays()
    results = simulate(ClusterSpec(1, 1), [model], [Request(100.0, "one", 500, 100)], Dedicated(), settings=QUICK)
    way = delays.hop_s + delays.reply_s
    assert results.ttft_s[0] == pytest.approx(cost.prefill(500) + way, rel=1e-6)
    steps = sum(cost.decode(1, 501 + step) for step in range(99))
    assert results.finished_s[0] - 100.0 == pytest.approx(cost.prefill(500) + steps + way, rel=1e-3)
    assert results.ttft_s[0] == pytest.approx(results.unloaded_ttft_s[0], rel=1e-6)


@pytest.mark.parametrize("under_way", [1, 2])
def test_a_prompt_waits_for_the_steps_under_way(under_way: int) -> None:
    """For what is left of the one that is computed, and for those begun behind it, each of which is whole."""
    model = llama2_7b("one")
    cost = H100.steps(model)
    step = cost.decode(1, 650)
    begun = 100.0 + H100.steps(model).prefill(500) + Delays().hop_s
    waits = []
    for part in (0.1, 0.5, 0.9):  # of a step that is done when the second request comes
        count = 100  # steps before that
        at = begun + sum(cost.decode(1, 501 + i) for i in range(count)) + part * cost.decode(1, 601) - Delays().hop_s
        given_ = [Request(100.0, "one", 500, 300), Request(at, "one", 200, 10)]
        settings = replace(QUICK, under_way=under_way)
        results = simulate(ClusterSpec(1, 1), [model], given_, Dedicated(), settings=settings)
        own = results.unloaded_ttft_s[1] - cost.base + step  # its prompt is computed with a token of the first one
        waits.append((results.ttft_s[1] - own) / step)
    assert waits == pytest.approx([under_way - 1 + left for left in (0.9, 0.5, 0.1)], abs=0.1)


def test_instances_on_one_gpu_share_its_time() -> None:
    one, two = llama2_7b("one"), llama2_7b("two")
    both = [Request(0.0, name, 64, 400) for name in ("one", "two")]
    cluster = ClusterSpec(1, 1)
    alone = simulate(cluster, [one, two], both[:1], Muxserve(), settings=QUICK)
    together = simulate(cluster, [one, two], both, Muxserve(), settings=QUICK)
    assert together.tpot_s.mean() == pytest.approx(2 * alone.tpot_s[0], rel=0.02)


def test_a_cold_model_waits_for_its_copy_and_a_warm_one_for_milliseconds() -> None:
    model, delays = llama2_7b("one"), Delays()
    requests_ = [Request(0.0, "one", 100, 10), Request(30.0, "one", 100, 10)]
    cluster = ClusterSpec(1, 1, pcie_gbps=50.0)
    as_asked = Scripted((0.001, Do.WAKE), (15.0, Do.DRAIN), (30.001, Do.WAKE))
    results = simulate(cluster, [model], requests_, as_asked, settings=QUICK)
    copy = model.weight_bytes / 50e9
    cold, warm = results.ttft_s[0], results.ttft_s[1] - results.unloaded_ttft_s[1]
    assert results.found.tolist() == [Found.COLD, Found.WARM]
    # The prompt is computed behind the copy, but for its last layer.
    last_layer = results.unloaded_ttft_s[0] / model.layers
    assert cold == pytest.approx(copy + last_layer + delays.ask_s + delays.hop_s + delays.reply_s, abs=1e-3)
    assert delays.wake_s[0] < warm < delays.wake_s[1] + delays.ask_s
    assert (results.wakes.cold, results.wakes.warm) == (1, 1)
    assert results.copied_bytes == {"host": pytest.approx(model.weight_bytes, rel=0.01)}
    from_disk = simulate(replace(cluster, host_bytes=0), [model], requests_[:1], Ours(), settings=QUICK)
    assert from_disk.ttft_s[0] == pytest.approx(model.weight_bytes / (cluster.disk_gbps * 1e9), rel=0.02)


@pytest.mark.parametrize("opens_s", [0.1, 0.5, 2.0])
def test_an_instance_opens_while_its_weights_are_copied(opens_s: float) -> None:
    model, delays = llama2_7b("one"), Delays(wake_s=(opens_s, opens_s))
    copy = model.weight_bytes / 50e9
    cluster, as_asked = ClusterSpec(1, 1, pcie_gbps=50.0), Scripted((0.001, Do.WAKE))
    settings = replace(QUICK, delays=delays)
    results = simulate(cluster, [model], [Request(0.0, "one", 2000, 10)], as_asked, settings=settings)
    computed = results.unloaded_ttft_s[0] - delays.hop_s - delays.reply_s
    behind = min(max(0.0, copy - opens_s), computed * (1 - 1 / model.layers))  # computed before all was there
    asked = delays.hop_s + delays.ask_s
    waited = asked + max(copy, opens_s) + computed - behind + delays.reply_s
    assert results.ttft_s[0] == pytest.approx(waited, abs=2e-3)


def test_an_instance_that_is_open_before_its_last_weights_counts_as_one() -> None:
    model = llama2_7b("one")
    cluster = ClusterSpec(1, 1, pcie_gbps=5.0)  # 2.7 s; it takes requests in the last one
    settings = replace(QUICK, delays=Delays(wake_s=(0.01, 0.01)), behind_s=1.0)
    requests_ = [Request(at, "one", 100, 10) for at in (0.0, 1.0, 2.0, 3.0)]
    results = simulate(cluster, [model], requests_, Scripted((0.001, Do.WAKE)), settings=settings)
    assert results.found.tolist() == [Found.COLD, Found.WAKING, Found.OPEN, Found.ACTIVE]


def test_kv_that_runs_short_preempts_and_still_serves_all() -> None:
    model = ModelSpec("tight", 300_000_000, 12, 500_000, max_batch=16, context_tokens=1200)
    cluster = ClusterSpec(1, 1, arena_bytes=70 * PAGE, page_bytes=PAGE)  # 52 pages of KV, 67 tokens each
    given_ = [Request(0.01 * i, "tight", 100, 900) for i in range(16)]
    anew: list[tuple[int, int]] = []
    preempt = Engine._preempt

    def noted(engine: Engine) -> None:
        preempt(engine)
        job = engine._waiting[0]
        assert job.generated + job.left == job.output
        anew.append((job.tokens, job.prompt + job.generated))

    with pages_checked(), patch.object(Engine, "_preempt", noted):
        results = simulate(cluster, [model], given_, Dedicated(), settings=QUICK)
    assert results.served.all()
    assert results.preemptions == len(anew) > 0
    assert all(tokens == known > 100 for tokens, known in anew)


class Scripted:
    """A policy that gives orders at the ticks of a script."""

    name = "scripted"
    start_s = 0.0
    lends = True

    def __init__(self, *script: tuple[float, Do]) -> None:
        self.kv_pages: dict[Key, int] = {}
        self._script = list(script)

    def begin(self, cluster: Cluster, future: Future) -> None:
        """Nothing to prepare."""

    def decide(self, cluster: Cluster, asked: Sequence[str]) -> list[Action]:
        """What the script has for this moment."""
        due = [do for at, do in self._script if at <= cluster.clock.now]
        self._script = self._script[len(due) :]
        return [Action(do, "one", ("n0g0",), Reason(common_pb2.CAUSE_OPERATOR, "scripted")) for do in due]


@pytest.mark.parametrize(
    ("script", "wasted"),
    [
        ([(-15.0, Do.WARM), (-10.0, Do.EVICT), (-5.0, Do.WAKE)], 1),
        ([(-15.0, Do.WAKE), (-10.0, Do.DRAIN), (-9.0, Do.EVICT), (-5.0, Do.WAKE)], 0),
    ],
)
def test_what_was_copied_and_evicted_without_serving_is_wasted(script: list[tuple[float, Do]], wasted: int) -> None:
    model = llama2_7b("one")
    requests_ = [Request(0.0, "one", 100, 10)]
    results = simulate(ClusterSpec(1, 1), [model], requests_, Scripted(*script), settings=QUICK)
    assert results.found[0] == Found.ACTIVE
    assert results.copied_bytes["host"] == pytest.approx(2 * model.weight_bytes, rel=0.01)
    assert results.wasted_bytes == pytest.approx(wasted * model.weight_bytes, rel=0.01)


def test_a_request_that_no_kv_would_hold_fails_and_the_others_go_on() -> None:
    model = ModelSpec("tight", 300_000_000, 12, 500_000, max_batch=16, context_tokens=9000)
    cluster = ClusterSpec(1, 1, arena_bytes=70 * PAGE, page_bytes=PAGE)
    given_ = [Request(0.0, "tight", 100, 20), Request(0.1, "tight", 8000, 20), Request(0.2, "tight", 100, 20)]
    results = simulate(cluster, [model], given_, Dedicated(), settings=QUICK)
    assert results.served.tolist() == [True, False, True]
    assert results.summary()["unserved"] == 1


@pytest.mark.parametrize(
    ("cluster", "models", "says"),
    [
        (ClusterSpec(0, 8), [SMALL], "no GPU"),
        (TIGHT, [], "no model"),
        (TIGHT, [SMALL, SMALL], "two models are called small"),
        (TIGHT, [SMALL, replace(LARGE, parameters=70_000_000_000)], "large is too large.*no group"),
        (TIGHT, [replace(MEDIUM, parameters=2_000_000_000)], "medium is too large.*tp: 2 would fit"),
        (TIGHT, [replace(LARGE, tp=4)], "large is spread over 4 GPUs.*a node has 2"),
        (TIGHT, [replace(LARGE, tp=3)], "power of two"),
        (TIGHT, [replace(SMALL, layers=0)], "small: .*layers"),
        (replace(TIGHT, pcie_gbps=0.0), [SMALL], "pcie_gbps must be above 0"),
        (TIGHT, [replace(SMALL, kv_bytes_per_token=10**9)], "one token's KV"),
    ],
)
def test_an_impossible_setting_says_what_is_to_blame(cluster: ClusterSpec, models: list[ModelSpec], says: str) -> None:
    with pytest.raises(ImpossibleError, match=says):
        simulate(cluster, models, [Request(0.0, "small", 1, 1)], Ours())


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ([], "no requests"),
        ([Request(0.0, "other", 1, 1)], "request 1 is for 'other'"),
        ([Request(1.0, "small", 1, 1), Request(0.5, "small", 1, 1)], "number 2 arrives before"),
        ([Request(1.0, "small", 1900, 200)], r"request 1 has 1900 \+ 200 tokens.*holds 2000"),
    ],
)
def test_bad_requests_are_refused(given_: list[Request], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        simulate(TIGHT, MODELS, given_, Ours())
