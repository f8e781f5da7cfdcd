"""Whether the simulator tells the truth: the same traffic through the real system on this machine, and through it.

    python -m benchmarks.simulator_validation [--json FILE] [--duration 600] [--trace FILE]

The real system is `warmserve up`'s: etcd, Redis, router, placer, forecaster and two agents on host memory, each with
room for one of three tiny models, which take turns of six seconds. Azure's conversations, at half their speed and with
a tenth of their tokens, are sent to it as clients would send them.

Before it, on a cluster of its own, what the machine does is measured, as a client sees it: prompts of some lengths and
batches of some sizes on an active instance, which the simulator's cost model is fitted to, and what a warm and a cold
replica take to serve; after it the steps once more. From these figures and the requests alone the simulator foretells
the replay. Ten minutes, and four to measure; on a machine that does nothing else, or it measures that.
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
from launcher.checkpoints import CONTEXT_TOKENS, checkpoint_folders
from launcher.cluster import Cluster, ClusterConfig
from launcher.demo import traffic
from launcher.folder import DataFolder
from launcher.programs import deploy, make_checkpoints
from launcher.replay import Outcome, replay
from launcher.traces import Rotation
from services.forecaster.predictors import PublishedPredictor
from services.placer.snapshot import Rules
from simulator.cost import CostModel, Measurement, fit
from simulator.policies.ours import Ours
from simulator.results import Found, Results
from simulator.run import simulate
from simulator.spec import ClusterSpec, Delays, Forecasting, ModelSpec, Settings
from warmserve import AsyncClient
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store, decode
from warmserve.traces import Request
from warmserve.v1 import cluster_pb2

ARENA_BYTES = 94 << 20  # of 1 MiB pages: room for one model of 70 MiB and its KV
PERIOD_S = 18.0
WINDOW_S = 1.0
LOOKAHEAD_S = 4.0
BATCH = 8  # host agents' most sequences
PROMPTS = (8, 64, 160)
BATCHES = (1, 4, 8)
REPEATS = 5
WAKES = 12
_LITTLE = 0.05  # of the weights: what misses no more is all there
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Machine:
    """What was measured."""

    cost: CostModel
    fit_error: float  # mean of the relative errors' sizes
    wake_s: tuple[float, float]  # lower and upper quartile, of a replica all resident; assumed where too few were
    load_gbps: float


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
            tpot_s=_TIMEOUT_S,  # none: instances report their slots, and that is what the placer counts on
        )
        for (name, path), layers in zip(checkpoint_folders(folder).items(), (8, 9, 8), strict=True)
    ]


@dataclass(frozen=True)
class Switch:
    """A wake: the share of the weights that was missing, and what it took beyond a request to an active model."""

    missing: float
    seconds: float


def machine_of(models: Sequence[ModelSpec], steps: Sequence[Measurement], switches: Sequence[Switch]) -> Machine:
    """What the measurements say."""
    cost, delays = fit(steps), Delays()
    wake_s = delays.wake_s
    whole = [switch.seconds for switch in switches if switch.missing <= _LITTLE]
    if len(whole) >= WAKES // 2:
        quarters = statistics.quantiles(whole, n=4)
        wake_s = quarters[0], quarters[2]
    # What is in the way drains first, which the simulator counts too.
    other_s = statistics.mean(wake_s) + delays.replan_s
    loads = [(switch.seconds - other_s) / switch.missing for switch in switches if switch.missing > _LITTLE]
    if not loads or statistics.median(loads) <= 0:
        raise RuntimeError("no wake showed what loading takes: the machine is too busy to measure anything")
    loading_s = statistics.median(loads)
    shard = statistics.mean(model.shard_bytes for model in models)
    errors = [abs(error) for error in cost.error(steps)]
    return Machine(cost, statistics.mean(errors), wake_s, shard / loading_s / 1e9)


class Lab:
    """Measures a running cluster, as a client sees it."""

    def __init__(self, address: str, etcd_address: str, models: Sequence[ModelSpec]) -> None:
        self._address = address
        self._etcd_address = etcd_address
        self._models = models
        self._seed = 0
        self._first: dict[str, float] = {}  # seconds of a short prompt on an active instance

    async def steps(self) -> list[Measurement]:
        """Of all models, each active and alone."""
        return [step for model in self._models for step in await self._steps(model)]

    async def switches(self) -> list[Switch]:
        """Wakes of models without an instance.

        Idle instances stay until somebody wants their pages, so what is in the way drains first, as in the replay.
        """
        return [await self._wake() for _ in range(WAKES)]

    async def _steps(self, model: ModelSpec) -> list[Measurement]:
        delays = Delays()
        steps = []
        for prompt in PROMPTS:
            seconds = [one.ttft_s for one in await self._active(model, prompt, 1, REPEATS, 1)]
            taken = statistics.median(seconds) - delays.hop_s - delays.reply_s
            steps.append(Measurement(model, taken, prefill=prompt))
        self._first[model.name] = steps[0].seconds
        for batch in BATCHES:
            outcomes = await self._active(model, PROMPTS[0], 40, 2, batch)
            token = statistics.median((one.total_s - one.ttft_s) / (one.output_tokens - 1) for one in outcomes)
            steps.append(Measurement(model, token, decodes=batch, context=PROMPTS[0] + 20))
        return steps

    async def _active(self, model: ModelSpec, prompt: int, output: int, repeats: int, batch: int) -> list[Outcome]:
        """Outcomes of `repeats` batches that found an active instance."""
        outcomes: list[Outcome] = []
        while len(outcomes) < repeats * batch:
            found = await self._ask([Request(0.0, model.name, prompt, output)] * batch)
            if all(one.found_state == "active" for one in found):
                outcomes += found
        return outcomes

    async def _wake(self) -> Switch:
        await asyncio.sleep(2 * Rules().min_stay_s)  # then instances may go
        name = await self._inactive()
        missing = 1 - await self._resident(name)
        (outcome,) = await self._ask([Request(0.0, name, PROMPTS[0], 1)])
        return Switch(missing, max(0.0, outcome.ttft_s - self._first[name]))

    async def _resident(self, name: str) -> float:
        """The largest share of a model's weights that any agent has."""
        store = Store([self._etcd_address])
        try:
            found, _ = await store.snapshot(Keys().residencies())
        finally:
            await store.close()
        records = [decode(item.value, cluster_pb2.AgentResidency) for item in found if item.value is not None]
        return max((s.residency for record in records for s in record.shards if s.model == name), default=0.0)

    async def _inactive(self) -> str:
        """The name of a model without an instance: agents have room for all models but one."""
        async with AsyncClient(self._address) as client, asyncio.timeout(_TIMEOUT_S):
            while True:
                for info in await client.models():
                    if info.state in ("warm", "cold"):
                        return info.name
                await asyncio.sleep(0.1)

    async def _ask(self, requests: Sequence[Request]) -> list[Outcome]:
        self._seed += 1  # no prompt twice: its beginning would be remembered
        outcomes = await replay(
            self._address,
            requests,
            timeout_s=_TIMEOUT_S,
            seed=self._seed,
            on_sent=lambda request: None,
            on_outcome=lambda outcome: None,
        )
        if lost := [one.error for one in outcomes if one.lost]:
            raise RuntimeError(f"a request was lost while measuring: {lost[0]}")
        return outcomes


@dataclass(frozen=True)
class Observed:
    """What the real system was asked, and what came of it."""

    machine: Machine
    models: Sequence[ModelSpec]
    requests: Sequence[Request]  # as long as the system's own tokenizer found them to be
    outcomes: Sequence[Outcome]
    offset_s: float  # where in a season the replay began


def foretell(observed: Observed) -> Results:
    """The replay, simulated, from what was measured and the requests alone."""
    machine, offset_s = observed.machine, observed.offset_s
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
        warmup_s=offset_s % WINDOW_S,
        forecasting=Forecasting(PublishedPredictor(round(PERIOD_S / WINDOW_S)), window_s=WINDOW_S),
        delays=Delays(wake_s=machine.wake_s),
        cost=machine.cost,
        rules=Rules(lookahead_s=LOOKAHEAD_S),
    )
    moved = [replace(request, time_s=request.time_s + offset_s) for request in observed.requests]
    return simulate(cluster, observed.models, moved, Ours(), settings=settings)


def rows(observed: Observed, foretold: Results) -> list[Row]:
    """What was asked of both, side by side."""
    real, machine = observed.outcomes, observed.machine
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
        Row("waking what is all resident, upper quartile", 1000 * machine.wake_s[1], "ms"),
        Row("loading", machine.load_gbps, "GB/s"),
        *off("mean time to the first token", "ms", 1000 * float(foretold.ttft_s.mean()), 1000 * ttft, 15.0),
        *off("throughput", "tokens/s", foretold.tokens_per_s, tokens, 15.0),
        *[
            row
            for name in states
            for row in off(f"requests that found it {name}", "requests", simulated[name], states[name], 10.0)
        ],
    ]


# A router sees an instance that is being woken as what its weights are: warm, or on their way.
_REAL = {"active": ("active",), "warm": ("warm",), "cold": ("cold", "warming")}
_SIMULATED = {"active": (Found.ACTIVE,), "warm": (Found.WARM, Found.PARTIAL), "cold": (Found.COLD, Found.WAKING)}


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
                steps = await lab.steps()
                switches = await lab.switches()
        with DataFolder(Path(temporary) / "replay") as folder:
            async with Cluster(folder, config, say) as cluster:
                await start(cluster)
                offset_s = time.time() % PERIOD_S
                rotation = Rotation([model.name for model in models], PERIOD_S, offset_s)
                requests = rotation.apply(traffic(trace, duration_s))
                say(f"replaying {len(requests)} requests for {duration_s:.0f} s")
                outcomes = await replay(
                    cluster.router_address,
                    requests,
                    timeout_s=_TIMEOUT_S,
                    seed=0,
                    on_sent=lambda request: None,
                    on_outcome=lambda outcome: None,
                )
                after = Lab(cluster.router_address, cluster.etcd_address, models)
                steps += await after.steps()  # a machine's speed may have changed meanwhile
    machine = machine_of(models, steps, switches)
    say(f"measured: {machine}")
    sent = [
        replace(request, prompt_tokens=outcome.prompt_tokens or request.prompt_tokens)
        for request, outcome in zip(requests, outcomes, strict=True)
    ]
    return Observed(machine, models, sent, outcomes, offset_s)


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
    report("simulator_validation", rows(observed, foretell(observed)), arguments.json)


if __name__ == "__main__":
    main()
