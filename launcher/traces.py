"""Traffic to replay: reading Azure's trace format, making traffic up, scaling it, and giving it to models in turns."""

from __future__ import annotations

import csv
import gzip
import io
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


class TraceError(ValueError):
    """A trace file cannot be read; says where and why."""


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at_s: float  # since the trace's begin
    prompt_tokens: int
    output_tokens: int
    model: str = ""


def read_azure(path: Path) -> list[Arrival]:
    """Reads a trace in the format of Azure's public LLM traces, gzipped or not, in order of time.

    The first request is at 0 s. Raises TraceError where the file is missing or is not in that format.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except OSError as error:
        raise TraceError(f"the trace {path} cannot be read: {error.strerror or error}") from error
    except (EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TraceError(f"{path} is damaged, or no trace: {error}") from error
    rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, [])
    if [name.strip() for name in header] != _COLUMNS:
        raise TraceError(
            f"{path} is not in Azure's format: the first line must be {','.join(_COLUMNS)}, not {','.join(header)!r}"
        )
    read = [_parse(path, rows.line_num, row) for row in rows if row]
    if not read:
        raise TraceError(f"{path}: there are no requests in it")
    read.sort()
    begin = read[0][0]
    return [Arrival((moment - begin).total_seconds(), prompt, output) for moment, prompt, output in read]


def _parse(path: Path, line: int, row: list[str]) -> tuple[datetime, int, int]:
    try:
        timestamp, prompt, output = row
        whole, _, fraction = timestamp.partition(".")
        # Seven digits of a second, of which datetime takes six.
        moment = datetime.fromisoformat(f"{whole}.{fraction[:6].ljust(6, '0')}")
        return moment, int(prompt), int(output)
    except ValueError as error:
        raise TraceError(f"{path}, line {line}: {error}") from error


def generate(duration_s: float, rate_per_s: float, seed: int) -> list[Arrival]:
    """Traffic like that of a chat service: bursty arrivals (gamma gaps with a coefficient of variation of 2) and
    lognormal lengths (medians 930 tokens in, 130 out), `rate_per_s` on average, for `duration_s` seconds."""
    chance = random.Random(seed)
    shape = 1 / 2**2

    def arrivals() -> Iterator[Arrival]:
        at = 0.0
        while True:
            at += chance.gammavariate(shape, 1 / (rate_per_s * shape))
            if at >= duration_s:
                return
            yield Arrival(at, round(chance.lognormvariate(6.83, 0.8)) + 1, round(chance.lognormvariate(4.87, 0.9)) + 1)

    return list(arrivals())


@dataclass(frozen=True)
class Scale:
    """How to fit a trace to the machine at hand."""

    duration_s: float  # of the replay
    start_s: float = 0.0  # of the trace: what comes before is left out
    time: float = 1.0  # seconds of replay per second of trace
    tokens: float = 1.0  # tokens of replay per token of trace
    max_prompt_tokens: int = 1 << 30
    max_output_tokens: int = 1 << 30

    def apply(self, trace: Iterable[Arrival]) -> list[Arrival]:
        """The part of the trace that fills the duration, scaled. Lengths are at least 1."""
        return [
            replace(
                arrival,
                at_s=(arrival.at_s - self.start_s) * self.time,
                prompt_tokens=_within(arrival.prompt_tokens * self.tokens, self.max_prompt_tokens),
                output_tokens=_within(arrival.output_tokens * self.tokens, self.max_output_tokens),
            )
            for arrival in trace
            if 0 <= (arrival.at_s - self.start_s) * self.time < self.duration_s
        ]


def _within(tokens: float, most: int) -> int:
    return max(1, min(round(tokens), most))


@dataclass(frozen=True)
class Rotation:
    """Models that take turns: of each period of `period_s` seconds, each has an equal share, in order. The trace begins
    `offset_s` seconds into a period."""

    models: Sequence[str]
    period_s: float
    offset_s: float = 0.0

    def model_at(self, at_s: float) -> str:
        """Whose turn it is."""
        return self.models[int((at_s + self.offset_s) % self.period_s / self.period_s * len(self.models))]

    def apply(self, trace: Iterable[Arrival]) -> list[Arrival]:
        """The same requests, each with its model."""
        return [replace(arrival, model=self.model_at(arrival.at_s)) for arrival in trace]
