"""`warmctl models`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from warmserve.admin import render, units, views
from warmserve.admin.arguments import ModelName, OutputOption, target_of
from warmserve.admin.deploy import OnProgress, deploy, find_leader, wait_until_active
from warmserve.admin.edit import edit
from warmserve.admin.plain import plain
from warmserve.admin.state import read_state
from warmserve.admin.target import CommandError, Output, console, run, show
from warmserve.admin.timeline import latest_about
from warmserve.cluster.keys import check_model_name
from warmserve.cluster.specs import check_wishes
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, common_pb2

app = typer.Typer(
    help="Deploy models, look at them, say what is wanted of them, and take them away.", no_args_is_help=True
)


_TRANSITIONS = 10


class DType(StrEnum):
    """Number formats; auto is what the checkpoint's config says."""

    auto = "auto"
    f32 = "f32"
    bf16 = "bf16"
    f16 = "f16"


_DTYPES = {
    DType.auto: common_pb2.D_TYPE_UNSPECIFIED,
    DType.f32: common_pb2.D_TYPE_F32,
    DType.bf16: common_pb2.D_TYPE_BF16,
    DType.f16: common_pb2.D_TYPE_F16,
}


@app.command("deploy")
def deploy_command(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name clients will use.")],
    source: Annotated[
        str,
        typer.Option(
            help="Folder of the checkpoint (config.json, *.safetensors, tokenizer.json), on agents and routers."
        ),
    ],
    dtype: Annotated[DType, typer.Option(help="Number format to serve in; auto: the checkpoint's own.")] = DType.auto,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree: agents per replica.")] = 1,
    max_context_tokens: Annotated[
        int, typer.Option(min=0, help="Most tokens of prompt plus output; 0: the checkpoint's context.")
    ] = 0,
    max_batch: Annotated[int, typer.Option(min=0, help="Most sequences at a time; 0: the agent's default.")] = 0,
    priority: Annotated[float, typer.Option(min=0, help="Weight against other models in placement.")] = 1.0,
    min_replicas: Annotated[int, typer.Option(min=0, help="Replicas kept active whatever the load.")] = 0,
    max_replicas: Annotated[int, typer.Option(min=0, help="Most replicas active at a time; 0: no bound.")] = 0,
    ttft_p95_ms: Annotated[float, typer.Option(min=0, help="Target: p95 time to first token; 0: none.")] = 0.0,
    tpot_ms: Annotated[float, typer.Option(min=0, help="Target: mean time per further token; 0: none.")] = 0.0,
    wait: Annotated[bool, typer.Option("--wait", help="Return once --min-replicas instances are active.")] = False,
    output: OutputOption = None,
) -> None:
    """Deploy a model: each node checks the checkpoint and prepares it; then it is deployed, or not at all.

    Examples:

      warmctl models deploy qwen3-8b --source /models/Qwen3-8B

      warmctl models deploy llama --source ./llama --dtype bf16 --min-replicas 1 --wait
    """
    try:
        check_model_name(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
    if max_replicas and max_replicas < min_replicas:
        raise typer.BadParameter(f"{max_replicas} is below --min-replicas {min_replicas}", param_hint="--max-replicas")
    if wait and not min_replicas:
        raise typer.BadParameter("give --min-replicas of at least 1, or none may ever be active", param_hint="--wait")
    target = target_of(ctx, output)
    spec = cluster_pb2.ModelSpec(
        name=name,
        source=os.path.abspath(source),
        dtype=_DTYPES[dtype],
        tp=tp,
        limits=cluster_pb2.ModelLimits(max_context_tokens=max_context_tokens, max_batch=max_batch),
        target=cluster_pb2.ServiceTarget(ttft_p95_ms=ttft_p95_ms, tpot_ms=tpot_ms),
        priority=priority,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
    )

    async def action(store: Store) -> cluster_pb2.ModelSpec:
        leader = await find_leader(store, target.keys)
        with _ProgressBar(name) as bar:
            deployed = await deploy(leader, spec, bar.update)
            if wait:
                bar.update(f"waiting for {min_replicas} active", 0, 0)
                await wait_until_active(store, target.keys, deployed)
        return deployed

    deployed = run(target, action)
    facts = deployed.facts
    show(
        target,
        plain(deployed),
        lambda: (
            f"Deployed {name}: {facts.architecture}, {units.quantity(facts.parameters)} parameters, "
            f"{units.size(facts.shard_bytes)} per shard, context of {facts.context_tokens} tokens."
        ),
    )


class _ProgressBar:
    """On a terminal a bar; elsewhere one line for each stage."""

    def __init__(self, model: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(f"deploying {model}", total=None)
        self._stage = ""

    def __enter__(self) -> _ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @property
    def update(self) -> OnProgress:
        return self._update

    def _update(self, stage: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=stage, completed=done, total=total or None)
        if self._progress.disable and stage != self._stage:
            print(stage, file=sys.stderr)
        self._stage = stage


@app.command("list")
def list_command(ctx: typer.Context, output: OutputOption = None) -> None:
    """List the deployed models and how ready each is.

    Examples:

      warmctl models list

      warmctl models list -o json
    """
    target = target_of(ctx, output)
    found = views.model_summaries(run(target, lambda store: read_state(store, target.keys)))
    show(target, found, lambda: render.models(found, units.now_ms()))


@app.command("describe")
def describe_command(ctx: typer.Context, model: ModelName, output: OutputOption = None) -> None:
    """Describe a model: its checkpoint, limits and targets, its replicas and instances, and their last transitions.

    Examples:

      warmctl models describe qwen3-8b
    """
    target = target_of(ctx, output)

    async def action(store: Store) -> views.ModelDescription:
        state = await read_state(store, target.keys)
        if model not in state.models:
            raise CommandError(views.not_deployed(model, state))
        return views.describe(state, model, await latest_about(target, model, _TRANSITIONS))

    description = run(target, action)
    show(target, description, lambda: render.model(description, units.now_ms()))


@app.command("pin")
def pin_command(
    ctx: typer.Context,
    model: ModelName,
    replicas: Annotated[int, typer.Option(min=1, help="How many of its replicas.")] = 1,
    output: OutputOption = None,
) -> None:
    """Pin a model: so many of its replicas stay resident, warm or active, whatever the forecast.

    Where the memory does not suffice for all that is pinned, `warmctl explain MODEL` says so.

    Examples:

      warmctl models pin qwen3-8b

      warmctl models pin qwen3-8b --replicas 2
    """

    def change(spec: cluster_pb2.ModelSpec) -> None:
        spec.pinned_replicas = replicas

    _change(ctx, model, output, change)


@app.command("unpin")
def unpin_command(ctx: typer.Context, model: ModelName, output: OutputOption = None) -> None:
    """Unpin a model: forecast and requests alone decide what of it is resident.

    Examples:

      warmctl models unpin qwen3-8b
    """

    def change(spec: cluster_pb2.ModelSpec) -> None:
        spec.pinned_replicas = 0

    _change(ctx, model, output, change)


@app.command("set")
def set_command(
    ctx: typer.Context,
    model: ModelName,
    min_replicas: Annotated[int | None, typer.Option(min=0, help="Replicas kept active whatever the load.")] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=0, help="Most replicas active at a time; 0: no bound.")
    ] = None,
    priority: Annotated[float | None, typer.Option(min=0, help="Weight against other models in placement.")] = None,
    ttft_p95_ms: Annotated[float | None, typer.Option(min=0, help="Target: p95 time to first token; 0: none.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(min=0, help="Target: mean time per further token; 0: none.")] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=0, help="Most sequences at a time, of instances woken from now on.")
    ] = None,
    output: OutputOption = None,
) -> None:
    """Change what is wanted of a deployed model; what is not given stays as it is.

    Examples:

      warmctl models set qwen3-8b --min-replicas 1 --max-replicas 4

      warmctl models set qwen3-8b --priority 2 --ttft-p95-ms 500
    """
    wishes = {"min_replicas": min_replicas, "max_replicas": max_replicas, "priority": priority}
    targets = {"ttft_p95_ms": ttft_p95_ms, "tpot_ms": tpot_ms}
    if all(wish is None for wish in (*wishes.values(), *targets.values(), max_batch)):
        raise typer.BadParameter("nothing to set: give at least one option, such as --min-replicas 1")

    def change(spec: cluster_pb2.ModelSpec) -> None:
        for name, wish in wishes.items():
            if wish is not None:
                setattr(spec, name, wish)
        for name, wish in targets.items():
            if wish is not None:
                setattr(spec.target, name, wish)
        if max_batch is not None:
            spec.limits.max_batch = max_batch

    _change(ctx, model, output, change)


def _change(
    ctx: typer.Context, model: str, output: Output | None, change: Callable[[cluster_pb2.ModelSpec], None]
) -> None:
    """Changes a spec, checks it, and says what has changed."""
    target = target_of(ctx, output)

    def changed(spec: cluster_pb2.ModelSpec) -> None:
        change(spec)
        try:
            check_wishes(spec)
        except ValueError as error:
            raise CommandError(f"{model} stays as it is: {error}") from error

    async def action(store: Store) -> tuple[cluster_pb2.ModelSpec, cluster_pb2.ModelSpec]:
        key = target.keys.model(model)
        if await store.get(key, cluster_pb2.ModelSpec) is None:
            raise CommandError(views.not_deployed(model, await read_state(store, target.keys)))
        return await edit(store, key, cluster_pb2.ModelSpec, changed, f"{model} was undeployed just now")

    before, after = run(target, action)
    show(target, plain(after), lambda: _difference(before, after))


def _difference(before: cluster_pb2.ModelSpec, after: cluster_pb2.ModelSpec) -> str:
    """ "qwen: min_replicas 0 -> 1, ttft_p95_ms 0 -> 500." """
    pairs = [(before, after), (before.target, after.target), (before.limits, after.limits)]
    said = [
        f"{field.name} {getattr(old, field.name):g} -> {getattr(new, field.name):g}"
        for old, new in pairs
        for field in new.DESCRIPTOR.fields
        if field.cpp_type not in (field.CPPTYPE_MESSAGE, field.CPPTYPE_STRING)
        and getattr(old, field.name) != getattr(new, field.name)
    ]
    return f"{after.name}: {', '.join(said)}." if said else f"{after.name} is so already; nothing has changed."


@app.command("undeploy")
def undeploy_command(
    ctx: typer.Context,
    model: ModelName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    output: OutputOption = None,
) -> None:
    """Undeploy a model: routers refuse new requests for it, waiting ones fail, and its memory is given back.

    Asks first, unless --yes is given or no terminal is there to answer.

    Examples:

      warmctl models undeploy qwen3-8b

      warmctl models undeploy qwen3-8b --yes
    """
    target = target_of(ctx, output)

    async def look(store: Store) -> int:
        state = await read_state(store, target.keys)
        if model not in state.models:
            raise CommandError(views.not_deployed(model, state))
        return sum(record.model == model for record in state.instances.values())

    async def delete(store: Store) -> None:
        if not await store.delete(target.keys.model(model)):
            raise CommandError(f"{model} was undeployed by somebody else just now")

    instances = run(target, look)
    if not yes and sys.stdin.isatty():
        serving = f", which {instances} active instance(s) serve now," if instances else ""
        typer.confirm(f"Undeploy {model}{serving} from {', '.join(target.etcd)}?", abort=True, err=True)
    run(target, delete)
    show(target, {"undeployed": model}, lambda: f"Undeployed {model}.")
