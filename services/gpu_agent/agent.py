"""The agent: its shards, and the transitions between cold, warming, warm, active and draining."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Iterable
from functools import partial

from services.common.queues import RequestQueue
from services.common.tasks import end_tasks
from services.common.telemetry import logger
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.copy_lane import CopyLane, CopyTurn
from services.gpu_agent.engine.instance import Instance
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.loop import EngineLoop
from services.gpu_agent.engine.model import BoundModel, build_model
from services.gpu_agent.engine.sequence import SequenceOutput
from services.gpu_agent.images import Images
from services.gpu_agent.instance_server import InstanceServer
from services.gpu_agent.relay import Relay
from services.gpu_agent.reports import Reports
from services.gpu_agent.shard import Shard
from services.gpu_agent.weights.errors import CheckpointError, ImageCorrupt
from services.gpu_agent.weights.image import Image
from services.gpu_agent.weights.loader import LoadProgress, load
from warmserve.v1 import cluster_pb2, common_pb2

_log = logger(__name__)

COLD = common_pb2.REPLICA_STATE_COLD
WARMING = common_pb2.REPLICA_STATE_WARMING
WARM = common_pb2.REPLICA_STATE_WARM
ACTIVE = common_pb2.REPLICA_STATE_ACTIVE
DRAINING = common_pb2.REPLICA_STATE_DRAINING


_KV_RESERVE_SHARE = 16  # of the arena's pages an instance reserves at most one in so many


class NoRoomError(Exception):
    """The arena has too few free pages; the message has the numbers."""


class BusyError(Exception):
    """The order does not fit the shard's state."""


class Agent:
    """Carries out orders. Every order is idempotent: repeated, it changes nothing and answers with the state that is.

    Lives on the event loop; copying, files and building run in threads, the engine in a thread of its own.
    """

    def __init__(
        self, agent_id: str, arena: Arena, images: Images, queue: RequestQueue, reports: Reports, max_batch: int
    ) -> None:
        self._id = agent_id
        self._arena = arena
        self._images = images
        self._queue = queue
        self._reports = reports
        self._max_batch = max_batch
        self._lane = CopyLane()
        self._shards: dict[str, Shard] = {}
        self._loop = asyncio.get_running_loop()
        self._engine = EngineLoop(
            on_step=partial(self._from_engine, self._on_step), on_failure=partial(self._from_engine, self._on_failure)
        )
        self._relay = Relay(agent_id, self._on_cancel, self._on_router_lost)
        reports.describe = self.residency

    def start(self) -> None:
        """Starts the engine."""
        self._engine.start()

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""
        return self._engine.alive

    def residency(self) -> cluster_pb2.AgentResidency:
        """What is where, now."""
        usage = self._arena.usage()
        return cluster_pb2.AgentResidency(
            agent_id=self._id,
            pages_free=usage.free,
            pages_kv=usage.kv,
            pages_weights=usage.weights,
            shards=[
                shard.to_proto(usage) for shard in self._shards.values() if shard.state != COLD or shard.reason.text
            ],
            updated_unix_ms=int(time.time() * 1e3),
        )

    # Orders

    def warm(self, spec: cluster_pb2.ModelSpec, group: common_pb2.Group, reason: common_pb2.Reason) -> Shard:
        """Begins to make a shard's weights resident. Raises NoRoomError, BusyError."""
        shard = self._shard(spec, group)
        if shard.state == COLD or (shard.state == WARM and not shard.complete):
            self._begin_load(shard, reason, active=False)
        return shard

    def wake(self, spec: cluster_pb2.ModelSpec, group: common_pb2.Group, reason: common_pb2.Reason) -> Shard:
        """Begins to make a shard an instance. Raises NoRoomError, BusyError."""
        shard = self._shard(spec, group)
        if shard.state == WARM and shard.complete:
            try:
                self._activate(shard, reason)
            except OutOfPages as error:
                raise NoRoomError(f"{shard.name} is warm on {self._id}, but has no room to serve: {error}") from error
        elif shard.state in (COLD, WARM):
            self._begin_load(shard, reason, active=True)
        elif shard.state == WARMING and not shard.wanted_active:
            shard.wanted_active = True
            shard.reason = reason
            if shard.turn is not None:
                self._lane.hurry(shard.turn)
            self._reports.changed()
        elif shard.state == DRAINING and shard.server is not None:
            shard.rewoken.set()
            if not shard.retiring:  # else it is woken anew as soon as it is warm
                self._enter(shard, ACTIVE, reason, cluster_pb2.EVENT_KIND_WOKEN)
                self._reports.instance(self._instance_record(shard))
        return shard

    def drain(self, model: str, reason: common_pb2.Reason) -> common_pb2.ReplicaState.ValueType:
        """Has an instance finish what it runs and take nothing new."""
        shard = self._shards.get(model)
        if shard is None:
            return COLD
        if shard.state == ACTIVE:
            self._enter(shard, DRAINING, reason, cluster_pb2.EVENT_KIND_DRAINING)
            self._reports.instance(self._instance_record(shard))
            shard.task = asyncio.create_task(self._drain(shard, reason, shard.task), name=f"drain {model}")
        elif shard.state == DRAINING:
            shard.rewoken.clear()
        elif shard.state == WARMING and shard.wanted_active:
            shard.wanted_active = False
            shard.reason = reason
            self._reports.changed()
        return shard.state

    async def evict(
        self, model: str, keep: float, reason: common_pb2.Reason
    ) -> tuple[common_pb2.ReplicaState.ValueType, int]:
        """Gives weight pages back from the end, leaving the share `keep`; returns the state and the pages freed.

        Raises BusyError while the shard serves.
        """
        shard = self._shards.get(model)
        if shard is None:
            return COLD, 0
        if shard.state in (ACTIVE, DRAINING):
            raise BusyError(f"{model} is serving on {self._id}; drain it first")
        await self._abandon_load(shard)
        if shard.state in (ACTIVE, DRAINING):
            raise BusyError(f"{model} was woken on {self._id} meanwhile; drain it first")
        before = shard.pages_resident
        if shard.weights is not None and before:
            kept = math.ceil(keep * shard.weights.num_pages)
            await asyncio.to_thread(shard.weights.shrink, kept)
            state = WARM if shard.weights.resident_pages else COLD
            lasted = self._enter(shard, state, reason, None)
            freed = max(before - shard.weights.resident_pages, 0)
            self._event(shard, cluster_pb2.EVENT_KIND_EVICTED, lasted, freed * self._arena.page_bytes)
            return state, freed
        return shard.state, 0

    async def forget(self, model: str, keep_image: bool) -> None:
        """Removes an undeployed model: finishes what runs, gives everything back, deletes the image."""
        shard = self._shards.get(model)
        if shard is None:
            return
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_UNDEPLOYED, text="the model was undeployed")
        while shard.state in (ACTIVE, DRAINING):
            self.drain(model, reason)
            await asyncio.gather(*filter(None, [shard.task]), return_exceptions=True)
        await self.evict(model, 0, reason)
        del self._shards[model]
        shard.module = None
        if shard.weights is not None:
            await asyncio.to_thread(shard.weights.remove)
        if shard.blueprint is not None and not keep_image:
            await asyncio.to_thread(self._images.discard, shard.blueprint)
        self._reports.changed()

    async def stop(self, grace_s: float) -> None:
        """Takes no new requests, finishes running ones for up to `grace_s` seconds, and hands over the rest."""
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_AGENT_STOPPING, text=f"agent {self._id} is stopping")
        for shard in self._shards.values():
            await self._abandon_load(shard)
            self.drain(shard.name, reason)
        drains = [shard.task for shard in self._shards.values() if shard.task is not None]
        if drains:
            await asyncio.wait(drains, timeout=grace_s)
        for shard in self._shards.values():
            if shard.server is not None:
                shard.server.fail_all(f"agent {self._id} stopped")
                await shard.server.flush()
        await end_tasks(drains)
        await self._relay.close()
        await asyncio.to_thread(self._engine.stop)

    # Loading

    def _shard(self, spec: cluster_pb2.ModelSpec, group: common_pb2.Group) -> Shard:
        shard = self._shards.get(spec.name)
        if shard is None:
            shard = self._shards[spec.name] = Shard(spec, group)
        if shard.spec.deployed_unix_ms != spec.deployed_unix_ms:
            raise BusyError(f"an older model named {spec.name} is still being removed from {self._id}; try again")
        return shard

    def _begin_load(self, shard: Shard, reason: common_pb2.Reason, active: bool) -> None:
        needed = self._pages_missing(shard) + (self._kv_reserve(shard) if active else 0)
        free = self._arena.free_pages
        if needed > free:
            raise NoRoomError(
                f"{shard.name} needs {needed} more pages on {self._id}, of which {free} of {self._arena.num_pages} are "
                "free; evict another model first"
            )
        shard.wanted_active = active
        shard.abandoned = False
        self._enter(shard, WARMING, reason, cluster_pb2.EVENT_KIND_WARMING)
        shard.task = asyncio.create_task(self._load(shard), name=f"load {shard.name}")

    def _pages_missing(self, shard: Shard) -> int:
        total = shard.pages_total or math.ceil(shard.spec.facts.shard_bytes / self._arena.page_bytes)
        return total - shard.pages_resident

    def _kv_reserve(self, shard: Shard) -> int:
        """KV pages an instance holds from its first moment: one full sequence, but no more than its share."""
        facts = shard.spec.facts
        full = math.ceil(facts.kv_bytes_per_token * facts.context_tokens / self._arena.page_bytes)
        return max(1, min(full, self._arena.num_pages // _KV_RESERVE_SHARE))

    async def _load(self, shard: Shard) -> None:
        began = time.monotonic()
        cold = shard.pages_resident == 0
        resident = shard.pages_resident
        image: Image | None = None
        try:
            image = await self._bind(shard)
            # An image that turns out damaged is replaced on the way.
            while not shard.complete and not shard.abandoned:
                shard.turn = CopyTurn(shard.wanted_active)
                async with self._lane.turn(shard.turn):
                    if not shard.abandoned:
                        image = await self._copy(shard, image, shard.turn)
        except (CheckpointError, ImageCorrupt, OutOfPages, OSError) as error:
            self._not_ready(shard, error)
            return
        finally:
            if image is not None:
                image.close()
            shard.turn = None
            shard.mended = False
            shard.bytes_per_s = 0.0
        copied = (shard.pages_resident - resident) * self._arena.page_bytes
        took_ms = (time.monotonic() - began) * 1e3
        if shard.abandoned:
            self._enter(shard, WARM if shard.pages_resident else COLD, shard.reason, None)
            return
        if cold:
            shard.cold_load_ms = took_ms
        self._enter(shard, WARM, shard.reason, None)
        self._event(shard, cluster_pb2.EVENT_KIND_WARMED, took_ms, copied)
        if shard.wanted_active:
            try:
                self._activate(shard, shard.reason, lasted_ms=took_ms)
            except OutOfPages as error:
                self._not_ready(shard, error)

    async def _bind(self, shard: Shard) -> Image:
        """The image, and on the first load the module over the weight range."""
        if shard.blueprint is None:
            shard.blueprint = await asyncio.to_thread(self._images.inspect, shard.spec)
            present = await asyncio.to_thread(self._images.present, shard.blueprint)
            shard.tier = common_pb2.TIER_DISK if present else common_pb2.TIER_REMOTE
        blueprint = shard.blueprint
        image = await asyncio.to_thread(self._images.open, blueprint)
        shard.tier = common_pb2.TIER_DISK
        if shard.weights is None:
            shard.weights = self._arena.add_weights(shard.name, blueprint.layout.total_bytes)
        if shard.module is None:
            shard.module = await asyncio.to_thread(
                build_model, blueprint.checkpoint.model_config, blueprint.layout, shard.weights
            )
        return image

    async def _copy(self, shard: Shard, image: Image, turn: CopyTurn) -> Image:
        """Copies until all is resident or the turn is cut short; returns the image to go on with."""
        weights, blueprint = shard.weights, shard.blueprint
        assert weights is not None
        assert blueprint is not None

        def progress(done: LoadProgress) -> None:
            shard.bytes_per_s = done.bytes_per_s

        self._reports.changed()
        try:
            await asyncio.to_thread(load, image, weights, cancel=turn.cancel, progress=progress)
        except ImageCorrupt as error:
            if shard.mended:
                raise
            _log.warning("image is damaged; building it anew", model=shard.name, error=str(error))
            shard.mended = True
            await asyncio.to_thread(self._images.discard, blueprint)
            image.close()
            image = await asyncio.to_thread(self._images.open, blueprint)
        finally:
            self._reports.changed()
        return image

    def _not_ready(self, shard: Shard, error: Exception) -> None:
        _log.error("did not become ready", model=shard.name, error=str(error))
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=f"did not become ready: {error}")
        self._enter(shard, WARM if shard.pages_resident else COLD, reason, cluster_pb2.EVENT_KIND_FAILED)

    async def _abandon_load(self, shard: Shard) -> None:
        if shard.state != WARMING or shard.task is None:
            return
        shard.abandoned = True
        if shard.turn is not None:
            shard.turn.cancel.set()
        await asyncio.gather(shard.task, return_exceptions=True)

    # Serving

    def _activate(self, shard: Shard, reason: common_pb2.Reason, lasted_ms: float = 0.0) -> None:
        blueprint, module = shard.blueprint, shard.module
        assert blueprint is not None
        assert isinstance(module, BoundModel)
        began = time.monotonic()
        instance_id = f"{self._id}.{uuid.uuid4().hex[:8]}"
        kv = KvCache(self._arena, instance_id, blueprint.kv)
        # So that prewarming beside it can never leave an instance without memory to go on.
        kv.reserve(self._kv_reserve(shard))
        slots = shard.spec.limits.max_batch or self._max_batch
        instance = Instance(
            instance_id,
            shard.name,
            module,
            kv,
            eos_ids=blueprint.checkpoint.eos_token_ids,
            context_tokens=shard.spec.facts.context_tokens or blueprint.facts.context_tokens,
            max_batch=slots,
        )
        self._engine.activate(instance)
        shard.server = InstanceServer(
            instance_id, shard.name, slots, self._engine, self._queue, self._relay, self._reports.changed
        )
        shard.server.start_pulling()
        self._enter(shard, ACTIVE, reason, None)
        self._event(shard, cluster_pb2.EVENT_KIND_WOKEN, lasted_ms + (time.monotonic() - began) * 1e3, 0)
        self._reports.instance(self._instance_record(shard))

    async def _drain(self, shard: Shard, reason: common_pb2.Reason, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])  # an earlier drain that a wake ended
        server = shard.server
        if server is None:
            return
        shard.rewoken.clear()
        await server.stop_pulling()
        if not await server.until_idle(unless=shard.rewoken):
            server.start_pulling()
            return
        shard.retiring = True
        await server.flush()
        await asyncio.wrap_future(self._engine.deactivate(server.instance_id))
        shard.retiring = False
        self._retire(shard, reason, cluster_pb2.EVENT_KIND_DRAINED)
        if shard.rewoken.is_set():
            try:
                self._activate(shard, reason)
            except OutOfPages as error:
                self._not_ready(shard, error)

    def _retire(self, shard: Shard, reason: common_pb2.Reason, kind: cluster_pb2.EventKind.ValueType) -> None:
        """Active or draining becomes warm, once the engine has let go."""
        assert shard.server is not None
        self._reports.instance_gone(shard.name, shard.server.instance_id)
        shard.server = None
        self._enter(shard, WARM, reason, kind)

    def _instance_record(self, shard: Shard) -> cluster_pb2.InstanceRecord:
        assert shard.server is not None
        return cluster_pb2.InstanceRecord(
            id=shard.server.instance_id,
            model=shard.name,
            group=shard.group,
            state=shard.state,
            slots=shard.server.slots,
            started_unix_ms=int(shard.since * 1e3),
        )

    # News from the engine's thread and from routers

    def _from_engine(self, handler: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(handler, *arguments)

    def _servers(self) -> list[InstanceServer]:
        return [shard.server for shard in self._shards.values() if shard.server is not None]

    def _on_step(self, instance_id: str, outputs: list[SequenceOutput]) -> None:
        for server in self._servers():
            if server.instance_id == instance_id:
                server.handle(outputs)

    def _on_failure(self, instance_id: str, error: Exception) -> None:
        for shard in self._shards.values():
            if shard.server is not None and shard.server.instance_id == instance_id:
                reason = common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=f"the instance failed: {error}")
                if shard.state == ACTIVE:  # a draining one goes on to warm, for nothing runs on it any more
                    self._enter(shard, DRAINING, reason, cluster_pb2.EVENT_KIND_FAILED)
                    shard.task = asyncio.create_task(self._drain(shard, reason, shard.task))

    def _on_cancel(self, request_ids: Iterable[str]) -> None:
        for server in self._servers():
            server.cancel(request_ids)

    def _on_router_lost(self, address: str) -> None:
        for server in self._servers():
            server.cancel_router(address)

    # Reports

    def _enter(
        self,
        shard: Shard,
        state: common_pb2.ReplicaState.ValueType,
        reason: common_pb2.Reason,
        kind: cluster_pb2.EventKind.ValueType | None,
    ) -> float:
        lasted = shard.enter(state, reason)
        _log.info("transition", model=shard.name, state=common_pb2.ReplicaState.Name(state), reason=reason.text)
        if kind is not None:
            self._event(shard, kind, lasted, 0)
        self._reports.changed()
        return lasted

    def _event(self, shard: Shard, kind: cluster_pb2.EventKind.ValueType, duration_ms: float, nbytes: int) -> None:
        self._reports.event(
            cluster_pb2.Event(
                unix_ms=int(time.time() * 1e3),
                kind=kind,
                model=shard.name,
                agent_ids=[self._id],
                reason=shard.reason,
                duration_ms=duration_ms,
                bytes=nbytes,
            )
        )
