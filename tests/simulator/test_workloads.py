"""Traffic is what its source says: rates, gaps, lengths, order, and the same again from the same seed."""

from __future__ import annotations

import gzip
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import scenarios, servegen
from simulator.arrivals import Gaps, Lengths, counts_of, in_window, load_windows, rotated
from simulator.spec import ClusterSpec, check
from simulator.workloads import Workload, traffic_from
from warmserve.traces import Request

TRACES = Path(os.environ.get("WARMSERVE_TRACES") or Path(__file__).resolve().parents[3] / "shared" / "traces")
needs_traces = pytest.mark.skipif(
    not (TRACES / "servegen_windows.csv.gz").is_file(), reason=f"no traces in {TRACES}: set WARMSERVE_TRACES"
)
NODE = ClusterSpec(nodes=1, gpus_per_node=8)


def small(seed: int = 1) -> Workload:
    models = scenarios.fine_tuned()[:4]
    return scenarios.generated(models, NODE, seed, rate_per_s=0.5, hours=6.0, past_days=1)


# Arrivals


@given(
    count=st.integers(0, 200),
    family=st.sampled_from(["Gamma", "Weibull"]),
    shape=st.floats(0.01, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_a_window_holds_exactly_its_requests_in_order(count: int, family: str, shape: float, seed: int) -> None:
    times = in_window(count, 600.0, Gaps(family, shape), np.random.default_rng(seed))
    assert len(times) == count
    assert np.all(np.diff(times) >= 0)
    assert np.all((times >= 0) & (times < 600))


def test_gaps_vary_as_their_shape_says() -> None:
    random = np.random.default_rng(1)
    for shape in (0.25, 1.0, 4.0):
        gaps = np.diff(in_window(20_000, 600.0, Gaps("Gamma", shape), random))
        assert np.std(gaps) / np.mean(gaps) == pytest.approx(shape**-0.5, rel=0.1)


def test_counts_keep_small_rates_on_average() -> None:
    counts = counts_of(np.full(10_000, 0.0003), 600.0, np.random.default_rng(1))
    assert counts.mean() == pytest.approx(0.18, rel=0.1)
    assert counts_of(np.array([np.nan, 0.0]), 600.0, np.random.default_rng(1)).tolist() == [0, 0]


def test_lengths_have_the_quantiles_they_were_made_from() -> None:
    lengths = Lengths((0.05, 0.5, 0.95), (10, 100, 1000)).draw(20_000, np.random.default_rng(1))
    assert np.quantile(lengths, 0.5) == pytest.approx(100, rel=0.05)
    assert lengths.min() == 10
    assert lengths.max() == 1000


def test_a_trace_goes_round() -> None:
    times, order = rotated(np.array([1.0, 5.0, 9.0]), 10.0, 4.0)
    assert times.tolist() == [1.0, 5.0, 7.0]
    assert order.tolist() == [1, 2, 0]


@given(
    rows=st.lists(st.tuples(st.floats(0, 99), st.floats(0, 60), st.integers(1, 50), st.integers(1, 50)), max_size=30)
)
@settings(max_examples=200, deadline=None)
def test_recorded_load_is_what_was_in_progress(rows: list[tuple[float, float, int, int]]) -> None:
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
    starts, lasts = (np.array(column, dtype=float) for column in columns[:2])
    prompt, output = (np.array(column, dtype=np.int64) for column in columns[2:])
    counted = load_windows(starts, starts + lasts, prompt, output, 10.0, 10)
    # Little's law over all windows, and level by level: sampled in the middle of nothing that happens.
    overlap = np.clip(np.minimum(starts + lasts, 100.0) - starts, 0, None).sum() if rows else 0.0
    assert counted[:, 0].sum() * 10 == pytest.approx(overlap, abs=1e-6)
    assert counted[:, 2].sum() * 10 == pytest.approx(len(rows))
    assert counted[:, 3].sum() * 10 == pytest.approx(prompt.sum() if rows else 0)
    assert counted[:, 4].sum() * 10 == pytest.approx(output.sum() if rows else 0)
    assert np.all(counted[:, 1] >= counted[:, 0] - 1e-9)  # a peak is no lower than its mean


def test_a_request_that_lasts_counts_in_each_window_it_touches() -> None:
    one = np.array([1])
    counted = load_windows(np.array([5.0]), np.array([25.0]), one, one, 10.0, 4)
    assert counted[:, 0].tolist() == [0.5, 1.0, 0.5, 0.0]
    assert counted[:, 1].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert counted[:, 2].tolist() == [0.1, 0.0, 0.0, 0.0]


# Settings


def test_generated_traffic_follows_from_its_seed() -> None:
    one, again, other = small(1), small(1), small(2)
    assert list(one.traffic) == list(again.traffic)
    assert list(one.traffic) != list(other.traffic)
    assert all(np.array_equal(one.history[name], again.history[name]) for name in one.history)


def test_generated_traffic_has_its_rate_and_its_history() -> None:
    work = small()
    assert work.rate_per_s == pytest.approx(0.5, rel=0.5)  # a quarter of a day, and days vary
    assert len(work.traffic) == len(list(work.traffic))
    assert {len(history) for history in work.history.values()} == {288}
    per_s = sum(float(history[:, 2].mean()) for history in work.history.values())
    assert per_s == pytest.approx(0.5, rel=0.3)
    check(work.cluster, work.models)


def test_a_part_of_the_traffic_begins_at_zero() -> None:
    traffic = small().traffic
    part = list(traffic.between(3600, 7200))
    assert part == [
        replace(request, time_s=request.time_s - 3600) for request in traffic if 3600 <= request.time_s < 7200
    ]


def test_a_flash_crowd_adds_its_requests_and_moves_none() -> None:
    base = small()
    name = base.models[2].name
    crowded = scenarios.flash_crowd(base, name, 3600, rate_per_s=2.0, lasts_s=600)
    added = sorted(set(crowded.traffic) - set(base.traffic), key=lambda request: request.time_s)
    assert set(base.traffic) <= set(crowded.traffic)
    assert {request.model for request in added} == {name}
    assert len(added) == pytest.approx(2.0 * 570, rel=0.15)
    assert 3600 <= added[0].time_s <= added[-1].time_s < 4200
    times = crowded.traffic.times_s
    assert np.all(np.diff(times) >= 0)


def test_a_silent_forecaster_changes_no_traffic() -> None:
    base = small()
    silent = scenarios.silent_forecaster(base, 100, 200)
    assert silent.silent == (100, 200)
    assert silent.traffic is base.traffic


def test_requests_become_columns_and_back() -> None:
    requests = [Request(2.0, "b", 5, 6), Request(1.0, "a", 3, 4)]
    assert list(traffic_from(requests, ("a",))) == [requests[1], requests[0]]
    assert list(traffic_from([])) == []


# Public traces


@needs_traces
def test_the_papers_setting_has_the_asked_rate_and_popularity() -> None:
    for rate in (4.0, 32.0):
        work = scenarios.paper(TRACES, rate, seed=1)
        assert work.rate_per_s == pytest.approx(rate, rel=0.05)
        shares = np.bincount(work.traffic.model) / len(work.traffic)
        assert shares == pytest.approx(np.array([12, 6, 4, 3]) / 25, abs=0.05)
        check(work.cluster, work.models)
        assert max(work.traffic.prompt_tokens + work.traffic.output_tokens) <= 4096
        assert set(work.history) == {model.name for model in work.models}
    assert list(scenarios.paper(TRACES, 4.0, 1).traffic) == list(scenarios.paper(TRACES, 4.0, 1).traffic)


@needs_traces
def test_compressed_time_keeps_the_shape_of_bursts() -> None:
    slow, fast = (scenarios.paper(TRACES, rate, seed=1) for rate in (16.0, 32.0))
    ratio = slow.duration_s / fast.duration_s
    assert ratio == pytest.approx(2.0, rel=0.05)
    assert len(slow.traffic) == pytest.approx(len(fast.traffic), rel=0.02)


@needs_traces
def test_fine_tunes_have_the_rates_of_their_clients() -> None:
    work = scenarios.fine_tunes(TRACES, seed=1, rate_per_s=3.0, hours=2.0)
    assert len(work.models) == 60
    check(work.cluster, work.models)
    clients = servegen.busiest(servegen.read_clients(TRACES / "servegen_windows.csv.gz"), 60, 8 * 144)
    past = sum(float(np.nanmean(client.rates[: 8 * 144])) for client in clients)
    expected = [client.rates[8 * 144 : 8 * 144 + 12].sum() * 600 * 3.0 / past for client in clients]
    counted = np.bincount(work.traffic.model, minlength=60)
    assert counted[:5] == pytest.approx(np.array(expected[:5]), rel=0.02)
    gaps = np.isnan(clients[0].rates[: 8 * 144])
    assert np.array_equal(np.isnan(work.history[work.models[0].name][:, 0]), gaps)


def test_a_file_that_is_no_trace_is_refused_with_words(tmp_path: Path) -> None:
    file = tmp_path / "servegen_windows.csv.gz"
    file.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    with pytest.raises(ValueError, match="lacks model, client"):
        servegen.read_clients(file)
    file.write_bytes(gzip.compress(b"model,client,window_start_s,rate_per_s,arrival_dist,param1\n"))
    with pytest.raises(ValueError, match="no windows of m-large"):
        servegen.read_clients(file)
