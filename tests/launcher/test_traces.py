"""Traffic to replay: made up, scaled, and given to models in turns."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.traces import Rotation, Scale, generate
from warmserve.traces import Request


def test_made_up_traffic_is_reproducible_and_has_its_rate() -> None:
    arrivals = generate(2_000, 5.0, seed=1)
    assert arrivals == generate(2_000, 5.0, seed=1)
    assert arrivals != generate(2_000, 5.0, seed=2)
    assert len(arrivals) == pytest.approx(10_000, rel=0.1)
    assert all(0 <= a.time_s < 2_000 and a.prompt_tokens >= 1 and a.output_tokens >= 1 for a in arrivals)
    gaps = [b.time_s - a.time_s for a, b in pairwise(arrivals)]
    assert min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation / mean > 1.5, "arrivals should be burstier than a Poisson process"


def test_scaling_fits_a_trace_to_time_and_tokens() -> None:
    trace = [Request(0, "", 1000, 3), Request(10, "", 50, 800), Request(29.9, "", 1, 1), Request(30, "", 1, 1)]
    scaled = Scale(60, time=2, tokens=0.1, max_prompt_tokens=64, max_output_tokens=32).apply(trace)
    assert scaled == [Request(0, "", 64, 1), Request(20, "", 5, 32), Request(59.8, "", 1, 1)]
    assert Scale(25, start_s=10).apply(trace) == [
        Request(0, "", 50, 800),
        Request(19.9, "", 1, 1),
        Request(20, "", 1, 1),
    ]


@given(st.lists(st.floats(0, 1e5), max_size=50), st.integers(1, 5), st.floats(0.5, 1e3))
def test_models_take_turns_in_every_period(times: list[float], number: int, period_s: float) -> None:
    models = [f"model-{index}" for index in range(number)]
    rotation = Rotation(models, period_s)
    given_out = rotation.apply([Request(at, "", 1, 1) for at in times])
    assert [a.time_s for a in given_out] == times
    assert {a.model for a in given_out} <= set(models)
    # In the middle of each turn there is no doubt whose it is, in every period.
    for turn, model in enumerate(models):
        middle = (turn + 0.5) * period_s / number
        assert rotation.model_at(middle) == rotation.model_at(middle + 7 * period_s) == model
        later = Rotation(models, period_s, offset_s=middle)
        assert later.model_at(0) == later.model_at(period_s) == model
