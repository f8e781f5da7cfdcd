"""What benchmarks say at their end."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import Row

ROWS = [
    Row("decode step", 6.234567, "ms", limit=5.0, limit_source="copy bandwidth", target=6.6),
    Row("64 requests", 12345.6, "tokens/s", limit=1400.0, limit_source="transformers", target=15000.0),
    Row("idle", 0.0, "%"),
    Row("prefill", 4.42, "ms", target=3.76, note="out of reach: the floor is 3.91 ms"),
]


@pytest.mark.parametrize(
    ("unit", "value", "target", "met"),
    [
        ("ms", 6.5, 6.6, True),
        ("ms", 6.6, 6.6, True),
        ("ms", 6.7, 6.6, False),
        ("%", 4.0, 5.0, True),
        ("tokens/s", 3600.0, 3500.0, True),
        ("tokens/s", 3500.0, 3500.0, True),
        ("GB/s", 3400.0, 3500.0, False),
        ("ms", 1.0, None, None),
        ("ms", 0.0, 0.0, True),
    ],
)
def test_rates_are_to_be_high_and_all_else_low(unit: str, value: float, target: float | None, met: bool | None) -> None:
    assert Row("x", value, unit, target=target).met is met


def test_a_row_can_say_that_more_is_better() -> None:
    assert Row("x", 2.6, "times", target=2.5, more=True).met is True
    assert Row("x", 2.4, "times", target=2.5, more=True).met is False


def test_ratio_needs_a_limit() -> None:
    assert Row("x", 6.0, "ms", limit=5.0).ratio == pytest.approx(1.2)
    assert Row("x", 6.0, "ms").ratio is None


def test_table_is_aligned_and_shows_what_was_missed() -> None:
    assert report.table(ROWS).splitlines() == [
        "what          value  unit      limit  ratio  target  met  limit is        note",
        "decode step    6.23  ms            5   1.25     6.6  yes  copy bandwidth",
        "64 requests  12,346  tokens/s  1,400   8.82  15,000  NO   transformers",
        "idle              0  %",
        "prefill        4.42  ms                        3.76  NO                   out of reach: the floor is 3.91 ms",
    ]


def test_the_file_holds_what_the_table_shows_and_where_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["engine.py", "--shape", "8b", "--json", "/home/me/engine.json"])
    file = tmp_path / "results" / "engine-here.json"
    report.report("engine", ROWS, file)
    assert capsys.readouterr().out == f"{report.table(ROWS)}\nwritten to {file}\n"
    found = json.loads(file.read_text())
    assert found["benchmark"] == "engine"
    assert found["command"] == "python -m benchmarks.engine --shape 8b --json engine.json"
    assert timedelta() <= datetime.now(UTC) - datetime.fromisoformat(found["date"]) < timedelta(minutes=5)
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["rows"][0] == {
        "what": "decode step",
        "value": 6.2346,
        "unit": "ms",
        "limit": 5.0,
        "limit_source": "copy bandwidth",
        "ratio": 1.2469,
        "target": 6.6,
        "met": True,
        "note": None,
    }
    assert [row["met"] for row in found["rows"]] == [True, False, None, False]
    assert found["rows"][3]["note"] == "out of reach: the floor is 3.91 ms"
    assert found["rows"][2]["ratio"] is None


def test_a_newer_result_takes_the_place_of_the_last(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    report.report("engine", ROWS, file)
    report.report("engine", ROWS[:1], file)
    assert len(json.loads(file.read_text())["rows"]) == 1


def test_without_a_file_it_only_prints(capsys: pytest.CaptureFixture[str]) -> None:
    report.report("engine", ROWS)
    assert capsys.readouterr().out == f"{report.table(ROWS)}\n"


def test_the_commit_is_marked_where_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set where tests run in a hook
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit() is None  # outside a checkout

    def git(*words: str) -> str:
        user = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *user, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "report.py").write_text("1\n")
    git("init", "-q")
    git("add", "report.py")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD").strip()
    (tmp_path / "untracked").write_text("results of the last run, say\n")
    assert report.commit() == head
    (tmp_path / "report.py").write_text("2\n")
    assert report.commit() == f"{head}-changed"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.commit() is None
