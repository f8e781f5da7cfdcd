"""The load record that the forecaster reads."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from launcher.backing import Backing, start_redis
from services.common.load import LoadCounters, LoadCounts, window_index
from services.router.load import LoadRecorder, LoadReporter, Window
from tests.router.conftest import Cluster, gathered
from tests.router.peers import until
from warmserve.cluster.keys import Keys

BEGIN = 1000


def add(windows: list[Window], totals: dict[tuple[int, int], LoadCounts]) -> None:
    """As Redis does it: what was written last of a window stands."""
    for window in windows:
        for model, count in window.counts.items():
            assert model == "m"
            totals[window.index, window.life] = replace(count)
        window.written = True


@given(
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=12),
    flushes=st.lists(st.integers(0, 70), max_size=6),
    window=st.sampled_from([10.0, 2.5, 60.0]),
)
def test_arrivals_integral_and_peak_of_each_window(
    spans: list[tuple[int, int]], flushes: list[int], window: float
) -> None:
    spans = [(BEGIN + start, BEGIN + start + length) for start, length in spans]
    moments = [(end, 0) for _, end in spans] + [(start, 1) for start, _ in spans] + [(BEGIN + at, 2) for at in flushes]
    recorder = LoadRecorder(window, BEGIN)
    totals: dict[tuple[int, int], LoadCounts] = {}
    for moment, what in sorted(moments):
        if what == 0:
            recorder.generated("m", 2, moment)
            recorder.ended("m", moment)
        elif what == 1:
            recorder.arrived("m", 3, moment)
        else:
            add(recorder.unwritten(moment), totals)
    add(recorder.unwritten(BEGIN + 100), totals)

    for index in range(int(BEGIN / window), int((BEGIN + 100) / window)):
        begin, end = index * window, (index + 1) * window
        total = totals.get((index, 0), LoadCounts())
        assert total.arrivals == sum(begin <= start < end for start, _ in spans)
        assert total.prompt_tokens == 3 * total.arrivals
        assert total.output_tokens == 2 * sum(begin <= stop < end for _, stop in spans)
        overlaps = sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in spans)
        assert total.load_seconds == pytest.approx(overlaps)
        moments_within = [begin, *(start for start, _ in spans if begin <= start < end)]
        # At a window's very begin, what ends at that moment was still there.
        at_begin = sum(start < begin <= stop for start, stop in spans)
        peak = max(sum(start <= moment < stop for start, stop in spans) for moment in moments_within)
        assert total.peak == max(peak, at_begin)


def test_what_redis_did_not_take_is_not_lost() -> None:
    recorder = LoadRecorder(10, BEGIN)
    recorder.arrived("m", 5, BEGIN + 1)
    recorder.unwritten(BEGIN + 2)  # and Redis does not take it
    totals: dict[tuple[int, int], LoadCounts] = {}
    add(recorder.unwritten(BEGIN + 12), totals)
    assert totals == {(100, 0): LoadCounts(1, 5, 0, 9.0, 1), (101, 0): LoadCounts(0, 0, 0, 2.0, 1)}


def test_what_is_counted_after_a_window_was_written_is_written_when_it_has_ended() -> None:
    recorder = LoadRecorder(10, BEGIN)
    totals: dict[tuple[int, int], LoadCounts] = {}
    add(recorder.unwritten(BEGIN + 5), totals)
    recorder.arrived("m", 5, BEGIN + 9)
    add(recorder.unwritten(BEGIN + 11), totals)
    assert totals[100, 0] == LoadCounts(1, 5, 0, 1.0, 1)


def test_a_clock_that_leaps_ahead_makes_no_load() -> None:
    recorder = LoadRecorder(10, BEGIN)
    recorder.arrived("m", 5, BEGIN + 1)
    windows = recorder.unwritten(BEGIN + 1_000_000)
    assert [(window.index, window.seen_s) for window in windows] == [(100, 1), (100_100, 0)]
    assert windows[0].counts["m"].load_seconds == 0
    assert recorder.unwritten(BEGIN + 1_000_004)[-1].counts["m"].load_seconds == 4  # and from there on it counts


def test_a_clock_that_is_set_back_makes_windows_of_their_own() -> None:
    recorder = LoadRecorder(10, BEGIN)
    recorder.arrived("m", 5, BEGIN + 21)
    windows = recorder.unwritten(BEGIN + 3)
    assert [(window.index, window.life) for window in windows] == [(100, 0), (101, 0), (102, 0), (100, 1)]
    recorder.arrived("m", 5, BEGIN + 6)
    assert recorder.unwritten(BEGIN + 9)[-1].counts["m"] == LoadCounts(1, 5, 0, 3 + 2 * 3, 2)


async def test_silence_is_told_from_a_gap(redis: Redis, keys: Keys) -> None:
    counters = LoadCounters(redis, keys)
    reporter = LoadReporter("r0", LoadRecorder(300, time.time()), counters, 300)
    index = window_index(time.time(), 300)
    assert await counters.read(index, 300) is None
    reporter.start()

    async def reported() -> bool:
        counts = await counters.read(index, 300)
        return counts is not None and counts.routers == {"r0"} and not counts.counts

    await until(reported, "a window without traffic is reported")
    await reporter.close()


async def test_several_lives_of_several_routers_add_up(redis: Redis, keys: Keys) -> None:
    counters = LoadCounters(redis, keys)
    index = window_index(time.time(), 3600)
    for router in ("r0", "r0", "r1"):  # r0 is killed and comes back under its id
        recorder = LoadRecorder(3600, index * 3600)
        recorder.arrived("m", 5, index * 3600)
        reporter = LoadReporter(router, recorder, counters, 3600)
        for _ in range(3):  # written again, as after an answer that was lost, nothing counts twice
            await reporter.flush()
    counts = await counters.read(index, 3600)
    assert counts is not None
    assert counts.routers == {"r0", "r1"}
    assert counts.counts["m"].arrivals == 3
    assert counts.counts["m"].prompt_tokens == 15
    assert counts.counts["m"].peak == 2  # of r0's lives, one followed the other


async def test_what_a_restarted_redis_has_lost_is_written_again(tmp_path: Path, keys: Keys) -> None:
    backing = start_redis(tmp_path / "first", tmp_path / "log")
    port = int(backing.address.rpartition(":")[2])
    redis = Redis.from_url(f"redis://{backing.address}/0")
    counters = LoadCounters(redis, keys)
    index = window_index(time.time(), 3600)
    recorder = LoadRecorder(3600, (index - 1) * 3600)
    recorder.arrived("m", 5, (index - 1) * 3600)
    reporter = LoadReporter("r0", recorder, counters, 3600)
    await reporter.flush()
    before = [await counters.read(window, 3600) for window in (index - 1, index)]
    assert before[0] is not None
    assert before[0].counts["m"].load_seconds == pytest.approx(3600)
    backing.child.stop(5)
    await reporter.flush()  # nobody answers
    again = start_redis(tmp_path / "empty", tmp_path / "log", port)
    await until(redis.ping, "Redis is back")
    assert await counters.read(index - 1, 3600) is None
    await reporter.flush()
    assert await counters.read(index - 1, 3600) == before[0]
    assert await counters.read(index, 3600) is not None
    await redis.aclose()
    again.child.stop(5)


async def test_a_routers_requests_are_in_redis_when_it_has_stopped(cluster: Cluster, redis_server: Backing) -> None:
    await cluster.deploy()
    agent = await cluster.agent()
    await agent.activate("m")
    router = await cluster.router(window_s=3600)
    index = window_index(time.time(), 3600)
    await asyncio.gather(*(gathered(router.generate()) for _ in range(3)))
    await router.close()
    read = await LoadCounters(cluster.redis, cluster.keys).read(index, 3600)
    assert read is not None
    counts = read.counts
    prompt = len(agent.taken[0].token_ids)
    assert counts["m"].arrivals == 3
    assert counts["m"].prompt_tokens == 3 * prompt
    assert counts["m"].output_tokens == 3 * len(cluster.answer)
    assert 1 <= counts["m"].peak <= 3
    assert counts["m"].load_seconds > 0
