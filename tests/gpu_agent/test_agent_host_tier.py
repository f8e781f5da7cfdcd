"""Whole agents with images in the node's memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import torch
from structlog.testing import capture_logs

from launcher.backing import Backing
from services.gpu_agent.images import Images
from services.gpu_agent.keeping import TierKeeper
from services.gpu_agent.weights.building import prepare_image
from services.gpu_agent.weights.checkpoint import Checkpoint
from services.gpu_agent.weights.host_tier import HostTier
from services.gpu_agent.weights.image import Image, delete_image, open_image
from services.gpu_agent.weights.layout import plan_layout
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import REASON, RunningAgent, running_agent
from tests.gpu_agent.test_agent_service import PROMPT, expected
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2


async def kept(agent: RunningAgent, count: int) -> list[cluster_pb2.HostImage]:
    """What the tier holds, once it is so many images."""
    name = agent.settings.id
    await asyncio.wait_for(agent.residency.wait_for(lambda items: len(items[name].host_tier.images) == count), 30)
    return list(agent.residency.items[name].host_tier.images)


async def evict(agent: RunningAgent, model: str) -> None:
    await agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model=model, reason=REASON))


async def test_deployed_models_are_loaded_from_memory_by_all_agents_of_the_node(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    model = checkpoints.llama(tmp_path / "m")
    tier = {"host_tier_bytes": "4MiB", "host_tier_dir": tmp_path / "tier"}
    where = (etcd.address, redis_server.address, keys.prefix, tmp_path)
    async with running_agent(*where, **tier) as one, running_agent(*where, agent_id="g1", **tier) as two:
        spec = await one.prepare("m", tmp_path / "m")
        (image,) = await kept(one, 1)
        assert image.name.startswith(spec.facts.fingerprint[:32])
        assert one.residency.items["g0"].host_tier.used_bytes == image.bytes == spec.facts.shard_bytes
        for agent in (one, two):
            await agent.stub.WarmReplica(agent_pb2.WarmReplicaRequest(spec=spec, group=agent.group, reason=REASON))
            await agent.until("m", common_pb2.REPLICA_STATE_WARM)
            await evict(agent, "m")
            await agent.wake(spec)
            name = f"r-{agent.settings.id}"
            await agent.submit("m", name, PROMPT, 8)
            await agent.relay.finished(name)
            assert agent.relay.tokens(name) == expected(model, PROMPT, 8)
            await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
            await agent.until("m", common_pb2.REPLICA_STATE_WARM)
            await agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model="m", keep_residency=0.5, reason=REASON))
            await asyncio.wait_for(
                agent.residency.wait_for(lambda i, a=agent: i[a.settings.id].shards[0].tier == common_pb2.TIER_HOST), 30
            )


async def test_models_of_one_checkpoint_share_an_image(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    checkpoints.llama(tmp_path / "m")
    options = {"host_tier_bytes": "4MiB", "host_tier_dir": tmp_path / "tier"}
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, **options) as agent:
        specs = [await agent.prepare(name, tmp_path / "m") for name in ("one", "two")]
        for spec in specs:
            await agent.wake(spec)
        assert len(await kept(agent, 1)) == 1
        assert len(list((tmp_path / "images").glob("*.image"))) == 1


async def test_a_bit_flipped_in_memory_is_found_and_the_disk_serves(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    model = checkpoints.llama(tmp_path / "m")
    options = {"host_tier_bytes": "4MiB", "host_tier_dir": tmp_path / "tier"}
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, **options) as agent:
        spec = await agent.prepare("m", tmp_path / "m")
        (image,) = await kept(agent, 1)
        with (tmp_path / "tier" / image.name).open("r+b") as file:
            file.seek(100_000)
            byte = file.read(1)
            file.seek(100_000)
            file.write(bytes([byte[0] ^ 1]))
        await agent.submit("m", "r0", PROMPT, 8)
        await agent.wake(spec)
        await agent.relay.finished("r0")
        assert agent.relay.tokens("r0") == expected(model, PROMPT, 8)


async def deploy(agent: RunningAgent, name: str, source: Path, priority: float = 0) -> cluster_pb2.ModelSpec:
    """Prepares a model and makes it known, as the placer does."""
    spec = await agent.prepare(name, source, priority=priority)
    await agent.node.store.put(agent.node.keys.model(name), spec)
    return spec


async def forecast(agent: RunningAgent, model: str, *peaks: float) -> None:
    """Has the forecaster say how many requests are in progress at most, window by window."""
    windows = [cluster_pb2.WindowForecast(peak_load=cluster_pb2.Quantiles(p90=peak)) for peak in peaks]
    record = cluster_pb2.Forecast(model=model, windows=windows)
    await agent.node.store.put(agent.node.keys.forecast(model), record)


async def holds(agent: RunningAgent, spec: cluster_pb2.ModelSpec, score: float) -> None:
    """Returns once the tier holds just this model's image, worth so much."""

    def there(items: Mapping[str, cluster_pb2.AgentResidency]) -> bool:
        shown = items[agent.settings.id].host_tier.images
        return [(image.name[:32], image.score) for image in shown] == [(spec.facts.fingerprint[:32], score)]

    await asyncio.wait_for(agent.residency.wait_for(there), 60)


async def test_what_the_forecast_says_is_worth_most_is_in_memory_before_anybody_wakes_it(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    """A budget for one of two; nothing is ever warm."""
    for seed, name in enumerate(("a", "b")):
        checkpoints.llama(tmp_path / name, seed=seed)
    options = {"host_tier_bytes": "1MiB", "host_tier_dir": tmp_path / "tier"}
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, **options) as agent:
        first = await deploy(agent, "a", tmp_path / "a")
        await holds(agent, first, 0)  # there is room
        second = await deploy(agent, "b", tmp_path / "b", priority=2)
        await forecast(agent, "a", 1, 4, 100)  # the third window is far away
        await holds(agent, first, 4)
        await forecast(agent, "b", 3)
        await holds(agent, second, 6)
        await forecast(agent, "a", 7)  # not much more than 6
        await forecast(agent, "b", 3.25)
        await holds(agent, second, 6.5)
        await forecast(agent, "a", 9)
        await holds(agent, first, 9)
        await agent.node.store.delete(agent.node.keys.forecast("a"))
        await holds(agent, second, 6.5)
        assert agent.shard("a") is agent.shard("b") is None


async def test_another_agent_of_the_node_finds_there_what_one_has_taken_in_and_knows_its_worth(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    checkpoints.llama(tmp_path / "m")
    tier = {"host_tier_bytes": "4MiB", "host_tier_dir": tmp_path / "tier"}
    where = (etcd.address, redis_server.address, keys.prefix, tmp_path)
    async with running_agent(*where, **tier) as one:
        spec = await deploy(one, "m", tmp_path / "m")
        await forecast(one, "m", 5)
        await holds(one, spec, 5)
        async with running_agent(*where, agent_id="g1", **tier) as two:
            await holds(two, spec, 5)


@pytest.mark.parametrize("budget", ["64KiB", "1MiB"])
async def test_models_that_do_not_fit_are_served_from_the_disk(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path, budget: str
) -> None:
    """A budget smaller than any model, which is said, and one for one of two."""
    models = {name: checkpoints.llama(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))}
    options = {"host_tier_bytes": budget, "host_tier_dir": tmp_path / "tier"}
    with capture_logs() as logs:
        async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, **options) as agent:
            specs = {name: await deploy(agent, name, tmp_path / name) for name in models}
            if budget == "1MiB":
                await kept(agent, 1)
            for name, model in models.items():
                await agent.wake(specs[name])
                await agent.submit(name, f"r-{name}", PROMPT, 8)
                await agent.relay.finished(f"r-{name}")
                assert agent.relay.tokens(f"r-{name}") == expected(model, PROMPT, 8)
    said = [log["image"][:32] for log in logs if "smaller than this image" in log["event"]]
    assert sorted(said) == (sorted(s.facts.fingerprint[:32] for s in specs.values()) if budget == "64KiB" else [])


async def test_undeploying_takes_the_image_out_of_memory(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    checkpoints.llama(tmp_path / "m")
    options = {"host_tier_bytes": "4MiB", "host_tier_dir": tmp_path / "tier"}
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, **options) as agent:
        spec = await agent.prepare("m", tmp_path / "m")
        await agent.node.store.put(agent.node.keys.model("m"), spec)
        await kept(agent, 1)
        await agent.wake(spec)
        await agent.node.store.delete(agent.node.keys.model("m"))
        while list((tmp_path / "tier").glob("*.image*")):
            await asyncio.sleep(0.01)


async def test_what_found_no_place_is_taken_in_when_a_load_no_longer_holds_what_is_worth_less(tmp_path: Path) -> None:
    """Nothing says so but the end of that load."""
    images, paths = images_of(tmp_path, "xy")
    tier = images.tier
    keeper = TierKeeper(cast(Images, images), lambda: None)
    keeper.start()

    async def holds(model: str) -> None:
        async with asyncio.timeout(30):
            while [kept.name for kept in tier.kept()] != [paths[model].name]:
                await asyncio.sleep(0.01)

    keeper.value("x", paths["x"].name[:32], 1.0)
    await holds("x")
    with open_image(paths["x"]) as image, tier.reading(image) as host:
        assert host is not None
        keeper.value("y", paths["y"].name[:32], 10.0)
        async with asyncio.timeout(30):
            while not keeper._turned_away:
                await asyncio.sleep(0.01)
    keeper.loaded(from_disk=False)
    await holds("y")
    await keeper.close()


async def test_an_image_deleted_while_it_is_taken_in_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, paths = images_of(tmp_path, "x")
    keeper = TierKeeper(cast(Images, images), lambda: None)
    keeper.start()
    read = Image.fetch_page

    def deleted_meanwhile(image: Image, index: int, into: memoryview) -> None:
        delete_image(image.path)  # as when its model is undeployed, here or by another agent
        images.tier.discard(image.path.name)
        read(image, index, into)

    monkeypatch.setattr(Image, "fetch_page", deleted_meanwhile)
    keeper.value("x", paths["x"].name[:32], 1.0)
    async with asyncio.timeout(30):
        while paths["x"].exists():
            await asyncio.sleep(0.01)
    assert keeper._task is not None
    await keeper._task
    assert images.tier.kept() == []
    await keeper.close()


@dataclass
class ImagesOnDisk:
    """Stands for an agent's images, of which there are some on the disk."""

    tier: HostTier
    paths: list[Path]

    def sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.paths if path.exists()}

    def named(self, name: str) -> Image:
        return open_image(self.paths[0].parent / name)

    def preparing(self) -> list[cluster_pb2.DiskFill]:
        return []

    def on_disk(self) -> cluster_pb2.DiskTier:
        return cluster_pb2.DiskTier()


def images_of(folder: Path, models: str) -> tuple[ImagesOnDisk, dict[str, Path]]:
    """Images of small models on the disk, and a tier that has room for one and a half of them."""
    paths, nbytes = {}, 0
    for seed, model in enumerate(models):
        checkpoints.llama(folder / "models" / model, seed=seed)
        checkpoint = Checkpoint.open(str(folder / "models" / model), [folder / "models"])
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        layout = plan_layout(shapes, checkpoint.aliases, torch.float32, 65536)
        paths[model] = prepare_image(checkpoint, layout, folder / "images", lambda *_: None)
        nbytes = layout.total_bytes
    return ImagesOnDisk(HostTier(folder / "tier", nbytes * 3 // 2), list(paths.values())), paths
