"""What the validation makes of its measurements."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.simulator_validation import Conditions, Replayed, foretell
from benchmarks.simulator_validation_lab import Machine, machine_of
from benchmarks.simulator_validation_replay import Step, steps_of, times_slower, ways
from launcher.replay import Outcome
from simulator.cost import H100, Measurement
from simulator.spec import Delays, ModelSpec
from warmserve.traces import Request

MODEL = ModelSpec("m", 18_000_000, 8, 8192, bytes_per_parameter=4.0)
COST = H100.steps(MODEL)
STEPS = [
    Measurement(MODEL, COST.decode(1, 100), decodes=1, context=100),
    Measurement(MODEL, COST.decode(8, 800), decodes=8, context=100),
    Measurement(MODEL, COST.prefill(160), prefill=160),
]


def outcome(at_s: float, tokens_s: list[float], prompt: int = 100, model: str = "m", state: str = "active") -> Outcome:
    return Outcome(
        model,
        at_s,
        state,
        tokens_s[0],
        tokens_s[-1],
        prompt,
        len(tokens_s),
        0,
        "",
        tuple(tokens_s),
        queue_s=0.01,
        router_ttft_s=tokens_s[0] - 0.002,
    )


def test_waking_is_what_requests_wait_beside_what_the_simulator_counts_itself() -> None:
    other = Delays().ask_s + Delays().replan_s
    wakes_s = [other + 0.012 + 0.001 * at for at in range(12)]
    machine = machine_of([MODEL], STEPS, wakes_s, [2.0, 0.5, 0.7])
    quarters = statistics.quantiles(wakes_s, n=4)
    assert machine.wake_s == pytest.approx((quarters[0] - other, quarters[2] - other))
    assert machine.load_gbps == pytest.approx(MODEL.shard_bytes / 0.5 / 1e9)
    assert machine.fit_error < 0.05
    assert machine_of([MODEL], STEPS, [0.001] * 12, [0.5]).wake_s == (0.0, 0.0)


def test_steps_are_found_in_when_tokens_came() -> None:
    """One answer goes on alone, while a prompt is computed, and with that one's tokens; another model's are apart."""
    first = outcome(10.0, [0.1, 0.2, 0.5, 0.7, 0.9], prompt=100)
    second = outcome(10.25, [0.251, 0.451, 0.651], prompt=60)  # its first token came with the first one's third
    lost = Outcome("m", 10.0, "", 0.0, 0.0, 0, 0, 0, "gone", (0.1, 0.3))
    found = steps_of([first, second, lost, outcome(10.0, [0.15, 0.25], model="other")])
    assert [(step.model, step.decodes, step.prompts) for step in found] == [
        ("m", 1, ()),
        ("m", 1, (60,)),
        ("m", 2, ()),
        ("m", 2, ()),
        ("m", 2, ()),
        ("m", 2, ()),
        ("other", 1, ()),
    ]
    assert [step.seconds for step in found] == pytest.approx([0.1, 0.3, 0.2, 0.2, 0.2, 0.2, 0.1])
    assert [step.context for step in found] == [100, 100, 160, 160, 160, 160, 100]


def test_how_much_slower_the_machine_was_is_found_from_steps() -> None:
    tokens, prompts = 1.3, 1.7
    alone = [Step("m", tokens * COST.decode(n, 100 * n), n, 100 * n) for n in (1, 2, 2, 5)]
    beside = [
        Step(
            "m",
            tokens * COST.decode(n, 100 * n) + prompts * (COST.prefill(prompt) - COST.base),
            n,
            100 * n,
            (prompt,),
        )
        for n, prompt in ((1, 160), (3, 40))
    ]
    assert times_slower(H100, {"m": MODEL}, [*alone, *beside]) == pytest.approx((prompts, tokens))
    with pytest.raises(ValueError, match="took no longer"):
        times_slower(H100, {"m": MODEL}, [*alone, Step("m", 0.5 * COST.decode(1, 100), 1, 100, (160,))])
    for steps in (alone, beside):
        with pytest.raises(ValueError, match="in no step"):
            times_slower(H100, {"m": MODEL}, steps)


def test_ways_are_those_of_requests_to_active_models() -> None:
    outcomes = [outcome(0.0, [0.1, 0.2]), outcome(1.0, [0.3, 0.4]), outcome(2.0, [5.0], state="cold")]
    assert ways(outcomes) == pytest.approx((0.01, 0.002))


def test_a_machine_that_is_slower_in_a_replay_is_foretold_to_be() -> None:
    machine = Machine(H100, 0.0, (0.005, 0.010), 1.0)
    requests = [Request(0.02 * at, "m", 160, 30) for at in range(100)]
    usual = foretell(machine, [MODEL], Replayed(requests, [], 0.0), Conditions(1.0, 1.0, 0.001, 0.001))
    slow = foretell(machine, [MODEL], Replayed(requests, [], 0.0), Conditions(2.0, 1.0, 0.001, 0.001))
    far = foretell(machine, [MODEL], Replayed(requests, [], 0.0), Conditions(1.0, 1.0, 0.011, 0.021))
    assert slow.ttft_s.mean() > usual.ttft_s.mean()
    assert far.ttft_s[-10:].mean() == pytest.approx(usual.ttft_s[-10:].mean() + 0.03, rel=0.02)
