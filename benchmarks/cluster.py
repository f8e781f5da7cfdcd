"""Whole clusters in virtual time: ours beside autoscaling, static sharing, dedicated GPUs, the published rule, oracle.

    python -m benchmarks.cluster [--json FILE] [--plots FOLDER] [--keep FOLDER] [--quick] [--processes N] [--seed 1]
    python -m benchmarks.cluster --day ...    the whole day alone: how long a simulated day takes

The paper's setting (two nodes of eight GPUs; Llama-2 7B twice, 13B over two, 70B over four; Azure's arrivals with
power-law popularity) at rates swept over two orders of magnitude, and beyond it sixty fine-tunes with ServeGen's
clients on the same GPUs: a sweep of rates, half an hour of days 9 and 10 with learning on all time before, a whole
day, models that all fit at once, a flash crowd, a silent forecaster, and ours with parts taken away.
simulator/scenarios.py tells the settings, simulator/policies the policies, docs/simulator.md how each was tuned.

Published engine starts: a vLLM cold start of an 8B takes 59 s by its makers' figure (on a B200), of which weights are
4, so 55 s; 2 and 10 s lie around its waking of sleeping larger models, 3 to 6 s. A rate is within target when 99 % of
its requests have their first token within 10 times, and each further token within 4 times, what an idle instance takes;
the highest such rate is sought by halving between the swept ones. Traces are read from $WARMSERVE_TRACES or
../shared/traces. With --keep, what was run is kept there, and not run again while the code is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.cluster_plots import draw
from benchmarks.cluster_rows import (
    ABLATIONS,
    LED,
    STATIC,
    Compared,
    Sweep,
    beside,
    next_rate,
    policies,
    run_lines,
    run_values,
    shares,
    sweep_rows,
)
from benchmarks.cluster_runs import ENGINE_STARTS_S, Case, Outcome, Runner, Setting, autoscaling
from benchmarks.report import Row, document, table
from simulator import scenarios

RATES = (0.5, 1, 2, 4, 8, 16, 32)
TUNE_RATES = tuple(scenarios.FINE_TUNES_PER_S * factor for factor in (0.25, 0.5, 1))
MOMENTS = ((8, 10.0), (9, 14.0), (10, 20.0))  # days and hours of the fine-tunes
WINDOWS_S = (1200.0,)  # besides 600, the traces' own
HALVINGS = 2  # of the range in which a competitor's highest rate within target lies
DAY_S = 300.0  # a simulated day of sixty models should not take longer, plans included

OURS = ("ours", "published", "told the future")
COMPARED = (*OURS, *STATIC, *(name for start in (0.0, *ENGINE_STARTS_S) for name in autoscaling(start)))
ON_A_DAY = ("ours", *STATIC[:1])

Run = Callable[[Iterable[tuple[Setting, str]]], None]


def settings(quick: bool) -> tuple[list[Setting], list[Setting], list[Setting], list[Setting]]:
    """The paper's rates, the fine-tunes' rates, the fine-tunes' moments, and variations of the first moment."""
    at, hours = MOMENTS[0], 0.2 if quick else 1.0
    paper = [Setting("paper", rate) for rate in (RATES[2:5] if quick else RATES)]
    tunes = [Setting("fine-tunes", rate, at, hours) for rate in (TUNE_RATES[2:3] if quick else TUNE_RATES)]
    moments = [Setting("fine-tunes", scenarios.FINE_TUNES_PER_S, at, 0.5) for at in MOMENTS[1:]]
    usual = Setting("fine-tunes", scenarios.FINE_TUNES_PER_S, at, hours)
    others = [
        replace(usual, kind=kind, hours=hours / 2) for kind in ("small fine-tunes", "flash crowd", "silent forecaster")
    ]
    return paper, tunes, [] if quick else moments, others


def sweeps(quick: bool) -> list[Sweep]:
    """The two of which all that is asked is told."""
    paper, tunes, *_ = settings(quick)
    return [Sweep("paper", tuple(paper)), Sweep("fine-tunes", tuple(tunes))]


def run_everything(run: Run, done: dict[tuple[Setting, str], Outcome], quick: bool) -> Iterator[None]:
    """All that is compared, part by part: sweeps, then closer to where each competitor's requests come late, then
    variations. After each part there are `rows` of all that was run."""
    paper, tunes, moments, others = settings(quick)
    run((setting, policy) for setting in (*paper, *tunes) for policy in COMPARED)
    yield
    for _ in range(0 if quick else HALVINGS):
        compared, wanted = Compared(done), []
        for sweep in sweeps(quick):
            for who in LED:
                rate = next_rate(shares(compared, sweep, who))
                if rate is not None:
                    setting = replace(sweep.settings[0], rate_per_s=rate)
                    wanted += [(setting, policy) for policy in policies(compared, sweep, who)]
        run(wanted)
    yield
    best = Compared(done).best_autoscaling(tunes, 0.0)
    usual = next(s for s in tunes if s.rate_per_s == scenarios.FINE_TUNES_PER_S)
    run((usual, policy) for policy in ABLATIONS)
    run((setting, policy) for setting in others for policy in (*OURS, *STATIC, best))
    yield
    run((replace(usual, window_s=window_s), "ours") for window_s in WINDOWS_S)
    run((setting, policy) for setting in moments for policy in (*OURS, *STATIC, best))
    yield
    if not quick:
        yield from run_day(run)


def run_day(run: Run) -> Iterator[None]:
    """A whole day of sixty models on sixteen GPUs."""
    run((_day(), policy) for policy in ON_A_DAY)
    yield


def _day() -> Setting:
    return Setting("fine-tunes", scenarios.FINE_TUNES_PER_S, (scenarios.FIRST_TEST_DAY, 0.0), 24.0)


def rows(done: dict[tuple[Setting, str], Outcome], quick: bool) -> list[Row]:
    """What the issue asks of each sweep, then what else was compared, as far as it was run."""
    compared = Compared(done)
    _, tunes, moments, others = settings(quick)
    best = compared.best_autoscaling(tunes, 0.0)
    found = [row for sweep in sweeps(quick) for row in sweep_rows(compared, sweep)]
    for setting in (*moments, *others):
        if (setting, "ours") in done:
            static = compared.best_static(setting)
            found += beside(compared, setting, ("published", "told the future", static, best))
    usual = next(s for s in tunes if s.rate_per_s == scenarios.FINE_TUNES_PER_S)
    found += beside(compared, usual, [policy for policy in ABLATIONS if (usual, policy) in done])
    for window_s in WINDOWS_S:
        other = done.get((replace(usual, window_s=window_s), "ours"))
        if other is not None:
            what = f"p99 TTFT, windows of {window_s:g} s"
            found.append(Row(what, other.p99, "s", compared.of(usual, "ours").p99, "ours, 600 s"))
    return [*found, *day_rows(done)]


def day_rows(done: dict[tuple[Setting, str], Outcome]) -> list[Row]:
    """Of the whole day, if it was run: what a policy made of it, and how long that took."""
    day = done.get((_day(), "ours"))
    if day is None:
        return []
    what = f"seconds of one core for a day of {day.requests:,} requests"
    return [
        *beside(Compared(done), _day(), ON_A_DAY[1:]),
        Row(f"{what}, plans included", day.cpu_s, "s", target=DAY_S),
        Row("  of them plans", day.plan_s, "s"),
    ]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw into this folder")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what was run there, and go on from it")
    less = parser.add_mutually_exclusive_group()
    less.add_argument("--quick", action="store_true", help="three rates, twelve minutes of fine-tunes")
    less.add_argument("--day", action="store_true", help="the whole day of fine-tunes alone, without plots")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time (all cores)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.exit(2, f"--processes {arguments.processes}: at least one is needed\n")
    traces = Path(os.environ.get("WARMSERVE_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces")
    needed = ("azure_2023_conv.csv.gz", "azure_2023_code.csv.gz", "servegen_windows.csv.gz", "servegen_lengths.csv.gz")
    if missing := [name for name in needed if not (traces / name).is_file()]:
        parser.exit(2, f"{traces} lacks {', '.join(missing)}: set WARMSERVE_TRACES to the folder of the traces\n")
    done: dict[tuple[Setting, str], Outcome] = {}
    runner = Runner(arguments.processes, arguments.keep)

    def run(wanted: Iterable[tuple[Setting, str]]) -> None:
        cases = [Case(*one, arguments.seed, traces) for one in dict.fromkeys(wanted) if one not in done]
        for number, (case, outcome) in enumerate(runner.run(cases), 1):
            done[case.setting, case.policy] = outcome
            told = f"{case.setting.name}: {case.policy}, {outcome.cpu_s:.0f} s"
            print(f"{number}/{len(cases)} {told}", file=sys.stderr, flush=True)

    for _ in run_day(run) if arguments.day else run_everything(run, done, arguments.quick):
        tell(dict(sorted(done.items(), key=lambda item: repr(item[0]))), arguments)  # in whatever order they ended


def tell(done: dict[tuple[Setting, str], Outcome], arguments: argparse.Namespace) -> None:
    """Prints what there is, and writes and draws it where that was asked for."""
    result = day_rows(done) if arguments.day else rows(done, arguments.quick)
    print(run_lines(done), table(result), sep="\n\n", flush=True)
    if arguments.plots is not None and not arguments.day:
        draw(done, sweeps(arguments.quick), arguments.plots, command(arguments))
    if arguments.json is not None:
        write(arguments.json, done, result, command(arguments), arguments.seed)


def command(arguments: argparse.Namespace) -> str:
    """What gives the same figures again, wherever they are to lie."""
    part = "--day" if arguments.day else "--plots FOLDER" + (" --quick" if arguments.quick else "")
    return f"python -m benchmarks.cluster --json FILE {part} --seed {arguments.seed}"


def write(file: Path, done: dict[tuple[Setting, str], Outcome], result: Sequence[Row], command: str, seed: int) -> None:
    """The JSON file: rows, and each run's figures."""
    content = {**document("cluster", result), "command": command, "seed": seed, "runs": run_values(done, seed)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
