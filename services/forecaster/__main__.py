"""The forecaster's process."""

from __future__ import annotations

import asyncio
import sqlite3
import time

from services.common.load import LoadCounters
from services.common.process import Node, run
from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from services.forecaster.calendar import Calendar
from services.forecaster.champion import Champions
from services.forecaster.database import Database
from services.forecaster.history import History
from services.forecaster.past import EndedAnnouncements, PastForecasts
from services.forecaster.publisher import Publisher
from services.forecaster.recorder import Recorder
from services.forecaster.refitting import Refitter
from services.forecaster.rpcs import ForecastServicer
from services.forecaster.service import Forecaster
from services.forecaster.settings import ForecasterSettings
from warmserve.cluster.mirror import Mirror
from warmserve.v1 import cluster_pb2, forecast_pb2, forecast_pb2_grpc

_log = logger(__name__)


async def serve(settings: ForecasterSettings, node: Node) -> None:
    """Serves until node.stop is set. OSError where the history cannot be used."""
    try:
        database = Database(settings.data_dir, settings.window_s)
    except (ValueError, sqlite3.Error) as error:
        raise OSError(f"the history in {settings.data_dir} cannot be used: {error}") from error
    try:
        await _serve(settings, node, database)
    finally:
        database.close()


async def _serve(settings: ForecasterSettings, node: Node, database: Database) -> None:
    history = await asyncio.to_thread(History, database, settings.full_s, settings.retention_s)
    past, ended = PastForecasts(database), EndedAnnouncements(database)
    champions = Champions(settings.data_dir / "predictors", settings.season)
    await asyncio.to_thread(champions.load)
    models = Mirror(node.store, node.keys.models(), cluster_pb2.ModelSpec)
    routers = Mirror(node.store, node.keys.routers(), cluster_pb2.RouterRecord)
    instances = Mirror(node.store, node.keys.instances(), cluster_pb2.InstanceRecord)
    others = Mirror(node.store, node.keys.forecasters(), cluster_pb2.ForecasterRecord)
    publisher = Publisher(node.store, node.keys)
    calendar = Calendar(node.keys, node.store, history, past, ended)
    recorder = Recorder(history, LoadCounters(node.redis, node.keys), settings.window_s)
    forecaster = Forecaster(settings, models, routers, history, recorder, past, calendar, champions, publisher)
    refitter = Refitter(settings, history, past, champions, forecaster.remake)

    def on_model(name: str, old: cluster_pb2.ModelSpec | None, new: cluster_pb2.ModelSpec | None) -> None:
        if new is None:
            forecaster.undeployed(name)
        elif old is None:
            forecaster.remake()

    def on_other(name: str, _: cluster_pb2.ForecasterRecord | None, new: cluster_pb2.ForecasterRecord | None) -> None:
        if new is not None and name != settings.id:
            _log.warning(
                "another forecaster writes the same forecasts; one is enough, though both do no harm", other=name
            )

    models.on_change(on_model)
    others.on_change(on_other)
    mirrors = (models, routers, instances, others)
    for mirror in mirrors:
        await mirror.start()
    await calendar.start(forecaster.announced)
    servicer = ForecastServicer(
        models, instances, publisher, history, past, ended, calendar, champions, refitter, forecaster.remake
    )
    node.server.add(
        forecast_pb2_grpc.add_ForecastServiceServicer_to_server,
        servicer,
        forecast_pb2.DESCRIPTOR.services_by_name["ForecastService"],
    )
    address = await node.server.start()
    working = [begin_task(forecaster.run(), "forecaster"), begin_task(refitter.run(), "refits")]
    stopping = asyncio.create_task(node.stop.wait())
    record = cluster_pb2.ForecasterRecord(id=settings.id, address=address, started_unix_ms=int(time.time() * 1e3))
    await node.session.put(node.keys.forecaster(settings.id), record)
    await node.server.set_serving(True)
    _log.info("serving", address=address, window_s=settings.window_s, season_s=settings.season_s)
    try:
        done, _ = await asyncio.wait({*working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()  # they never end by themselves: this raises what broke them
    finally:
        await node.session.delete(node.keys.forecaster(settings.id))
        await node.server.set_serving(False)
        await end_tasks([*working, stopping])
        await calendar.close()
        for mirror in mirrors:
            await mirror.close()
        await node.server.stop(1)


def main() -> None:
    """Entry point."""
    run("forecaster", ForecasterSettings, serve)


if __name__ == "__main__":
    main()
