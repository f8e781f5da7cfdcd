"""`warmctl forecast`, as its users run it: against a real etcd and a forecaster's real protocol."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import math
import os
import pty
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.sdk.conftest import Warmctl, words
from tests.sdk.forecaster_server import PeerForecaster
from warmserve.admin.units import now_ms
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.traces.service_time import service_time_s
from warmserve.v1 import cluster_pb2, forecast_pb2

WINDOW_S = 300
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
async def forecaster(store: Store, keys: Keys, cluster: None) -> AsyncIterator[PeerForecaster]:
    forecaster = PeerForecaster()
    await forecaster.start(store, keys)
    yield forecaster
    await forecaster.close()


def quantiles(p50: float) -> cluster_pb2.Quantiles:
    return cluster_pb2.Quantiles(p50=p50, p90=2 * p50, p99=3 * p50)


def know_qwen(forecaster: PeerForecaster) -> int:
    """A day of qwen with a gap, and twelve windows to come; returns the begin of the first of them."""
    now = int(time.time()) // WINDOW_S * WINDOW_S
    windows = []
    for number in range(-288, 0):
        actual = forecast_pb2.LoadSample(mean_load=4.0, peak_load=9.0, request_rate=0.5)
        window = forecast_pb2.HistoryWindow(start_unix_s=now + number * WINDOW_S, window_s=WINDOW_S, actual=actual)
        if number > -100:
            window.forecast.CopyFrom(
                cluster_pb2.WindowForecast(
                    start_unix_s=window.start_unix_s, mean_load=quantiles(5), peak_load=quantiles(9)
                )
            )
        if not -200 < number < -150:
            windows.append(window)
    ended = cluster_pb2.CalendarEntry(
        model="qwen", id="e", start_unix_s=now - 3600, duration_s=1800, load=8, note="the launch",
        source=cluster_pb2.CALENDAR_SOURCE_OPERATOR,
    )  # fmt: skip
    forecaster.history["qwen"] = forecast_pb2.GetHistoryResponse(window_s=WINDOW_S, windows=windows, calendar=[ended])
    forecaster.forecasts["qwen"] = cluster_pb2.Forecast(
        model="qwen",
        made_unix_ms=now_ms() - 30_000,
        window_s=WINDOW_S,
        predictor="learned",
        windows=[
            cluster_pb2.WindowForecast(
                start_unix_s=now + number * WINDOW_S, mean_load=quantiles(6 + number), peak_load=quantiles(11)
            )
            for number in range(12)
        ],
    )
    return now


async def test_history_band_and_what_is_expected_are_drawn(
    warmctl: Warmctl, forecaster: PeerForecaster, tmp_path: Path
) -> None:
    now = know_qwen(forecaster)
    file = tmp_path / "qwen.png"
    done = await warmctl("forecast", "qwen", "--ahead", "3", "--past", "1d", "--png", str(file))
    assert done.status == 0, done.err
    assert (
        "qwen: requests in progress, mean of each window; past forecasts as made 3 windows of 5 min ahead" in done.out
    )
    assert all(character in done.out for character in "░▒│█")
    assert "\x1b" not in done.out
    assert "by the learned predictor" in done.out
    first = time.strftime("%H:%M:%S", time.localtime(now))
    assert re.search(rf"{first} +6 +12 +18 +11 +22 +33\b", done.out)
    assert re.search(r"ago +30 min +8 +operator +the launch", done.out)
    assert file.read_bytes().startswith(PNG)
    assert done.err == f"Wrote {file}.\n"
    [request] = forecaster.asked
    assert (request.model, request.ahead) == ("qwen", 3)
    assert abs(time.time() - 86_400 - request.from_unix_s) < 120


async def test_the_picture_fits_a_terminal_and_has_colours(warmctl: Warmctl, forecaster: PeerForecaster) -> None:
    know_qwen(forecaster)
    ours, theirs = pty.openpty()
    warmctl.environment |= {"COLUMNS": "70", "LINES": "50", "TERM": "xterm-256color"}
    process = await warmctl.start("forecast", "qwen", stdout=theirs)
    os.close(theirs)

    def read() -> str:
        found = bytearray()
        with contextlib.suppress(OSError):  # closed by the other side
            while True:
                found += os.read(ours, 65536)
        return found.decode()

    text = await asyncio.to_thread(read)
    assert await process.wait() == 0
    os.close(ours)
    assert "\x1b[38;5;75m" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    drawn = [line for line in plain.splitlines() if re.match(r"[\d. ]*[┤│┌└]", line)]
    assert len(drawn) > 15
    assert max(map(len, drawn)) <= 70


async def test_all_numbers_are_there_for_programs(warmctl: Warmctl, forecaster: PeerForecaster) -> None:
    now = know_qwen(forecaster)
    document = (await warmctl("forecast", "show", "qwen", "--quantity", "rate", "-o", "json")).json
    assert (document["model"], document["ahead"], document["window_s"]) == ("qwen", 1, WINDOW_S)
    assert document["predictor"] == "learned"
    assert len(document["history"]) == 288 - 49
    assert document["history"][0]["actual"]["peak_load"] == 9
    assert document["history"][0]["forecast"] is None
    assert document["history"][-1]["forecast"]["mean_load"] == {"p50": 5, "p90": 10, "p99": 15}
    assert [window["start_unix_s"] for window in document["forecast"]] == [now + WINDOW_S * n for n in range(12)]
    assert [entry["note"] for entry in document["calendar"]] == ["the launch"]


async def test_options_may_come_before_the_model(warmctl: Warmctl, forecaster: PeerForecaster) -> None:
    know_qwen(forecaster)
    assert (await warmctl("forecast", "--ahead", "2", "-o", "json", "qwen")).json["ahead"] == 2


async def test_a_model_of_which_little_is_known(warmctl: Warmctl, forecaster: PeerForecaster) -> None:
    know_qwen(forecaster)
    # Deployed, and not one window has ended since.
    assert "Nothing is known of sharded yet" in (await warmctl("forecast", "sharded")).out
    # Undeployed: what was remains.
    forecaster.history["gone"] = forecaster.history["qwen"]
    done = await warmctl("forecast", "gone")
    assert done.status == 0
    assert "There is no forecast of gone" in done.out
    # Neither, or not a model at all.
    done = await warmctl("forecast", "qwem")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("Error: nothing is known of a model 'qwem'")
    assert "did you mean qwen?" in done.err
    assert "show, import, score, predictor" in done.err


async def test_a_picture_without_matplotlib(warmctl: Warmctl, forecaster: PeerForecaster, tmp_path: Path) -> None:
    know_qwen(forecaster)
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')")
    warmctl.environment["PYTHONPATH"] = str(tmp_path)
    done = await warmctl("forecast", "qwen", "--png", str(tmp_path / "x.png"))
    assert (done.status, done.out) == (1, "")
    assert done.err == "Error: pictures need matplotlib: pip install 'warmserve[plots]'\n"
    assert (await warmctl("forecast", "qwen")).status == 0


async def test_a_picture_that_cannot_be_written(warmctl: Warmctl, forecaster: PeerForecaster, tmp_path: Path) -> None:
    know_qwen(forecaster)
    for file in (tmp_path / "none" / "x.png", tmp_path / "x.docx"):
        done = await warmctl("forecast", "qwen", "--png", str(file))
        assert done.status == 1
        assert f"{file} cannot be written" in done.err


# ---- import


def requests_csv(file: Path, begin: float, end: float) -> None:
    """A request a second, of 1,000 tokens in and 100 out, for a and b in turns."""
    lines = [f"{begin + at},{'ab'[at % 2]},1000,100" for at in range(round(end - begin) + 1)]
    file.write_bytes(gzip.compress("\n".join(["time,model,prompt_tokens,output_tokens", *lines]).encode()))


async def test_a_traces_requests_become_windows(warmctl: Warmctl, forecaster: PeerForecaster, tmp_path: Path) -> None:
    now = time.time() // WINDOW_S * WINDOW_S
    file = tmp_path / "trace.csv.gz"
    requests_csv(file, now - 10 * WINDOW_S - 100, now - 2 * WINDOW_S + 100)  # the first and last window not whole
    done = await warmctl("forecast", "import", str(file), "--window", "5m", "--model", "a=qwen", "-o", "json")
    assert done.status == 0, done.err
    assert done.json == {
        "windows": 8,
        "models": ["qwen"],
        "begin_unix_s": now - 10 * WINDOW_S,
        "end_unix_s": now - 2 * WINDOW_S,
        "not_deployed": [],
    }
    [request] = forecaster.imported
    assert (request.model, request.window_s) == ("qwen", WINDOW_S)
    assert [window.start_unix_s for window in request.windows] == [now - (10 - n) * WINDOW_S for n in range(8)]
    for window in request.windows:
        assert window.actual.request_rate == 0.5
        assert (window.actual.prompt_tokens_per_s, window.actual.output_tokens_per_s) == (500, 50)
        assert window.actual.mean_load == pytest.approx(0.5 * service_time_s(1000, 100), rel=0.02)
        assert window.actual.peak_load == math.ceil(service_time_s(1000, 100) / 2)


async def test_a_trace_of_the_past_is_moved_to_now(
    warmctl: Warmctl, forecaster: PeerForecaster, tmp_path: Path
) -> None:
    file = tmp_path / "azure.csv"
    begin = 1_700_000_000.25
    rows = [
        time.strftime("%Y-%m-%d %H:%M:%S.2500000", time.gmtime(begin + at)) + ",1000,100"
        for at in range(0, 4 * WINDOW_S + 10, 10)
    ]
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    before = time.time() // WINDOW_S * WINDOW_S
    done = await warmctl("forecast", "import", str(file), "--window", "300", "--model", "new", "--shift-to-now")
    assert done.status == 0, done.err
    assert "Recorded 4 windows of new, from " in done.out
    assert "1 of them not deployed" in done.out
    [request] = forecaster.imported
    starts = [window.start_unix_s for window in request.windows]
    assert starts[-1] + WINDOW_S in (before, before + WINDOW_S)
    assert starts == [starts[0] + n * WINDOW_S for n in range(4)]
    assert all(start % WINDOW_S == 0 for start in starts)
    assert {window.actual.request_rate for window in request.windows} == {0.1}


async def test_servegens_windows_are_cut_to_the_forecasters(
    warmctl: Warmctl, forecaster: PeerForecaster, store: Store, keys: Keys, tmp_path: Path
) -> None:
    know_qwen(forecaster)
    await store.put(keys.forecast("qwen"), forecaster.forecasts["qwen"])  # tells the length of windows
    file = tmp_path / "servegen.csv"
    rows = [f"m-large,{client},{600 * at},{1 + client},1,Gamma,1,1" for client in (0, 1) for at in range(3)]
    file.write_text("\n".join(["model,client,window_start_s,rate_per_s,cv,arrival_dist,param1,param2", *rows]))
    done = await warmctl("forecast", "import", str(file), "--shift-to-now", "--model", "m-large=qwen")
    assert done.status == 0, done.err
    done = await warmctl("forecast", "import", str(file), "--shift-to-now", "--by-client")
    assert done.status == 0, done.err
    assert [(request.model, request.window_s, len(request.windows)) for request in forecaster.imported] == [
        ("qwen", 300, 6),
        ("m-large/0", 300, 6),
        ("m-large/1", 300, 6),
    ]
    rates = [{window.actual.request_rate for window in request.windows} for request in forecaster.imported]
    assert rates == [{3}, {1}, {2}]
    loads = {window.actual.mean_load for window in forecaster.imported[0].windows}
    assert loads == {3 * service_time_s(1020, 129)}


async def test_long_histories_go_in_parts(warmctl: Warmctl, forecaster: PeerForecaster, tmp_path: Path) -> None:
    now = time.time() // WINDOW_S * WINDOW_S
    file = tmp_path / "windows.csv"
    starts = [now - (5001 - at) * WINDOW_S for at in range(5000)]
    file.write_text("window_start,load\n" + "".join(f"{start},1\n" for start in starts))
    assert (await warmctl("forecast", "import", str(file), "--window", "5m", "--model", "qwen")).status == 0
    sent = [window.start_unix_s for request in forecaster.imported for window in request.windows]
    assert sent == starts
    assert len(forecaster.imported) > 1


@pytest.mark.parametrize(
    ("text", "arguments", "status", "says"),
    [
        ("a,b\n1,2\n", (), 1, "trace.csv, line 1: 'a,b' is the first line of no format that is known"),
        ("time,prompt_tokens,output_tokens\n1,2,x\n", (), 1, "trace.csv, line 2: output_tokens: 'x' is not a number"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n", (), 1, "there is not one whole window of 5 min in it"),
        ("time,prompt_tokens,output_tokens\n0,2,3\n900,2,3\n", (), 1, "names no model: say --model NAME"),
        ("time,prompt_tokens,output_tokens\n0,2,3\n900,2,3\n", ("--model", "m"), 1, "--shift-to-now ends it now"),
        ("time,model,prompt_tokens,output_tokens\n0,m,2,3\n900,m,2,3\n", ("--model", "n=x"), 1, "no model 'n'"),
        ("time,prompt_tokens,output_tokens\n4e9,2,3\n4000000900,2,3\n", ("--model", "m"), 1, "still to come"),
        ("window_start,load\n1700000001,1\n1700000301,1\n", ("--model", "m"), 1, "does not begin at a multiple"),
        ("window_start,load\n1700000000,1\n1700000700,1\n", ("--model", "m"), 1, "windows of 700 s can neither"),
        ("window_start,model,load\n1700000100,a,1\n1700000400,b,1\n1700000400,a,1\n", ("--model", "m"), 1, "several"),
        ("time,model,prompt_tokens,output_tokens\n0,a b,2,3\n900,a b,2,3\n", ("--shift-to-now",), 1, "'a b' is not"),
        ("", ("--model", "a=b", "--model", "c"), 2, "give one NAME, or FROM=NAME for each"),
        ("", ("--model", "/"), 2, "is not allowed"),
        ("", ("--window", "soon"), 2, "no length of time"),
    ],
)
async def test_what_cannot_be_imported(
    warmctl: Warmctl, forecaster: PeerForecaster, tmp_path: Path, text: str, arguments: tuple[str, ...], status: int,
    says: str,
) -> None:  # fmt: skip
    file = tmp_path / "trace.csv"
    file.write_text(text)
    window = () if "--window" in arguments else ("--window", "5m")
    done = await warmctl("forecast", "import", str(file), *arguments, *window)
    assert (done.status, done.out) == (status, "")
    assert says in words(done.err.replace("│", ""))
    assert forecaster.imported == []


async def test_what_the_forecaster_refuses_is_told(
    warmctl: Warmctl, forecaster: PeerForecaster, store: Store, keys: Keys, tmp_path: Path
) -> None:
    file = tmp_path / "windows.csv"
    file.write_text("window_start,load\n1700000100,1\n1700000400,1\n")
    await store.delete(keys.forecast("qwen"))
    unsure = await warmctl("forecast", "import", str(file), "--model", "m")
    assert (unsure.status, "--window 5m" in unsure.err) == (1, True)
    forecaster.refusal = "m: windows of 300 s cannot be joined to those of 60 s that are kept here"
    done = await warmctl("forecast", "import", str(file), "--window", "5m", "--model", "m")
    assert (done.status, done.err) == (1, f"Error: {forecaster.refusal}\n")
    forecaster.refusal = ""
    done = await warmctl("forecast", "import", str(file), "--window", "5m", "--model", "m")
    assert done.status == 0
    assert "Warning: its last window ended" in done.err  # years ago


# ---- score, predictor


async def test_scores_say_how_good_and_what_it_cost(warmctl: Warmctl, forecaster: PeerForecaster) -> None:
    forecaster.scores = forecast_pb2.GetScoresResponse(
        models=[
            forecast_pb2.ForecastScore(
                model="qwen", windows=2016, wape=0.153, pinball_p90=0.0512, coverage_p90=0.912, coverage_p99=1,
                over_provision=1.38, needless_replica_s=7500, missing_replica_s=0, unforeseen_requests=12,
            )
        ],
        calendar=[
            forecast_pb2.CalendarScore(
                entry=cluster_pb2.CalendarEntry(
                    model="qwen", id="x", start_unix_s=1_800_000_000, duration_s=3600, load=20, note="launch",
                    source=cluster_pb2.CALENDAR_SOURCE_CLIENT,
                ),
                actual_load=17.26,
                forecast_load=2,
            )
        ],
    )  # fmt: skip
    done = await warmctl("forecast", "score", "qwen", "--past", "2d", "--ahead", "6")
    assert re.search(r"qwen +2016 +15 % +0.051 +91 % +100 % +1.38 +2 h 5 min +- +12\b", done.out)
    assert re.search(r"qwen +\S+ \S+ \S+ +1 h +client +20 +17.3 +- +2 +launch", done.out)
    assert "The last 2d, forecast 6 window(s) ahead." in done.out
    [request] = forecaster.asked
    assert (list(request.models), request.past_s, request.ahead) == (["qwen"], 172_800, 6)
    document = (await warmctl("forecast", "score", "-o", "json")).json
    assert document["models"][0]["needless_replica_s"] == 7500
    assert document["calendar"][0]["actual_peak"] is None
    forecaster.scores = forecast_pb2.GetScoresResponse()
    assert "No window has been both forecast and counted yet." in (await warmctl("forecast", "score")).out


async def test_the_predictor_is_shown_and_restored(warmctl: Warmctl, forecaster: PeerForecaster) -> None:
    done = await warmctl("forecast", "predictor", "--restore")
    assert (done.status, done.err) == (1, "Error: there is no previous predictor\n")
    forecaster.champion = forecast_pb2.PredictorInfo(
        name="learned", fitted_unix_ms=now_ms() - 7_200_000, series=63, windows=99_792, relative_loss=0.71
    )
    forecaster.previous = forecast_pb2.PredictorInfo(name="published")
    text = words((await warmctl("forecast", "predictor")).out)
    for piece in (
        "champion learned, fitted 2 h 0 min ago to 99,792 windows of 63 series; loss 0.71 of the published one's",
        "previous published",
        "last challenger none",
        "last refit kept",
        "newest loss 1.25 of the loss when it was fitted",
    ):
        assert piece in text
    assert (await warmctl("forecast", "predictor", "--restore")).out.startswith("Restored.\n")
    assert (await warmctl("forecast", "predictor", "-o", "json")).json["champion"]["name"] == "published"


# ---- no forecaster, help, completion


async def test_without_a_forecaster(warmctl: Warmctl, cluster: None, store: Store, keys: Keys, tmp_path: Path) -> None:
    file = tmp_path / "windows.csv"
    file.write_text("window_start,load\n1700000100,1\n1700000400,1\n")
    commands = (("qwen",), ("score",), ("predictor",), ("import", str(file), "--model", "m", "--window", "5m"))
    for command in commands:
        done = await warmctl("forecast", *command)
        assert (done.status, done.out) == (1, "")
        assert done.err.startswith("Error: no forecaster is registered")
    gone = PeerForecaster()
    await gone.start(store, keys)
    await gone.close()
    for command in commands:
        done = await warmctl("forecast", *command)
        assert (done.status, done.out) == (1, "")
        assert f"forecaster f0 at {gone.address}: " in done.err


COMMANDS = ["calendar add", "calendar list", "calendar remove"]
COMMANDS += ["forecast", "forecast show", "forecast import", "forecast score", "forecast predictor"]


@pytest.mark.parametrize("command", COMMANDS)
async def test_help_has_examples(warmctl: Warmctl, command: str) -> None:
    done = await warmctl(*command.split(), "--help")
    assert done.status == 0
    assert f"warmctl {command}".removesuffix(" show") in words(done.out.partition("Examples:")[2])


async def test_shells_complete_commands_and_models(warmctl: Warmctl, cluster: None) -> None:
    async def complete(line: str) -> list[str]:
        warmctl.environment |= {
            "_WARMCTL_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        return (await warmctl()).out.split()

    assert await complete("warmctl forecast s") == ["show", "score", "sharded"]
    assert await complete("warmctl forecast q") == ["qwen"]
    assert await complete("warmctl forecast show q") == ["qwen"]
    assert await complete("warmctl calendar add org") == ["org/llama"]
