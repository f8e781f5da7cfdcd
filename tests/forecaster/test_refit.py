"""Refits in a process of their own, champions and challengers, and their files."""

from __future__ import annotations

import asyncio
import functools
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client import REGISTRY

from services.common.load import window_index
from services.forecaster import stored
from services.forecaster.champion import Champions
from services.forecaster.database import Database
from services.forecaster.history import History
from services.forecaster.learned import LearnedPredictor, fit
from services.forecaster.past import PastForecasts
from services.forecaster.predictors import MEAN_LOAD, QUANTITIES
from services.forecaster.refit import held_out
from services.forecaster.refitting import Refitter
from services.forecaster.settings import ForecasterSettings
from tests.forecaster.process import Start
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, forecast_pb2

HOUR = 3600.0
SEASON = 24
NOW = time.time()
MODELS = tuple(f"m{number}" for number in range(10))


def traffic(days: int, seed: int = 0) -> np.ndarray:
    """Daily curves with noise that lasts some windows: shape (models, windows, 5)."""
    rng = np.random.default_rng(seed)
    at = np.arange(days * SEASON)
    noise = rng.normal(0, 0.2, (len(MODELS), len(at)))
    for step in range(1, len(at)):
        noise[:, step] += 0.9 * noise[:, step - 1]
    phase = rng.uniform(0, 2 * np.pi, (len(MODELS), 1))
    load = (
        np.geomspace(1, 30, len(MODELS))[:, None] * (1 + 0.7 * np.sin(2 * np.pi * at / SEASON + phase)) * np.exp(noise)
    )
    return np.stack([load, 1.5 * load, load / 4, load * 50, load * 20], axis=2)


@functools.cache
def predictor() -> LearnedPredictor:
    return fit(traffic(6), SEASON)


def info(fitted: int = 5000) -> forecast_pb2.PredictorInfo:
    return forecast_pb2.PredictorInfo(name="learned", fitted_unix_ms=fitted, series=10, windows=99, relative_loss=0.7)


def last_window() -> int:
    return window_index(NOW, HOUR) - 1


def seed_history(folder: Path, data: np.ndarray) -> History:
    database = Database(folder, HOUR)
    history = History(database, 28 * SEASON * HOUR, 365 * SEASON * HOUR)
    last = last_window()
    numbers = np.arange(last - data.shape[1] + 1, last + 1)
    history.add({name: (numbers, data[row]) for row, name in enumerate(MODELS)})
    return history


def settings(folder: Path, **more: object) -> ForecasterSettings:
    return ForecasterSettings.model_validate({"data_dir": folder, "window_s": HOUR, **more})


def refitter(folder: Path, history: History, **more: object) -> tuple[Refitter, Champions]:
    champions = Champions(folder / "predictors", SEASON)
    champions.load()
    past = PastForecasts(history._database)
    return Refitter(settings(folder, **more), history, past, champions, lambda: None, lambda: NOW), champions


async def test_a_refit_that_is_better_makes_the_champion_with_which_forecasts_are_made(
    start: Start, store: Store, keys: Keys, tmp_path: Path
) -> None:
    seed_history(tmp_path, traffic(7))
    await store.put(keys.model("m3"), cluster_pb2.ModelSpec(name="m3"))
    published = Mirror(store, keys.forecasts(), cluster_pb2.Forecast)
    await published.start()
    async with start(window_s=HOUR, season_s=SEASON * HOUR, refit_s=86_400) as stub:
        await published.wait_for(lambda items: "m3" in items and items["m3"].predictor == "learned")
        answer = await stub.GetPredictor(forecast_pb2.GetPredictorRequest())
        assert answer.champion == answer.challenger
        assert (answer.champion.name, answer.champion.series) == ("learned", 10)
        assert 0 < answer.champion.relative_loss < 1
        assert answer.previous.name == "published"
        assert "is the champion now" in answer.last_refit
    async with start(
        window_s=HOUR, season_s=SEASON * HOUR, refit_s=86_400
    ) as stub:  # it is there after a restart, and no refit is due
        assert (await stub.GetPredictor(forecast_pb2.GetPredictorRequest())).champion == answer.champion
        restored = await stub.RestorePredictor(forecast_pb2.RestorePredictorRequest())
        assert restored.champion.name == "published"
        await published.wait_for(lambda items: items["m3"].predictor == "published")
    async with start(window_s=HOUR, season_s=SEASON * HOUR) as stub:
        now = await stub.GetPredictor(forecast_pb2.GetPredictorRequest())
        assert (now.champion.name, now.previous.name) == ("published", "learned")
    await published.close()


async def test_without_a_previous_predictor_none_is_restored(start: Start) -> None:
    async with start() as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="no previous predictor") as failed:
            await stub.RestorePredictor(forecast_pb2.RestorePredictorRequest())
        assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_challenger_that_is_not_better_is_not_kept(tmp_path: Path) -> None:
    data = traffic(7)
    rng = np.random.default_rng(1)
    # There is nothing to learn from the days before; the champion has learned from better ones.
    data[:, : -2 * SEASON] = data[:, rng.permutation(data.shape[1] - 2 * SEASON)]
    history = seed_history(tmp_path, data)
    one, champions = refitter(tmp_path, history)
    stored.write(champions.champion_file, stored.to_bytes(predictor(), info()))
    champions.load()
    await one.refit()
    assert "was not kept" in champions.last_refit
    assert champions.champion.info == info()
    assert champions.previous is None
    assert champions.challenger is not None
    assert champions.challenger.relative_loss > 0


async def test_without_traffic_to_compare_on_the_champion_stays(tmp_path: Path) -> None:
    data = traffic(7)
    data[:, -SEASON:] = 0
    one, champions = refitter(tmp_path, seed_history(tmp_path, data))
    await one.refit()
    assert "no traffic in the newest 24 windows" in champions.last_refit
    assert champions.champion is champions.published


async def test_a_refit_that_fails_changes_nothing_and_says_why(tmp_path: Path) -> None:
    one, champions = refitter(tmp_path, seed_history(tmp_path, traffic(7)))
    champions.champion_file.parent.mkdir()
    champions.champion_file.write_bytes(b"broken while the forecaster runs")
    await one.refit()
    assert champions.champion is champions.published
    assert "the refit failed" in champions.last_refit
    assert "not a predictor of this version" in champions.last_refit
    assert not champions.challenger_file.exists()


async def test_too_little_history_is_said(tmp_path: Path) -> None:
    history = seed_history(tmp_path, traffic(3))
    one, champions = refitter(tmp_path, history)
    await one.refit()
    assert "too few yet" in champions.last_refit


async def test_a_stopped_forecaster_leaves_no_refit_behind(tmp_path: Path) -> None:
    history = seed_history(tmp_path, traffic(7))
    one, champions = refitter(tmp_path, history)
    task = asyncio.create_task(one.refit())
    children = Path("/proc/self/task")

    def running() -> list[str]:
        return [child for thread in children.iterdir() for child in (thread / "children").read_text().split()]

    before = set(running())
    while not set(running()) - before:
        await asyncio.sleep(0.01)
    [child] = set(running()) - before
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not Path(f"/proc/{child}").exists()
    assert champions.champion is champions.published


@pytest.mark.parametrize(
    ("windows", "newest"),
    [(0, 0), (3 * 288, 0), (3 * 288 + 71, 0), (3 * 288 + 72, 72), (4 * 288, 288), (20 * 288, 288)],
)
def test_the_newest_windows_are_for_comparing(windows: int, newest: int) -> None:
    assert held_out(windows, 288) == newest
    assert held_out(windows, 12) == 0  # no day has a shape in so few windows


def test_champions_are_saved_and_restored(tmp_path: Path) -> None:
    def reopened() -> Champions:
        champions = Champions(tmp_path, SEASON)
        champions.load()
        return champions

    champions = reopened()
    assert champions.champion.info.name == "published"
    for fitted in (1, 2):
        stored.write(champions.challenger_file, stored.to_bytes(predictor(), info(fitted)))
        champions.crown_challenger()
    for found in (champions, reopened()):
        assert found.champion.info == info(2)
        assert found.previous is not None
        assert found.previous.info == info(1)
    series = traffic(6)
    expected = predictor().forecast_all(series, 12)
    np.testing.assert_allclose(reopened().champion.predictor.forecast_all(series, 12), expected)
    champions.restore()
    assert reopened().champion.info == info(1)
    champions.restore()
    assert reopened().champion.info == info(2)


def broken(data: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "cut off": data[: len(data) // 2],
        "one bit": data[:500] + bytes([data[500] ^ 1]) + data[501:],
        "something else": b"PK\x03\x04" + data[4:],
    }


@pytest.mark.parametrize("how", broken(bytes(1000)))
def test_a_broken_file_gives_way_to_the_previous_predictor_and_then_the_published_one(tmp_path: Path, how: str) -> None:
    champions = Champions(tmp_path, SEASON)
    for fitted in (1, 2):
        stored.write(champions.challenger_file, stored.to_bytes(predictor(), info(fitted)))
        champions.crown_challenger()
    champions.champion_file.write_bytes(broken(champions.champion_file.read_bytes())[how])
    champions.load()
    assert champions.champion.info == info(1)
    assert champions.previous is None
    assert str(champions.champion_file) in champions.last_refit
    champions.load()  # it is the champion from now on
    assert champions.champion.info == info(1)
    champions.champion_file.write_bytes(broken(champions.champion_file.read_bytes())[how])
    champions.load()
    assert champions.champion is champions.published
    assert "the published predictor" in champions.last_refit


def test_a_predictor_of_another_season_is_not_used(tmp_path: Path) -> None:
    champions = Champions(tmp_path, SEASON)
    stored.write(champions.champion_file, stored.to_bytes(predictor(), info()))
    other = Champions(tmp_path, 2 * SEASON)
    other.load()
    assert other.champion is other.published
    assert "season" in other.last_refit


async def test_drift_is_the_loss_of_what_was_forecast_over_that_at_the_fit(tmp_path: Path) -> None:
    data = traffic(7)
    history = seed_history(tmp_path, data)
    one, champions = refitter(tmp_path, history)
    stored.write(champions.champion_file, stored.to_bytes(predictor(), info()))
    champions.load()
    await one.watch_drift()
    assert one.drift == 0  # nothing was forecast yet
    past, first = PastForecasts(history._database), last_window() - 2 * SEASON
    for window in range(first, last_window() + 1):
        off = 3 * as_it_came(data, window)
        past.save(window, list(MODELS), off, off)
    await one.watch_drift()
    assert one.drift > 1.5
    assert (metric("drift"), metric("drift_alert")) == (one.drift, 1)
    # p50, p90 and p99 of three times what came: their loss is 2 (0.5 + 0.1 + 0.01) / 3 of the traffic.
    assert one.drift == pytest.approx(2 * 0.61 / 3 / predictor().loss, rel=0.01)
    with history._database.transaction() as db:
        db.execute("delete from forecasts")
    for window in range(first, last_window() + 1):  # announcements that came to nothing are no fault of the predictor
        right = as_it_came(data, window)
        past.save(window, list(MODELS), right + 1000, right)
    await one.watch_drift()
    assert one.drift < 0.1
    assert metric("drift_alert") == 0


def as_it_came(data: np.ndarray, window: int) -> np.ndarray:
    """What came in a window and those after it, as a forecast: shape (models, 12, 5, 3)."""
    at = data.shape[1] - 1 - (last_window() - window)
    load = data[:, np.minimum(np.arange(at, at + 12), data.shape[1] - 1), MEAN_LOAD]
    return np.ones((len(MODELS), 12, len(QUANTITIES), 3)) * load[:, :, None, None]


def metric(name: str) -> float | None:
    return REGISTRY.get_sample_value(f"warmserve_forecaster_{name}")


async def test_a_champion_that_fails_gives_way_to_the_published_predictor(
    start: Start, store: Store, keys: Keys, tmp_path: Path
) -> None:
    seed_history(tmp_path, traffic(7))
    knows_one_quantity = stored.to_bytes(fit(traffic(6)[:, :, MEAN_LOAD], SEASON), info())
    stored.write(Champions(tmp_path / "predictors", SEASON).champion_file, knows_one_quantity)
    await store.put(keys.model("m3"), cluster_pb2.ModelSpec(name="m3"))
    published = Mirror(store, keys.forecasts(), cluster_pb2.Forecast)
    await published.start()
    before = metric("fallbacks_total") or 0
    async with start(window_s=HOUR, season_s=SEASON * HOUR) as stub:
        await published.wait_for(lambda items: "m3" in items)
        assert published.items["m3"].predictor == "published"
        assert published.items["m3"].windows[0].mean_load.p50 > 0
        assert (await stub.GetPredictor(forecast_pb2.GetPredictorRequest())).champion.name == "learned"
    assert (metric("fallbacks_total") or 0) > before
    await published.close()
