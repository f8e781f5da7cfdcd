"""The formats of traces, and how they are told apart: by the columns of the first line, whatever the file is called.

| format | what it is | first line |
|---|---|---|
| azure | requests of Azure's LLM traces of 2023 and 2024 | TIMESTAMP,ContextTokens,GeneratedTokens |
| burstgpt | requests of BurstGPT | Timestamp,...,Model,Request tokens,Response tokens,... |
| csv | requests, of your own | time,prompt_tokens,output_tokens and, if there are several, model |
| jsonl | requests, a JSON object on each line | an object with time and, as far as known, model and tokens |
| access-log | requests, as web servers log them (Common or Combined Log Format) | a line of a log |
| servegen | windows of clients, of ServeGen | model,client,window_start_s,rate_per_s,... |
| windows | windows, of your own | window_start and any of rate, load, peak, prompt_tokens_per_s, output_tokens_per_s |

Columns may come in any order and among others; capital letters do not matter. In files of your own the time may also be
called timestamp, ts, @timestamp or time_iso8601, prompt_tokens input_tokens, and output_tokens completion_tokens.
"""

from __future__ import annotations

import csv
import re
from enum import StrEnum
from pathlib import Path

from warmserve.traces.file import TraceFile
from warmserve.traces.shapes import TraceError


class Format(StrEnum):
    """How a trace is written down."""

    azure = "azure"
    burstgpt = "burstgpt"
    csv = "csv"
    jsonl = "jsonl"
    access_log = "access-log"
    servegen = "servegen"
    windows = "windows"

    @property
    def has_windows(self) -> bool:
        """Whether it holds windows and not requests."""
        return self in (Format.servegen, Format.windows)


WINDOW_VALUES = ("rate", "load", "peak", "prompt_tokens_per_s", "output_tokens_per_s")
"""Columns of the format `windows`, of which at least one is needed."""

TIMES = ("time", "timestamp", "ts", "@timestamp", "time_iso8601")
PROMPTS = ("prompt_tokens", "input_tokens")
OUTPUTS = ("output_tokens", "completion_tokens")

# Columns of files of one's own and how else they may be called, the first that is there.
_SPELLINGS: dict[Format, dict[str, tuple[str, ...]]] = {
    Format.csv: {names[0]: names[1:] for names in (TIMES, PROMPTS, OUTPUTS)},
    Format.windows: {"window_start": TIMES},
}

# What the header must have, in the order in which formats are tried.
COLUMNS = {
    Format.azure: ("timestamp", "contexttokens", "generatedtokens"),
    Format.burstgpt: ("timestamp", "model", "request tokens", "response tokens"),
    Format.servegen: ("model", "client", "window_start_s", "rate_per_s"),
    Format.csv: ("time", "prompt_tokens", "output_tokens"),
    Format.windows: ("window_start",),
}

ACCESS_LOG = re.compile(
    r'(?P<host>\S+) \S+ .*?\[(?P<time>[^\]]+)\] "(?P<request>(?:[^"\\]|\\.)*)" (?P<status>\d{3}) (?:\d+|-)'
)


def header_of(line: str, format: Format) -> list[str]:
    """The columns that a CSV file's first line names, in lower case, each as its format calls it."""
    names = [name.strip().lower() for name in next(csv.reader([line]), [])]
    for column, others in _SPELLINGS.get(format, {}).items():
        other = next((name for name in others if name in names), None)
        if column not in names and other is not None:
            names[names.index(other)] = column
    return names


def checked_header(file: TraceFile, line: str, format: Format) -> list[str]:
    """The same of the first line of a file that is said to be of this format. Raises TraceError where it is not."""
    header = header_of(line, format)
    missing = [name for name in COLUMNS[format] if name not in header]
    if missing:
        raise file.wrong(f"no {format} trace: column {', '.join(missing)} is missing")
    return header


def detect(path: Path) -> Format:
    """The format of a file. Raises TraceError, with the formats there are, where it is none of them."""
    first = next((line for line in TraceFile(path) if line.strip()), "")
    if first.lstrip().startswith("{"):
        return Format.jsonl
    if ACCESS_LOG.match(first):
        return Format.access_log
    for format, needed in COLUMNS.items():
        columns = header_of(first, format)
        if set(needed) <= set(columns) and (format is not Format.windows or set(WINDOW_VALUES) & set(columns)):
            return format
    expected = "; ".join(f"{format}: {','.join(needed)}" for format, needed in COLUMNS.items() if needed[1:])
    raise TraceError(
        f"{path}, line 1: {first.strip()[:120]!r} is the first line of no format that is known. Expected columns ("
        f"{expected}; windows: window_start and any of {', '.join(WINDOW_VALUES)}), an access log, or JSON lines"
    )
