"""What the forecaster's tests share."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from launcher.backing import Backing
from tests.forecaster.process import Start, forecaster
from warmserve.cluster.keys import Keys
from warmserve.v1 import forecast_pb2_grpc


@pytest.fixture
def start(etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path) -> Start:
    """Starts forecasters: `async with start(window_s=1.0) as stub`; on one folder, unless told otherwise."""

    def run(**settings: Any) -> AbstractAsyncContextManager[forecast_pb2_grpc.ForecastServiceStub]:
        folder = settings.pop("folder", tmp_path)
        redis = settings.pop("redis", redis_server.address)
        return forecaster(etcd.address, redis, keys.prefix, folder, **settings)

    return run
