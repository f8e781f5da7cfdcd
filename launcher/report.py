"""What a replay showed, in numbers and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher.replay import Outcome

STATES = ("active", "warm", "warming", "cold")


@dataclass(frozen=True)
class Latency:
    """Requests that found their model in one state, and their times to the first token, in seconds."""

    requests: int
    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True)
class Report:
    """The figures of one replay."""

    requests: int
    lost: int
    resumed: int  # answered in full, although an instance was lost on the way
    duration_s: float  # from the first request sent to the last one's end
    prompt_tokens: int
    output_tokens: int
    by_state: dict[str, Latency]  # states that occurred
    errors: dict[str, int]  # of the lost ones

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens generated per second of the whole replay."""
        return self.output_tokens / self.duration_s if self.duration_s else 0.0

    @property
    def prewarm_hit_rate(self) -> float | None:
        """Of the requests that found no instance active, the share that found a warm replica. Those that found one
        still warming are not hits. None where every model was active each time."""
        counts = {state: latency.requests for state, latency in self.by_state.items() if state != "active"}
        return counts.get("warm", 0) / sum(counts.values()) if counts else None

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            **asdict(self),
            "output_tokens_per_s": self.output_tokens_per_s,
            "prewarm_hit_rate": self.prewarm_hit_rate,
        }


def summarise(outcomes: Sequence[Outcome]) -> Report:
    """The figures over all outcomes."""
    answered = [outcome for outcome in outcomes if not outcome.lost]
    times = {
        state: sorted(outcome.ttft_s for outcome in answered if outcome.found_state == state)
        for state in (*STATES, *sorted({outcome.found_state for outcome in answered} - set(STATES)))
    }
    return Report(
        requests=len(outcomes),
        lost=len(outcomes) - len(answered),
        resumed=sum(outcome.resumed > 0 for outcome in answered),
        duration_s=max((o.at_s + o.total_s for o in outcomes), default=0.0)
        - min((o.at_s for o in outcomes), default=0.0),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in answered),
        output_tokens=sum(outcome.output_tokens for outcome in answered),
        by_state={
            state: Latency(len(found), quantile(found, 0.5), quantile(found, 0.95), quantile(found, 0.99))
            for state, found in times.items()
            if found
        },
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.lost)),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value at `share` (0 to 1) of ascending values, interpolated linearly between neighbours."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def print_report(report: Report, console: Console) -> None:
    """The table for people."""
    table = Table()
    table.add_column("found")
    for heading in ("requests", "p50", "p95", "p99"):
        table.add_column(heading, justify="right")
    for state, latency in report.by_state.items():
        figures = (latency.p50_s, latency.p95_s, latency.p99_s)
        table.add_row(state, str(latency.requests), *(f"{1000 * figure:,.0f} ms" for figure in figures))
    if report.by_state:
        console.print("Time to the first token, by the state in which a request found its model:", soft_wrap=True)
        console.print(table)
    rate = report.prewarm_hit_rate
    lines = {
        "requests": f"{report.requests} in {report.duration_s:.1f} s",
        "requests lost": str(report.lost),
        "requests resumed": str(report.resumed),
        "tokens per second": f"{report.output_tokens_per_s:.1f} generated ({report.output_tokens} in all, "
        f"{report.prompt_tokens} of prompts)",
        "prewarm hit rate": "none: no answered request had found its model inactive"
        if rate is None
        else f"{100 * rate:.0f} % (warm / (warm + warming + cold))",
    }
    figures_table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in lines.items():
        figures_table.add_row(name, text)
    console.print(figures_table)
    for error, count in report.errors.items():
        console.print(f"  lost {count}: {error}", style="red", markup=False, soft_wrap=True)
