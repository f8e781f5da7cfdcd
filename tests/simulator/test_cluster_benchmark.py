"""What the comparison of policies makes of runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cluster
from benchmarks.cluster_runs import POLICIES, Case, Done, Setting, run
from simulator.results import Results, Wakes
from tests.simulator.test_workloads import TRACES, needs_traces


def results(ttft_s: list[float]) -> Results:
    """Requests of one token each on an idle instance that takes 0.1 s."""
    count = len(ttft_s)
    ttft, nothing = np.array(ttft_s), np.zeros(1)
    return Results(
        policy="any",
        models=["m"],
        duration_s=600.0,
        gpus=16,
        model=np.zeros(count, dtype=np.int64),
        arrival_s=np.arange(count, dtype=float),
        ttft_s=ttft,
        finished_s=np.arange(count) + ttft,
        prompt_tokens=np.ones(count, dtype=np.int64),
        output_tokens=np.ones(count, dtype=np.int64),
        found=np.full(count, 4),
        unloaded_ttft_s=np.full(count, 0.1),
        unloaded_tpot_s=np.full(count, 0.01),
        busy_gpu_s=nothing,
        active_gpu_s=nothing,
        resident_gpu_s=nothing,
        wakes_by_model=[Wakes()],
    )


def late(share: float) -> Results:
    """1,000 requests, of which this share is out of target."""
    bad = round(1000 * share)
    return results([0.2] * (1000 - bad) + [2.0] * bad)


def runs(shares: list[float], rates: tuple[float, ...] = (1, 2, 4, 8)) -> tuple[cluster.Runs, list[Setting]]:
    settings = [Setting("paper", rate) for rate in rates]
    done = {
        (setting, "ours"): Done(Case(setting, "ours", 1, Path()), late(share), "")
        for setting, share in zip(settings, shares, strict=True)
    }
    return done, settings


@pytest.mark.parametrize(
    ("shares", "rate"),
    [
        ([0.0, 0.0, 0.0, 0.0], 8.0),  # no rate was too high
        ([0.02, 0.0, 0.0, 0.0], 0.0),  # the first that is too high ends it
        ([0.0, 0.02, 0.0, 0.0], math.sqrt(2)),  # 1 % late lies half the way from 1 to 2
        ([0.0, 0.0, 0.04, 0.9], 2 * 2**0.25),
    ],
)
def test_goodput_is_where_one_in_a_hundred_is_late(shares: list[float], rate: float) -> None:
    done, settings = runs(shares)
    assert cluster.goodput(done, settings, "ours") == pytest.approx(rate)


def test_what_was_never_served_counts_as_the_whole_run() -> None:
    setting = Setting("paper", 1.0)
    done = {
        (setting, "dedicated"): Done(Case(setting, "dedicated", 1, Path()), results([0.1] * 90 + [math.inf] * 10), ""),
        (setting, "ours"): Done(Case(setting, "ours", 1, Path()), results([0.5] * 100), ""),
    }
    assert cluster._ratio(done, setting, "dedicated", "ours") == pytest.approx(600 / 0.5)


def test_every_case_is_of_a_known_policy_and_rows_need_no_other(tmp_path: Path) -> None:
    for quick in (True, False):
        wanted = cluster.cases(quick, 1, tmp_path)
        assert {case.policy for case in wanted} == set(POLICIES)
        assert len(set(wanted)) == len(wanted)
        done = {(case.setting, case.policy): Done(case, late(0.02), "made up") for case in wanted}
        rows = cluster.rows(done, quick)
        assert len({row.what for row in rows}) == len(rows)
        document = json.dumps(cluster.whole_document(done, rows, 1), allow_nan=False)
        assert json.loads(document)["seed"] == 1
        assert len(cluster.runs_table(done).splitlines()) == len(wanted) + 1


@needs_traces
def test_a_case_is_run_on_the_real_simulator() -> None:
    done = run(Case(Setting("paper", 2.0), "autoscaling", 1, TRACES))
    assert done.results.served.all()
    assert done.results.policy.startswith("serverless")
