"""A forecaster that answers from what it was given: ForecastService over a real socket, registered in etcd."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, forecast_pb2, forecast_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class PeerForecaster(forecast_pb2_grpc.ForecastServiceServicer):
    """Set what it knows; `asked` and `imported` are what came."""

    def __init__(self) -> None:
        self.history: dict[str, forecast_pb2.GetHistoryResponse] = {}
        self.forecasts: dict[str, cluster_pb2.Forecast] = {}
        self.scores = forecast_pb2.GetScoresResponse()
        self.champion = forecast_pb2.PredictorInfo(name="published")
        self.previous: forecast_pb2.PredictorInfo | None = None
        self.asked: list[Any] = []
        self.imported: list[forecast_pb2.ImportHistoryRequest] = []
        self.refusal = ""
        self.address = ""
        self._server = grpc.aio.server()

    async def start(self, store: Store, keys: Keys, name: str = "f0") -> None:
        forecast_pb2_grpc.add_ForecastServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        record = cluster_pb2.ForecasterRecord(id=name, address=self.address, started_unix_ms=1000)
        await store.put(keys.forecaster(name), record)

    async def close(self) -> None:
        await self._server.stop(0)

    async def GetHistory(self, request: forecast_pb2.GetHistoryRequest, context: Context) -> Any:
        self.asked.append(request)
        if request.model not in self.history:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"nothing was ever recorded of a model {request.model!r}")
        return self.history[request.model]

    async def GetForecasts(self, request: forecast_pb2.GetForecastsRequest, context: Context) -> Any:
        found = [self.forecasts[name] for name in request.models if name in self.forecasts]
        return forecast_pb2.GetForecastsResponse(forecasts=found)

    async def ImportHistory(
        self, request_iterator: AsyncIterator[forecast_pb2.ImportHistoryRequest], context: Context
    ) -> Any:
        taken = [request async for request in request_iterator]
        if self.refusal:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.refusal)
        self.imported += taken
        models = {request.model for request in taken}
        windows = sum(len(request.windows) for request in taken)
        return forecast_pb2.ImportHistoryResponse(windows=windows, models=len(models))

    async def GetScores(self, request: forecast_pb2.GetScoresRequest, context: Context) -> Any:
        self.asked.append(request)
        return self.scores

    async def GetPredictor(self, request: forecast_pb2.GetPredictorRequest, context: Context) -> Any:
        return forecast_pb2.GetPredictorResponse(
            champion=self.champion,
            previous=self.previous,
            last_refit="kept: its loss is 0.71 of the published predictor's",
            drift=1.25,
        )

    async def RestorePredictor(self, request: forecast_pb2.RestorePredictorRequest, context: Context) -> Any:
        if self.previous is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "there is no previous predictor")
        assert self.previous is not None
        self.champion, self.previous = self.previous, self.champion
        return forecast_pb2.RestorePredictorResponse(champion=self.champion)
