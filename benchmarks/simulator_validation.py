"""Whether the simulator tells the truth: the same traffic through the real system on this machine, and through it.

    python -m benchmarks.simulator_validation [--json FILE] [--duration 600] [--trace FILE]

The real system is `warmserve up`'s: etcd, Redis, router, placer, forecaster and two agents on host memory, each with
room for one of three tiny models, which take turns of six seconds. Azure's conversations, at half their speed and with
a tenth of their tokens, are sent to it as clients would send them: the first half with forecasts, which leave hardly a
model cold, the second, on a fresh cluster, before the forecaster has seen a window, so that each turn's model is.

Before it, on a cluster of its own, what the machine does is measured: prompts of some lengths and batches of some sizes
on an active instance, which the simulator's cost model is fitted to, and what waking and loading take. These are
measured one at a time; in a replay, agents, router, placer, forecaster and clients share the machine's cores. How much
slower that makes prompts and tokens, a factor for each, is taken from the steps of the replay itself, and with it how
long requests take to an instance and tokens back (simulator_validation_replay.py): the conditions are the same on both
sides. Times to first tokens, what requests found, and all waiting are foretold from these figures and the requests
alone. Ten minutes, and four to measure.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Row, report
from benchmarks.simulator_validation_lab import TIMEOUT_S, Lab, Machine, machine_of
from benchmarks.simulator_validation_replay import steps_of, times_slower, ways
from launcher.checkpoints import CONTEXT_TOKENS, checkpoint_folders
from launcher.cluster import Cluster, ClusterConfig
from launcher.demo import traffic
from launcher.folder import DataFolder
from launcher.programs import deploy, make_checkpoints
from launcher.replay import Outcome, replay
from launcher.traces import Rotation
from services.forecaster.predictors import QUANTITIES, PublishedPredictor
from services.placer.snapshot import Rules
from simulator.policies.ours import Ours
from simulator.results import Found, Results
from simulator.run import simulate
from simulator.spec import ClusterSpec, Delays, Forecasting, ModelSpec, Settings
from warmserve.traces import Request

ARENA_BYTES = 94 << 20  # of 1 MiB pages: room for one model of 70 MiB and its KV
PERIOD_S = 18.0
WINDOW_S = 1.0
LOOKAHEAD_S = 4.0
BATCH = 8  # host agents' most sequences
TOKEN_BUDGET = 512  # of a step of theirs
_NO_WINDOW_S = 86_400.0  # longer than a replay: the forecaster has nothing to tell of


def specs(folder: Path) -> list[ModelSpec]:
    """The demo's three models as the simulator knows them."""
    return [
        ModelSpec(
            name,
            parameters=sum(file.stat().st_size for file in path.glob("*.safetensors")) // 4,
            layers=layers,
            kv_bytes_per_token=2 * layers * 2 * 64 * 4,  # two KV heads of 64, in float32
            hidden=384,
            bytes_per_parameter=4.0,
            max_batch=BATCH,
            context_tokens=CONTEXT_TOKENS,
            tpot_s=TIMEOUT_S,  # none: instances report their slots, and that is what the placer counts on
        )
        for (name, path), layers in zip(checkpoint_folders(folder).items(), (8, 9, 8), strict=True)
    ]


@dataclass(frozen=True)
class Replayed:
    """What the real system was asked, and what came of it."""

    requests: Sequence[Request]  # as long as the system's own tokenizer found them to be
    outcomes: Sequence[Outcome]
    offset_s: float  # where in a season it began
    forecasts: bool = True  # whether the forecaster had seen anything


@dataclass(frozen=True)
class Observed:
    """The machine, and the replays that are to be foretold."""

    machine: Machine  # as measured one at a time
    models: Sequence[ModelSpec]
    replays: Sequence[Replayed]


@dataclass(frozen=True)
class Conditions:
    """What a machine was like in a replay."""

    prompts: float  # times slower than measured one at a time
    tokens: float  # likewise
    hop_s: float
    reply_s: float


def conditions(observed: Observed, replayed: Replayed) -> Conditions:
    """From the replay's steps and ways."""
    outcomes = replayed.outcomes
    models = {model.name: model for model in observed.models}
    prompts, tokens = times_slower(observed.machine.cost, models, steps_of(outcomes))
    hop_s, reply_s = ways([one for one in outcomes if not one.lost])
    # An idle instance's first token, to which the cost model is fitted, takes ways that a step beside others lacks.
    return Conditions(max(1.0, prompts), tokens, hop_s, reply_s)


def foretell(machine: Machine, models: Sequence[ModelSpec], replayed: Replayed, then: Conditions) -> Results:
    """A replay, simulated, from what was measured and the requests alone."""
    machine = machine.slower(then.prompts, then.tokens)
    cluster = ClusterSpec(
        gpus_per_node=2,
        arena_bytes=ARENA_BYTES,
        page_bytes=1 << 20,
        pcie_gbps=machine.load_gbps,
        node_gbps=2 * machine.load_gbps,
        nvlink_gbps=0.0,
        disk_gbps=2 * machine.load_gbps,  # images are in the page cache
    )
    predictor, window_s = PublishedPredictor(round(PERIOD_S / WINDOW_S)), WINDOW_S
    history: dict[str, NDArray[np.float64]] = {}
    if not replayed.forecasts:  # of a model of which no window is known something is foretold all the same
        window_s, history = _NO_WINDOW_S, {model.name: np.full((1, len(QUANTITIES)), np.nan) for model in models}
    settings = Settings(
        tick_s=0.1,  # the placer plans whenever something has changed
        busy_tick_s=0.1,
        warmup_s=replayed.offset_s % WINDOW_S,
        forecasting=Forecasting(predictor, history, window_s),
        delays=Delays(hop_s=then.hop_s, reply_s=then.reply_s, wake_s=machine.wake_s),
        cost=machine.cost,
        rules=Rules(lookahead_s=LOOKAHEAD_S),
        token_budget=TOKEN_BUDGET,
        prefill_budget=TOKEN_BUDGET,
        under_way=1,
    )
    moved = [replace(request, time_s=request.time_s + replayed.offset_s) for request in replayed.requests]
    return simulate(cluster, models, moved, Ours(), settings=settings)


@dataclass(frozen=True)
class Compared:
    """One replay and its simulation."""

    real: Sequence[Outcome]  # that were answered
    then: Conditions
    foretold: Results

    @property
    def tokens_per_s(self) -> float:
        """Of the real system."""
        seconds = max(o.at_s + o.total_s for o in self.real) - min(o.at_s for o in self.real)
        return sum(one.output_tokens for one in self.real) / seconds

    def real_found(self, states: Collection[str]) -> int:
        """Requests that found their model in one of these states."""
        return sum(one.found_state in states for one in self.real)

    def simulated_found(self, states: Collection[Found]) -> int:
        """The same, simulated."""
        return int(sum((self.foretold.found == state).sum() for state in states))


def compare(observed: Observed, replayed: Replayed) -> Compared:
    """Simulates a replay."""
    then = conditions(observed, replayed)
    answered = [outcome for outcome in replayed.outcomes if not outcome.lost]
    return Compared(answered, then, foretell(observed.machine, observed.models, replayed, then))


def rows(observed: Observed, compared: Sequence[Compared]) -> list[Row]:
    """What was asked of both, side by side."""
    machine, answered = observed.machine, [one for half in compared for one in half.real]
    asked = sum(len(replayed.requests) for replayed in observed.replays)

    def off(what: str, unit: str, simulated: float, measured: float, target: float) -> list[Row]:
        error = 100 * abs(simulated - measured) / measured if measured else (100.0 if simulated else 0.0)
        return [
            Row(f"{what}, simulated", simulated, unit, measured, "measured"),
            Row("  off by", error, "%", target=target),
        ]

    def found(name: str) -> list[Row]:
        real = [half.real_found(_REAL[name]) for half in compared]
        simulated = [half.simulated_found(_SIMULATED[name]) for half in compared]
        return [
            *off(f"requests that found it {name}", "requests", sum(simulated), sum(real), 10.0),
            *(
                Row(f"  {_half(replayed)}, simulated", of_simulated, "requests", of_real, "measured")
                for replayed, of_simulated, of_real in zip(observed.replays, simulated, real, strict=True)
            ),
        ]

    return [
        Row("requests", asked, "requests"),
        Row("lost by the real system", asked - len(answered), "requests", target=0.0),
        Row("steps fitted, mean error", 100 * machine.fit_error, "%"),
        Row("waking, upper quartile", 1000 * machine.wake_s[1], "ms"),
        Row("loading", machine.load_gbps, "GB/s"),
        *(
            row
            for replayed, half in zip(observed.replays, compared, strict=True)
            for row in _conditions(_half(replayed), half.then)
        ),
        *off(
            "mean time to the first token", "ms", _ttft_ms(compared), 1e3 * mean(one.ttft_s for one in answered), 15.0
        ),
        *(
            Row(
                f"  {_half(replayed)}, simulated",
                _ttft_ms([half]),
                "ms",
                1e3 * mean(o.ttft_s for o in half.real),
                "measured",
            )
            for replayed, half in zip(observed.replays, compared, strict=True)
        ),
        Row("  of those that found it active, simulated", *_active_ms(compared), "measured"),
        *off(
            "throughput",
            "tokens/s",
            mean(half.foretold.tokens_per_s for half in compared),
            mean(half.tokens_per_s for half in compared),
            15.0,
        ),
        *(row for name in _REAL for row in found(name)),
    ]


def _half(replayed: Replayed) -> str:
    return "with forecasts" if replayed.forecasts else "without forecasts"


def _conditions(half: str, then: Conditions) -> list[Row]:
    return [
        Row(f"{half}: prompts were slower in the replay than one at a time", then.prompts, "times"),
        Row("  tokens likewise", then.tokens, "times"),
        Row("  a request's way to an instance", 1000 * then.hop_s, "ms"),
        Row("  beside the router, with the first token's", 1000 * then.reply_s, "ms"),
    ]


def _ttft_ms(compared: Sequence[Compared]) -> float:
    return 1000 * float(np.concatenate([half.foretold.ttft_s for half in compared]).mean())


def _active_ms(compared: Sequence[Compared]) -> tuple[float, str, float]:
    simulated = np.concatenate([half.foretold.ttft_s[half.foretold.found >= Found.OPEN] for half in compared])
    measured = [one.ttft_s for half in compared for one in half.real if one.found_state == "active"]
    return 1000 * float(simulated.mean()), "ms", 1000 * mean(measured)


# Cold: nothing of the model is on any agent. Warm: a part, or all, or it is on its way for a request that came before,
# until its instance is registered.
_REAL = {"active": ("active",), "warm": ("warm", "warming"), "cold": ("cold",)}
_SIMULATED = {
    "active": (Found.ACTIVE, Found.OPEN),
    "warm": (Found.WARM, Found.PARTIAL, Found.WAKING),
    "cold": (Found.COLD,),
}


async def observe(duration_s: float, trace: Path | None) -> Observed:
    """Measures the machine, and replays."""

    def say(line: str) -> None:
        print(line, flush=True)

    config = ClusterConfig(
        agents=2,
        arena_bytes=ARENA_BYTES,
        window_s=WINDOW_S,
        season_s=PERIOD_S,
        lookahead_s=LOOKAHEAD_S,
        max_batch=BATCH,
        grace_s=5.0,
    )
    with tempfile.TemporaryDirectory(prefix="warmserve-validation-") as temporary:
        checkpoints = Path(temporary) / "checkpoints"
        await make_checkpoints(checkpoints, say)
        models = specs(checkpoints)
        config = replace(config, model_roots=(checkpoints,))

        async def start(cluster: Cluster) -> None:
            for name, path in checkpoint_folders(checkpoints).items():
                await deploy(cluster.environment, name, path, say)

        with DataFolder(Path(temporary) / "measuring") as folder:
            async with Cluster(folder, config, say) as cluster:
                await start(cluster)
                lab = Lab(cluster.router_address, cluster.etcd_address, models)
                steps, wakes_s, loads_s = await lab.steps(), await lab.wakes(), await lab.loads()
        replays = []
        both, half_s = traffic(trace, duration_s), duration_s / 2
        for forecasts in (True, False):
            begin_s = 0.0 if forecasts else half_s
            half = [replace(one, time_s=one.time_s - begin_s) for one in both if 0 <= one.time_s - begin_s < half_s]
            seen = config if forecasts else replace(config, window_s=_NO_WINDOW_S)
            with DataFolder(Path(temporary) / f"replay-{begin_s:g}") as folder:
                async with Cluster(folder, seen, say) as cluster:
                    await start(cluster)
                    offset_s = time.time() % PERIOD_S
                    requests = Rotation([model.name for model in models], PERIOD_S, offset_s).apply(half)
                    say(f"replaying {len(requests)} requests for {half_s:.0f} s, forecasts: {forecasts}")
                    replays.append(await _replayed(cluster.router_address, requests, offset_s, forecasts))
    machine = machine_of(models, steps, wakes_s, loads_s)
    say(f"measured: {machine}")
    return Observed(machine, models, replays)


async def _replayed(address: str, requests: Sequence[Request], offset_s: float, forecasts: bool) -> Replayed:
    outcomes = await replay(
        address,
        requests,
        timeout_s=TIMEOUT_S,
        seed=round(offset_s * 1e6),  # no prompt twice: its beginning would be remembered
        on_sent=lambda request: None,
        on_outcome=lambda outcome: None,
    )
    sent = [
        replace(request, prompt_tokens=outcome.prompt_tokens or request.prompt_tokens)
        for request, outcome in zip(requests, outcomes, strict=True)
    ]
    return Replayed(sent, outcomes, offset_s, forecasts)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--duration", type=float, default=600.0, help="seconds of replay (600)")
    folder = os.environ.get("WARMSERVE_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces"
    usual = Path(folder) / "azure_2023_conv.csv.gz"
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", default=usual, help="in Azure's format; else made-up traffic"
    )
    arguments = parser.parse_args()
    trace = arguments.trace if arguments.trace.is_file() else None
    if trace is None and arguments.trace != usual:
        parser.exit(2, f"there is no trace {arguments.trace}\n")
    observed = asyncio.run(observe(arguments.duration, trace))
    compared = [compare(observed, replayed) for replayed in observed.replays]
    report("simulator_validation", rows(observed, compared), arguments.json)


if __name__ == "__main__":
    main()
