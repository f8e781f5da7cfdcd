"""Talking to the forecaster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from warmserve.admin.target import CommandError
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, forecast_pb2_grpc

_OPTIONS = [("grpc.max_receive_message_length", -1)]  # a long history is one message


@asynccontextmanager
async def forecaster(store: Store, keys: Keys) -> AsyncIterator[forecast_pb2_grpc.ForecastServiceAsyncStub]:
    """The forecaster; of several, the one that has run longest. CommandError where there is none, or a call fails."""
    found = await store.get_all(keys.forecasters(), cluster_pb2.ForecasterRecord)
    if not found:
        raise CommandError(f"no forecaster is registered (nothing in etcd under {keys.forecasters()}): start one")
    record = min((entry.value for entry in found), key=lambda record: (record.started_unix_ms, record.id))
    async with grpc.aio.insecure_channel(record.address, options=_OPTIONS) as channel:
        try:
            yield forecast_pb2_grpc.ForecastServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            details = error.details() or error.code().name
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                details = f"forecaster {record.id} at {record.address}: {details}"
            raise CommandError(details) from None
