"""The forecaster's process."""

from __future__ import annotations

import asyncio

from services.common.load import LoadCounters
from services.common.process import Node, run
from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from services.forecaster.history import History
from services.forecaster.predictors import PublishedPredictor
from services.forecaster.recorder import Recorder
from services.forecaster.service import Forecaster, Forecasts, ForecastServicer
from services.forecaster.settings import ForecasterSettings
from warmserve.cluster.mirror import Mirror
from warmserve.v1 import cluster_pb2, forecast_pb2, forecast_pb2_grpc

_log = logger(__name__)


async def serve(settings: ForecasterSettings, node: Node) -> None:
    """Serves until node.stop is set. OSError where the history cannot be used."""
    try:
        history = History(settings.data_dir, settings.window_s)
    except ValueError as error:
        raise OSError(str(error)) from error
    models = Mirror(node.store, node.keys.models(), cluster_pb2.ModelSpec)
    forecasts = Forecasts()
    recorder = Recorder(history, LoadCounters(node.redis, node.keys), settings.window_s, settings.retention_s)
    predictor = PublishedPredictor(max(1, round(settings.season_s / settings.window_s)))
    forecaster = Forecaster(settings, node.keys, node.store, models, history, recorder, predictor, forecasts)
    forgetting: set[asyncio.Task[None]] = set()

    def on_model(name: str, _: cluster_pb2.ModelSpec | None, new: cluster_pb2.ModelSpec | None) -> None:
        if new is None:
            task = begin_task(forecaster.forget(name), f"forget {name}")
            forgetting.add(task)
            task.add_done_callback(forgetting.discard)

    models.on_change(on_model)
    await models.start()
    node.server.add(
        forecast_pb2_grpc.add_ForecastServiceServicer_to_server,
        ForecastServicer(models, forecasts),
        forecast_pb2.DESCRIPTOR.services_by_name["ForecastService"],
    )
    address = await node.server.start()
    working = asyncio.create_task(forecaster.run(), name="forecaster")
    stopping = asyncio.create_task(node.stop.wait())
    await node.server.set_serving(True)
    _log.info("serving", address=address, window_s=settings.window_s, season_s=settings.season_s)
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()  # it never ends by itself: this raises what broke it
    finally:
        await node.server.set_serving(False)
        await end_tasks([working, stopping, *forgetting])
        await models.close()
        await node.server.stop(1)
        history.close()


def main() -> None:
    """Entry point."""
    run("forecaster", ForecasterSettings, serve)


if __name__ == "__main__":
    main()
