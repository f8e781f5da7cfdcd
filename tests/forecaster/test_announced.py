"""What is announced raises forecasts, and only what it should; clients are believed as far as they were right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.forecaster.announced import Expectation, per_load, raised, trust, what_came

WINDOW_S = 300.0
BEGINS = [float(1_000_000 + WINDOW_S * step) for step in range(12)]
PER_LOAD = np.array([[0.5, 100.0, 20.0]])[0]


def flat(load: float = 4.0) -> np.ndarray:
    """A forecast of the same for all windows: p50, p90, p99 are 1, 2, 3 times it, the peak twice that."""
    one = np.array([1.0, 2.0, 3.0]) * load
    return np.tile(np.stack([one, 2 * one, one / 2, one * 100, one * 20]), (12, 1, 1))


def expect(first: float, windows: float, load: float, of_all: bool = True) -> Expectation:
    begin = BEGINS[0] + first * WINDOW_S
    return Expectation(begin, begin + windows * WINDOW_S, load, of_all)


def test_what_is_announced_is_expected_for_its_time_and_no_other() -> None:
    forecast = flat()
    result = raised(forecast, BEGINS, WINDOW_S, [expect(3, 2, 10)], PER_LOAD)
    np.testing.assert_array_equal(result[[0, 1, 2, 5, 11]], forecast[[0, 1, 2, 5, 11]])
    for window in (3, 4):
        np.testing.assert_array_equal(result[window, 0], [10, 10, 12])
        np.testing.assert_array_equal(result[window, 1], [10, 16, 24])
        # Six more in progress than the median, each with half a request per second.
        np.testing.assert_allclose(result[window, 2], [2 + 3, 4 + 1, 6])
        np.testing.assert_allclose(result[window, 3], [400 + 600, 800 + 200, 1200])
    np.testing.assert_array_equal(forecast, flat())  # it is left as it was


def test_a_part_of_a_window_counts_for_its_part_in_the_mean_and_fully_in_the_peak() -> None:
    result = raised(flat(), BEGINS, WINDOW_S, [expect(3.75, 0.5, 20)], PER_LOAD)
    for window in (3, 4):
        np.testing.assert_allclose(result[window, 0, 0], 0.75 * 4 + 0.25 * 20)
        np.testing.assert_allclose(result[window, 1, 0], 20)


def test_what_is_below_the_forecast_changes_nothing() -> None:
    forecast = flat()
    np.testing.assert_array_equal(raised(forecast, BEGINS, WINDOW_S, [expect(0, 12, 3)], PER_LOAD), forecast)


def test_clients_add_up_and_operators_speak_of_all() -> None:
    clients = [expect(0, 2, 20, of_all=False), expect(1, 2, 30, of_all=False)]
    result = raised(flat(), BEGINS, WINDOW_S, clients, PER_LOAD)
    np.testing.assert_array_equal(result[:4, 0, 0], [20, 50, 30, 4])
    operators = [expect(0, 2, 20), expect(1, 2, 40)]
    result = raised(flat(), BEGINS, WINDOW_S, operators, PER_LOAD)
    np.testing.assert_array_equal(result[:4, 0, 0], [20, 40, 40, 4])
    result = raised(flat(), BEGINS, WINDOW_S, clients + operators, PER_LOAD)
    np.testing.assert_array_equal(result[:4, 0, 0], [20, 50, 40, 4])


@given(
    st.lists(st.builds(expect, st.floats(-3, 14), st.floats(0.01, 8), st.floats(0.01, 1e4), st.booleans()), max_size=5)
)
def test_nothing_falls_and_quantiles_never_cross(expected: list[Expectation]) -> None:
    forecast = flat()
    result = raised(forecast, BEGINS, WINDOW_S, expected, PER_LOAD)
    assert (result >= forecast - 1e-9).all()
    assert (np.diff(result, axis=2) >= -1e-9).all()
    assert (result[:, 1] >= result[:, 0] - 1e-9).all()
    most = max([sum(one.load for one in expected if not one.of_all)] + [one.load for one in expected if one.of_all])
    assert (result[:, 0] <= np.maximum(forecast[:, 0], most) + 1e-6).all()


def test_hints_that_do_not_come_true_are_believed_less_and_less() -> None:
    assert trust([]) == 1
    assert trust([(20, 25), (20, 20)]) == 1
    assert trust([(20, 0)]) == pytest.approx(2 / 3)
    assert trust([(20, 0)] * 10) == pytest.approx(1 / 6)
    assert trust([(20, 10)] * 10) == pytest.approx(7 / 12)
    assert trust([(20, 0)] * 5 + [(20, 20)] * 5) > trust([(20, 0)] * 6 + [(20, 20)] * 4)


def test_ratios_come_from_what_was_counted() -> None:
    series = np.full((3, 4, 5), np.nan)
    series[0, :2] = [[2, 3, 1, 100, 10], [4, 5, 2, 500, 50]]
    series[1, 3] = 0
    np.testing.assert_allclose(per_load(series), [[0.5, 100, 10], [0, 0, 0], [0, 0, 0]])
    assert per_load(np.empty((2, 0, 5))).shape == (2, 3)


def test_what_came_is_weighed_by_what_was_covered() -> None:
    windows = [(0.0, 1.0, 1.0), (300.0, 5.0, 9.0), (900.0, 100.0, 100.0)]
    assert what_came(150, 600, WINDOW_S, windows) == ((1 * 150 + 5 * 300) / 450, 5)
    assert what_came(600, 900, WINDOW_S, windows) is None


@pytest.mark.parametrize(("begin", "lasts"), [(0, 60), (60, 120), (150, 300), (250, 600), (0, 900)])
def test_what_comes_true_counts_as_true_however_short_it_is(begin: int, lasts: int) -> None:
    """Windows hold the mean of all their time, of which a hint may cover a part."""
    windows = []
    for at in range(0, 1200, int(WINDOW_S)):
        covered = max(0.0, min(begin + lasts, at + WINDOW_S) - max(begin, at)) / WINDOW_S
        windows.append((float(at), 20 * covered, 20.0 if covered else 0.0))
    assert what_came(begin, begin + lasts, WINDOW_S, windows) == pytest.approx((20, 20))


def test_what_came_all_the_time_is_not_taken_for_a_short_burst() -> None:
    assert what_came(0, 60, WINDOW_S, [(0.0, 4.0, 5.0)]) == (5, 5)
