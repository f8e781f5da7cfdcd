"""Traffic: Azure's format, made-up traffic, scaling, and models taking turns."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.traces import Arrival, Rotation, Scale, TraceError, generate, read_azure

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:16:01.0000000,91,16\r\n"
)


@pytest.mark.parametrize("compressed", [False, True])
def test_reads_azures_format(tmp_path: Path, compressed: bool) -> None:
    file = tmp_path / "trace"
    file.write_bytes(gzip.compress(AZURE.encode()) if compressed else AZURE.encode())
    arrivals = read_azure(file)
    assert [(a.prompt_tokens, a.output_tokens) for a in arrivals] == [(374, 44), (396, 109), (91, 16)]
    assert [a.at_s for a in arrivals] == pytest.approx([0, 4.314579, 14.319410])


def test_orders_requests_by_time(tmp_path: Path) -> None:
    header, first, second, third, _ = AZURE.split("\r\n")
    file = tmp_path / "trace.csv"
    file.write_text("\n".join([header, third, first, second]))
    assert [a.prompt_tokens for a in read_azure(file)] == [374, 396, 91]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "first line must be TIMESTAMP"),
        (b"a,b,c\r\n1,2,3\r\n", "first line must be TIMESTAMP"),
        (AZURE.encode() + b"2023-11-16 18:16:02.0,many,3\r\n", "line 5"),
        (AZURE.encode() + b"2023-11-16 18:16:02.0,3\r\n", "line 5"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n", "no requests"),
        (gzip.compress(AZURE.encode())[:-20], "trace"),
        (b"\xff\xfe\x00", "decode"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "trace"
    file.write_bytes(content)
    with pytest.raises(TraceError, match=complaint):
        read_azure(file)


def test_says_that_a_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_azure(tmp_path / "nothing")


def test_made_up_traffic_is_reproducible_and_has_its_rate() -> None:
    arrivals = generate(2_000, 5.0, seed=1)
    assert arrivals == generate(2_000, 5.0, seed=1)
    assert arrivals != generate(2_000, 5.0, seed=2)
    assert len(arrivals) == pytest.approx(10_000, rel=0.1)
    assert all(0 <= a.at_s < 2_000 and a.prompt_tokens >= 1 and a.output_tokens >= 1 for a in arrivals)
    gaps = [b.at_s - a.at_s for a, b in pairwise(arrivals)]
    assert min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation / mean > 1.5, "arrivals should be burstier than a Poisson process"


def test_scaling_fits_a_trace_to_time_and_tokens() -> None:
    trace = [Arrival(0, 1000, 3), Arrival(10, 50, 800), Arrival(29.9, 1, 1), Arrival(30, 1, 1)]
    scaled = Scale(60, time=2, tokens=0.1, max_prompt_tokens=64, max_output_tokens=32).apply(trace)
    assert scaled == [Arrival(0, 64, 1), Arrival(20, 5, 32), Arrival(59.8, 1, 1)]
    assert Scale(25, start_s=10).apply(trace) == [Arrival(0, 50, 800), Arrival(19.9, 1, 1), Arrival(20, 1, 1)]


@given(st.lists(st.floats(0, 1e5), max_size=50), st.integers(1, 5), st.floats(0.5, 1e3))
def test_models_take_turns_in_every_period(times: list[float], number: int, period_s: float) -> None:
    models = [f"model-{index}" for index in range(number)]
    rotation = Rotation(models, period_s)
    given_out = rotation.apply([Arrival(at, 1, 1) for at in times])
    assert [a.at_s for a in given_out] == times
    assert {a.model for a in given_out} <= set(models)
    # In the middle of each turn there is no doubt whose it is, in every period.
    for turn, model in enumerate(models):
        middle = (turn + 0.5) * period_s / number
        assert rotation.model_at(middle) == rotation.model_at(middle + 7 * period_s) == model
        later = Rotation(models, period_s, offset_s=middle)
        assert later.model_at(0) == later.model_at(period_s) == model
