"""The agent: the orders that its shards are given, and their loads and evictions."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from prometheus_client import Gauge

from services.common.queues import RequestQueue
from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.device import is_fatal
from services.gpu_agent.engine.backend import Backend
from services.gpu_agent.engine.loop import EngineStopped
from services.gpu_agent.images import Images
from services.gpu_agent.loading import Loader
from services.gpu_agent.reports import Reports
from services.gpu_agent.serving import Serving
from services.gpu_agent.shard import ACTIVE, COLD, DRAINING, WARM, WARMING, Shard
from services.gpu_agent.taken_back import TakenBack
from services.gpu_agent.transitions import Moved, Transitions
from services.gpu_agent.weights.errors import CheckpointError, ImageCorrupt
from warmserve.v1 import cluster_pb2, common_pb2

_log = logger(__name__)
_OUTSIDE = Gauge(
    "warmserve_gpu_agent_outside_arena_bytes", "Device memory outside the arena: its bound, held, grown", ["what"]
)


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
        self._reports = reports
        self._backend = backend
        self._grown = 0
        self._stopping = False
        self._shards: dict[str, Shard] = {}
        self._undeployed: dict[str, int] = {}  # by name: when the last model to be removed was deployed
        self._transitions = Transitions(agent_id, reports)
        self._serving = Serving(agent_id, arena, queue, reports, self._transitions, self._shards, self._wake_again)
        engine = self._serving.engine
        self._loader = Loader(
            arena,
            backend,
            images,
            reports.changed,
            on_pages=engine.look,
            on_near=self._serve_early,
            is_computing=lambda: engine.computing,
        )
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # fails when the device is lost
        reports.describe = self.residency
        TakenBack(arena, self._shards, self._transitions)  # the arena holds it

    def start(self) -> None:
        """Starts the engine."""
        self._serving.engine.start()
        self._loader.keeper.start()
        for what in ("bound", "held", "grown"):
            _OUTSIDE.labels(what).set_function(lambda what=what: getattr(self._backend.outside, what))  # type: ignore[misc]

    async def ended(self) -> None:
        """Returns when the engine has ended, and raises what it or the device died of: the agent is of no more use."""
        engine = asyncio.wrap_future(self._serving.engine.ended)
        await asyncio.wait([engine, self._lost], return_when=asyncio.FIRST_COMPLETED)
        (self._lost if self._lost.done() else engine).result()

    def residency(self) -> cluster_pb2.AgentResidency:
        """What is where, now."""
        outside = self._backend.outside
        if outside.grown > self._grown:
            _log.error("memory outside the arena grew while serving", by=outside.grown, of=outside.bound)
        self._grown = outside.grown
        usage = self._arena.usage()
        return cluster_pb2.AgentResidency(
            agent_id=self._id,
            pages_free=usage.free,
            pages_kv=usage.kv,
            pages_weights=usage.weights,
            pages_lent=usage.lent,
            pages_promised=usage.promised,
            host_tier=self._loader.keeper.host(),
            disk=self._loader.keeper.disk(),
            shards=[
                shard.to_proto(usage, self._kv_most(shard))
                for shard in self._shards.values()
                if shard.state != COLD or shard.reason.text
            ],
            updated_unix_ms=int(time.time() * 1e3),
        )

    def _kv_most(self, shard: Shard) -> int:
        return self._arena.kv_within_reach(shard.server.instance_id) if shard.server else 0

    def expect(self, model: str, sequences: float) -> None:
        """Says how many sequences the forecast has an instance of a model run at once."""
        self._serving.expect(model, sequences)

    def value(self, spec: cluster_pb2.ModelSpec, worth: float | None) -> None:
        """Says what a model's image in the node's memory is worth; None: it is not deployed any more."""
        if worth is None:
            self._loader.keeper.forget(spec.name)
        else:
            self._loader.keeper.value(spec.name, spec.facts.fingerprint, worth)

    def prepared(self) -> None:
        """A model's image is on this node's disk: if there is room, it is taken into memory too."""
        self._loader.keeper.arrived()

    # Orders

    async def warm(self, spec: cluster_pb2.ModelSpec, group: common_pb2.Group, reason: common_pb2.Reason) -> Shard:
        """Begins to make a shard's weights resident. Raises NoRoomError, BusyError."""
        async with self._ordered(spec, group) as shard:
            if reason.score != shard.score:
                shard.score = reason.score
                shard.lend()
                self._reports.changed()
            if shard.state == COLD or (shard.state == WARM and not shard.complete):
                self._begin_load(shard, reason, active=False)
            return shard

    async def wake(self, spec: cluster_pb2.ModelSpec, group: common_pb2.Group, reason: common_pb2.Reason) -> Shard:
        """Begins to make a shard an instance. Raises NoRoomError, BusyError."""
        async with self._ordered(spec, group) as shard:
            if shard.state in (COLD, WARM):
                shard.woken = time.monotonic()
                shard.want(active=True)  # before anybody counts its pages
                try:
                    self._wake(shard, reason)
                except NoRoomError:
                    shard.want(active=False)
                    raise
                self._count_wake(shard)
            elif shard.state == WARMING and not shard.wanted_active:
                self._count_wake(shard)
                shard.woken = time.monotonic()
                shard.want(active=True)
                shard.reason = reason
                self._loader.hurry(shard)
                self._reports.changed()
            elif shard.state == DRAINING:
                self._serving.rewake(shard, reason)
            return shard

    def drain(self, model: str, reason: common_pb2.Reason) -> common_pb2.ReplicaState.ValueType:
        """Has an instance finish what it runs and take nothing new."""
        shard = self._shards.get(model)
        if shard is None:
            return COLD
        if shard.state == ACTIVE:
            self._serving.drain(shard, reason, cluster_pb2.EVENT_KIND_DRAINING)
        elif shard.state == DRAINING:
            shard.rewoken.clear()
        elif shard.state == WARMING and shard.wanted_active:
            shard.want(active=False)
            self._loader.relax(shard)
            if shard.server is not None:
                self._serving.pause(shard)
            self._transitions.redirected(shard, reason, cluster_pb2.EVENT_KIND_CANCELLED)
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
        self._undeployed[spec.name] = spec.deployed_unix_ms
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
                with self._device_watched():
                    await asyncio.to_thread(shard.weights.remove)
            del self._shards[spec.name]  # not before: a later model of that name needs the range's name
            self._reports.changed()
            shard.weights = None
            with suppress(EngineStopped):  # between steps and captures, whose stream what goes was used on
                await asyncio.wrap_future(self._serving.engine.work(_collect_garbage))
        if not image_needed():
            await asyncio.to_thread(self._images.discard, spec.facts.fingerprint)
            self._loader.keeper.arrived()

    async def stop(self, grace_s: float) -> None:
        """Takes no new requests, finishes running ones for up to `grace_s` seconds, and hands over the rest."""
        self._stopping = True
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_AGENT_STOPPING, text=f"agent {self._id} is stopping")
        shards = list(self._shards.values())
        for shard in shards:
            self.drain(shard.name, reason)
        await asyncio.gather(*(self._abandon_load(shard, reason) for shard in shards))
        await self._loader.close()
        drains = [shard.task for shard in shards if shard.task is not None]
        if drains:
            await asyncio.wait(drains, timeout=grace_s)
        await end_tasks(drains)
        await self._serving.stop(f"agent {self._id} stopped")

    # Loading

    @asynccontextmanager
    async def _ordered(self, spec: cluster_pb2.ModelSpec, group: common_pb2.Group) -> AsyncIterator[Shard]:
        """The shard, free for a new order: an eviction in progress has ended. Raises BusyError."""
        if self._undeployed.get(spec.name) == spec.deployed_unix_ms:  # whoever orders it does not know yet
            raise BusyError(f"{spec.name} was undeployed")
        shard = self._shards.get(spec.name)
        if shard is None:
            shard = self._shards[spec.name] = Shard(spec, group)
        async with shard.orders:
            if self._stopping:
                raise BusyError(f"agent {self._id} is stopping")
            if shard.leaving or shard.spec.deployed_unix_ms != spec.deployed_unix_ms:
                raise BusyError(f"an older model named {spec.name} is still being removed from {self._id}; try again")
            yield shard

    def _count_wake(self, shard: Shard) -> None:
        resident, page_bytes = shard.pages_resident, self._arena.page_bytes
        shard.prewarming.woken(resident * page_bytes, (resident + self._pages_missing(shard)) * page_bytes)

    def _wake(self, shard: Shard, reason: common_pb2.Reason) -> None:
        if not shard.complete:
            self._begin_load(shard, reason, active=True)
            return
        try:
            self._serving.activate(shard, reason)
        except OutOfPages as error:
            raise NoRoomError(f"{shard.name} is warm on {self._id}, but has no room to serve: {error}") from error

    def _wake_again(self, shard: Shard, reason: common_pb2.Reason) -> None:
        try:
            self._wake(shard, reason)
        except NoRoomError as error:
            shard.want(active=False)
            self._transitions.failed(shard, error)

    def _begin_load(self, shard: Shard, reason: common_pb2.Reason, active: bool) -> None:
        self._check_room(shard, active)
        shard.want(active)
        shard.abandoned.clear()
        shard.copied_bytes, shard.copy_s = 0, 0.0
        self._transitions.enter(shard, WARMING, reason, cluster_pb2.EVENT_KIND_WARMING)
        shard.task = begin_task(self._load(shard), f"load {shard.name}")

    def _check_room(self, shard: Shard, active: bool) -> None:
        """Raises NoRoomError. A wake may take lent pages; warming takes none, and leaves instances theirs."""
        needed, usage = self._pages_missing(shard), self._arena.usage()
        if active:
            needed += self._serving.kv_reserve(shard)
            room, beside = usage.free + usage.lent, f" and {usage.lent} are lent"
        else:
            room, beside = usage.free - usage.promised, f", {usage.promised} of them kept for running instances"
        if needed > room:
            raise NoRoomError(
                f"{shard.name} needs {needed} more pages on {self._id}, of which {usage.free} of "
                f"{self._arena.num_pages} are free{beside}; drain or evict another model first"
            )

    def _pages_missing(self, shard: Shard) -> int:
        total = shard.pages_total or math.ceil(shard.spec.facts.shard_bytes / self._arena.page_bytes)
        return total - shard.pages_resident

    async def _load(self, shard: Shard) -> None:
        began = time.monotonic()
        resident = shard.pages_resident
        shard.gave_way = False
        try:
            while True:
                with self._device_watched():
                    await self._loader.load(shard)
                took_ms = (time.monotonic() - began) * 1e3
                if resident == 0 and shard.complete and not shard.gave_way:
                    shard.cold_load_ms = took_ms
                await self._serving.preparing.ahead(shard)
                if shard.pausing is not None:
                    await asyncio.wait([shard.pausing])
                    shard.pausing = None
                if shard.complete or not shard.wanted_active or shard.abandoned.is_set():
                    break  # else pages were taken back before it was woken
            if shard.retiring:
                await self._failed(shard, RuntimeError("its instance failed"))
                return
            moved = Moved(shard.copied_bytes, shard.copy_s, shard.tier) if shard.copied_bytes else Moved()
            if shard.abandoned.is_set():  # even if it was woken before that: its pages are about to go
                await self._serving.retire(shard, f"{shard.name} is not to serve here any more")
                shard.want(active=False)
                self._transitions.rest(shard, shard.abandoned_for, cluster_pb2.EVENT_KIND_CANCELLED, moved)
                return
            if not shard.complete:
                await self._serving.retire(shard, f"{shard.name} gave its memory to others before it was ready")
                if shard.wanted_active:  # woken meanwhile
                    await self._load(shard)
                    return
                self._transitions.rest(shard, _overtaken(shard), cluster_pb2.EVENT_KIND_CANCELLED, moved)
                return
            self._transitions.rest(shard, shard.reason, cluster_pb2.EVENT_KIND_WARMED, moved)
            if shard.wanted_active:
                self._serving.activate(shard, shard.reason)
            elif shard.server is not None:  # it is not wanted any more, but has begun
                self._serving.drain(shard, shard.reason, cluster_pb2.EVENT_KIND_DRAINING)
        except (CheckpointError, ImageCorrupt, OutOfPages, OSError) as error:
            await self._failed(shard, error)
        except Exception as error:
            await self._failed(shard, error)  # whatever it is, the shard must not seem to be loading
            raise

    def _serve_early(self, shard: Shard) -> None:
        """The last weights of a shard that is to wake are about to come: first prompts may be computed behind them."""
        wanted = shard.state == WARMING and shard.wanted_active and not shard.abandoned.is_set()
        if wanted and shard.server is None and not self._stopping:
            with suppress(OutOfPages):  # it is tried again when all is there
                self._serving.open(shard)

    async def _failed(self, shard: Shard, error: Exception) -> None:
        await self._serving.retire(shard, f"{shard.name} did not become ready: {error}")
        shard.want(active=False)
        self._transitions.failed(shard, error)

    @contextmanager
    def _device_watched(self) -> Iterator[None]:
        """Ends the agent where what is done within fails in a way that says that the device is lost."""
        try:
            yield
        except Exception as error:
            if is_fatal(error) and not self._lost.done():
                self._lost.set_exception(error)
            raise

    async def _abandon_load(self, shard: Shard, reason: common_pb2.Reason) -> None:
        if shard.state == WARMING and shard.task is not None:
            self._loader.abandon(shard, reason)
            await asyncio.wait([shard.task])

    async def _evict(
        self, shard: Shard, keep: float, reason: common_pb2.Reason
    ) -> tuple[common_pb2.ReplicaState.ValueType, int]:
        async with shard.orders:  # a wake meanwhile would compute with pages that go
            if shard.state in (ACTIVE, DRAINING):
                raise BusyError(f"{shard.name} is serving on {self._id}; drain it first")
            await self._abandon_load(shard, reason)
            await self._serving.preparing.end(shard)
            before = shard.pages_resident
            if shard.weights is None or before <= (kept := math.ceil(keep * shard.weights.num_pages)):
                return shard.state, 0
            began = time.monotonic()
            with self._device_watched():
                await asyncio.to_thread(shard.weights.shrink, kept)
            freed = before - shard.pages_resident
            shard.prewarming.lost(freed * self._arena.page_bytes)
            moved, took_ms = Moved(freed * self._arena.page_bytes), (time.monotonic() - began) * 1e3
            self._transitions.rest(shard, reason, cluster_pb2.EVENT_KIND_EVICTED, moved, took_ms)
            return shard.state, freed


def _collect_garbage() -> bool:
    """Lets go of a model's program, in which much refers to each other; with it go its graphs and its addresses.

    Nothing else runs meanwhile, with torch and transformers for some 0.2 s. False: a job of the engine that is done.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return False


def _overtaken(shard: Shard) -> common_pb2.Reason:
    return common_pb2.Reason(
        cause=common_pb2.CAUSE_MADE_ROOM,
        text=f"warming ended with {shard.pages_resident} of {shard.pages_total} pages resident: running instances need "
        "the memory for KV",
        score=shard.score,
    )
