"""The GPU agent's process."""

from __future__ import annotations

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

from services.common.process import Node, run
from services.common.queues import RequestQueue
from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from services.gpu_agent.agent import Agent
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.device import open_backend, open_device, open_host_tier
from services.gpu_agent.expectation import follow, follow_worths
from services.gpu_agent.images import Images
from services.gpu_agent.reports import Reports
from services.gpu_agent.service import AgentServicer
from services.gpu_agent.settings import GpuAgentSettings
from warmserve.cluster.mirror import Mirror
from warmserve.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2

_log = logger(__name__)
_SWITCH_S = 0.0001
_SWEEP_S = 3600.0
_THREADS = 64  # a load whose image is yet to be built has one for minutes, which must not keep others from loading


async def serve(settings: GpuAgentSettings, node: Node) -> None:
    """Serves until node.stop is set. OSError where the memory is not there, or the engine has died."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "agent"))
    device = open_device(settings)
    arena = Arena(device.memory)
    settings.image_dir.mkdir(parents=True, exist_ok=True)
    backend = open_backend(device, arena, settings.max_batch)
    tier = open_host_tier(settings, device)
    images = Images(settings, arena, backend, tier)
    reports = Reports(settings.id, node.session, node.events, node.keys)
    queue = RequestQueue(node.redis, node.keys)
    agent = Agent(settings.id, arena, backend, images, queue, reports)
    agent.start()
    node.server.add(
        agent_pb2_grpc.add_AgentServiceServicer_to_server,
        AgentServicer(settings.id, agent, images),
        agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
    )
    address = await node.server.start()
    record = cluster_pb2.AgentRecord(
        id=settings.id,
        address=address,
        node=settings.node,
        device_index=settings.device_index,
        device_name=device.device_name,
        backend=device.backend,
        page_bytes=arena.page_bytes,
        pages_total=arena.num_pages,
        version=version("warmserve-server"),
        started_unix_ms=int(time.time() * 1e3),
    )
    models = Mirror(node.store, node.keys.models(), cluster_pb2.ModelSpec)
    forgetting = _forget_undeployed(models, agent)
    forecasts = Mirror(node.store, node.keys.forecasts(), cluster_pb2.Forecast)
    instances = Mirror(node.store, node.keys.instances(), cluster_pb2.InstanceRecord)
    follow(forecasts, instances, agent.expect)
    follow_worths(models, forecasts, agent.value)
    followed = (forecasts, instances, models)  # so that a model's forecast is known when it is
    for mirror in followed:
        await mirror.start()
    reports.start()
    sweeping = begin_task(_sweep(images, models), "sweep images")
    await node.session.put(node.keys.agent(settings.id), record)
    await node.server.set_serving(True)
    _log.info("serving", address=address, pages=arena.num_pages, page_bytes=arena.page_bytes, node=settings.node)
    ended = asyncio.create_task(agent.ended())
    stopping = asyncio.create_task(node.stop.wait())
    await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    died = ended.exception() if ended.done() else None
    _log.info("stopping")
    await node.server.set_serving(False)
    record.stopping = True
    await node.session.put(node.keys.agent(settings.id), record)
    await agent.stop(0 if died else settings.grace_s)
    await end_tasks([sweeping, *forgetting])
    for mirror in followed:
        await mirror.close()
    await reports.close()
    await node.server.stop(1)
    if died:
        raise OSError(f"the engine has died: {died!r}")


def _forget_undeployed(models: Mirror[cluster_pb2.ModelSpec], agent: Agent) -> set[asyncio.Task[None]]:
    """Has the agent forget what is undeployed; call it before `models` starts. Returns the tasks that are at it."""
    forgetting: set[asyncio.Task[None]] = set()

    def on_model(_: str, old: cluster_pb2.ModelSpec | None, new: cluster_pb2.ModelSpec | None) -> None:
        if old is None or (new is not None and new.deployed_unix_ms == old.deployed_unix_ms):
            return

        def image_needed() -> bool:
            return any(spec.facts.fingerprint == old.facts.fingerprint for spec in models.items.values())

        task = begin_task(agent.forget(old, image_needed), f"forget {old.name}")
        forgetting.add(task)
        task.add_done_callback(forgetting.discard)

    models.on_change(on_model)
    return forgetting


async def _sweep(images: Images, models: Mirror[cluster_pb2.ModelSpec]) -> None:
    """Deletes, each hour, images that no model needs."""
    while True:
        needed = {spec.facts.fingerprint for spec in models.items.values()}
        try:
            if removed := await asyncio.to_thread(images.sweep, needed):
                _log.info("removed images that no model needs", images=removed)
        except OSError as error:
            _log.warning("the folder of images cannot be swept", error=str(error))
        await asyncio.sleep(_SWEEP_S)


def main() -> None:
    """Entry point."""
    # The engine's thread, the one that copies, and this one want the interpreter lock in turns, and a step asks for it
    # again behind each of its calls: beside a thread that computes, each waits for so long.
    sys.setswitchinterval(_SWITCH_S)
    run("gpu-agent", GpuAgentSettings, serve)


if __name__ == "__main__":
    main()
