"""Readers of formats that hold requests. Each gives them in the file's order; failed ones are left out."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from warmserve.traces.fields import TYPICAL_OUTPUT_TOKENS, TYPICAL_PROMPT_TOKENS, number_of, time_of, tokens_of
from warmserve.traces.file import TraceFile
from warmserve.traces.formats import ACCESS_LOG, COLUMNS, OUTPUTS, PROMPTS, TIMES, Format, checked_header
from warmserve.traces.shapes import Request, TraceError

_LOG_TIME = "%d/%b/%Y:%H:%M:%S %z"


def azure(file: TraceFile) -> Iterator[Request]:
    """Azure's LLM traces. They name no model."""
    time, prompt, output = COLUMNS[Format.azure]
    return _table(file, Format.azure, time, None, prompt, output)


def burstgpt(file: TraceFile) -> Iterator[Request]:
    """BurstGPT's. A request without any response token failed, and is left out."""
    time, model, prompt, output = COLUMNS[Format.burstgpt]
    return (request for request in _table(file, Format.burstgpt, time, model, prompt, output) if request.output_tokens)


def table(file: TraceFile) -> Iterator[Request]:
    """Columns time, prompt_tokens, output_tokens, or as else they may be called, and perhaps model."""
    time, prompt, output = COLUMNS[Format.csv]
    return _table(file, Format.csv, time, "model", prompt, output)


def _table(
    file: TraceFile, format: Format, time: str, model: str | None, prompt: str, output: str
) -> Iterator[Request]:
    lines = iter(file)
    header = checked_header(file, next(lines, ""), format)
    width = len(header)
    time_at, prompt_at, output_at = header.index(time), header.index(prompt), header.index(output)
    model_at = header.index(model) if model in header else None
    try:
        for row in csv.reader(lines):
            if not row:
                continue
            if len(row) != width:
                raise file.wrong(f"{len(row)} values where the first line names {width} columns")
            yield Request(
                time_of(row[time_at]),
                row[model_at] if model_at is not None else "",
                tokens_of(row[prompt_at], prompt),
                tokens_of(row[output_at], output),
            )
    except TraceError:
        raise
    except (ValueError, csv.Error) as error:
        raise file.wrong(error) from error


def json_lines(file: TraceFile) -> Iterator[Request]:
    """A JSON object on each line, as gateways log them.

    time (or timestamp, ts, @timestamp, time_iso8601); model, if there are several; prompt_tokens (or input_tokens) and
    output_tokens (or completion_tokens), beside it or in `usage`. Lengths that are left out are taken as those of a
    typical conversation; where there is a `status`, only requests that succeeded (200 to 299) count.
    """
    for line in file:
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise TypeError(f"expected a JSON object, not {line.strip()[:60]!r}")
            if not 200 <= number_of(entry.get("status", 200), "status") < 300:
                continue
            yield _entry(entry)
        except (TypeError, ValueError) as error:
            raise file.wrong(error) from error


def _entry(entry: dict[str, Any]) -> Request:
    usage = entry.get("usage")
    lengths = {**entry, **usage} if isinstance(usage, dict) else entry
    time = _first(entry, TIMES)
    if time is None:
        raise ValueError(f"there is no time in it: expected one of {', '.join(TIMES)}")
    prompt, output = _first(lengths, PROMPTS), _first(lengths, OUTPUTS)
    model = entry.get("model", "")
    if not isinstance(model, str):
        raise TypeError(f"model: {model!r} is no name")
    return Request(
        time_of(time),
        model,
        TYPICAL_PROMPT_TOKENS if prompt is None else tokens_of(prompt, "prompt_tokens"),
        TYPICAL_OUTPUT_TOKENS if output is None else tokens_of(output, "output_tokens"),
    )


def _first(entry: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def access_log(file: TraceFile) -> Iterator[Request]:
    """A web server's log in Common or Combined Log Format.

    It tells when requests came, and neither their model nor their lengths: each POST that succeeded (200 to 299) counts
    as one request with the lengths of a typical conversation.
    """
    for line in file:
        if not line.strip():
            continue
        found = ACCESS_LOG.match(line)
        if found is None:
            raise file.wrong(f"{line.strip()[:80]!r} is not in Common or Combined Log Format")
        if not found["request"].startswith("POST ") or not found["status"].startswith("2"):
            continue
        try:
            moment = datetime.strptime(found["time"], _LOG_TIME)
        except ValueError as error:
            raise file.wrong(error) from error
        yield Request(moment.timestamp(), "", TYPICAL_PROMPT_TOKENS, TYPICAL_OUTPUT_TOKENS)
