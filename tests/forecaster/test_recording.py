"""From the routers' counters in a real Redis to the history: nothing is lost, nothing counted twice, no gap is zero."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from launcher.backing import start_redis
from services.common.load import LoadCounters, LoadCounts, window_index
from services.forecaster.database import Database
from services.forecaster.history import History
from services.forecaster.recorder import Recorder
from services.router.load import LoadRecorder, LoadReporter
from warmserve.cluster.keys import Keys

WINDOW_S = 10.0
BUSY = LoadCounts(arrivals=20, prompt_tokens=100, output_tokens=50, load_seconds=40.0, peak=7)
ROW = [4, 7, 2, 10, 5]


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    database = Database(tmp_path, WINDOW_S)
    yield History(database, 1e6, 1e7)
    database.close()


@pytest.fixture
def counters(redis: Redis, keys: Keys) -> LoadCounters:
    return LoadCounters(redis, keys)


@pytest.fixture
def recorder(history: History, counters: LoadCounters) -> Recorder:
    return Recorder(history, counters, WINDOW_S)


async def report(
    counters: LoadCounters, window: int, counts: dict[str, LoadCounts], router: str = "r0", seen_s: float = WINDOW_S
) -> None:
    await counters.report(f"{router}:x.0", window, WINDOW_S, seen_s, counts)


def loads(history: History, first: int, last: int, model: str = "m") -> list[float]:
    series = np.full(last - first + 1, np.nan)
    known = history.series([model], last, last - first + 1)[0, :, 0]
    series[len(series) - len(known) :] = known
    return series.tolist()


ALWAYS = {"m": 0.0}


async def test_windows_missed_while_away_are_recorded_later(
    history: History, counters: LoadCounters, recorder: Recorder
) -> None:
    await report(counters, 100, {"m": BUSY})
    assert await recorder.catch_up(ALWAYS, {}, 1011) == [100]
    np.testing.assert_array_equal(history.series(["m"], 100, 1)[0, 0], ROW)
    await report(counters, 102, {"m": BUSY})  # nobody counts in window 101
    await report(counters, 103, {})  # somebody counts, and nothing arrives
    await report(counters, 104, {"m": BUSY})  # it has not ended yet
    assert await recorder.catch_up(ALWAYS, {}, 1047) == [102, 103]
    np.testing.assert_array_equal(loads(history, 100, 104), [4, np.nan, 4, 0, np.nan])
    assert await recorder.catch_up(ALWAYS, {}, 1049) == []  # nothing is new


async def test_a_restarted_forecaster_reads_only_what_is_new(
    history: History, counters: LoadCounters, recorder: Recorder
) -> None:
    await report(counters, 100, {"m": BUSY})
    await recorder.catch_up(ALWAYS, {}, 1011)
    await report(counters, 101, {"m": BUSY})
    assert await Recorder(history, counters, WINDOW_S).catch_up(ALWAYS, {}, 1021) == [101]


async def test_late_reports_are_taken_up(history: History, counters: LoadCounters, recorder: Recorder) -> None:
    await report(counters, 100, {"m": BUSY})
    await recorder.catch_up(ALWAYS, {}, 1200)
    await report(counters, 100, {"m": BUSY, "n": BUSY}, router="r1")  # Redis was away for it
    assert await recorder.catch_up(ALWAYS, {}, 1201) == [100]
    assert loads(history, 100, 100) == [8]
    assert loads(history, 100, 100, "n") == [4]


async def test_a_window_waits_for_all_routers_that_are_registered(
    history: History, counters: LoadCounters, recorder: Recorder
) -> None:
    routers = {"r0": 900.0, "r1": 900.0, "new": 1005.0}  # the last has come in the midst of it
    await report(counters, 100, {"m": BUSY})
    assert await recorder.catch_up(ALWAYS, routers, 1011) == []
    assert history.series(["m"], 100, 5).shape[1] == 0
    # It does not become known because the router is gone, nor because the forecaster is restarted.
    await report(counters, 100, {"m": BUSY})
    assert await Recorder(history, counters, WINDOW_S).catch_up(ALWAYS, {"r0": 900.0}, 1012) == []
    await report(counters, 100, {"m": BUSY}, router="r1")
    assert await recorder.catch_up(ALWAYS, routers, 1013) == [100]
    assert loads(history, 100, 100) == [8]


async def test_nothing_recorded_is_replaced_by_less(
    history: History, counters: LoadCounters, recorder: Recorder, redis: Redis, keys: Keys
) -> None:
    await report(counters, 100, {"m": BUSY})
    await report(counters, 100, {"m": BUSY}, router="r1")
    await recorder.catch_up(ALWAYS, {}, 1011)
    for key in await redis.keys(f"{keys.prefix}:load*"):
        await redis.delete(key)  # Redis has lost its data, and one of the routers is gone
    for _ in range(3):
        await report(counters, 100, {"m": BUSY})
    assert await recorder.catch_up(ALWAYS, {}, 1011) == []
    assert loads(history, 100, 100) == [8]


async def test_what_was_seen_in_part_is_scaled_and_what_was_hardly_seen_is_unknown(
    history: History, counters: LoadCounters, recorder: Recorder
) -> None:
    await report(counters, 100, {"m": LoadCounts(load_seconds=20)}, seen_s=5)
    await report(counters, 101, {"m": LoadCounts(load_seconds=20)}, seen_s=4)
    assert await recorder.catch_up(ALWAYS, {}, 1050) == [100]
    np.testing.assert_array_equal(loads(history, 100, 101), [4, np.nan])


async def test_a_model_is_not_idle_before_it_is_deployed(
    history: History, counters: LoadCounters, recorder: Recorder
) -> None:
    for window in (100, 101, 102):
        await report(counters, window, {})
    await report(counters, 100, {"m": BUSY})  # it was there before, under this name
    await recorder.catch_up({"m": 1025.0}, {}, 1030)
    np.testing.assert_array_equal(loads(history, 100, 102), [4, np.nan, 0])


async def test_an_undeployed_model_keeps_its_history_and_goes_on_with_it(
    history: History, counters: LoadCounters, recorder: Recorder
) -> None:
    for window in (100, 101, 102):
        await report(counters, window, {"m": BUSY} if window != 101 else {})
    await recorder.catch_up(ALWAYS, {}, 1010)
    await recorder.catch_up({}, {}, 1020)  # it is gone
    await recorder.catch_up({"m": 1020.0}, {}, 1030)
    np.testing.assert_array_equal(loads(history, 100, 102), [4, np.nan, 4])


async def test_a_clock_that_goes_back_loses_nothing(
    history: History, counters: LoadCounters, recorder: Recorder
) -> None:
    for window in (100, 101, 5000):  # one router's clock is far ahead
        await report(counters, window, {"m": BUSY})
    assert await recorder.catch_up(ALWAYS, {}, 1020) == [100, 101]
    assert await recorder.catch_up(ALWAYS, {}, 500) == []
    await report(counters, 102, {"m": BUSY})
    assert await recorder.catch_up(ALWAYS, {}, 1030) == [102]
    assert loads(history, 100, 102) == [4, 4, 4]


async def test_a_clock_that_leaps_ahead_and_comes_back_loses_nothing(
    history: History, counters: LoadCounters, recorder: Recorder
) -> None:
    await report(counters, 100, {"m": BUSY})
    await recorder.catch_up(ALWAYS, {}, 1010)
    await report(counters, 101, {"m": BUSY})
    await recorder.catch_up(ALWAYS, {}, 1e9)
    await report(counters, 102, {"m": BUSY})
    await recorder.catch_up(ALWAYS, {}, 1030)
    assert loads(history, 100, 100) == [4]
    assert loads(history, 102, 102) == [4]


async def test_counts_are_exact_over_restarts_of_redis_and_routers(
    tmp_path: Path, keys: Keys, history: History
) -> None:
    """Two routers count for three windows; one is killed and comes back, and Redis loses all it has on the way."""
    backing = start_redis(tmp_path / "first", tmp_path / "log")
    port = int(backing.address.rpartition(":")[2])
    redis = Redis.from_url(f"redis://{backing.address}/0")
    counters = LoadCounters(redis, keys)
    clock = FakeTime((window_index(time.time(), WINDOW_S) - 100) * WINDOW_S)
    begin = window_index(clock.now, WINDOW_S)
    routers = [Router(name, counters, clock) for name in ("r0", "r1")]
    for router in routers:
        await router.requests(3, seconds=1)
    clock.now += 5
    await routers[0].flush()
    await routers[1].flush()
    routers[1] = Router("r1", counters, clock)  # killed, and there again
    await routers[1].requests(2, seconds=4)
    backing.child.stop(5)
    for router in routers:
        await router.flush()
    with pytest.raises(RedisError):
        await counters.windows()
    clock.now += WINDOW_S
    await routers[0].requests(4, seconds=2)
    again = start_redis(tmp_path / "empty", tmp_path / "log", port)
    clock.now += WINDOW_S
    for router in routers:
        while not router.all_written:
            await router.flush()
    recorder = Recorder(history, counters, WINDOW_S)
    assert await recorder.catch_up({}, {}, clock.now) == [begin, begin + 1]
    arrivals = history.series(["m"], begin + 1, 2)[0, :, 2] * WINDOW_S
    # Of the first window only the killed router's three are gone: it was not there to write them again.
    np.testing.assert_allclose(arrivals, [3 + 2, 4], rtol=1e-4)
    np.testing.assert_allclose(history.series(["m"], begin + 1, 2)[0, :, 0] * WINDOW_S, [3 + 8, 8], rtol=1e-4)
    await redis.aclose()
    again.child.stop(5)


class FakeTime:
    """A clock that stands still unless it is set."""

    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now


class Router:
    """A router's counting, without its doors."""

    def __init__(self, name: str, counters: LoadCounters, clock: FakeTime) -> None:
        self._clock = clock
        self._recorder = LoadRecorder(WINDOW_S, clock.now)
        self._reporter = LoadReporter(name, self._recorder, counters, WINDOW_S, clock.time)

    async def requests(self, count: int, seconds: float) -> None:
        """That many requests, which begin now and take so long each."""
        for _ in range(count):
            self._recorder.arrived("m", 10, self._clock.now)
        for _ in range(count):
            self._recorder.ended("m", self._clock.now + seconds)

    async def flush(self) -> None:
        await self._reporter.flush()

    @property
    def all_written(self) -> bool:
        return all(window.written for window in self._recorder.unwritten(self._clock.now))
