"""A forecaster as its process runs it, in this one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from services.common.grpc_frame import channel
from services.common.process import make_node
from services.forecaster.__main__ import serve
from services.forecaster.settings import ForecasterSettings
from warmserve.v1 import forecast_pb2_grpc

DAY = 86_400.0
Start = Callable[..., AbstractAsyncContextManager[forecast_pb2_grpc.ForecastServiceStub]]


@asynccontextmanager
async def forecaster(
    etcd: str, redis: str, prefix: str, folder: Path, **settings: Any
) -> AsyncIterator[forecast_pb2_grpc.ForecastServiceStub]:
    """Runs one until the block ends; with windows of a day, of which none ends while a test runs, and no refits, unless
    told otherwise."""
    chosen = ForecasterSettings(
        etcd_endpoints=[etcd],
        redis_url=f"redis://{redis}/0",
        prefix=prefix,
        data_dir=folder,
        **{"window_s": DAY, "season_s": 24 * DAY, "refit_s": 0, "lease_ttl_s": 2, **settings},
    )
    stop = asyncio.Event()
    node = make_node(chosen, stop)
    await node.session.start()
    task = asyncio.create_task(serve(chosen, node))
    while not node.server.address and not task.done():
        await asyncio.sleep(0.01)
    try:
        if task.done():
            task.result()
        async with channel(node.server.address) as connection:
            yield forecast_pb2_grpc.ForecastServiceStub(connection)
    finally:
        stop.set()
        try:
            await task
        finally:
            await node.close()
