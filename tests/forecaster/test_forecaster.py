"""The forecaster with a real etcd and Redis, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from redis.asyncio import Redis

from launcher.backing import Backing, start_etcd
from services.common.load import LoadCounters, LoadCounts, start_of, window_index
from services.forecaster.calendar import Calendar
from services.forecaster.database import Database
from services.forecaster.history import History, Seen
from services.forecaster.past import EndedAnnouncements, PastForecasts
from services.forecaster.publisher import Publisher
from tests.forecaster.process import DAY, Start, forecaster
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, forecast_pb2

BUSY = LoadCounts(arrivals=20, prompt_tokens=100, output_tokens=50, load_seconds=4.0, peak=7)


@pytest.fixture
async def published(store: Store, keys: Keys) -> AsyncIterator[Mirror[cluster_pb2.Forecast]]:
    """The forecasts in etcd."""
    mirror = Mirror(store, keys.forecasts(), cluster_pb2.Forecast)
    await mirror.start()
    yield mirror
    await mirror.close()


async def deploy(store: Store, keys: Keys, *names: str, deployed_s: float = 0) -> None:
    for name in names:
        spec = cluster_pb2.ModelSpec(name=name, deployed_unix_ms=int(deployed_s * 1e3))
        await store.put(keys.model(name), spec)


def now_window(window_s: float = DAY) -> int:
    return window_index(time.time(), window_s)


def seed(folder: Path, model: str, loads: list[float], last: int, window_s: float = DAY) -> None:
    """Puts windows into the history of a forecaster that does not run."""
    database = Database(folder, window_s)
    history = History(database, 28 * 24 * DAY, 365 * 24 * DAY)
    values = np.array([[load, 2 * load, load / 2, load * 100, load * 10] for load in loads])
    history.add({model: (np.arange(last - len(loads) + 1, last + 1), values)})
    database.close()


def windows(model: str, loads: list[float], last: int, window_s: float = DAY) -> forecast_pb2.ImportHistoryRequest:
    samples = [
        forecast_pb2.HistoryWindow(
            start_unix_s=start_of(last - len(loads) + 1 + at, window_s),
            actual=forecast_pb2.LoadSample(mean_load=load, peak_load=2 * load, request_rate=load / 2),
        )
        for at, load in enumerate(loads)
    ]
    return forecast_pb2.ImportHistoryRequest(model=model, window_s=window_s, windows=samples)


async def test_each_window_is_forecast_published_and_streamed(
    start: Start, store: Store, keys: Keys, published: Mirror[cluster_pb2.Forecast]
) -> None:
    async with start(window_s=1.0, season_s=4.0) as stub:
        await deploy(store, keys, "m")
        await published.wait_for(lambda items: "m" in items)
        call = stub.WatchForecasts(forecast_pb2.WatchForecastsRequest(models=["m"]))
        first, second = [(await call.read()).forecast for _ in range(2)]
        assert second.made_unix_ms > first.made_unix_ms
        assert second.predictor == "published"
        starts = [window.start_unix_s for window in second.windows]
        assert starts == list(range(starts[0], starts[0] + 12))
        call.cancel()
        answer = await stub.GetForecasts(forecast_pb2.GetForecastsRequest())
        assert [forecast.model for forecast in answer.forecasts] == ["m"]
        await store.delete(keys.model("m"))
        await published.wait_for(lambda items: not items)
        assert not (await stub.GetForecasts(forecast_pb2.GetForecastsRequest())).forecasts


async def test_a_new_model_is_forecast_at_once(
    start: Start, store: Store, keys: Keys, published: Mirror[cluster_pb2.Forecast]
) -> None:
    async with start():  # the next window is hours away, or nearly always
        for name in ("a", "b"):
            await deploy(store, keys, name)
            await published.wait_for(lambda items, name=name: name in items)  # type: ignore[misc]
        assert published.items["b"].windows[0].start_unix_s % DAY == 0


async def test_a_model_that_is_not_deployed_is_named(start: Start) -> None:
    async with start() as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="not deployed: x") as failed:
            await stub.GetForecasts(forecast_pb2.GetForecastsRequest(models=["x"]))
        assert failed.value.code() == grpc.StatusCode.NOT_FOUND


async def test_forecasts_that_outlived_their_models_are_withdrawn(
    start: Start, store: Store, keys: Keys, published: Mirror[cluster_pb2.Forecast]
) -> None:
    async with start(window_s=1.0):
        await store.put(keys.forecast("gone"), cluster_pb2.Forecast(model="gone"))
        await published.wait_for(lambda items: "gone" in items)
        await published.wait_for(lambda items: "gone" not in items)


async def test_it_is_found_in_etcd_while_it_runs(start: Start, store: Store, keys: Keys) -> None:
    records = Mirror(store, keys.forecasters(), cluster_pb2.ForecasterRecord)
    await records.start()
    async with start(id="f0"):
        await records.wait_for(lambda items: "f0" in items)
        assert records.items["f0"].address.startswith("127.0.0.1:")
    await records.close()
    assert await store.get(keys.forecaster("f0"), cluster_pb2.ForecasterRecord) is None


async def test_windows_of_a_stopped_forecaster_are_recorded_when_it_is_back(
    start: Start, store: Store, keys: Keys, redis: Redis
) -> None:
    await deploy(store, keys, "m")
    counters = LoadCounters(redis, keys)
    last = now_window(1.0) - 5
    await counters.report("r0:a.0", last - 2, 1.0, 1.0, {"m": BUSY})
    async with start(window_s=1.0) as stub:
        await until_recorded(stub, "m", last - 2)
    for window in (last - 1, last):
        await counters.report("r0:a.0", window, 1.0, 1.0, {"m": BUSY, "undeployed": BUSY})
    async with start(window_s=1.0) as stub:
        await until_recorded(stub, "m", last)
        found = await history_of(stub, "m", last - 5, last)
        assert {window: load for window, load in found.items() if window <= last} == {
            last - 2: 4,
            last - 1: 4,
            last: 4,
        }
        assert (await history_of(stub, "undeployed", last, last)) == {last: 4}


async def history_of(stub: object, model: str, first: int, last: int) -> dict[int, float]:
    request = forecast_pb2.GetHistoryRequest(model=model, from_unix_s=first, to_unix_s=last)
    answer = await stub.GetHistory(request)  # type: ignore[attr-defined]
    return {one.start_unix_s: one.actual.mean_load for one in answer.windows if one.HasField("actual")}


async def until_recorded(stub: object, model: str, window: int) -> None:
    while True:
        try:
            if window in await history_of(stub, model, window, window):
                return
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:  # nothing was recorded of it yet
                raise
        await asyncio.sleep(0.02)


async def test_without_redis_forecasts_go_on(
    start: Start, store: Store, keys: Keys, published: Mirror[cluster_pb2.Forecast]
) -> None:
    async with start(window_s=1.0, redis="127.0.0.1:1"):
        await deploy(store, keys, "m")
        await published.wait_for(lambda items: "m" in items)
        made = published.items["m"].made_unix_ms
        await published.wait_for(lambda items: items["m"].made_unix_ms > made)


async def test_a_model_deployed_again_goes_on_with_its_history(
    start: Start, store: Store, keys: Keys, tmp_path: Path, published: Mirror[cluster_pb2.Forecast]
) -> None:
    last = now_window() - 1
    seed(tmp_path, "m", [6.0] * 72, last)
    async with start() as stub:
        for _ in range(2):
            await deploy(store, keys, "m", deployed_s=time.time())
            await published.wait_for(lambda items: "m" in items)
            assert published.items["m"].windows[0].mean_load.p50 == pytest.approx(6, rel=0.01)
            await store.delete(keys.model("m"))
            await published.wait_for(lambda items: not items)
        answer = await stub.GetHistory(forecast_pb2.GetHistoryRequest(model="m", from_unix_s=start_of(last - 90, DAY)))
        assert sum(one.HasField("actual") for one in answer.windows) == 72


async def test_forecasts_are_adapted_to_what_came_of_those_that_were_kept(
    start: Start, store: Store, keys: Keys, published: Mirror[cluster_pb2.Forecast], tmp_path: Path
) -> None:
    last = now_window() - 1
    loads = [10 + 3 * np.sin(at) for at in range(60)]
    names = ("missed", "met", *(f"met-{number}" for number in range(8)))  # one in ten was above p90, as it should be
    for model in names:
        seed(tmp_path, model, loads, last)
    database = Database(tmp_path, DAY)
    made = np.full((len(names), 12, 5, 3), 50.0)
    made[0] = 0
    for window in range(last - 40, last + 1):
        PastForecasts(database).save(window, names, made, made)
    database.close()
    await deploy(store, keys, *names)
    async with start():
        await published.wait_for(lambda items: len(items) == len(names))
        missed, met = (published.items[name].windows for name in ("missed", "met"))
        for one, other in zip(missed, met, strict=True):
            assert one.mean_load.p50 == other.mean_load.p50
            wide, narrow = (at.mean_load.p90 - at.mean_load.p50 for at in (one, other))
            assert wide > 1.2 * narrow > 0


async def test_history_and_what_was_forecast_for_it(start: Start, tmp_path: Path) -> None:
    last = now_window() - 1
    seed(tmp_path, "m", [1.0, 2.0, 3.0], last)
    database = Database(tmp_path, DAY)
    made = np.tile(np.arange(1.0, 13)[None, :, None, None], (1, 1, 5, 3))
    PastForecasts(database).save(last, ["m"], made, made)
    database.close()
    async with start() as stub:
        begin = start_of(last - 2, DAY)
        answer = await stub.GetHistory(forecast_pb2.GetHistoryRequest(model="m", from_unix_s=begin))
        assert answer.window_s == DAY
        assert [one.actual.mean_load for one in answer.windows] == [1, 2, 3]
        assert [one.actual.prompt_tokens_per_s for one in answer.windows] == [100, 200, 300]
        assert [one.HasField("forecast") for one in answer.windows] == [False, False, True]
        assert answer.windows[2].forecast.mean_load.p90 == 1
        request = forecast_pb2.GetHistoryRequest(model="m", to_unix_s=start_of(last + 3, DAY), ahead=3)
        ahead = (await stub.GetHistory(request)).windows
        assert ahead[-1].start_unix_s == start_of(last + 2, DAY)
        assert not ahead[-1].HasField("actual")
        assert ahead[-1].forecast.peak_load.p50 == 3
        for wrong, code in (
            (forecast_pb2.GetHistoryRequest(model="x"), grpc.StatusCode.NOT_FOUND),
            (forecast_pb2.GetHistoryRequest(model="m", ahead=13), grpc.StatusCode.INVALID_ARGUMENT),
            (forecast_pb2.GetHistoryRequest(model="m", from_unix_s=9, to_unix_s=5), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await stub.GetHistory(wrong)
            assert failed.value.code() == code


async def test_imported_history_is_forecast_from_at_once(
    start: Start, store: Store, keys: Keys, published: Mirror[cluster_pb2.Forecast]
) -> None:
    last = now_window() - 1
    async with start() as stub:
        await deploy(store, keys, "m")
        await published.wait_for(lambda items: "m" in items)
        half = windows("other", [2.0, 4.0], 2 * last + 1, DAY / 2)  # both halves of the last day
        answer = await stub.ImportHistory(iter([windows("m", [5.0] * 60, last), half]))
        assert (answer.windows, answer.models) == (61, 2)
        await published.wait_for(lambda items: abs(items["m"].windows[0].mean_load.p50 - 5) < 0.1)
        joined = (
            await stub.GetHistory(forecast_pb2.GetHistoryRequest(model="other", to_unix_s=start_of(last, DAY)))
        ).windows
        assert [(one.actual.mean_load, one.actual.peak_load) for one in joined] == [(3, 8)]


async def test_an_import_with_a_wrong_window_leaves_nothing(start: Start) -> None:
    last = now_window() - 1
    async with start() as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="has not ended yet") as failed:
            await stub.ImportHistory(iter([windows("m", [5.0] * 5, last), windows("n", [1.0], last + 1)]))
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError, match="nothing was ever recorded"):
            await stub.GetHistory(forecast_pb2.GetHistoryRequest(model="m"))


async def test_an_announcement_raises_the_forecast_at_once(
    start: Start, store: Store, keys: Keys, published: Mirror[cluster_pb2.Forecast], tmp_path: Path
) -> None:
    seed(tmp_path, "m", [2.0] * 60, now_window() - 1)
    begin = start_of(now_window() + 2, DAY)
    async with start() as stub:
        await deploy(store, keys, "m", "other")
        await published.wait_for(lambda items: len(items) == 2)
        other = published.items["other"].made_unix_ms
        entry = cluster_pb2.CalendarEntry(
            model="m",
            id="e",
            start_unix_s=begin,
            duration_s=int(DAY / 2),
            load=20,
            source=cluster_pb2.CALENDAR_SOURCE_OPERATOR,
        )
        await store.put(keys.calendar("m", "e"), entry)
        await published.wait_for(lambda items: items["m"].windows[2].peak_load.p50 == 20)
        raised = published.items["m"].windows
        assert raised[2].mean_load.p50 == pytest.approx(11, abs=0.1)  # for half of the window
        assert raised[2].request_rate.p50 == pytest.approx(5.5, abs=0.1)  # half a request per second and load, as ever
        assert raised[1].peak_load.p50 < 20
        assert raised[3].peak_load.p50 < 20
        assert published.items["other"].made_unix_ms == other
        asked = await stub.GetHistory(forecast_pb2.GetHistoryRequest(model="m", to_unix_s=begin + 60))
        assert [one.id for one in asked.calendar] == ["e"]
        await store.delete(keys.calendar("m", "e"))
        await published.wait_for(lambda items: items["m"].windows[2].peak_load.p50 < 20)


async def test_an_announcement_that_has_ended_is_scored_and_taken_away(
    start: Start, store: Store, keys: Keys, redis: Redis
) -> None:
    await deploy(store, keys, "m")
    counters = LoadCounters(redis, keys)
    begin = now_window(1.0) - 10
    for window in range(begin, begin + 6):
        load = {"m": LoadCounts(load_seconds=3.0 if window == begin + 2 else 1.0)}
        await counters.report("r0:a.0", window, 1.0, 1.0, load)
    entry = cluster_pb2.CalendarEntry(model="m", id="e", start_unix_s=begin, duration_s=4, load=20, note="a launch")
    unseen = cluster_pb2.CalendarEntry(model="unknown", id="e", start_unix_s=begin, duration_s=4, load=1)
    meant_nothing = cluster_pb2.CalendarEntry(model="m", id="no", start_unix_s=begin, duration_s=4)
    for one in (entry, unseen, meant_nothing):
        await store.put(keys.calendar(one.model, one.id), one)
    calendar = Mirror(store, keys.calendars(), cluster_pb2.CalendarEntry)
    await calendar.start()
    async with start(window_s=1.0) as stub:
        await calendar.wait_for(lambda items: not items)
        scores = (await stub.GetScores(forecast_pb2.GetScoresRequest())).calendar
        assert [one.entry for one in scores] == [entry, unseen]
        assert (scores[0].actual_load, scores[0].actual_peak) == (1.5, 3.0)
        assert not scores[0].HasField("forecast_load")  # nothing was forecast then
        assert not scores[1].HasField("actual_load")
        only = await stub.GetScores(forecast_pb2.GetScoresRequest(models=["m"]))
        assert [one.entry.model for one in only.calendar] == ["m"]
    async with start(window_s=1.0) as stub:  # and they are kept
        assert (await stub.GetScores(forecast_pb2.GetScoresRequest())).calendar == scores
    await calendar.close()


async def test_an_announcement_is_settled_when_what_came_is_counted_and_not_by_a_clock_alone(
    store: Store, keys: Keys, tmp_path: Path
) -> None:
    database = Database(tmp_path, 60)
    history, ended = History(database, 1e7, 1e7), EndedAnnouncements(database)
    calendar = Calendar(keys, store, history, PastForecasts(database), ended)
    entry = cluster_pb2.CalendarEntry(model="m", id="e", start_unix_s=60_000, duration_s=120, load=20)
    await store.put(keys.calendar("m", "e"), entry)
    await calendar.start(lambda model: None)

    def count(window: int) -> None:
        history.record(window, {"m": (10.0, 12.0, 1.0, 1.0, 1.0)}, Seen(1, 60.0))

    count(1000)
    await calendar.settle(1001)  # the second of its windows has just ended: routers may yet report it
    await calendar.settle(500_000)  # the clock leaps, and nobody has counted since
    assert calendar.entries("m") == [entry]
    count(1001)
    await calendar.settle(1003)
    assert await store.get(keys.calendar("m", "e"), cluster_pb2.CalendarEntry) is None
    (score,) = ended.since(0)
    assert (score.actual_load, score.actual_peak) == (10, 10)
    await calendar.close()
    database.close()


async def test_clients_whose_hints_came_to_nothing_are_believed_less(
    start: Start, store: Store, keys: Keys, published: Mirror[cluster_pb2.Forecast], tmp_path: Path
) -> None:
    await deploy(store, keys, "m", "other")
    database = Database(tmp_path, DAY)
    hint = cluster_pb2.CalendarEntry(start_unix_s=1, duration_s=1, load=20, source=cluster_pb2.CALENDAR_SOURCE_CLIENT)
    for number in range(2):
        past = cluster_pb2.CalendarEntry(model="m", id=f"past{number}")
        past.MergeFrom(hint)
        EndedAnnouncements(database).save(forecast_pb2.CalendarScore(entry=past, actual_load=0, actual_peak=0))
    database.close()
    async with start():
        hint.start_unix_s, hint.duration_s = start_of(now_window() + 1, DAY), int(DAY)
        for model in ("m", "other"):
            one = cluster_pb2.CalendarEntry(model=model, id="new")
            one.MergeFrom(hint)
            await store.put(keys.calendar(model, "new"), one)
        await published.wait_for(
            lambda items: len(items) == 2 and all(i.windows[1].peak_load.p50 for i in items.values())
        )
        assert published.items["m"].windows[1].peak_load.p50 == 10  # two of four, two of them given in advance
        assert published.items["other"].windows[1].peak_load.p50 == 20


async def test_what_a_killed_forecaster_missed_is_there_when_it_is_back(
    etcd: Backing, redis_server: Backing, store: Store, keys: Keys, redis: Redis, tmp_path: Path, start: Start
) -> None:
    """It is killed again and again while a router counts; in the end every window is there, and exactly."""
    await deploy(store, keys, "m")
    command = [sys.executable, "-m", "services.forecaster", f"--etcd-endpoints={etcd.address}", "--window-s=1"]
    command += [f"--redis-url=redis://{redis_server.address}/0", f"--prefix={keys.prefix}", f"--data-dir={tmp_path}"]
    counters = LoadCounters(redis, keys)
    last = now_window(1.0) - 1
    begin = last - 59
    for round_ in range(3):
        for window in range(begin + 20 * round_, begin + 20 * (round_ + 1)):
            count = LoadCounts(arrivals=window - begin, load_seconds=window - begin)
            await counters.report("r0:a.0", window, 1.0, 1.0, {"m": count})
        process = await asyncio.create_subprocess_exec(*command, "--lease-ttl-s=2", stderr=asyncio.subprocess.DEVNULL)
        while not await any_recorded(tmp_path, begin + 20 * round_ + 3):
            await asyncio.sleep(0.02)
        process.kill()  # somewhere in the midst of recording
        await process.wait()
    async with start(window_s=1.0) as stub:
        await until_recorded(stub, "m", last)
        found = await history_of(stub, "m", begin, last)
        assert {window: found.get(window) for window in range(begin, last + 1)} == {
            window: window - begin for window in range(begin, last + 1)
        }


async def any_recorded(folder: Path, window: int) -> bool:
    """Whether a window is in a history that another process writes."""
    if not (folder / "history.sqlite").exists():
        return False
    with contextlib.closing(sqlite3.connect(folder / "history.sqlite", timeout=5)) as db:
        try:
            return db.execute("select 1 from windows where window >= ?", (window,)).fetchone() is not None
        except sqlite3.OperationalError:  # it is being made
            return False


async def test_forecasts_reach_etcd_when_it_is_back(redis_server: Backing, keys: Keys, tmp_path: Path) -> None:
    first = start_etcd(tmp_path / "etcd", tmp_path / "log")
    store = Store([first.address])
    await deploy(store, keys, "m")
    async with forecaster(first.address, redis_server.address, keys.prefix, tmp_path / "data", window_s=1.0) as stub:
        mirror = Mirror(store, keys.forecasts(), cluster_pb2.Forecast)
        await mirror.start()
        await mirror.wait_for(lambda items: "m" in items)
        first.child.stop(5)
        call = stub.WatchForecasts(forecast_pb2.WatchForecastsRequest())
        made = [(await call.read()).forecast.made_unix_ms for _ in range(3)]  # who follows hears them meanwhile
        call.cancel()
        second = start_etcd(tmp_path / "etcd", tmp_path / "log", int(first.address.rpartition(":")[2]))
        await mirror.wait_for(lambda items: "m" in items and items["m"].made_unix_ms > made[-1])
        await mirror.close()
    await store.close()
    second.child.stop(5)


async def test_scores_say_what_errors_cost(start: Start, store: Store, keys: Keys, tmp_path: Path) -> None:
    last = now_window() - 1
    seed(tmp_path, "m", [4.0, 4.0], last)
    database = Database(tmp_path, DAY)
    made = np.full((1, 12, 5, 3), 5.0)
    for window, peak in ((last - 1, 30.0), (last, 0.0)):
        made[:, :, 1] = peak
        PastForecasts(database).save(window, ["m"], made, made)
    database.close()
    async with start() as stub:
        [score] = (await stub.GetScores(forecast_pb2.GetScoresRequest())).models
        assert (score.model, score.windows) == ("m", 2)
        assert score.wape == pytest.approx(0.25)
        assert score.coverage_p90 == 1
        # A replica carries 8; the peaks were 8.
        assert (score.needless_replica_s, score.missing_replica_s) == (3 * DAY, DAY)
        assert score.unforeseen_requests == 2 * DAY
        await store.put(keys.model("m"), cluster_pb2.ModelSpec(name="m", limits=cluster_pb2.ModelLimits(max_batch=30)))

        async def needless() -> float:
            answer = await stub.GetScores(forecast_pb2.GetScoresRequest(models=["m"], past_s=9 * DAY))
            return answer.models[0].needless_replica_s

        while await needless() != 0:
            await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.GetScores(forecast_pb2.GetScoresRequest(models=["x"]))
        assert failed.value.code() == grpc.StatusCode.NOT_FOUND


async def test_two_forecasters_do_no_harm(
    start: Start, store: Store, keys: Keys, published: Mirror[cluster_pb2.Forecast], tmp_path: Path
) -> None:
    await deploy(store, keys, "m")
    async with start(window_s=1.0, id="f0", folder=tmp_path / "0") as one:
        async with start(window_s=1.0, id="f1", folder=tmp_path / "1") as other:
            for stub in (one, other):
                call = stub.WatchForecasts(forecast_pb2.WatchForecastsRequest())
                for _ in range(2):
                    assert (await call.read()).forecast.model == "m"
                call.cancel()
        made = published.items["m"].made_unix_ms
        await published.wait_for(lambda items: items["m"].made_unix_ms > made)


async def test_a_thousand_models_are_forecast_and_published(
    start: Start, store: Store, keys: Keys, tmp_path: Path, redis: Redis
) -> None:
    names = [f"team/model-{number:04}" for number in range(1000)]
    last = now_window() - 1
    database = Database(tmp_path, DAY)
    History(database, 28 * 24 * DAY, 365 * 24 * DAY).record(
        last - 1, dict.fromkeys(names, (2, 4, 1, 100, 10)), Seen(1, 1)
    )
    database.close()
    await LoadCounters(redis, keys).report("r0:a.0", last, DAY, DAY, {"team/model-0007": BUSY})
    for at in range(0, len(names), 100):
        await asyncio.gather(*(deploy(store, keys, name) for name in names[at : at + 100]))
    async with start() as stub:
        found = 0
        while found < 1000:
            await asyncio.sleep(0.05)
            found = len((await stub.GetForecasts(forecast_pb2.GetForecastsRequest())).forecasts)
        while len((await store.snapshot(keys.forecasts()))[0]) < 1000:
            await asyncio.sleep(0.05)
        begin = start_of(last - 1, DAY)
        busy, quiet = [
            (await stub.GetHistory(forecast_pb2.GetHistoryRequest(model=name, from_unix_s=begin))).windows
            for name in names[7:9]
        ]
        assert [one.actual.peak_load for one in busy if one.HasField("actual")] == [4, 7]
        assert [one.actual.peak_load for one in quiet if one.HasField("actual")] == [4, 0]


async def test_a_slow_follower_gets_the_newest_of_each_model(store: Store, keys: Keys) -> None:
    publisher = Publisher(store, keys)
    following = publisher.follow(["a", "b"])
    publisher.publish(cluster_pb2.Forecast(model="a", made_unix_ms=1))
    assert (await anext(following)).made_unix_ms == 1
    for made in range(2, 100):
        for model in ("a", "b", "c"):
            publisher.publish(cluster_pb2.Forecast(model=model, made_unix_ms=made))
    publisher.withdraw("b")
    assert await anext(following) == cluster_pb2.Forecast(model="a", made_unix_ms=99)
    publisher.publish(cluster_pb2.Forecast(model="b", made_unix_ms=100))
    assert await anext(following) == cluster_pb2.Forecast(model="b", made_unix_ms=100)
    await following.aclose()
