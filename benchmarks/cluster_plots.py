"""Plots of `python -m benchmarks.cluster`, as PNG."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.cluster_rows import ABLATIONS, Compared, Runs, Sweep
from benchmarks.cluster_runs import CURVE, ENGINE_STARTS_S, Outcome
from simulator import plots, scenarios


def draw(runs: Runs, sweeps: Sequence[Sweep], folder: Path, command: str) -> None:
    """Writes them. The command, with its seed, stands below each."""
    compared = Compared(runs)
    folder.mkdir(parents=True, exist_ok=True)
    save = functools.partial(_save, folder, command)
    for sweep in sweeps:
        rates = [setting.rate_per_s for setting in sweep.settings]
        curves = _competitors(compared, sweep)
        name = sweep.name.replace(" ", "-")
        tails = {who: (rates, [run.p99 for run in line]) for who, line in curves.items()}
        tails["floor: alone on idle instances"] = (rates, [run.floor_s for run in curves["ours"]])
        within = {who: (rates, [run.within for run in line]) for who, line in curves.items()}
        save(plots.lines("requests/s", "p99 time to first token (s)", tails, log_x=True, log_y=True), name, "p99")
        save(plots.lines("requests/s", "share within target", within, log_x=True), name, "within")
    usual = [s for s in sweeps[-1].settings if s.rate_per_s == scenarios.FINE_TUNES_PER_S]
    for setting in usual:
        at = sweeps[-1].settings.index(setting)
        save(
            _shares({who: line[at] for who, line in _competitors(compared, sweeps[-1]).items()}),
            "fine-tunes",
            "ttft",
        )
        ablations = {name: runs[setting, name] for name in ("ours", *ABLATIONS) if (setting, name) in runs}
        save(_shares(ablations), "fine-tunes", "ablations")


def _competitors(compared: Compared, sweep: Sweep) -> dict[str, list[Outcome]]:
    settings = sweep.settings
    lines = {
        "ours": [compared.of(s, "ours") for s in settings],
        "published rule": [compared.of(s, "published") for s in settings],
        "static sharing": [compared.of(s, compared.best_static(s)) for s in settings],
        "our planner, told the future": [compared.of(s, "told the future") for s in settings],
    }
    for start_s in (0.0, *ENGINE_STARTS_S):
        name = compared.best_autoscaling(settings, start_s)
        lines[f"autoscaling, engine start {start_s:g} s"] = [compared.of(s, name) for s in settings]
    return lines


def _shares(runs: Mapping[str, Outcome]) -> Figure:
    """The share of requests that waited longer than so many seconds."""
    above = 1 - np.array(CURVE) / 100
    return plots.lines(
        "time to first token (s)",
        "share of requests above it",
        {name: (run.ttft_s, above.tolist()) for name, run in runs.items()},
        log_x=True,
        log_y=True,
    )


def _save(folder: Path, command: str, figure: Figure, *name: str) -> None:
    figure.text(0.005, 0.005, command, fontsize=5, color="grey")
    figure.savefig(folder / f"cluster-{'-'.join(name)}.png", dpi=120)
