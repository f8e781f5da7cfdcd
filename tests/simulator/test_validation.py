"""What the validation makes of its measurements."""

from __future__ import annotations

import pytest

from benchmarks.simulator_validation import Replayed, foretell, times_slower
from benchmarks.simulator_validation_lab import WAKES, Machine, Switch, machine_of
from launcher.replay import Outcome
from simulator.cost import H100, Measurement
from simulator.spec import Delays, ModelSpec
from warmserve.traces import Request

MODEL = ModelSpec("m", 18_000_000, 8, 8192, bytes_per_parameter=4.0)
STEPS = [
    Measurement(MODEL, H100.steps(MODEL).decode(1, 100), decodes=1, context=100),
    Measurement(MODEL, H100.steps(MODEL).decode(8, 800), decodes=8, context=100),
    Measurement(MODEL, H100.steps(MODEL).prefill(160), prefill=160),
]


def test_loading_and_waking_are_told_apart_by_what_was_missing() -> None:
    drains = Delays().replan_s
    whole = [Switch(0.0, 0.012 + 0.001 * at) for at in range(WAKES)]
    wake_s = 0.012 + 0.001 * (WAKES - 1) / 2
    partly = [Switch(missing, wake_s + drains + missing * 0.5) for missing in (0.3, 0.7, 1.0)]
    machine = machine_of([MODEL], STEPS, [*partly, *whole])
    assert machine.load_gbps == pytest.approx(MODEL.shard_bytes / 0.5 / 1e9, rel=0.05)
    assert 0.012 < machine.wake_s[0] < wake_s < machine.wake_s[1] < 0.012 + 0.001 * WAKES
    assert machine.fit_error < 0.05


def test_without_whole_replicas_the_services_own_wake_time_is_assumed() -> None:
    machine = machine_of([MODEL], STEPS, [Switch(1.0, 0.5)] * WAKES)
    assert machine.wake_s == Delays().wake_s


def test_a_machine_that_shows_no_loading_is_refused() -> None:
    for switches in ([Switch(0.0, 0.01)] * WAKES, [Switch(1.0, 0.001)] * WAKES):
        with pytest.raises(RuntimeError, match="too busy to measure"):
            machine_of([MODEL], STEPS, switches)


def test_how_much_slower_the_machine_was_is_found_from_what_requests_took() -> None:
    """Requests as a machine slower than measured would have served them."""
    machine = Machine(H100, 0.0, (0.005, 0.010), 1.0)
    requests = [Request(0.02 * at, "m", 160, 30) for at in range(100)]
    truth = foretell(machine.slower(1.7, 1.3), [MODEL], Replayed(requests, [], 0.0))
    outcomes = [
        Outcome("m", request.time_s, "active", ttft_s, end_s - request.time_s, 160, 30, 0, "")
        for request, ttft_s, end_s in zip(requests, truth.ttft_s, truth.finished_s, strict=True)
    ]
    prompts, tokens = times_slower(machine, [MODEL], [Replayed(requests, outcomes, 0.0)])
    found = foretell(machine.slower(prompts, tokens), [MODEL], Replayed(requests, [], 0.0))
    assert found.ttft_s.mean() == pytest.approx(truth.ttft_s.mean(), rel=0.03)
    assert found.finished_s.mean() == pytest.approx(truth.finished_s.mean(), rel=0.03)
    assert prompts > tokens > 1.1
