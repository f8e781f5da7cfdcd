"""Each policy on cases small enough to tell what it has to do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from services.forecaster.predictors import Floats, PublishedPredictor
from services.placer import planner
from services.placer.decisions import Plan
from services.placer.snapshot import Snapshot
from simulator.engine import Job
from simulator.forecasts import LoadMeter
from simulator.policies.base import Future, Policy
from simulator.policies.oracle import Oracle
from simulator.policies.ours import Ours
from simulator.policies.serverless import Serverless
from simulator.policies.static import Dedicated, Muxserve
from simulator.results import Found, Results
from simulator.run import simulate
from simulator.spec import ClusterSpec, Forecasting, ModelSpec, Settings, llama2_7b, llama2_13b
from warmserve.traces import Request

PAGE = 32 << 20
QUICK = Settings(tick_s=1.0, warmup_s=60.0, drain_s=120.0)
ONE_GPU = ClusterSpec(1, 1)
# One of these fits beside its KV, two do not.
BIG = [replace(llama2_7b(name), parameters=20_000_000_000) for name in ("first", "second")]


def asks(*times: tuple[float, str], prompt: int = 100, output: int = 20) -> list[Request]:
    return [Request(time_s, model, prompt, output) for time_s, model in times]


def run(policy: Policy, models: list[ModelSpec], requests: list[Request], **settings: object) -> Results:
    return simulate(ONE_GPU, models, requests, policy, settings=replace(QUICK, **settings))  # type: ignore[arg-type]


# Autoscaling


def test_serverless_keeps_an_instance_alive_for_a_while_and_then_starts_anew() -> None:
    results = run(Serverless(keep_alive_s=30.0), BIG, asks((0, "first"), (20, "first"), (120, "first")))
    assert results.found.tolist() == [Found.COLD, Found.ACTIVE, Found.COLD]
    assert results.wakes.cold == 2


def test_serverless_gives_an_idle_instances_gpu_to_who_asks() -> None:
    results = run(Serverless(keep_alive_s=1000.0), BIG, asks((0, "first"), (20, "second"), (40, "first")))
    assert results.found.tolist() == [Found.COLD] * 3
    assert results.ttft_s.max() < 1.0  # a copy from host memory each time


def test_a_published_engine_start_is_waited_for_each_time() -> None:
    requests = asks((0, "first"), (90, "second"))
    ours, published = (run(Serverless(start_s=start), BIG, requests) for start in (0.0, 55.0))
    assert (published.ttft_s - ours.ttft_s).tolist() == pytest.approx([55.0, 55.0], abs=0.03)


def test_serverless_never_puts_two_models_on_one_gpu() -> None:
    models = [llama2_7b("first"), llama2_7b("second")]
    results = run(Serverless(), models, asks((0, "first"), (0.1, "second"), output=400))
    assert results.ttft_s[1] > results.finished_s[0]  # though both would fit
    both = simulate(ClusterSpec(1, 2), models, asks((0, "first"), (0.1, "second")), Serverless(), settings=QUICK)
    assert both.ttft_s.max() < 1.0


def test_serverless_adds_instances_under_load() -> None:
    requests = asks(*((0.02 * i, "first") for i in range(600)), output=300)
    results = simulate(ClusterSpec(1, 4), [llama2_7b("first")], requests, Serverless(), settings=QUICK)
    assert results.wakes.cold > 1
    assert results.served.all()


def test_serverless_starts_where_the_image_is_in_memory() -> None:
    models = [llama2_7b("first"), llama2_7b("second")]  # each node's memory has room for one, and has the second
    cluster = ClusterSpec(2, 1, host_bytes=models[0].weight_bytes)
    requests = asks((0, "first"), (60, "second"), (120, "first"))
    results = simulate(cluster, models, requests, Serverless(keep_alive_s=5.0), settings=QUICK)
    assert results.copied_bytes["disk"] == pytest.approx(models[0].weight_bytes, rel=0.01)
    assert results.ttft_s[0] > 5.0
    assert results.ttft_s[1:].max() < 1.0


def test_who_has_waited_long_gets_gpus_from_those_that_never_idle() -> None:
    busy = [(0.5 * i, "first") for i in range(200)]
    requests = sorted(asks(*busy, (20.0, "second"), output=200), key=lambda r: r.time_s)
    results = run(Serverless(), BIG, requests, tick_s=1000.0)  # while somebody waits, ticks are closer
    waited = results.ttft_s[results.model == 1]
    assert QUICK.rules.max_wait_s < waited[0] < QUICK.rules.max_wait_s + 20


# Static placements


def test_muxserve_keeps_all_that_fits_active_and_wakes_nothing_later() -> None:
    models = [llama2_7b("first"), llama2_7b("second")]
    results = run(Muxserve(), models, asks((0, "first"), (300, "second"), (900, "first")))
    assert results.found.tolist() == [Found.ACTIVE] * 3
    assert results.wakes.all == 2


def test_muxserve_splits_kv_by_need_and_nobody_gets_more() -> None:
    models = [llama2_7b("busy"), llama2_7b("quiet")]
    requests = asks(*((0.2 * i, "busy") for i in range(300)), (70.0, "quiet"), prompt=600, output=300)
    policy = Muxserve()
    results = run(policy, models, requests)
    pages = {key[0]: pages for key, pages in policy.kv_pages.items()}
    assert pages["busy"] > 2 * pages["quiet"]
    assert sum(pages.values()) <= ONE_GPU.pages - 2 * models[0].shard_pages(ONE_GPU.page_bytes)
    assert results.served.all()


def test_muxserve_relieves_the_busiest_gpu_with_replicas() -> None:
    models = [llama2_7b("busy"), llama2_7b("quiet")]
    requests = asks(*((0.05 * i, "busy") for i in range(1200)), (61.0, "quiet"))
    policy = Muxserve()
    simulate(ClusterSpec(1, 4), models, requests, policy, settings=QUICK)
    assert sum(key[0] == "busy" for key in policy.kv_pages) == 4


def test_dedicated_gives_whole_gpus_by_peaks_and_the_rest_nothing() -> None:
    models = [llama2_7b("busy"), llama2_7b("quiet"), llama2_13b("pair"), llama2_7b("left")]
    busy = [(0.01 * i, "busy") for i in range(2000)]
    requests = sorted(
        asks(*busy, (1, "quiet"), (1.1, "quiet"), (2, "pair"), (3, "left"), output=100), key=lambda r: r.time_s
    )
    results = simulate(ClusterSpec(1, 4), models, requests, Dedicated(), settings=QUICK)
    served = {name: results.served[results.model == i].all() for i, name in enumerate(results.models)}
    assert served == {"busy": True, "quiet": True, "pair": True, "left": False}
    assert results.ttft(99, "left") == float("inf")


# The planner, with and without its parts


def history(load: float, windows: int = 12) -> Floats:
    return np.tile(np.array([load, load, load, 100 * load, 20 * load]), (windows, 1))


def test_ours_has_what_is_forecast_warm_before_the_first_request() -> None:
    models = [llama2_7b("first"), llama2_7b("second")]
    forecasting = Forecasting(PublishedPredictor(288), {"first": history(2.0), "second": history(0.0)})
    results = run(Ours(), models, asks((0, "first"), (1, "second")), forecasting=forecasting)
    assert results.found.tolist() == [Found.WARM, Found.COLD]
    assert results.ttft_s[0] < 0.05 < results.ttft_s[1]


def test_a_silent_forecaster_makes_no_new_forecasts_until_it_is_back() -> None:
    predictor = Recording()
    forecasting = Forecasting(
        predictor, {"first": history(2.0)}, window_s=100.0, silent_from_s=150.0, silent_to_s=450.0
    )
    requests = asks(*((float(i), "first") for i in range(0, 650, 10)))
    results = run(Ours(), [llama2_7b("first")], requests, forecasting=forecasting)
    assert [asked.shape[1] - 12 for asked in predictor.asked] == [0, 1, 5, 6]  # windows counted in the run
    assert results.served.all()


def test_without_lending_an_active_instance_leaves_no_room_for_others() -> None:
    models = [llama2_7b("first"), llama2_7b("second")]
    forecasting = Forecasting(PublishedPredictor(288), {"first": history(2.0), "second": history(2.0)})
    requests = asks(*((0.1 * i, "first") for i in range(400)), (41.0, "second"), output=100)
    lent, kept = (run(Ours(lends=lends), models, requests, forecasting=forecasting) for lends in (True, False))
    assert lent.found[-1] in (Found.WARM, Found.ACTIVE)
    assert kept.found[-1] not in (Found.WARM, Found.ACTIVE)


def test_without_partial_residency_nothing_is_ever_partly_there() -> None:
    requests = sorted(
        asks(*((7.0 * i, "first") for i in range(20)), *((7.0 * i + 3, "second") for i in range(20))),
        key=lambda r: r.time_s,
    )
    with_parts, without = (run(Ours(partial=partial), BIG, requests) for partial in (True, False))
    assert with_parts.wakes.partial > 0
    assert without.wakes.partial == 0
    assert sum(with_parts.copied_bytes.values()) < sum(without.copied_bytes.values())


# The oracle


def test_the_oracle_has_a_model_there_just_before_its_first_request() -> None:
    requests = asks((50, "first"), (100, "second"), (150, "first"))
    oracle, ours = run(Oracle(), BIG, requests), run(Ours(), BIG, requests)
    assert (oracle.found == Found.ACTIVE).all()
    assert oracle.ttft_s.max() < 0.1 < ours.ttft_s.max()


def test_the_oracles_planner_knows_what_requests_are_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """As forecasts tell it, which the oracle is without: else it left a quarter of each arena to KV."""
    plan, asked = planner.plan, []

    def recording(snapshot: Snapshot, **options: bool) -> Plan:
        asked.append(snapshot)
        return plan(snapshot, **options)

    monkeypatch.setattr(planner, "plan", recording)
    run(Oracle(), BIG, asks((50, "first"), (100, "second")))
    assert asked
    assert all(m.service_s > 0 and m.kv_bytes_per_request > 0 for seen in asked for m in seen.models.values())


def test_known_loads_are_requests_in_progress() -> None:
    future = Future(np.array([0.0, 5.0, 12.0]), np.array([0, 0, 1]), np.array([10.0, 10.0, 2.0]))
    assert future.loads(0, 10.0).tolist() == pytest.approx([1.5, 0.5, 0.0])
    assert future.loads(1, 10.0).tolist() == pytest.approx([0.0, 0.2, 0.0])
    assert future.loads(2, 10.0).tolist() == [0.0]


# Forecasts


def test_a_meter_counts_as_routers_do() -> None:
    meter = LoadMeter(0.0)
    jobs = [Job(0, 0, 100, 10, 2.0), Job(1, 0, 50, 20, 4.0)]
    meter.arrived(jobs[0], 2.0)
    meter.arrived(jobs[1], 4.0)
    meter.ended(jobs[0], 6.0)
    assert meter.cut(10.0, 10.0) == [pytest.approx((2 + 2 * 2 + 4) / 10), 2.0, 0.2, 15.0, 1.0]
    meter.ended(jobs[1], 15.0)
    assert meter.cut(20.0, 10.0) == [pytest.approx(0.5), 1.0, 0.0, 0.0, 2.0]


class Recording:
    """A predictor that remembers what it was asked with, and says that all stays as it was."""

    name = "recording"

    def __init__(self) -> None:
        self.asked: list[Floats] = []

    def predict_many(self, series: Floats, horizon: int) -> Floats:
        raise AssertionError("the simulator asks for all quantities")

    def at(self, series: Floats, origins: NDArray[np.int64], distance: int) -> Floats:
        raise AssertionError("the simulator asks for what comes")

    def forecast_all(self, history: Floats, horizon: int) -> Floats:
        self.asked.append(history)
        last = np.nan_to_num(history[:, -1])
        return np.tile(last[:, None, :, None], (1, horizon, 1, 3))


def test_the_predictor_gets_the_history_and_then_what_was_counted_in_the_run() -> None:
    predictor = Recording()
    forecasting = Forecasting(predictor, {"first": history(2.0, 5)}, window_s=100.0)
    requests = asks(*((1000.0 + i, "first") for i in range(250)), output=30)
    run(Ours(), [llama2_7b("first"), llama2_7b("new")], requests, forecasting=forecasting)
    assert predictor.asked[0].shape == (2, 5, 5)
    assert np.isnan(predictor.asked[0][1]).all()
    assert [asked.shape[1] for asked in predictor.asked[:3]] == [5, 6, 7]
    counted = predictor.asked[2][0, 5:]
    assert counted[:, 2].tolist() == pytest.approx([1.0, 1.0])
    assert counted[:, 3].tolist() == pytest.approx([100.0, 100.0])
    assert (counted[:, 0] > 0.1).all()
    assert (predictor.asked[2][1, 5:] == 0).all()


def test_a_history_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"history of first has the shape \(3, 2\)"):
        run(
            Ours(),
            [llama2_7b("first")],
            asks((0, "first")),
            forecasting=Forecasting(Recording(), {"first": np.zeros((3, 2))}),
        )
