"""History on disk, counters in Redis, forecasts in etcd and over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from launcher.backing import Backing
from services.common.grpc_frame import channel
from services.common.process import make_node
from services.forecaster.__main__ import serve
from services.forecaster.settings import ForecasterSettings
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, forecast_pb2, forecast_pb2_grpc


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
