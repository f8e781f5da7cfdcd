"""Whole clusters in virtual time: ours beside autoscaling, static sharing, dedicated GPUs, the published rule, oracle.

    python -m benchmarks.cluster [--json FILE] [--plots FOLDER] [--quick] [--processes N] [--seed 1]

The paper's setting (two nodes of eight GPUs; Llama-2 7B twice, 13B over two, 70B over four; Azure's arrivals with
power-law popularity) at rates swept over two orders of magnitude, and beyond it sixty fine-tunes with ServeGen's
clients, half an hour of each of days 8 to 10 with learning on all time before, a flash crowd, a silent forecaster, and
ours with parts taken away. simulator/scenarios.py tells the settings, simulator/policies the policies.

Published engine starts: a vLLM cold start of an 8B takes 59 s by its makers' figure (on a B200), of which weights are
4, so 55 s; 2 and 10 s lie around its waking of sleeping larger models, 3 to 6 s. A rate is within target when 99 % of
its requests have their first token within 10 times, and each further token within 4 times, what an idle instance takes.
Traces are read from $WARMSERVE_TRACES or ../shared/traces. About half an hour on two quiet cores; --quick takes a
few, and shows that all of it runs, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster_runs import ENGINE_STARTS_S, Case, Done, Setting, run_all
from benchmarks.report import Row, document, table
from simulator import plots, scenarios
from simulator.results import Results

RATES = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
COMPARED = (
    "ours",
    "published",
    "autoscaling",
    *(f"autoscaling, engine {start:g} s" for start in ENGINE_STARTS_S),
    "static",
    "dedicated",
    "oracle",
)
ABLATIONS = ("no forecast", "published predictor", "published placement", "no lending", "no partial residency")
MOMENTS = ((8, 10.0), (9, 14.0), (10, 20.0))  # days and hours of the fine-tunes
WINDOWS_S = (300.0, 1200.0)  # besides 600
WITHIN = 0.99

Runs = dict[tuple[Setting, str], Done]


def settings(quick: bool) -> tuple[list[Setting], list[Setting], list[Setting]]:
    """The paper's rates, the fine-tunes' moments, and the latter's variations."""
    rates = RATES[2:7:2] if quick else RATES
    moments = MOMENTS[:1] if quick else MOMENTS
    hours = 0.1 if quick else 0.5
    paper = [Setting("paper", rate) for rate in rates]
    tunes = [Setting("fine-tunes", scenarios.FINE_TUNES_PER_S, moment, hours) for moment in moments]
    others = [
        Setting(kind, scenarios.FINE_TUNES_PER_S, moments[0], hours) for kind in ("flash crowd", "silent forecaster")
    ]
    return paper, tunes, others


def cases(quick: bool, seed: int, traces: Path) -> list[Case]:
    """All runs, those that share a workload one after another."""
    paper, tunes, others = settings(quick)
    wanted = [(setting, policy) for setting in paper for policy in COMPARED]
    wanted += [(setting, policy) for setting in tunes for policy in COMPARED]
    wanted += [(tunes[0], policy) for policy in ABLATIONS]
    wanted += [(setting, policy) for setting in others for policy in ("ours", "published", "oracle")]
    wanted += [(_with_window(tunes[0], window_s), "ours") for window_s in (WINDOWS_S[1:] if quick else WINDOWS_S)]
    return [Case(setting, policy, seed, traces) for setting, policy in wanted]


def rows(done: Runs, quick: bool) -> list[Row]:
    """What the issue asks, then what else was compared."""
    paper, tunes, others = settings(quick)
    result = []
    for start in ENGINE_STARTS_S:
        ratios = [_ratio(done, setting, f"autoscaling, engine {start:g} s", "ours") for setting in paper]
        best = max(range(len(ratios)), key=lambda at: ratios[at])
        where = f"best rate ({paper[best].rate_per_s:g}/s)"
        what = f"p99 TTFT, autoscaling with an engine start of {start:g} s / ours, {where}"
        result.append(_times(what, ratios[best], 50.8))
    for name, group in (("the paper's rates", paper), ("the fine-tunes' moments", tunes)):
        ratios = [_ratio(done, setting, "autoscaling", "ours") for setting in group]
        what = f"p99 TTFT, autoscaling with our engine's start / ours, median over {name}"
        result.append(_times(what, float(np.median(ratios)), 5.0))
    good = {policy: goodput(done, paper, policy) for policy in ("ours", "static", "published", "oracle")}
    for policy, rate in good.items():
        result.append(Row(f"paper: requests within target, {policy}", rate, "requests/s"))
    for policy, target in (("static", 2.5), ("published", 1.1)):
        if good[policy]:
            result.append(_times(f"the same, ours / {policy}", good["ours"] / good[policy], target))
    everywhere = [*paper, *tunes]
    for policy, target in (("published", 1.0), ("oracle", 2.0)):
        worst = max(_ratio(done, setting, "ours", policy) for setting in everywhere)
        result.append(Row(f"p99 TTFT, ours / {policy}, worst setting", worst, "times", target=target))
        median = float(np.median([_ratio(done, setting, "ours", policy) for setting in everywhere]))
        result.append(Row(f"p99 TTFT, ours / {policy}, median over settings", median, "times"))
    for policy in (*COMPARED[1:], *ABLATIONS):
        group = tunes if policy in COMPARED else tunes[:1]
        result += _beside(done, group, policy, "fine-tunes" if policy in COMPARED else "ablation")
    result += [
        row
        for setting in others
        for policy in ("published", "oracle")
        for row in _beside(done, [setting], policy, setting.kind)
    ]
    for window_s in WINDOWS_S[1:] if quick else WINDOWS_S:
        other = done[_with_window(tunes[0], window_s), "ours"].results.ttft(99)
        usual = done[tunes[0], "ours"].results.ttft(99)
        result.append(Row(f"p99 TTFT, ours, windows of {window_s:g} s", other, "s", usual, "ours, windows of 600 s"))
    return result


def goodput(done: Runs, paper: Sequence[Setting], policy: str) -> float:
    """Requests per second up to which 99 % are within target: between the last rate that is and the first that is not,
    where a straight line over the rate's logarithm crosses; 0 where the lowest is not within."""
    before: tuple[float, float] | None = None
    for setting in paper:
        share = done[setting, policy].results.within()
        if share < WITHIN:
            if before is None:
                return 0.0
            rate, kept = before
            part = (kept - WITHIN) / (kept - share)
            return float(rate * (setting.rate_per_s / rate) ** part)
        before = setting.rate_per_s, share
    return before[0] if before else 0.0


def _with_window(setting: Setting, window_s: float) -> Setting:
    return Setting(setting.kind, setting.rate_per_s, setting.at, setting.hours, window_s)


def _ratio(done: Runs, setting: Setting, above: str, below: str) -> float:
    """Of the 99th percentiles; what was not served counts as the longest that anything waited."""
    return _p99(done[setting, above].results) / _p99(done[setting, below].results)


def _p99(results: Results) -> float:
    p99 = results.ttft(99)
    return p99 if np.isfinite(p99) else results.duration_s


def _times(what: str, value: float, target: float | None) -> Row:
    return Row(what, value, "times", target=target, more=True)


def _beside(done: Runs, group: Sequence[Setting], policy: str, where: str) -> list[Row]:
    """p99 and share within target of a policy over all runs of a group, beside ours."""
    ttft, within = {}, {}
    for name in (policy, "ours"):
        runs = [_run_of(done, setting, name) for setting in group]
        ttft[name] = float(np.percentile(np.concatenate([run.ttft_s for run in runs]), 99, method="inverted_cdf"))
        within[name] = float(np.mean([run.within() for run in runs]))
    found = []
    if np.isfinite(ttft[policy]):
        found.append(Row(f"{where}: p99 TTFT, {policy}", ttft[policy], "s", ttft["ours"], "ours"))
    found.append(Row(f"{where}: within target, {policy}", within[policy], "of requests", within["ours"], "ours"))
    return found


def _run_of(done: Runs, setting: Setting, policy: str) -> Results:
    return done[setting, policy].results


def runs_table(done: Runs) -> str:
    """Each run in a line."""
    header = f"{'setting':44} {'policy':26} {'p50':>7} {'p99':>8} {'within':>7} {'unserved':>8}"
    lines = [f"{header} {'wakes w/p/c':>16} {'TB':>6}"]
    for (setting, policy), run in done.items():
        results, wakes = run.results, run.results.wakes
        name = setting.name + ("" if setting.window_s == 600 else f", windows {setting.window_s:g} s")
        lines.append(
            f"{name:44} {policy:26} {results.ttft(50):7.3f} {results.ttft(99):8.3f} {results.within():7.4f} "
            f"{(~results.served).mean():8.4f} {f'{wakes.warm}/{wakes.partial}/{wakes.cold}':>16} "
            f"{sum(results.copied_bytes.values()) / 1e12:6.1f}"
        )
    return "\n".join(lines)


def draw(done: Runs, folder: Path, quick: bool) -> None:
    """Writes the plots as PNG."""
    paper, tunes, _ = settings(quick)
    folder.mkdir(parents=True, exist_ok=True)
    rates = [setting.rate_per_s for setting in paper]
    tails = {policy: (rates, [done[s, policy].results.ttft(99) for s in paper]) for policy in COMPARED}
    shares = {policy: (rates, [done[s, policy].results.within() for s in paper]) for policy in COMPARED}
    figures = {
        "paper-p99": plots.lines("requests/s", "p99 time to first token (s)", tails, log_y=True),
        "paper-within": plots.lines("requests/s", "share of requests within target", shares),
        "fine-tunes-ttft": plots.ttft_shares({policy: done[tunes[0], policy].results for policy in COMPARED}),
        "fine-tunes-found": plots.found(done[tunes[0], "ours"].results),
        "fine-tunes-arrivals": plots.arrivals(done[tunes[0], "ours"].results),
        "ablations": plots.ttft_shares({name: done[tunes[0], name].results for name in ("ours", *ABLATIONS)}),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"cluster-{name}.png", dpi=120)


def whole_document(done: Runs, result: Sequence[Row], seed: int) -> dict[str, Any]:
    """The JSON file: rows, and each run's figures."""
    runs = []
    for (setting, policy), run in done.items():
        summary = run.results.summary()
        del summary["models"]
        runs.append(
            {"setting": setting.name, "window_s": setting.window_s, "says": run.says, **summary, "policy": policy}
        )
    return {**document("cluster", result), "seed": seed, "runs": runs}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw into this folder")
    parser.add_argument("--quick", action="store_true", help="three rates, six minutes of fine-tunes")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time (all cores)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    traces = Path(os.environ.get("WARMSERVE_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces")
    needed = ("azure_2023_conv.csv.gz", "azure_2023_code.csv.gz", "servegen_windows.csv.gz", "servegen_lengths.csv.gz")
    if missing := [name for name in needed if not (traces / name).is_file()]:
        parser.exit(2, f"{traces} lacks {', '.join(missing)}: set WARMSERVE_TRACES to the folder of the traces\n")
    wanted = cases(arguments.quick, arguments.seed, traces)
    done: Runs = {}
    for number, run in enumerate(run_all(wanted, arguments.processes), 1):
        done[run.case.setting, run.case.policy] = run
        print(
            f"{number}/{len(wanted)} {run.case.setting.name}: {run.case.policy}, {run.results.wall_seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    result = rows(done, arguments.quick)
    print(runs_table(done))
    print()
    print(table(result))
    if arguments.plots is not None:
        draw(done, arguments.plots, arguments.quick)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(whole_document(done, result, arguments.seed), indent=1) + "\n")
        print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
