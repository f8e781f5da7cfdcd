"""The figures of a replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from launcher.demo import shortcomings
from launcher.replay import Outcome
from launcher.report import print_report, summarise


def outcome(state: str, ttft_s: float, at_s: float = 0.0) -> Outcome:
    return Outcome("m", at_s, state, ttft_s, 1.0, prompt_tokens=10, output_tokens=5, resumed=0, error="")


LOST = replace(outcome("", 0.0), error="UnavailableError: gone", prompt_tokens=0, output_tokens=0)
GOOD = [
    *(outcome("active", ttft / 100, at_s=ttft) for ttft in range(1, 10)),
    *(outcome("warm", ttft) for ttft in (0.1, 0.2, 0.3)),
    outcome("warming", 0.4),
    *(outcome("cold", ttft) for ttft in (0.5, 0.7)),
]


def test_figures() -> None:
    report = summarise([*GOOD, LOST])
    assert (report.requests, report.lost) == (16, 1)
    assert report.errors == {"UnavailableError: gone": 1}
    assert report.by_state["warm"].p50_s == pytest.approx(0.2)
    assert report.by_state["cold"].p50_s == pytest.approx(0.6)
    assert report.by_state["cold"].p95_s == pytest.approx(0.69)
    assert report.by_state["active"].requests == 9
    assert report.prewarm_hit_rate == pytest.approx(3 / 6)
    assert report.duration_s == pytest.approx(10)
    assert report.output_tokens_per_s == pytest.approx(15 * 5 / 10)


def test_no_hit_rate_where_all_models_were_active() -> None:
    assert summarise([outcome("active", 0.1)]).prewarm_hit_rate is None


def test_no_requests_at_all() -> None:
    report = summarise([])
    assert (report.requests, report.by_state, report.output_tokens_per_s) == (0, {}, 0)


def test_table_shows_each_state_and_what_was_lost() -> None:
    console = Console(width=120, record=True, file=None)
    print_report(summarise([*GOOD, LOST]), console)
    text = console.export_text()
    for word in ("active", "warm", "warming", "cold", "200 ms", "600 ms", "requests lost", "UnavailableError: gone"):
        assert word in text


def test_verdict() -> None:
    assert shortcomings(summarise(GOOD)) == []
    assert shortcomings(summarise([*GOOD, LOST])) == ["1 of 16 requests were lost"]
    assert shortcomings(summarise([o for o in GOOD if o.found_state != "cold"])) == ["no request found its model cold"]
    (complaint,) = shortcomings(summarise([*GOOD, *(outcome("cold", 0.01) for _ in range(5))]))
    assert "not shorter warm (200 ms) than cold (10 ms)" in complaint
    assert len(shortcomings(summarise([]))) == 3
