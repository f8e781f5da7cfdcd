"""`warmserve demo`: the whole system doing its main job on this machine, and a verdict."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launcher.backing import version
from launcher.checkpoints import checkpoint_folders
from launcher.cluster import Cluster, ClusterConfig
from launcher.folder import DataFolder
from launcher.programs import deploy, make_checkpoints, warmctl
from launcher.progress import replay_with_progress
from launcher.report import Report, print_report, summarise
from launcher.traces import Rotation, Scale, generate
from launcher.up import deployed_models
from warmserve.traces import Request, from_zero, read_requests

# Each of the three models has 70 MiB. An arena, in pages of 1 MiB on the host and 2 MiB on a GPU, has room for one of
# them and, in the quarter that the placer leaves for it, KV cache: two agents for three models, so whether a model is
# warm when its turn comes is the forecast's doing.
_ARENA_BYTES = 94 << 20
_PERIOD_S = 18.0  # in which each model has its turn
_WINDOW_S = 1.0
_LOOKAHEAD_S = 4.0  # less than the two turns between one model's own
_TRACE_START_S = 60.0  # Azure's begins with a quiet minute
_TIMEOUT_S = 60.0
_SEED = 7


@dataclass(frozen=True)
class DemoConfig:
    """What the demo may be told."""

    trace: Path | None  # None: traffic of our own making
    duration_s: float
    agents: int


def traffic(trace: Path | None, duration_s: float) -> list[Request]:
    """The requests of the demo, not yet given to models: a trace scaled down to what two CPU cores can do.

    Raises TraceError where the trace cannot be read.
    """
    requests = generate(_TRACE_START_S + duration_s, 5.0, _SEED) if trace is None else from_zero(read_requests(trace))
    scale = Scale(duration_s, start_s=_TRACE_START_S, time=2.0, tokens=0.1, max_prompt_tokens=160, max_output_tokens=30)
    return scale.apply(requests)


async def demo(folder: DataFolder, config: DemoConfig, console: Console) -> tuple[Report, list[str]]:
    """Runs it. Returns the figures, and in words what did not go as it should (empty where all did)."""
    begin = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - begin:6.1f} s[/dim]  ", end="")
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    models = checkpoint_folders(folder.models)
    requests = traffic(config.trace, config.duration_s)
    say(f"data folder: {folder.path}")
    say(f"etcd: {version('etcd')}; Redis: {version('redis-server')}")
    await make_checkpoints(folder.models, say)
    cluster_config = ClusterConfig(
        agents=config.agents,
        arena_bytes=_ARENA_BYTES,
        window_s=_WINDOW_S,
        season_s=_PERIOD_S,
        lookahead_s=_LOOKAHEAD_S,
        grace_s=5.0,
    )
    async with Cluster(folder, cluster_config, say) as cluster:
        deployed = await deployed_models(cluster)
        for name, checkpoint in models.items():
            if name not in deployed:
                await deploy(cluster.environment, name, checkpoint, say)
        source = f"{config.trace}" if config.trace else "the built-in generator"
        say(f"replaying {len(requests)} requests from {source} for {config.duration_s:.0f} s; {len(models)} models")
        # Turns by the clock, so that a second run on the same folder goes on with the season that the first one learnt.
        rotation = Rotation(list(models), _PERIOD_S, offset_s=time.time() % _PERIOD_S)
        outcomes = await replay_with_progress(
            cluster.router_address, rotation.apply(requests), timeout_s=_TIMEOUT_S, seed=_SEED, console=console
        )
        report = summarise(outcomes)
        console.print()
        print_report(report, console)
        name = next(iter(models))
        console.print(f"\n$ warmctl explain {name}", markup=False, highlight=False)
        explained = await warmctl(cluster.environment, "explain", name)
        console.print(explained, markup=False, highlight=False, soft_wrap=True)
        console.print()
    return report, shortcomings(report)


def shortcomings(report: Report) -> list[str]:
    """What a run must show and this one did not, in words."""
    found = []
    if report.lost:
        found.append(f"{report.lost} of {report.requests} requests were lost")
    found += [
        f"no request found its model {state}" for state in ("active", "warm", "cold") if state not in report.by_state
    ]
    warm, cold = report.by_state.get("warm"), report.by_state.get("cold")
    if warm and cold and warm.p50_s >= cold.p50_s:
        found.append(
            f"the median time to the first token was not shorter warm ({1000 * warm.p50_s:.0f} ms) than cold "
            f"({1000 * cold.p50_s:.0f} ms)"
        )
    return found
