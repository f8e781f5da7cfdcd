"""What a forecaster would have counted of a trace's requests."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmserve.traces import Request, TraceError, Window
from warmserve.traces.counting import complete, count, fit


def service_time(prompt_tokens: int, output_tokens: int) -> float:
    return prompt_tokens / 10 + output_tokens


def test_counts_what_was_in_progress() -> None:
    requests = [
        Request(1, "a", 0, 4),  # until 5
        Request(3, "a", 20, 5),  # until 10: has ended as the window begins
        Request(4, "a", 0, 11),  # until 15
        Request(12, "a", 0, 1),
        Request(20, "b", 0, 0),
        Request(30, "b", 0, 0),
    ]
    assert count([Request(0, "a", 0, 0), *requests], 10, service_time, aligned=True) == [
        Window(0, 10, "a", 4 / 10, (4 + 7 + 6) / 10, 3, 20 / 10, 20 / 10),
        Window(10, 10, "a", 1 / 10, (5 + 1) / 10, 2, 0, 1 / 10),
        Window(20, 10, "a", 0, 0, 0, 0, 0),
        Window(0, 10, "b", 0, 0, 0, 0, 0),
        Window(10, 10, "b", 0, 0, 0, 0, 0),
        Window(20, 10, "b", 1 / 10, 0, 1, 0, 0),
    ]


def test_only_whole_windows_are_given() -> None:
    requests = [Request(at, "a", 0, 0) for at in (1003, 1013, 1029)]
    assert [w.start_s for w in count(requests, 10, service_time, aligned=True)] == [1010]
    assert [w.start_s for w in count(requests, 10, service_time, aligned=False)] == [1003, 1013]
    assert count(requests[:1], 10, service_time, aligned=True) == []
    assert count([], 10, service_time, aligned=True) == []


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), min_size=1, max_size=30).map(sorted),
    st.sampled_from([1, 7, 10, 50]),
)
def test_agrees_with_counting_second_by_second(arrivals: list[tuple[int, int]], window_s: int) -> None:
    found = count([Request(at, "m", 1, tokens) for at, tokens in arrivals], window_s, lambda _, tokens: tokens, True)
    first, last = -(-arrivals[0][0] // window_s), arrivals[-1][0] // window_s
    assert [window.start_s for window in found] == [number * window_s for number in range(first, last)]
    for window in found:
        seconds = range(round(window.start_s), round(window.start_s) + window_s)
        in_progress = [sum(at <= second < at + tokens for at, tokens in arrivals) for second in seconds]
        assert window.mean_load == pytest.approx(sum(in_progress) / window_s)
        assert window.request_rate == pytest.approx(sum(at in seconds for at, _ in arrivals) / window_s)
        assert window.output_tokens_per_s == pytest.approx(sum(n for at, n in arrivals if at in seconds) / window_s)
        # A request that ends as it begins was in progress for a moment, and so counts for the peak.
        assert window.peak_load is not None
        assert window.peak_load >= max(in_progress)
        assert window.peak_load <= max(in_progress) + sum(at in seconds for at, _ in arrivals)


def test_what_a_trace_does_not_tell_follows_from_its_rate() -> None:
    window = complete(Window(0, 600, "m", request_rate=2), lambda prompt, output: 5.0)
    assert (window.mean_load, window.prompt_tokens_per_s, window.output_tokens_per_s) == (10, 2 * 1020, 2 * 129)
    assert window.peak_load == pytest.approx(10 + math.sqrt(2 * math.log(120) * 10))
    quiet = complete(Window(0, 600, "m", request_rate=0), lambda prompt, output: 5.0)
    assert (quiet.mean_load, quiet.peak_load, quiet.output_tokens_per_s) == (0, 0, 0)
    told = Window(0, 600, "m", 1, 2, 3, 4, 5)
    assert complete(told, lambda prompt, output: 5.0) == told
    assert complete(Window(0, 600, "m", mean_load=10), lambda prompt, output: 5.0).request_rate == 2
    with pytest.raises(TraceError, match="neither rate nor load"):
        complete(Window(0, 600, "m", peak_load=3), lambda prompt, output: 5.0)


def test_windows_are_made_to_fit() -> None:
    long = Window(600, 600, "m", request_rate=2)
    assert list(fit([long], 300)) == [Window(600, 300, "m", request_rate=2), Window(900, 300, "m", request_rate=2)]
    assert list(fit([long], 600)) == [long]
    assert list(fit([long], 1800)) == [long]  # whoever records it joins three
    for odd in (700, 400):
        with pytest.raises(TraceError, match="windows of 600 s can neither"):
            list(fit([long], odd))
