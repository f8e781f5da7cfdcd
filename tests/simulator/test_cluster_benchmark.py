"""What the comparison of policies makes of runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cluster
from benchmarks.cluster_plots import draw
from benchmarks.cluster_rows import Compared, Sweep, goodput, next_rate, sweep_rows
from benchmarks.cluster_runs import CURVE, POLICIES, Case, Outcome, Runner, Setting, autoscaling, run
from tests.simulator.test_workloads import TRACES, needs_traces


def outcome(within: float = 1.0, p99: float = 0.2) -> Outcome:
    """A run of which nothing else matters."""
    return Outcome(
        says="made up",
        requests=1000,
        duration_s=600.0,
        ttft_s=tuple(p99 if percentile >= 99 else 0.1 for percentile in CURVE),
        floor_s=0.1,
        within=within,
        unserved=0.0,
        found=(0, 0, 0, 0, 0, 1000),
        wakes=(1, 0, 0),
        copied_bytes=1e9,
        wasted_bytes=0.0,
        preemptions=0,
        drains=0,
        busy=0.5,
        plans=10,
        plan_s=0.1,
        cpu_s=1.0,
    )


@pytest.mark.parametrize(
    ("shares", "rate"),
    [
        ([1.0, 1.0, 1.0, 1.0], 8.0),  # no rate was too high
        ([0.98, 1.0, 1.0, 1.0], 0.0),  # the first that is too high ends it
        ([1.0, 0.98, 1.0, 1.0], math.sqrt(2)),  # 1 % late lies half the way from 1 to 2
        ([1.0, 1.0, 0.96, 0.1], 2 * 2**0.25),
    ],
)
def test_goodput_is_where_one_in_a_hundred_is_late(shares: list[float], rate: float) -> None:
    assert goodput(list(zip((1.0, 2.0, 4.0, 8.0), shares, strict=True))) == pytest.approx(rate)


def test_the_next_rate_tried_lies_between_the_last_within_target_and_the_first_that_is_not() -> None:
    assert next_rate([(1.0, 1.0), (2.0, 0.995), (8.0, 0.9), (16.0, 1.0)]) == pytest.approx(4.0)
    assert next_rate([(1.0, 0.9), (2.0, 1.0), (4.0, 0.5)]) is None  # it never was
    assert next_rate([(1.0, 1.0), (2.0, 1.0)]) is None  # it always is


def test_halving_comes_closer_to_the_true_rate() -> None:
    def within(rate: float) -> float:
        return 1.0 if rate <= 5.0 else 0.5

    tried = {rate: within(rate) for rate in (1.0, 2.0, 4.0, 8.0)}
    for _ in range(6):
        rate = next_rate(sorted(tried.items()))
        assert rate is not None
        tried[rate] = within(rate)
    assert goodput(sorted(tried.items())) == pytest.approx(5.0, rel=0.02)


def test_what_was_never_served_counts_as_the_whole_run() -> None:
    assert outcome(p99=math.inf).p99 == 600.0
    assert outcome(p99=0.3).p99 == 0.3


def sweep(figures: dict[str, list[Outcome]]) -> tuple[Compared, Sweep]:
    """Two rates; policies that are not told of are as bad as can be."""
    settings = (Setting("paper", 1.0), Setting("paper", 2.0))
    bad = [outcome(0.0, 500.0)] * 2
    runs = {
        (setting, policy): figures.get(policy, bad)[at] for at, setting in enumerate(settings) for policy in POLICIES
    }
    return Compared(runs), Sweep("paper", settings)


def test_competitors_are_compared_by_their_best_variant() -> None:
    """Autoscaling by one variant for all rates, static placements by the best of each rate."""
    always, _, at_first, _ = autoscaling(0.0)
    compared, both = sweep(
        {
            always: [outcome(p99=1.0), outcome(p99=1.0)],
            at_first: [outcome(p99=0.3), outcome(p99=9.0)],
            "static, by means": [outcome(0.99), outcome(0.5)],
            "dedicated": [outcome(0.9), outcome(0.8)],
        }
    )
    assert compared.best_autoscaling(both.settings, 0.0) == always
    assert [compared.best_static(setting) for setting in both.settings] == ["static, by means", "dedicated"]


def test_nobody_is_better_than_the_oracle() -> None:
    compared, both = sweep({"ours": [outcome(0.995, 0.2)] * 2, "told the future": [outcome(0.99, 0.4)] * 2})
    rows = {row.what: row.value for row in sweep_rows(compared, both)}
    assert rows["paper: p99 TTFT, ours / oracle, worst rate"] == 1.0
    compared, both = sweep({"ours": [outcome(0.98, 0.8)] * 2, "told the future": [outcome(0.99, 0.4)] * 2})
    rows = {row.what: row.value for row in sweep_rows(compared, both)}
    assert rows["paper: p99 TTFT, ours / oracle, worst rate"] == pytest.approx(2.0)
    assert rows["paper: requests within target, told the future"] == 2.0
    assert rows["paper: requests within target, ours"] == 0.0


def test_all_that_rows_need_is_run_and_nothing_twice(tmp_path: Path) -> None:
    for quick in (True, False):
        done: dict[tuple[Setting, str], Outcome] = {}

        def run_them(wanted: object, done: dict[tuple[Setting, str], Outcome] = done) -> None:
            for setting, policy in wanted:  # type: ignore[attr-defined]
                assert policy in POLICIES
                done[setting, policy] = outcome(1.0 if setting.rate_per_s < 5 else 0.5)

        told = [len(cluster.rows(done, quick)) for _ in cluster.run_everything(run_them, done, quick)]
        assert told == sorted(told)
        assert told[0] < told[-1]  # each part adds to what there is
        assert {policy for _, policy in done} == set(POLICIES)
        rows = cluster.rows(done, quick)
        assert quick or any(4 < setting.rate_per_s < 8 for setting, _ in done)  # where requests come late
        assert len({row.what for row in rows}) == len(rows)
        file = tmp_path / f"{quick}.json"
        cluster.write(file, done, rows, "command", 7)
        assert json.loads(file.read_text())["seed"] == 7
    draw(done, cluster.sweeps(quick=False), tmp_path, "command")
    plots = {plot.stem for plot in tmp_path.glob("*.png")}
    assert {"cluster-paper-p99", "cluster-fine-tunes-within", "cluster-fine-tunes-ablations"} <= plots


@needs_traces
def test_runs_are_the_same_in_any_number_of_processes_and_are_kept(tmp_path: Path) -> None:
    static = [Case(Setting("paper", rate), "static, by means", 1, TRACES) for rate in (0.5, 1.0)]
    alone = {case: replace(run(case), cpu_s=0.0, plan_s=0.0) for case in static}
    together = dict(Runner(2, tmp_path).run(static))
    assert {case: replace(told, cpu_s=0.0, plan_s=0.0) for case, told in together.items()} == alone
    assert all(told.unserved == 0 for told in alone.values())
    again = dict(Runner(1, tmp_path).run(static))
    assert again == together  # with the same seconds of the processor: it was read, not run


def test_the_whole_day_can_be_asked_for_alone() -> None:
    done: dict[tuple[Setting, str], Outcome] = {}
    assert cluster.day_rows(done) == []
    told = 0
    for _ in cluster.run_day(lambda wanted: done.update({one: outcome() for one in wanted})):
        told = len(cluster.day_rows(done))
    assert {(setting.hours, policy) for setting, policy in done} == {(24.0, "ours"), (24.0, "static, by means")}
    taken = [row for row in cluster.day_rows(done) if "a day of 1,000 requests" in row.what]
    assert told
    assert [(row.value, row.target) for row in taken] == [(1.0, 300.0)]
