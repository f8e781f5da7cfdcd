"""Whole agents and the images on their node's disk: damaged, of another version, half written, not to be written."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from transformers import PreTrainedModel

from launcher.backing import Backing
from services.common.grpc_frame import channel
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import REASON, RunningAgent, running_agent, status_of
from tests.gpu_agent.test_agent_host_tier import deploy, kept
from tests.gpu_agent.test_agent_service import PROMPT, expected
from tests.gpu_agent.test_weights_building import half_built, largest_file
from tests.gpu_agent.test_weights_image import damage
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2, common_pb2

PAGE = 64 << 10  # of running_agent


@pytest.fixture
async def agent(etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path) -> AsyncIterator[RunningAgent]:
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        yield agent


async def assert_serves(agent: RunningAgent, spec: cluster_pb2.ModelSpec, model: PreTrainedModel) -> None:
    """It is woken, and answers as transformers does."""
    request = f"r-{os.urandom(4).hex()}"
    await agent.submit(spec.name, request, PROMPT, 8)
    await agent.wake(spec)
    await agent.relay.finished(request)
    assert agent.relay.tokens(request) == expected(model, PROMPT, 8)


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


# Damaged


@pytest.mark.parametrize("offset", [100, 3 * PAGE + 4097, -9])
async def test_a_bit_flipped_on_the_disk_is_found_before_a_token_and_the_image_is_built_anew(
    agent: RunningAgent, tmp_path: Path, offset: int
) -> None:
    model = checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    (image,) = (tmp_path / "images").glob("*.image")
    good = image.read_bytes()
    damage(image, offset % len(good))
    await assert_serves(agent, spec, model)
    assert image.read_bytes() == good
    assert files(tmp_path / "images") == [".image", ".json"]


async def test_bits_flipped_in_memory_and_on_the_disk_are_found_one_after_the_other(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    model = checkpoints.llama(tmp_path / "m")
    options = {"host_tier_bytes": "4MiB", "host_tier_dir": tmp_path / "tier"}
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, **options) as agent:
        spec = await deploy(agent, "m", tmp_path / "m")
        (held,) = await kept(agent, 1)
        on_disk, in_memory = tmp_path / "images" / held.name, tmp_path / "tier" / held.name
        good = on_disk.read_bytes()
        damage(in_memory, 2 * PAGE + 5)
        damage(on_disk, 5 * PAGE + 5)
        await assert_serves(agent, spec, model)
        assert on_disk.read_bytes() == good
        while not in_memory.exists():  # it is taken in again
            await asyncio.sleep(0.01)
        assert in_memory.read_bytes() == good


# Of another version


async def test_a_model_deployed_anew_from_a_changed_checkpoint_has_an_image_of_it(
    agent: RunningAgent, tmp_path: Path
) -> None:
    checkpoints.llama(tmp_path / "m", seed=1)
    spec = await deploy(agent, "m", tmp_path / "m")
    (old,) = (tmp_path / "images").glob("*.image")
    await agent.wake(spec)
    await agent.node.store.delete(agent.node.keys.model("m"))
    while list((tmp_path / "images").iterdir()):  # undeployed
        await asyncio.sleep(0.01)
    model = checkpoints.llama(tmp_path / "m", seed=2)
    again = await agent.prepare("m", tmp_path / "m")
    again.deployed_unix_ms = 2
    (new,) = (tmp_path / "images").glob("*.image")
    assert new.name != old.name
    await assert_serves(agent, again, model)


async def test_a_checkpoint_that_was_changed_after_it_was_deployed_is_not_served(
    agent: RunningAgent, tmp_path: Path
) -> None:
    """Other agents, which hold the old one, would answer otherwise."""
    checkpoints.llama(tmp_path / "m", seed=1)
    spec = await agent.prepare("m", tmp_path / "m")
    checkpoints.llama(tmp_path / "m", seed=2)
    await agent.stub.WakeReplica(agent_pb2.WakeReplicaRequest(spec=spec, group=agent.group, reason=REASON))

    def said(items: object) -> bool:
        shard = agent.shard("m")
        return shard is not None and "has changed since it was deployed; deploy it again" in shard.reason.text

    await asyncio.wait_for(agent.residency.wait_for(said), 30)
    await agent.until("m", common_pb2.REPLICA_STATE_COLD)


# Two models of the same weights


async def test_models_of_the_same_weights_deployed_at_once_have_one_image_until_both_are_gone(
    agent: RunningAgent, tmp_path: Path
) -> None:
    model = checkpoints.llama(tmp_path / "m")
    specs = await asyncio.gather(*(deploy(agent, name, tmp_path / "m") for name in ("one", "two")))
    assert files(tmp_path / "images") == [".image", ".json"]
    await agent.wake(specs[0])
    await agent.node.store.delete(agent.node.keys.model("one"))
    await asyncio.wait_for(agent.residency.wait_for(lambda _: agent.shard("one") is None), 30)
    await assert_serves(agent, specs[1], model)
    assert files(tmp_path / "images") == [".image", ".json"]
    await agent.node.store.delete(agent.node.keys.model("two"))
    while list((tmp_path / "images").iterdir()):
        await asyncio.sleep(0.01)


# Half written, and not to be written


async def test_progress_is_told_and_what_a_killed_agent_had_written_is_gone_on_with(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    model = checkpoints.llama(tmp_path / "m")
    told: list[tuple[int, int]] = []

    async def prepare() -> cluster_pb2.ModelSpec:
        spec = cluster_pb2.ModelSpec(name="m", source=str(tmp_path / "m"), tp=1)
        async for progress in agent.stub.PrepareModel(agent_pb2.PrepareModelRequest(spec=spec)):
            told.append((progress.bytes_done, progress.bytes_total))
            if progress.HasField("facts"):
                spec.facts.CopyFrom(progress.facts)
        return spec

    def shown(items: Mapping[str, cluster_pb2.AgentResidency]) -> bool:
        record = items["g0"].disk.preparing
        return [fill.name for fill in record if 4 * PAGE <= fill.bytes_done < fill.bytes_total] == [path.name]

    async with AsyncExitStack() as stack:
        with half_built(tmp_path / "m", tmp_path / "images", 4, PAGE) as path:
            agent = await stack.enter_async_context(
                running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path)
            )
            preparing = asyncio.ensure_future(prepare())
            await asyncio.wait_for(agent.residency.wait_for(shown), 60)
            assert not preparing.done()
        spec = await preparing
        assert told == sorted(told)
        assert told[-1] == (spec.facts.shard_bytes, spec.facts.shard_bytes)
        await assert_serves(agent, spec, model)
        await asyncio.wait_for(agent.residency.wait_for(lambda items: not items["g0"].disk.preparing), 30)
        assert files(tmp_path / "images") == [".image", ".json"]


async def test_a_deployment_that_is_cancelled_halfway_leaves_nothing_of_its_own(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    model = checkpoints.llama(tmp_path / "m")
    spec = cluster_pb2.ModelSpec(name="m", source=str(tmp_path / "m"), tp=1)
    async with AsyncExitStack() as stack:
        with half_built(tmp_path / "m", tmp_path / "images", 4, PAGE) as path:
            agent = await stack.enter_async_context(
                running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path)
            )
            call = agent.stub.PrepareModel(agent_pb2.PrepareModelRequest(spec=spec))
            await asyncio.wait_for(agent.residency.wait_for(lambda items: bool(items["g0"].disk.preparing)), 60)
            call.cancel()
            await asyncio.wait_for(agent.residency.wait_for(lambda items: not items["g0"].disk.preparing), 60)
        assert not path.exists()
        await assert_serves(agent, await agent.prepare("m", tmp_path / "m"), model)


async def test_a_full_disk_refuses_a_deployment_with_numbers_and_it_works_once_there_is_space(
    agent: RunningAgent, tmp_path: Path
) -> None:
    model = checkpoints.llama(tmp_path / "m")
    spec = cluster_pb2.ModelSpec(name="m", source=str(tmp_path / "m"), tp=1)
    with largest_file(5 * PAGE):
        code, message = await status_of(agent.stub.PrepareModel(agent_pb2.PrepareModelRequest(spec=spec)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "but the disk is full" in message
    assert "free space there" in message
    assert list((tmp_path / "images").iterdir()) == []
    await assert_serves(agent, await agent.prepare("m", tmp_path / "m"), model)


async def test_an_agent_killed_while_warming_leaves_nothing_registered_and_the_next_serves(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path, store: Store
) -> None:
    """It warms a model whose image is still being written, and so stands still until it is killed."""
    model = checkpoints.llama(tmp_path / "m")
    where = (etcd.address, redis_server.address, keys.prefix, tmp_path)
    async with running_agent(*where) as agent:
        spec = await agent.prepare("m", tmp_path / "m")
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    agents = Mirror(store, keys.agents(), cluster_pb2.AgentRecord)
    residency = Mirror(store, keys.residencies(), cluster_pb2.AgentResidency)
    for mirror in (agents, residency):
        await mirror.start()
    with half_built(tmp_path / "m", tmp_path / "images", 4, PAGE):
        doomed = _start(etcd, redis_server, keys, tmp_path)
        try:
            await asyncio.wait_for(agents.wait_for(lambda items: "k0" in items), 120)
            async with channel(agents.items["k0"].address) as connection:
                stub = agent_pb2_grpc.AgentServiceStub(connection)
                group = common_pb2.Group(agent_ids=["k0"], node="n0")
                await stub.WarmReplica(agent_pb2.WarmReplicaRequest(spec=spec, group=group, reason=REASON))

                def warming(items: Mapping[str, cluster_pb2.AgentResidency]) -> bool:
                    states = [shard.state for record in items.values() for shard in record.shards]
                    return states == [common_pb2.REPLICA_STATE_WARMING]

                await asyncio.wait_for(residency.wait_for(warming), 60)
        finally:
            doomed.kill()
            doomed.wait()
        await asyncio.wait_for(residency.wait_for(lambda items: not items), 60)
        await asyncio.wait_for(agents.wait_for(lambda items: not items), 60)
        assert await store.get_all(keys.instances(), cluster_pb2.InstanceRecord) == []
    for mirror in (agents, residency):
        await mirror.close()
    async with running_agent(*where) as agent:
        assert agent.shard("m") is None
        await assert_serves(agent, spec, model)
        assert files(tmp_path / "images") == [".image", ".json"]


def _start(etcd: Backing, redis: Backing, keys: Keys, folder: Path) -> subprocess.Popen[bytes]:
    """An agent as a process of its own."""
    settings = {
        "ID": "k0",
        "NODE": "n0",
        "BACKEND": "host",
        "ETCD_ENDPOINTS": etcd.address,
        "REDIS_URL": f"redis://{redis.address}/0",
        "PREFIX": keys.prefix,
        "LEASE_TTL_S": "8",
        "ARENA_BYTES": "16MiB",
        "PAGE_BYTES": str(PAGE),
        "MODEL_ROOTS": str(folder),
        "IMAGE_DIR": str(folder / "images"),
    }
    environment = {**os.environ, **{f"WARMSERVE_{name}": value for name, value in settings.items()}}
    with (folder / "agent.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "services.gpu_agent"], env=environment, stderr=log, stdout=log)


async def test_deployments_that_take_long_keep_no_model_from_loading(agent: RunningAgent, tmp_path: Path) -> None:
    models = {name: checkpoints.llama(tmp_path / name, seed=seed) for seed, name in enumerate(("slow", "m"))}
    await agent.prepare("slow", tmp_path / "slow")
    [image] = (tmp_path / "images").glob("*.image")
    spec = await agent.prepare("m", tmp_path / "m")
    image.unlink()
    waiting, many = 0, asyncio.Event()

    async def deploy_slow() -> str:
        nonlocal waiting
        order, stage = cluster_pb2.ModelSpec(name="slow", source=str(tmp_path / "slow"), tp=1), ""
        async for progress in agent.stub.PrepareModel(agent_pb2.PrepareModelRequest(spec=order)):
            if progress.stage == "writing the image" != stage:
                waiting += 1
                if waiting == 4:
                    many.set()
            stage = progress.stage
        return stage

    with image.with_name(f"{image.name}.sums.unfinished").open("wb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)  # as another agent does that builds it
        deploying = [asyncio.create_task(deploy_slow()) for _ in range(70)]
        await asyncio.wait_for(many.wait(), 30)
        await assert_serves(agent, spec, models["m"])
    assert set(await asyncio.gather(*deploying)) == {"ready"}
