"""The agent: its shards, and the transitions between cold, warming, warm, active and draining."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial

from services.common.queues import RequestQueue
from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.device import is_fatal
from services.gpu_agent.engine.backend import Backend
from services.gpu_agent.engine.grammar import GrammarCompiler
from services.gpu_agent.engine.instance import Instance
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.loop import EngineLoop, EngineStopped
from services.gpu_agent.engine.sequence import SequenceOutput
from services.gpu_agent.images import Images
from services.gpu_agent.instance_server import InstanceServer
from services.gpu_agent.loading import Loader
from services.gpu_agent.relay import Relay
from services.gpu_agent.reports import Reports
from services.gpu_agent.shard import Shard
from services.gpu_agent.weights.errors import CheckpointError, ImageCorrupt
from warmserve.v1 import cluster_pb2, common_pb2

_log = logger(__name__)

COLD = common_pb2.REPLICA_STATE_COLD
WARMING = common_pb2.REPLICA_STATE_WARMING
WARM = common_pb2.REPLICA_STATE_WARM
ACTIVE = common_pb2.REPLICA_STATE_ACTIVE
DRAINING = common_pb2.REPLICA_STATE_DRAINING


_KV_RESERVE_SHARE = 16  # of the arena's pages an instance reserves at most one in so many
_FLUSH_S = 2.0  # how long Redis may take to be told of ended requests before work goes on without that

_BEGINNINGS = (cluster_pb2.EVENT_KIND_WARMING, cluster_pb2.EVENT_KIND_DRAINING, cluster_pb2.EVENT_KIND_WOKEN)


class NoRoomError(Exception):
    """The arena has too few free pages; the message has the numbers."""


class BusyError(Exception):
    """The order does not fit the shard's state."""


class Agent:
    """Carries out orders. Every order is idempotent: repeated, it changes nothing and answers with the state that is.

    Lives on the event loop; copying, files and building run in threads, the engine in a thread of its own.
    """

    def __init__(
        self,
        agent_id: str,
        arena: Arena,
        backend: Backend,
        images: Images,
        queue: RequestQueue,
        reports: Reports,
    ) -> None:
        self._id = agent_id
        self._arena = arena
        self._images = images
        self._queue = queue
        self._reports = reports
        self._backend = backend
        self._loader = Loader(arena, backend, images, reports.changed)
        self._stopping = False
        self._shards: dict[str, Shard] = {}
        self._loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[None] = self._loop.create_future()  # fails when the device is lost
        self._engine = EngineLoop(
            on_step=partial(self._from_engine, self._on_step),
            on_failure=partial(self._from_engine, self._on_failure),
            is_fatal=is_fatal,
        )
        self._relay = Relay(agent_id, self._on_cancel, self._on_router_lost)
        reports.describe = self.residency

    def start(self) -> None:
        """Starts the engine."""
        self._engine.start()

    async def ended(self) -> None:
        """Returns when the engine has ended, and raises what it or the device died of: the agent is of no more use."""
        engine = asyncio.wrap_future(self._engine.ended)
        await asyncio.wait([engine, self._lost], return_when=asyncio.FIRST_COMPLETED)
        (self._lost if self._lost.done() else engine).result()

    def residency(self) -> cluster_pb2.AgentResidency:
        """What is where, now."""
        if grown := self._backend.grown_bytes:
            _log.error("device memory outside the arena grew while serving", nbytes=grown)
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

    async def warm(self, spec: cluster_pb2.ModelSpec, group: common_pb2.Group, reason: common_pb2.Reason) -> Shard:
        """Begins to make a shard's weights resident. Raises NoRoomError, BusyError."""
        async with self._ordered(spec, group) as shard:
            if shard.state == COLD or (shard.state == WARM and not shard.complete):
                self._begin_load(shard, reason, active=False)
            return shard

    async def wake(self, spec: cluster_pb2.ModelSpec, group: common_pb2.Group, reason: common_pb2.Reason) -> Shard:
        """Begins to make a shard an instance. Raises NoRoomError, BusyError."""
        async with self._ordered(spec, group) as shard:
            if shard.state == WARM and shard.complete:
                try:
                    self._activate(shard, reason)
                except OutOfPages as error:
                    raise NoRoomError(
                        f"{shard.name} is warm on {self._id}, but has no room to serve: {error}"
                    ) from error
            elif shard.state in (COLD, WARM):
                self._begin_load(shard, reason, active=True)
            elif shard.state == WARMING and not shard.wanted_active:
                shard.wanted_active = True
                shard.reason = reason
                self._loader.hurry(shard)
                self._reports.changed()
            elif shard.state == DRAINING:
                shard.wake_reason = reason
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
            self._begin_drain(shard, reason, cluster_pb2.EVENT_KIND_DRAINING)
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

        Raises BusyError while the shard serves. Once begun it is carried out, even if the caller goes away.
        """
        shard = self._shards.get(model)
        if shard is None:
            return COLD, 0
        return await asyncio.shield(self._evict(shard, keep, reason))

    async def forget(self, spec: cluster_pb2.ModelSpec, image_needed: Callable[[], bool]) -> None:
        """Removes an undeployed model: finishes what runs, gives everything back, deletes the image."""
        shard = self._shards.get(spec.name)
        if shard is not None and shard.spec.deployed_unix_ms == spec.deployed_unix_ms:
            shard.leaving = True
            reason = common_pb2.Reason(cause=common_pb2.CAUSE_UNDEPLOYED, text="the model was undeployed")
            while self.drain(spec.name, reason) == DRAINING and shard.task is not None:
                await asyncio.wait([shard.task])
                shard.task.result()
            await self.evict(spec.name, 0, reason)
            shard.program = None
            if shard.weights is not None:
                await asyncio.to_thread(shard.weights.remove)
            del self._shards[spec.name]  # not before: a later model of that name needs the range's name
            self._reports.changed()
        if not image_needed():
            await asyncio.to_thread(self._images.discard, spec.facts.fingerprint)

    async def stop(self, grace_s: float) -> None:
        """Takes no new requests, finishes running ones for up to `grace_s` seconds, and hands over the rest."""
        self._stopping = True
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_AGENT_STOPPING, text=f"agent {self._id} is stopping")
        shards = list(self._shards.values())
        for shard in shards:
            self.drain(shard.name, reason)
        await asyncio.gather(*(self._abandon_load(shard) for shard in shards))
        drains = [shard.task for shard in shards if shard.task is not None]
        if drains:
            await asyncio.wait(drains, timeout=grace_s)
        await end_tasks(drains)
        servers = self._servers()
        await asyncio.gather(*(server.stop_pulling() for server in servers))
        for server in servers:
            server.fail_all(f"agent {self._id} stopped")
        await asyncio.gather(*(server.flush(_FLUSH_S) for server in servers))
        await asyncio.gather(*(server.close() for server in servers))
        await self._relay.close()
        await asyncio.to_thread(self._engine.stop)

    # Loading

    @asynccontextmanager
    async def _ordered(self, spec: cluster_pb2.ModelSpec, group: common_pb2.Group) -> AsyncIterator[Shard]:
        """The shard, free for a new order: an eviction in progress has ended. Raises BusyError."""
        shard = self._shards.get(spec.name)
        if shard is None:
            shard = self._shards[spec.name] = Shard(spec, group)
        async with shard.orders:
            if self._stopping:
                raise BusyError(f"agent {self._id} is stopping")
            if shard.leaving or shard.spec.deployed_unix_ms != spec.deployed_unix_ms:
                raise BusyError(f"an older model named {spec.name} is still being removed from {self._id}; try again")
            yield shard

    def _begin_load(self, shard: Shard, reason: common_pb2.Reason, active: bool) -> None:
        needed = self._pages_missing(shard) + (self._kv_reserve(shard) if active else 0)
        free = self._arena.free_pages
        if needed > free:
            raise NoRoomError(
                f"{shard.name} needs {needed} more pages on {self._id}, of which {free} of {self._arena.num_pages} are "
                "free; evict another model first"
            )
        shard.wanted_active = active
        shard.abandoned.clear()
        self._enter(shard, WARMING, reason, cluster_pb2.EVENT_KIND_WARMING)
        shard.task = begin_task(self._load(shard), f"load {shard.name}")

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
        resident = shard.pages_resident
        try:
            await self._loader.load(shard)
            took_ms = (time.monotonic() - began) * 1e3
            if shard.abandoned.is_set():
                self._enter(shard, WARM if shard.pages_resident else COLD, shard.reason, None)
                return
            if resident == 0:
                shard.cold_load_ms = took_ms
            # Once for each model. Who needs it at once does not wait: it is served while it is being prepared.
            await self._prepare(shard, lambda: not (shard.wanted_active or shard.abandoned.is_set()))
            self._enter(shard, WARM, shard.reason, None)
            copied = (shard.pages_resident - resident) * self._arena.page_bytes
            self._event(shard, cluster_pb2.EVENT_KIND_WARMED, took_ms, copied)
            if shard.wanted_active:
                self._activate(shard, shard.reason, lasted_ms=took_ms)
                shard.preparing = begin_task(self._prepare_beside(shard), f"prepare {shard.name}")
        except (CheckpointError, ImageCorrupt, OutOfPages, OSError) as error:
            self._not_ready(shard, error)
        except Exception as error:
            self._not_ready(shard, error)  # whatever it is, the shard must not seem to be loading
            if is_fatal(error) and not self._lost.done():
                self._lost.set_exception(error)
            raise

    async def _prepare(self, shard: Shard, go_on: Callable[[], bool]) -> None:
        """Has the engine prepare the program, piece by piece between other models' steps, as long as it may."""
        program = shard.program
        assert program is not None
        await asyncio.wrap_future(self._engine.work(lambda: go_on() and program.prepare()))

    async def _prepare_beside(self, shard: Shard) -> None:
        """Prepares the program of an instance that serves already."""
        try:
            await self._prepare(shard, lambda: not shard.unprepared.is_set())
        except EngineStopped:
            return
        except Exception as error:
            # It serves all the same, but not as fast as it should.
            _log.exception("could not be prepared", model=shard.name)
            reason = common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=f"could not be prepared: {error}")
            self._enter(shard, shard.state, reason, cluster_pb2.EVENT_KIND_FAILED)

    async def _end_preparing(self, shard: Shard) -> None:
        if shard.preparing is not None:
            shard.unprepared.set()
            await asyncio.wait([shard.preparing])
            shard.unprepared.clear()
            shard.preparing = None

    def _not_ready(self, shard: Shard, error: Exception) -> None:
        _log.error("did not become ready", model=shard.name, error=str(error))
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=f"did not become ready: {error}")
        self._enter(shard, WARM if shard.pages_resident else COLD, reason, cluster_pb2.EVENT_KIND_FAILED)

    async def _abandon_load(self, shard: Shard) -> None:
        if shard.state == WARMING and shard.task is not None:
            await self._loader.abandon(shard)
            await asyncio.wait([shard.task])

    async def _evict(
        self, shard: Shard, keep: float, reason: common_pb2.Reason
    ) -> tuple[common_pb2.ReplicaState.ValueType, int]:
        async with shard.orders:  # a wake meanwhile would compute with pages that go
            if shard.state in (ACTIVE, DRAINING):
                raise BusyError(f"{shard.name} is serving on {self._id}; drain it first")
            await self._abandon_load(shard)
            await self._end_preparing(shard)
            before = shard.pages_resident
            if shard.weights is None or not before:
                return shard.state, 0
            began = time.monotonic()
            kept = math.ceil(keep * shard.weights.num_pages)
            await asyncio.to_thread(shard.weights.shrink, kept)
            freed = before - shard.pages_resident
            took_ms = (time.monotonic() - began) * 1e3
            self._enter(shard, WARM if shard.pages_resident else COLD, reason, None)
            self._event(shard, cluster_pb2.EVENT_KIND_EVICTED, took_ms, freed * self._arena.page_bytes)
            return shard.state, freed

    # Serving

    def _activate(self, shard: Shard, reason: common_pb2.Reason, lasted_ms: float = 0.0) -> None:
        blueprint, program = shard.blueprint, shard.program
        assert blueprint is not None
        assert program is not None
        began = time.monotonic()
        instance_id = f"{self._id}.{uuid.uuid4().hex[:8]}"
        kv = KvCache(self._arena, instance_id, blueprint.kv, program.clear_page)
        # So that prewarming beside it can never leave an instance without memory to go on.
        kv.reserve(self._kv_reserve(shard))
        eos_ids = frozenset(blueprint.checkpoint.eos_token_ids)
        limits, vocab_size = program.limits, program.model.vocab_size
        instance = Instance(
            instance_id,
            shard.name,
            program.runner(eos_ids),
            kv,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
            context_tokens=shard.context_tokens,
            max_batch=limits.max_batch,
            token_budget=limits.token_budget,
            max_prefills=limits.max_prefills,
            prefill_budget=limits.prefill_budget,
        )
        self._engine.activate(instance)
        if shard.grammars is None:
            shard.grammars = GrammarCompiler(blueprint.checkpoint.folder, vocab_size, eos_ids)
        shard.server = InstanceServer(
            instance_id,
            shard.name,
            limits.max_batch,
            self._engine,
            self._queue,
            self._relay,
            self._reports.changed,
            shard.grammars,
        )
        shard.server.start_pulling()
        self._enter(shard, ACTIVE, reason, None)
        self._event(shard, cluster_pb2.EVENT_KIND_WOKEN, lasted_ms + (time.monotonic() - began) * 1e3, 0)
        self._reports.instance(self._instance_record(shard))

    def _begin_drain(self, shard: Shard, reason: common_pb2.Reason, kind: cluster_pb2.EventKind.ValueType) -> None:
        self._enter(shard, DRAINING, reason, kind)
        self._reports.instance(self._instance_record(shard))
        shard.rewoken.clear()
        shard.task = begin_task(self._drain(shard, reason, shard.task), f"drain {shard.name}")

    async def _drain(self, shard: Shard, reason: common_pb2.Reason, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])  # an earlier drain that a wake ended
        server = shard.server
        if server is None:
            return
        await server.stop_pulling()
        idle = await server.until_idle(unless=shard.rewoken)
        if not idle and not shard.retiring:
            server.start_pulling()
            return
        shard.retiring = True
        await server.flush(_FLUSH_S)
        await asyncio.wrap_future(self._engine.deactivate(server.instance_id))
        shard.retiring = False
        self._retire(shard, reason, cluster_pb2.EVENT_KIND_DRAINED)
        if shard.rewoken.is_set():
            try:
                self._activate(shard, shard.wake_reason)
            except OutOfPages as error:
                self._not_ready(shard, error)
        await server.close()  # last, for nobody waits for it

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
                shard.retiring = True
                if shard.state == ACTIVE:  # a draining one goes on to warm, for nothing runs on it any more
                    self._begin_drain(shard, reason, cluster_pb2.EVENT_KIND_FAILED)

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
    ) -> None:
        lasted_ms = shard.enter(state, reason)
        _log.info("transition", model=shard.name, state=common_pb2.ReplicaState.Name(state), reason=reason.text)
        if kind is not None:
            # What begins has taken no time yet; what ends a state has taken as long as that state lasted.
            self._event(shard, kind, 0.0 if kind in _BEGINNINGS else lasted_ms, 0)
        self._reports.changed()

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
