"""What is drawn of forecasts, whatever the numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmserve.admin import picture, terminal_plot
from warmserve.admin.forecast_views import Outlook, Point, Quantity, points
from warmserve.admin.plain import Plain

NOW = 1_800_000_000
value = st.none() | st.just(0.0) | st.floats(1e-6, 1e9)


def window(number: int, actual: float | None, median: float | None, window_s: float = 300) -> Plain:
    return {
        "start_unix_s": NOW + int(number * window_s),
        "window_s": window_s,
        "actual": None if actual is None else {"mean_load": actual},
        "forecast": None if median is None else {"mean_load": {"p50": median, "p90": 2 * median, "p99": 3 * median}},
    }


def view(history: list[Plain], forecast: list[Plain] | None = None, window_s: float = 300) -> Outlook:
    return Outlook("m", 1, window_s, "learned", NOW * 1000, history, forecast or [], [])


def test_what_came_and_what_was_forecast_stand_side_by_side() -> None:
    coming = [{"start_unix_s": NOW, "mean_load": {"p50": 1.0, "p90": 2.0, "p99": 3.0}}]
    found = points(view([window(-2, 5.0, None), window(0, 4.0, 9.0)], coming), Quantity.load)
    assert found == [
        Point(NOW - 600, 300, actual=5.0),
        Point(NOW - 300, 300),  # nobody knows
        Point(NOW, 300, actual=4.0, p50=1.0, p90=2.0, p99=3.0),  # the newest forecast of it
    ]
    assert points(view([window(-1, 5.0, 2.0)]), Quantity.rate) == [Point(NOW - 300, 300)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3000, 11), value, value), min_size=1, max_size=60),
    st.integers(20, 200),
    st.sampled_from([1, 300, 3600]),
)
def test_a_drawing_keeps_its_size(rows: list[tuple[int, float | None, float | None]], width: int, length: int) -> None:
    history = [window(number, actual, median, length) for number, actual, median in rows]
    text = terminal_plot.draw(view(history, window_s=length), Quantity.load, NOW, width, 20, colors=False)
    lines = text.splitlines()
    assert 15 <= len(lines) <= 20
    assert max(map(len, lines)) <= width
    assert "\x1b" not in text


def test_nothing_known_is_nothing_drawn() -> None:
    assert terminal_plot.draw(view([]), Quantity.load, NOW, 80, 20, colors=False) == ""


@given(st.floats(1e-9, 1e12))
def test_ticks_are_round_and_reach_the_top(top: float) -> None:
    ticks = terminal_plot.nice_ticks(top)
    assert ticks[0] == 0
    assert top <= ticks[-1] * (1 + 1e-9)
    assert 3 <= len(ticks) <= 6
    step = ticks[1]
    assert step / 10 ** math.floor(math.log10(step) + 1e-9) == pytest.approx(1) or round(
        step / 10 ** math.floor(math.log10(step) + 1e-9), 6
    ) in (2, 2.5, 5)


@given(st.floats(1e8, 2e9), st.floats(1, 1e8), st.integers(2, 12))
def test_ticks_of_time_lie_within(begin: float, span: float, most: int) -> None:
    ticks = terminal_plot.time_ticks(begin, begin + span, most)
    assert len(ticks) <= most + 1
    assert all(begin - 1 <= tick <= begin + span + 1 for tick in ticks)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_of_a_single_window(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    picture.save(view([window(-1, 3.0, None)]), Quantity.load, NOW, file)
    assert file.stat().st_size > 1000
