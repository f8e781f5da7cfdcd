"""Plots of runs. Each gives a matplotlib Figure that nothing else holds on to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulator.results import Found, Results

_STATES = {
    Found.ACTIVE: "active",
    Found.OPEN: "being woken, and open",
    Found.WAKING: "being woken",
    Found.WARM: "warm",
    Found.PARTIAL: "partly resident",
}
_SIZE = (8.0, 3.6)
_MOST_MODELS = 12  # with a line of their own


def arrivals(results: Results, bins: int = 200) -> Figure:
    """Requests per second over time, of the busiest models and of all others together, one above the other."""
    figure, axes = _axes("time (h)", "requests/s")
    edges = np.linspace(0.0, max(float(results.arrival_s[-1]), 1.0), bins + 1)
    counts = np.array(
        [np.histogram(results.arrival_s[results.model == at], edges)[0] for at in range(len(results.models))]
    )
    order = np.argsort(-counts.sum(axis=1), kind="stable")
    told = counts[order[:_MOST_MODELS]]
    names = [results.models[at] for at in order[:_MOST_MODELS]]
    if len(order) > _MOST_MODELS:
        told = np.vstack((told, counts[order[_MOST_MODELS:]].sum(axis=0)))
        names.append(f"{len(order) - _MOST_MODELS} others")
    axes.stackplot(edges[:-1] / 3600, told / np.diff(edges), labels=names, step="post")
    axes.set_xlim(0, edges[-1] / 3600)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def ttft_over_time(results: Results, bins: int = 60) -> Figure:
    """Median, p95 and p99 of the time to the first token, of requests that arrived in each span of time."""
    figure, axes = _axes("time (h)", "time to first token (s)")
    edges = np.linspace(0.0, max(float(results.arrival_s[-1]), 1.0), bins + 1)
    at = np.clip(np.digitize(results.arrival_s, edges) - 1, 0, bins - 1)
    for percentile in (50, 95, 99):
        values = [
            np.percentile(chosen, percentile, method="inverted_cdf")
            if (chosen := results.ttft_s[at == b]).size
            else np.nan
            for b in range(bins)
        ]
        axes.step(edges[:-1] / 3600, values, where="post", label=f"p{percentile}")
    axes.set_yscale("log")
    axes.set_xlim(0, edges[-1] / 3600)
    axes.legend(fontsize=8)
    return figure


def ttft_shares(runs: Mapping[str, Results]) -> Figure:
    """Share of requests above each time to the first token, of each run: tails are what differs."""
    figure, axes = _axes("time to first token (s)", "share of requests above it")
    for name, results in runs.items():
        served = np.sort(results.ttft_s[np.isfinite(results.ttft_s)])
        if served.size:
            shares = 1 - np.arange(1, served.size + 1) / len(results.ttft_s)
            axes.step(served, np.maximum(shares, 1 / len(results.ttft_s)), where="post", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure


def found(results: Results) -> Figure:
    """The state in which each model's requests found it, as shares, the busiest models first."""
    figure, axes = _axes("", "share of requests")
    totals = np.bincount(results.model, minlength=len(results.models))
    order = [int(at) for at in np.argsort(-totals, kind="stable") if totals[at]]
    names = [results.models[at] for at in order]
    bottom = np.zeros(len(order))
    for state, label in (*_STATES.items(), (Found.COLD, "cold")):
        shares = np.array([np.mean(results.found[results.model == at] == state) for at in order])
        axes.bar(names, shares, bottom=bottom, label=label)
        bottom += shares
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def gpu_hours(results: Results) -> Figure:
    """Hours of GPUs that each model's instances took, of which they computed."""
    figure, axes = _axes("", "GPU-hours")
    order = np.argsort(-results.active_gpu_s, kind="stable")
    names = [results.models[at] for at in order]
    axes.bar(names, results.active_gpu_s[order] / 3600, label="an instance was there")
    axes.bar(names, results.busy_gpu_s[order] / 3600, label="it computed")
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    axes.legend(fontsize=8)
    return figure


def lines(
    x: str,
    y: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Named curves of points; what is not finite leaves a gap."""
    figure, axes = _axes(x, y)
    for name, (across, values) in curves.items():
        axes.plot(across, values, marker="o", markersize=3, label=name)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes
