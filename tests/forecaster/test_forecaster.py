"""History on disk, counters in Redis, forecasts in etcd and over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from redis.asyncio import Redis

from launcher.backing import Backing
from services.common.grpc_frame import channel
from services.common.load import LoadCounters, LoadCounts
from services.common.process import make_node
from services.forecaster.__main__ import serve
from services.forecaster.history import History
from services.forecaster.recorder import Recorder
from services.forecaster.settings import ForecasterSettings
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, forecast_pb2, forecast_pb2_grpc

BUSY = LoadCounts(arrivals=20, prompt_tokens=100, output_tokens=50, load_seconds=40.0, peak=7)


def test_history_keeps_windows_over_a_restart_and_tells_gaps(tmp_path: Path) -> None:
    history = History(tmp_path, 10)
    history.record(100, {"m": BUSY})
    history.record(110, None)
    history.record(120, {"m": LoadCounts()})
    history.record(120, {"m": BUSY})  # again, with a late report
    history.record(120, None)  # again, when its counters have ended: what was recorded stays
    history.close()
    history = History(tmp_path, 10)
    series = history.series("m", 120, 50)
    assert series.shape == (3, 5)
    np.testing.assert_allclose(series[0], [4.0, 7.0, 2.0, 10.0, 5.0])
    assert np.isnan(series[1]).all()
    np.testing.assert_allclose(series[2], series[0])
    assert history.newest() == 120
    assert history.series("m", 120, 2).shape == (1, 5)  # only what is wanted; a gap at its begin is left out
    history.trim(115)
    assert history.series("m", 120, 50).shape == (1, 5)
    history.forget(["m"])
    assert history.series("m", 120, 50).shape == (0, 5)
    history.close()


def test_history_refuses_another_window_length(tmp_path: Path) -> None:
    History(tmp_path, 10).close()
    with pytest.raises(ValueError, match="windows of 10 s and not of 20 s"):
        History(tmp_path, 20)


async def test_windows_missed_while_away_are_recorded_later(tmp_path: Path, redis: Redis, keys: Keys) -> None:
    counters = LoadCounters(redis, keys)
    history = History(tmp_path, 10)
    recorder = Recorder(history, counters, 10, 1e6)
    await counters.add("r0", 1000, {"m": BUSY})
    assert await recorder.catch_up(["m"], 1011) == 1000
    await counters.add("r0", 1020, {"m": BUSY})  # nobody counts in the window that begins at 1010
    await counters.add("r0", 1030, {})  # somebody counts, and nothing arrives
    assert await recorder.catch_up(["m"], 1047) == 1030
    loads = history.series("m", 1030, 10)[:, 0]
    np.testing.assert_array_equal(loads, [4.0, np.nan, 4.0, 0.0])
    # The clock goes back: nothing is recorded twice, nothing is lost.
    await recorder.catch_up(["m"], 1015)
    np.testing.assert_array_equal(history.series("m", 1030, 10)[:, 0], loads)
    history.close()


@pytest.fixture
async def forecaster(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> AsyncIterator[forecast_pb2_grpc.ForecastServiceStub]:
    settings = ForecasterSettings(
        etcd_endpoints=[etcd.address],
        redis_url=f"redis://{redis_server.address}/0",
        prefix=keys.prefix,
        data_dir=tmp_path,
        window_s=1.0,
        season_s=4.0,
        port=0,
    )
    stop = asyncio.Event()
    node = make_node(settings, stop)
    await node.session.start()
    task = asyncio.create_task(serve(settings, node))
    while not node.server.address and not task.done():
        await asyncio.sleep(0.01)
    async with channel(node.server.address) as connection:
        yield forecast_pb2_grpc.ForecastServiceStub(connection)
    stop.set()
    await task
    await node.session.close()
    await node.redis.aclose()
    await node.store.close()


async def test_each_window_is_forecast_published_and_streamed(
    forecaster: forecast_pb2_grpc.ForecastServiceStub, store: Store, keys: Keys
) -> None:
    stub = forecaster
    await store.put(keys.model("m"), cluster_pb2.ModelSpec(name="m"))
    forecasts = Mirror(store, keys.forecasts(), cluster_pb2.Forecast)
    await forecasts.start()
    await forecasts.wait_for(lambda items: "m" in items)
    call = stub.WatchForecasts(forecast_pb2.WatchForecastsRequest(models=["m"]))
    first, second = [(await call.read()).forecast for _ in range(2)]
    assert second.made_unix_ms > first.made_unix_ms
    assert second.predictor == "published"
    starts = [window.start_unix_s for window in second.windows]
    assert starts == list(range(starts[0], starts[0] + 12))
    assert starts[0] <= second.made_unix_ms / 1e3 < starts[1]  # the current window is first
    call.cancel()
    answer = await stub.GetForecasts(forecast_pb2.GetForecastsRequest())
    assert [forecast.model for forecast in answer.forecasts] == ["m"]
    await store.delete(keys.model("m"))
    await forecasts.wait_for(lambda items: not items)
    await forecasts.close()


async def test_a_model_that_is_not_deployed_is_named(forecaster: forecast_pb2_grpc.ForecastServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="not deployed: x") as failed:
        await forecaster.GetForecasts(forecast_pb2.GetForecastsRequest(models=["x"]))
    assert failed.value.code() == grpc.StatusCode.NOT_FOUND


async def test_forecasts_that_outlived_their_models_are_withdrawn(
    forecaster: forecast_pb2_grpc.ForecastServiceStub, store: Store, keys: Keys
) -> None:
    await store.put(keys.forecast("gone"), cluster_pb2.Forecast(model="gone"))
    while await store.get(keys.forecast("gone"), cluster_pb2.Forecast):
        await asyncio.sleep(0.01)
