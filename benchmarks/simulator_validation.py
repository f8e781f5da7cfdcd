"""Whether the simulator tells the truth: the same traffic through the real system on this machine, and through it.

    python -m benchmarks.simulator_validation [--json FILE] [--duration 600] [--trace FILE]

The real system is `warmserve up`'s: etcd, Redis, router, placer, forecaster and two agents on host memory, each with
room for one of three tiny models, which take turns of six seconds. Azure's conversations, at half their speed and with
a tenth of their tokens, are sent to it as clients would send them.

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
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from services.forecaster.predictors import PublishedPredictor
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


@dataclass(frozen=True)
class Observed:
    """The machine, and the replay that is to be foretold."""

    machine: Machine  # as measured one at a time
    models: Sequence[ModelSpec]
    replayed: Replayed


@dataclass(frozen=True)
class Conditions:
    """What a machine was like in a replay."""

    prompts: float  # times slower than measured one at a time
    tokens: float  # likewise
    hop_s: float
    reply_s: float


def conditions(observed: Observed) -> Conditions:
    """From the replay's steps and ways."""
    outcomes = observed.replayed.outcomes
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
    settings = Settings(
        tick_s=0.1,  # the placer plans whenever something has changed
        busy_tick_s=0.1,
        warmup_s=replayed.offset_s % WINDOW_S,
        forecasting=Forecasting(PublishedPredictor(round(PERIOD_S / WINDOW_S)), window_s=WINDOW_S),
        delays=Delays(hop_s=then.hop_s, reply_s=then.reply_s, wake_s=machine.wake_s),
        cost=machine.cost,
        rules=Rules(lookahead_s=LOOKAHEAD_S),
        token_budget=TOKEN_BUDGET,
        prefill_budget=TOKEN_BUDGET,
        under_way=1,
    )
    moved = [replace(request, time_s=request.time_s + replayed.offset_s) for request in replayed.requests]
    return simulate(cluster, models, moved, Ours(), settings=settings)


def rows(observed: Observed, then: Conditions, foretold: Results) -> list[Row]:
    """What was asked of both, side by side."""
    real, machine = observed.replayed.outcomes, observed.machine
    answered = [outcome for outcome in real if not outcome.lost]
    seconds = max(o.at_s + o.total_s for o in answered) - min(o.at_s for o in answered)

    def off(what: str, unit: str, simulated: float, measured: float, target: float) -> list[Row]:
        error = 100 * abs(simulated - measured) / measured if measured else (100.0 if simulated else 0.0)
        return [
            Row(f"{what}, simulated", simulated, unit, measured, "measured"),
            Row("  off by", error, "%", target=target),
        ]

    states = {name: sum(one.found_state in found for one in answered) for name, found in _REAL.items()}
    simulated = {
        name: int(sum((foretold.found == state).sum() for state in found)) for name, found in _SIMULATED.items()
    }
    ttft = statistics.mean(one.ttft_s for one in answered)
    tokens = sum(one.output_tokens for one in answered) / seconds
    return [
        Row("requests", len(real), "requests"),
        Row("lost by the real system", len(real) - len(answered), "requests", target=0.0),
        Row("steps fitted, mean error", 100 * machine.fit_error, "%"),
        Row("waking, upper quartile", 1000 * machine.wake_s[1], "ms"),
        Row("loading", machine.load_gbps, "GB/s"),
        Row("prompts were slower in the replay than one at a time", then.prompts, "times"),
        Row("tokens likewise", then.tokens, "times"),
        Row("a request's way to an instance", 1000 * then.hop_s, "ms"),
        Row("beside the router, with the first token's", 1000 * then.reply_s, "ms"),
        *off("mean time to the first token", "ms", 1000 * float(foretold.ttft_s.mean()), 1000 * ttft, 15.0),
        Row("  of those that found it active, simulated", *_active_ms(foretold, answered), "measured"),
        *off("throughput", "tokens/s", foretold.tokens_per_s, tokens, 15.0),
        *[
            row
            for name in states
            for row in off(f"requests that found it {name}", "requests", simulated[name], states[name], 10.0)
        ],
    ]


def _active_ms(foretold: Results, real: Sequence[Outcome]) -> tuple[float, str, float]:
    simulated = foretold.ttft_s[foretold.found >= Found.OPEN]
    measured = [one.ttft_s for one in real if one.found_state == "active"]
    return 1000 * float(simulated.mean()), "ms", 1000 * statistics.mean(measured)


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
        with DataFolder(Path(temporary) / "replay") as folder:
            async with Cluster(folder, config, say) as cluster:
                await start(cluster)
                offset_s = time.time() % PERIOD_S
                rotation = Rotation([model.name for model in models], PERIOD_S, offset_s)
                requests = rotation.apply(traffic(trace, duration_s))
                say(f"replaying {len(requests)} requests for {duration_s:.0f} s")
                replayed = await _replayed(cluster.router_address, requests, offset_s)
    machine = machine_of(models, steps, wakes_s, loads_s)
    say(f"measured: {machine}")
    return Observed(machine, models, replayed)


async def _replayed(address: str, requests: Sequence[Request], offset_s: float) -> Replayed:
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
    return Replayed(sent, outcomes, offset_s)


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
    then = conditions(observed)
    foretold = foretell(observed.machine, observed.models, observed.replayed, then)
    report("simulator_validation", rows(observed, then, foretold), arguments.json)


if __name__ == "__main__":
    main()
