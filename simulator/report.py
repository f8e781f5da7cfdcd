"""A what-if as one HTML file that needs nothing else, and as a table and JSON."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from simulator import plots
from simulator.late import causes
from simulator.results import Found, Results
from simulator.whatif import WhatIf

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; border-bottom: 1px solid #d8dee6; text-align: right }
td:first-child, th:first-child { text-align: left } img { max-width: 100%; height: auto }
.no { color: #a3261e } .quiet { color: #5b6b7c; font-size: 13px }
"""

Cells = Sequence[object]


def html(what_if: WhatIf, command: str) -> str:
    """The report. Plots are inside it, as PNG."""
    results = what_if.results
    parts = [
        "<h1>What this traffic needs</h1>",
        f"<p>{escape(headline(what_if))}</p>",
        _table(
            ("", "p50", "p90", "p95", "p99"),
            [("time to first token", *(_s(results.ttft(p)) for p in (50, 90, 95, 99)))],
        ),
        *(f"<p class=quiet>{escape(remark)}</p>" for remark in what_if.remarks),
    ]
    if len(what_if.tried) > 1:
        parts += ["<h2>GPUs and the target</h2>", _table(*gpus_table(what_if))]
        points = [trial for trial in what_if.tried if trial.results is not None]
        curves = {
            f"p{p}": ([t.gpus for t in points], [t.results.ttft(p) for t in points if t.results]) for p in (50, 95, 99)
        }
        parts.append(
            _image(plots.lines("GPUs", "time to first token (s)", curves, log_y=True), "Time to first token by GPUs")
        )
    parts += [
        "<h2>Why the latest hundredth was late</h2>",
        _table(*late_table(results)),
        f"<h2>Models, on {results.gpus} GPUs</h2>",
        _table(*models_table(results)),
        "<p class=quiet>Active, warm, cold: how many requests found an instance, a warm replica (perhaps in part), or "
        "neither. GPU-hours: those in which an instance was there, times its GPUs; busy: in which it computed.</p>",
        *(
            f"<h2>{escape(title)}</h2>{_image(figure, title)}"
            for title, figure in (
                ("Requests", plots.arrivals(results)),
                ("Time to the first token", plots.ttft_over_time(results)),
                ("Tail of the time to the first token", plots.ttft_shares({results.policy: results})),
                ("What requests found", plots.found(results)),
                ("GPU-hours", plots.gpu_hours(results)),
            )
        ),
        f"<p class=quiet>Made by: <code>{escape(command)}</code>. Simulated: GPUs are H100 80GB with the measured step "
        "times of WarmServe's engine, and the planner is the one that serves. Measure before you promise.</p>",
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>WarmServe: what-if</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def headline(what_if: WhatIf) -> str:
    """The answer in a sentence or two."""
    results = what_if.results
    hours = float(results.arrival_s[-1]) / 3600
    text = (
        f"{len(results.arrival_s):,} requests to {len(results.models)} models in {hours:,.1f} h, on "
        f"{results.gpus} GPUs: 95 % had their first token within {_s(results.ttft(95))}, 99 % within "
        f"{_s(results.ttft(99))}."
    )
    if unserved := int((~results.served).sum()):
        text += f" {unserved:,} were not served in time."
    if missed := what_if.tried[0].missed:
        told = _few([f"{name} ({_s(p95)} for 95 %)" for name, p95 in missed])
        text += f" Above their target: {told}."
    if what_if.target_s is not None:
        target = f"95 % of each model's requests within {_s(what_if.target_s)}"
        if what_if.needed is None:
            text += (
                f" No number of GPUs up to {max(trial.gpus for trial in what_if.tried)} reaches the target ({target})."
            )
        else:
            text += f" The target ({target}) needs {what_if.needed} GPUs."
    return text


def gpus_table(what_if: WhatIf) -> tuple[Cells, list[Cells]]:
    """Header and rows: each number of GPUs that was tried."""
    rows: list[Cells] = []
    for trial in sorted(what_if.tried, key=lambda trial: trial.gpus):
        if trial.results is None:
            rows.append((trial.gpus, "-", "-", "-", f"no: {trial.impossible}"))
            continue
        verdict = "yes" if not trial.missed else "no: " + _few([f"{name} {_s(p95)}" for name, p95 in trial.missed])
        rows.append((trial.gpus, *(_s(trial.results.ttft(p)) for p in (50, 95, 99)), verdict))
    return ("GPUs", "p50", "p95", "p99", "target met"), rows


def models_table(results: Results) -> tuple[Cells, list[Cells]]:
    """Header and rows: each model's requests, times, what requests found, wakes and GPU-hours; the busiest first."""
    header = ("model", "requests", "p50", "p95", "p99", "active", "warm", "cold", "wakes", "GPU-hours", "busy")
    totals = np.bincount(results.model, minlength=len(results.models))
    rows: list[Cells] = []
    for at in np.argsort(-totals, kind="stable").tolist():
        name, own = results.models[at], results.found[results.model == at]
        warm = np.isin(own, (Found.WARM, Found.PARTIAL)).sum()
        times = [_s(results.ttft(p, name)) if totals[at] else "" for p in (50, 95, 99)]
        hours = [f"{seconds[at] / 3600:,.2f}" for seconds in (results.active_gpu_s, results.busy_gpu_s)]
        there = np.isin(own, (Found.ACTIVE, Found.OPEN, Found.WAKING)).sum()
        cold = (own == Found.COLD).sum()
        counts = (f"{count:,}" for count in (there, warm, cold, results.wakes_by_model[at].all))
        rows.append((name, f"{totals[at]:,}", *times, *counts, *hours))
    return header, rows


def late_table(results: Results) -> tuple[Cells, list[Cells]]:
    """Header and rows: why the latest hundredth of the requests waited, the commonest cause first."""
    header = ("when the request came, the model was ...", "requests", "time to first token, median")
    return header, [(cause.text, f"{cause.requests:,}", _s(cause.ttft_s)) for cause in causes(results)]


def document(what_if: WhatIf, command: str) -> dict[str, Any]:
    """The same for programs."""
    return {
        "command": command,
        "target_ttft_s": what_if.target_s,
        "gpus_needed": what_if.needed,
        "remarks": list(what_if.remarks),
        "tried": [
            {
                "gpus": trial.gpus,
                "impossible": trial.impossible or None,
                "ttft_s": None if trial.results is None else trial.results.summary()["ttft_s"],
                "missed": {name: (p95 if np.isfinite(p95) else None) for name, p95 in trial.missed},
            }
            for trial in what_if.tried
        ],
        "result": what_if.results.summary(),
        "late": [
            {"why": c.text, "requests": c.requests, "ttft_s": c.ttft_s if np.isfinite(c.ttft_s) else None}
            for c in causes(what_if.results)
        ],
        "gpu_hours": {
            name: float(seconds) / 3600
            for name, seconds in zip(what_if.results.models, what_if.results.active_gpu_s, strict=True)
        },
    }


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _s(seconds: float) -> str:
    if not np.isfinite(seconds):
        return "never"
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _table(header: Cells, rows: Iterable[Cells]) -> str:
    def line(cells: Cells, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _image(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{content}">'
