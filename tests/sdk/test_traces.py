"""Traces of each format, read as their publishers write them, and what is said of files that are none."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import warmserve.traces.read
from warmserve.traces import Format, Request, TraceError, Window, detect, from_zero, read_requests, read_windows
from warmserve.traces.fields import TYPICAL_OUTPUT_TOKENS, TYPICAL_PROMPT_TOKENS

AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:16:01.0000000,91,16\r\n"
)
AZURE_2024 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 02:00:00.009930+02:00,2162,5\n"
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,0,1087,Conversation log\n"
    "118.5,GPT-4,417,276,693,API log\n"
)
BURSTGPT_3 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "7,s1,3.2,GPT-4,10,20,30,Conversation log\n"
)
CSV = "model,time,prompt_tokens,output_tokens,user\nb,2.5,20,3,x\na,1,10,2,y\n"
JSON_LINES = (
    '{"time": "2024-05-10T00:00:00Z", "model": "a", "usage": {"prompt_tokens": 7, "completion_tokens": 8}}\n'
    "\n"
    '{"ts": 1715299201000, "status": 200, "input_tokens": 5, "output_tokens": 6}\n'
    '{"timestamp": 1715299202, "status": 503, "input_tokens": 5, "output_tokens": 6}\n'
    '{"timestamp": 1715299203}\n'
)
ACCESS_LOG = (
    '10.0.0.1 - - [10/May/2024:02:00:01 +0200] "POST /v1/chat/completions HTTP/1.1" 200 5316 "-" "OpenAI/Python 1.2"\n'
    '10.0.0.1 - ann [10/May/2024:00:00:02 +0000] "POST /v1/completions HTTP/1.1" 200 -\n'
    '10.0.0.1 - - [10/May/2024:00:00:03 +0000] "GET /v1/models HTTP/1.1" 200 80\n'
    '10.0.0.1 - - [10/May/2024:00:00:04 +0000] "POST /v1/completions HTTP/1.1" 429 80\n'
    '10.0.0.2 - - [10/May/2024:00:00:05 +0000] "\\x16\\x03\\x01 \\"" 400 157 "-" "-"\n'
    '10.0.0.2 - - [10/May/2024:00:00:06 +0000] "" 408 -\n'
)
MIDNIGHT = datetime(2024, 5, 10, tzinfo=UTC).timestamp()
TYPICAL = (TYPICAL_PROMPT_TOKENS, TYPICAL_OUTPUT_TOKENS)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("text", "format", "requests"),
    [
        (
            AZURE_2023,
            Format.azure,
            [
                Request(pytest.approx(datetime(2023, 11, 16, 18, 15, at, us, UTC).timestamp()), "", *tokens)
                for at, us, tokens in ((46, 680590, (374, 44)), (50, 995169, (396, 109)))
            ]
            + [Request(datetime(2023, 11, 16, 18, 16, 1, tzinfo=UTC).timestamp(), "", 91, 16)],
        ),
        (AZURE_2024, Format.azure, [Request(pytest.approx(MIDNIGHT + 0.00993), "", 2162, 5)]),
        (BURSTGPT, Format.burstgpt, [Request(5, "ChatGPT", 472, 18), Request(118.5, "GPT-4", 417, 276)]),
        (BURSTGPT_3, Format.burstgpt, [Request(7, "GPT-4", 10, 20)]),
        (CSV, Format.csv, [Request(1, "a", 10, 2), Request(2.5, "b", 20, 3)]),
        (CSV.replace("time", "timestamp", 1), Format.csv, [Request(1, "a", 10, 2), Request(2.5, "b", 20, 3)]),
        ("model,input_tokens,TS,completion_tokens\na,10,1,2\n", Format.csv, [Request(1, "a", 10, 2)]),
        ("ts,time,prompt_tokens,output_tokens\n9,1,10,2\n", Format.csv, [Request(1, "", 10, 2)]),
        (
            JSON_LINES,
            Format.jsonl,
            [
                Request(MIDNIGHT, "a", 7, 8),
                Request(MIDNIGHT + 1, "", 5, 6),
                Request(MIDNIGHT + 3, "", *TYPICAL),
            ],
        ),
        (
            ACCESS_LOG,
            Format.access_log,
            [Request(MIDNIGHT + 1, "", *TYPICAL), Request(MIDNIGHT + 2, "", *TYPICAL)],
        ),
    ],
)
def test_reads_requests_of_each_format(
    tmp_path: Path, text: str, format: Format, requests: list[Request], compressed: bool
) -> None:
    file = tmp_path / "trace"
    file.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    assert detect(file) is format
    assert list(read_requests(file)) == requests
    assert list(read_requests(file, format)) == requests
    assert {request.model for request in read_requests(file, model="mine")} == {"mine"}


def test_reads_windows_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "windows.csv"
    file.write_text("window_start,model,rate,load,peak\n2024-05-10 00:10,a,1.5,3,\n2024-05-10 00:00,a,0,,7\n")
    assert detect(file) is Format.windows
    assert list(read_windows(file)) == [
        Window(MIDNIGHT + 600, 600, "a", request_rate=1.5, mean_load=3),
        Window(MIDNIGHT, 600, "a", request_rate=0, peak_load=7),
    ]
    file.write_text(file.read_text().replace("window_start", "Timestamp"))
    assert detect(file) is Format.windows
    assert [window.start_s for window in read_windows(file)] == [MIDNIGHT + 600, MIDNIGHT]
    file.write_text("window_start,window_s,load,prompt_tokens_per_s,output_tokens_per_s\n300,300,1,20,30\n")
    assert list(read_windows(file, model="m")) == [
        Window(300, 300, "m", mean_load=1, prompt_tokens_per_s=20, output_tokens_per_s=30)
    ]


def servegen(file: Path, rates: dict[str, list[float]]) -> None:
    """Writes clients' rates, 600 s each, with the columns that ServeGen's have."""
    lines = ["model,client,window_start_s,rate_per_s,cv,arrival_dist,param1,param2"]
    for client, values in rates.items():
        lines += [f"m,{client},{600 * at},{value},1,Gamma,1,1" for at, value in enumerate(values)]
    file.write_text("\n".join(lines))


def test_servegens_gaps_are_not_zero_traffic(tmp_path: Path) -> None:
    file = tmp_path / "servegen.csv"
    # A client may be silent; all of them together are so only where nothing was collected. 4 % of the usual is no
    # traffic either, 6 % is some.
    servegen(file, {"0": [9, 0, 9, 0, 0.4, 0.6], "1": [1, 10, 1, 0, 0, 0]})
    assert detect(file) is Format.servegen
    totals = list(read_windows(file))
    assert [(w.start_s, w.request_rate) for w in totals] == [(0, 10), (600, 10), (1200, 10), (3000, 0.6)]
    assert {(w.model, w.window_s) for w in totals} == {("m", 600)}
    clients = list(read_windows(file, by_client=True))
    assert [(w.model, w.start_s, w.request_rate) for w in clients] == [
        *(("m/0", start, rate) for start, rate in ((0, 9), (600, 0), (1200, 9), (3000, 0.6))),
        *(("m/1", start, rate) for start, rate in ((0, 1), (600, 10), (1200, 1), (3000, 0))),
    ]


def test_what_is_usual_follows_the_last_day(tmp_path: Path) -> None:
    file = tmp_path / "servegen.csv"
    servegen(file, {"0": [100.0] * 144 + [3.0] * 144})
    kept = [window.start_s / 600 for window in read_windows(file)]
    # 3 is a gap as long as most of the day before was 100, and traffic from then on.
    assert kept == [*range(144), *range(216 - 1, 288)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "line 1.*format that is known.*Expected columns.*azure: timestamp"),
        (b"a,b,c\r\n1,2,3\r\n", "'a,b,c'.*Expected columns"),
        (b"window_start,model\n1,2\n", "Expected columns"),
        (AZURE_2023.encode() + b"2023-11-16 18:16:02.0,many,3\r\n", "line 5: contexttokens: 'many' is not a number"),
        (AZURE_2023.encode() + b"2023-11-16 18:16:02.0,3\r\n", "line 5: 2 values where the first line names 3"),
        (AZURE_2023.encode() + b"yesterday,1,3\r\n", "line 5: 'yesterday' is no time"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n", "there are no requests"),
        (CSV.encode() + b"a,3,1.5,2,z\n", "line 4: prompt_tokens: '1.5' is not a whole number"),
        (CSV.encode() + b"a,3,-1,2,z\n", "line 4: prompt_tokens: '-1' is not a number of at least 0"),
        (CSV.encode() + b"a,nan,1,2,z\n", "line 4: time: 'nan'"),
        (b'{"model": "a"}\n', "line 1: there is no time in it: expected one of time, timestamp"),
        (b'{"time": 1}\n[]\n', "line 2: expected a JSON object"),
        (b'{"time": 1}\n{"time"\n', "line 2"),
        (b'{"time": 1, "model": 3}\n', "line 1: model: 3 is no name"),
        (b'{"time": 1, "status": null}\n', "line 1"),
        (ACCESS_LOG.encode() + b"something else\n", "line 7: 'something else' is not in Common"),
        (ACCESS_LOG.replace("May", "Mai", 1).encode(), "line 1"),
        (gzip.compress(AZURE_2023.encode())[:-20], "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"window_start,rate\n1,2\n", "holds windows"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "trace"
    file.write_bytes(content)
    with pytest.raises(TraceError, match=complaint) as error:
        list(read_requests(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("window_start,rate\n1,2\n", "expected a column window_s"),
        ("window_start,window_s,rate\n1,0,2\n", "line 2: window_s: expected a length above 0"),
        ("window_start,rate\n1,2\n2,x\n", "line 3: rate: 'x'"),
        ("model,client,window_start_s,rate_per_s\nm,0,0,1\nm,0,600\n", "line 3"),
        ("model,client,window_start_s,rate_per_s\nm,0,0,1\n", "at least two windows"),
        (CSV, "holds requests"),
    ],
)
def test_says_what_is_wrong_with_windows(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "trace"
    file.write_text(content)
    with pytest.raises(TraceError, match=complaint):
        list(read_windows(file))


@pytest.mark.parametrize("format", [Format.servegen, Format.windows])
def test_says_what_a_file_lacks_that_is_said_to_be_of_a_format(tmp_path: Path, format: Format) -> None:
    file = tmp_path / "trace"
    file.write_text("begin,what\n1,2\n")
    with pytest.raises(TraceError, match=rf"line 1: no {format} trace: column .* is missing"):
        list(read_windows(file, format))


@pytest.mark.parametrize("parts", [1, 1_000, 1_000_000, 1_000_000_000])
def test_times_may_count_parts_of_a_second(tmp_path: Path, parts: int) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(f"time,prompt_tokens,output_tokens\n{1_715_299_200 * parts},1,2\n")
    assert [request.time_s for request in read_requests(file)] == [1_715_299_200]


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("time,prompt_tokens,output_tokens\n1e30,1,2\n")
    with pytest.raises(TraceError, match="is no time"):
        list(read_requests(file))


def test_says_that_a_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_requests(tmp_path / "nothing")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_requests_come_in_order_of_time(tmp_path_factory: pytest.TempPathFactory, times: list[int]) -> None:
    file = tmp_path_factory.mktemp("trace") / "trace.csv"
    file.write_text("time,prompt_tokens,output_tokens\n" + "".join(f"{time},{at},1\n" for at, time in enumerate(times)))
    read = list(read_requests(file))
    assert [(request.time_s, request.prompt_tokens) for request in read] == sorted(
        (time, at) for at, time in enumerate(times)
    )
    assert [request.time_s for request in from_zero(read)] == [request.time_s - min(times) for request in read]


def test_a_long_trace_is_read_as_it_goes_and_must_be_nearly_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmserve.traces.read, "_LATE", 10)
    file = tmp_path / "trace.csv"
    times = [time + 5 * (time % 2) for time in range(1000)]
    file.write_text("time,prompt_tokens,output_tokens\n" + "".join(f"{time},1,1\n" for time in [*times, 7]))
    reading = read_requests(file)
    assert [next(reading).time_s for _ in times[:980]] == sorted(times)[:980]
    with pytest.raises(TraceError, match=r"line 1002: .*sort the trace by time"):
        list(reading)


def test_progress_goes_to_the_end(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv.gz"
    file.write_bytes(gzip.compress(("time,prompt_tokens,output_tokens\n" + "1,2,3\n" * 20_000).encode()))
    told: list[tuple[int, int]] = []
    list(read_requests(file, on_progress=lambda done, total: told.append((done, total))))
    assert len(told) > 2
    assert told == sorted(told)
    assert told[-1] == (file.stat().st_size, file.stat().st_size)
