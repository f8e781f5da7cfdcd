"""The load record that the forecaster reads."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from launcher.backing import Backing
from services.common.load import LoadCounters, LoadCounts, window_start
from services.router.load import LoadRecorder, LoadReporter
from tests.router.conftest import Cluster, gathered
from tests.router.peers import until
from warmserve.cluster.keys import Keys

BEGIN = 1000


def add(taken: list[tuple[int, dict[str, LoadCounts]]], totals: dict[int, LoadCounts]) -> None:
    """As Redis does it: sums are added, the peak is overwritten."""
    for start, counts in taken:
        for count in counts.values():
            total = totals.setdefault(start, LoadCounts())
            total.arrivals += count.arrivals
            total.prompt_tokens += count.prompt_tokens
            total.output_tokens += count.output_tokens
            total.load_seconds += count.load_seconds
            total.peak = count.peak


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
    totals: dict[int, LoadCounts] = {}
    for moment, what in sorted(moments):
        if what == 0:
            recorder.generated("m", 2, moment)
            recorder.ended("m", moment)
        elif what == 1:
            recorder.arrived("m", 3, moment)
        else:
            add(recorder.take(moment), totals)
    add(recorder.take(BEGIN + 100), totals)

    for index in range(int(BEGIN / window), int((BEGIN + 100) / window)):
        begin, end = index * window, (index + 1) * window
        total = totals.get(window_start(begin, window), LoadCounts())
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
    failed = recorder.take(BEGIN + 2)
    recorder.give_back(failed)
    totals: dict[int, LoadCounts] = {}
    add(recorder.take(BEGIN + 12), totals)
    assert totals[BEGIN] == LoadCounts(1, 5, 0, 9.0, 1)
    assert totals[BEGIN + 10] == LoadCounts(0, 0, 0, 2.0, 1)


async def test_silence_is_told_from_a_gap(redis: Redis, keys: Keys) -> None:
    counters = LoadCounters(redis, keys)
    reporter = LoadReporter("r0", LoadRecorder(300, time.time()), counters, 300)
    start = window_start(time.time(), 300)
    assert await counters.read(["m"], start) is None
    reporter.start()

    async def reported() -> bool:
        return await counters.read(["m"], start) == {"m": LoadCounts()}

    await until(reported, "a window without traffic is reported")
    await reporter.close()


async def test_a_routers_requests_are_in_redis_when_it_has_stopped(cluster: Cluster, redis_server: Backing) -> None:
    await cluster.deploy()
    agent = await cluster.agent()
    await agent.activate("m")
    router = await cluster.router(window_s=3600)
    start = window_start(time.time(), 3600)
    await asyncio.gather(*(gathered(router.generate()) for _ in range(3)))
    await router.close()
    counts = await LoadCounters(cluster.redis, cluster.keys).read(["m"], start)
    assert counts is not None
    prompt = len(agent.taken[0].token_ids)
    assert counts["m"].arrivals == 3
    assert counts["m"].prompt_tokens == 3 * prompt
    assert counts["m"].output_tokens == 3 * len(cluster.answer)
    assert 1 <= counts["m"].peak <= 3
    assert counts["m"].load_seconds > 0
