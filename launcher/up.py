"""`warmserve up`: the system, running until it is told to stop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from launcher.backing import version
from launcher.checkpoints import checkpoint_folders
from launcher.cluster import Cluster, ClusterConfig
from launcher.folder import DataFolder
from launcher.programs import deploy, make_checkpoints
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store

Say = Callable[[str], None]


async def up(folder: DataFolder, config: ClusterConfig, demo_models: bool, say: Say) -> None:
    """Runs the system in `folder` until cancelled. Raises what Cluster raises, and ProgramError."""
    say(f"data folder: {folder.path}")
    say(f"etcd:  {version('etcd')}")
    say(f"Redis: {version('redis-server')}")
    if demo_models:
        await make_checkpoints(folder.models, say)
    async with Cluster(folder, config, say) as cluster:
        deployed = await deployed_models(cluster)
        for name, checkpoint in checkpoint_folders(folder.models).items():
            if demo_models and name not in deployed:
                await deploy(cluster.environment, name, checkpoint, say)
        deployed = await deployed_models(cluster)
        say("\n".join(_endpoints(cluster, deployed)))
        await asyncio.Event().wait()


async def deployed_models(cluster: Cluster) -> list[str]:
    """Names of the deployed models, sorted."""
    store = Store([cluster.etcd_address])
    try:
        prefix = Keys().models()
        changes, _ = await store.snapshot(prefix)
        return sorted(change.key.removeprefix(prefix) for change in changes)
    finally:
        await store.close()


def _endpoints(cluster: Cluster, deployed: list[str]) -> list[str]:
    lines = [
        "",
        f"gRPC (SDK)   {cluster.router_address}",
        f"OpenAI HTTP  {cluster.http_url}/v1",
        f"etcd         {cluster.etcd_address}",
        f"Redis        {cluster.redis_url}",
        *(
            f"{'metrics' if index == 0 else '':12} {url}  ({name})"
            for index, (name, url) in enumerate(cluster.metrics_urls.items())
        ),
        f"logs         {cluster.folder.log('*')}",
        "",
        "For warmctl, in another terminal:",
        *(f"  export {name}={value}" for name, value in cluster.environment.items()),
        "",
    ]
    if deployed:
        lines += [f"Models: {', '.join(deployed)}", "", "Try it:", f"  {curl(cluster.http_url, deployed[0])}"]
    else:
        lines += [
            "No model is deployed. Deploy one (a folder with config.json, *.safetensors and tokenizer.json):",
            f"  warmctl models deploy NAME --source {cluster.model_roots[-1]}/FOLDER",
            f"Checkpoints may be in {' or '.join(map(str, cluster.model_roots))}; `--model-root DIR` allows more, and",
            "`--demo-models` makes and deploys three small ones. Then:",
            f"  {curl(cluster.http_url, 'NAME')}",
        ]
    return [*lines, "", "Running; Ctrl-C stops everything."]


def curl(http_url: str, model: str) -> str:
    """A shell command that has `model` answer."""
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 20}
    return f"curl -s {http_url}/v1/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
