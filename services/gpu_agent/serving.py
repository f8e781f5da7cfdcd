"""Serving: shards become instances of the engine and are drained; news of the engine and of routers reach them."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

from services.common.queues import RequestQueue
from services.common.tasks import begin_task
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.device import is_fatal
from services.gpu_agent.engine.grammar import GrammarCompiler
from services.gpu_agent.engine.instance import Instance
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.loop import EngineLoop, EngineStopped
from services.gpu_agent.engine.sampling import NonFiniteLogits
from services.gpu_agent.engine.sequence import SequenceOutput
from services.gpu_agent.instance_server import InstanceServer
from services.gpu_agent.preparing import Preparing
from services.gpu_agent.relay import Relay
from services.gpu_agent.reports import Reports
from services.gpu_agent.shard import ACTIVE, DRAINING, WARMING, Shard
from services.gpu_agent.transitions import Transitions
from warmserve.v1 import cluster_pb2, common_pb2

_KV_RESERVE_SHARE = 16  # of the arena's pages an instance reserves at most one in so many
_FLUSH_S = 2.0  # how long Redis may take to be told of ended requests before work goes on without that


class Serving:
    """Owns the engine and the streams to routers. Used on the event loop."""

    def __init__(
        self,
        agent_id: str,
        arena: Arena,
        queue: RequestQueue,
        reports: Reports,
        transitions: Transitions,
        shards: Mapping[str, Shard],
        wake: Callable[[Shard, common_pb2.Reason], None],
    ) -> None:
        """`shards` are all of the agent's, by name, and change under it.

        `wake(shard, reason)` has a shard serve that was to end, but has been asked for again meanwhile.
        """
        self._id = agent_id
        self._arena = arena
        self._queue = queue
        self._reports = reports
        self._transitions = transitions
        self._shards = shards
        self._wake = wake
        self._expected: dict[str, float] = {}  # sequences that the forecast has an instance run at once, by model
        self._loop = asyncio.get_running_loop()
        self.engine = EngineLoop(
            on_step=partial(self._from_engine, self._on_step),
            on_failure=partial(self._from_engine, self._on_failure),
            is_fatal=is_fatal,
        )
        self.preparing = Preparing(self.engine, transitions)
        self._relay = Relay(agent_id, self._on_cancel, self._on_router_lost)

    def kv_reserve(self, shard: Shard) -> int:
        """KV pages an instance holds from its first moment: one full sequence, but no more than its share."""
        facts = shard.spec.facts
        full = math.ceil(facts.kv_bytes_per_token * facts.context_tokens / self._arena.page_bytes)
        return max(1, min(full, self._arena.num_pages // _KV_RESERVE_SHARE))

    def expect(self, model: str, sequences: float) -> None:
        """Says how many sequences the forecast has an instance of a model run at once: warming leaves room for them."""
        self._expected[model] = sequences
        shard = self._shards.get(model)
        if shard is not None and shard.server is not None:
            with suppress(EngineStopped):
                self.engine.expect(shard.server.instance_id, sequences)

    def open(self, shard: Shard) -> None:
        """Has a shard take requests, the last of whose weights may still be on their way. Raises OutOfPages."""
        blueprint, program = shard.blueprint, shard.program
        assert blueprint is not None
        assert program is not None
        instance_id = f"{self._id}.{uuid.uuid4().hex[:8]}"
        limits, vocab_size = program.limits, program.model.vocab_size
        # Some checkpoints name tokens that they do not have. Those never come, and have no logit that could be banned.
        eos_ids = frozenset(token for token in blueprint.checkpoint.eos_token_ids if token < vocab_size)
        runner = program.runner(eos_ids)
        kv = KvCache(self._arena, instance_id, blueprint.kv, program.clear_page)
        # So that prewarming beside it can never leave an instance without memory to go on.
        kv.reserve(self.kv_reserve(shard))
        instance = Instance(
            instance_id,
            shard.name,
            runner,
            kv,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
            context_tokens=shard.context_tokens,
            max_batch=limits.max_batch,
            token_budget=limits.token_budget,
            max_prefills=limits.max_prefills,
            prefill_budget=limits.prefill_budget,
        )
        instance.expect(self._expected.get(shard.name, 0.0))
        self.engine.activate(instance)
        if shard.grammars is None:
            shard.grammars = GrammarCompiler(blueprint.checkpoint.folder, vocab_size, eos_ids)
        shard.server = InstanceServer(
            instance_id,
            shard.name,
            limits.max_batch,
            self.engine,
            self._queue,
            self._relay,
            self._reports.changed,
            shard.grammars,
        )
        shard.server.start_pulling()
        shard.active_since = time.time()
        self._transitions.instance(shard)

    def activate(self, shard: Shard, reason: common_pb2.Reason) -> None:
        """A warm shard, all of it resident, becomes active, as it was ordered at `shard.woken`. Raises OutOfPages."""
        if shard.server is None:
            self.open(shard)
        else:
            shard.server.start_pulling()
        shard.want(active=False)  # for it does
        self.preparing.beside(shard)
        shard.active_since = time.time()
        took_ms = (time.monotonic() - shard.woken) * 1e3
        self._transitions.enter(shard, ACTIVE, reason, cluster_pb2.EVENT_KIND_WOKEN, took_ms=took_ms)
        self._transitions.instance(shard)

    def pause(self, shard: Shard) -> None:
        """An instance whose weights are still on their way begins to take no more; `shard.pausing` ends when it has."""
        assert shard.server is not None
        shard.pausing = begin_task(shard.server.stop_pulling(), f"pause {shard.name}")

    async def retire(self, shard: Shard, error: str) -> None:
        """Ends an instance at once, if there is one; routers put its requests back. Its state is for the caller."""
        server = shard.server
        if server is None:
            return
        await server.stop_pulling()
        server.fail_all(error)
        await server.flush(_FLUSH_S)
        await asyncio.wrap_future(self.engine.deactivate(server.instance_id))
        await self._give_up_damaged(shard)
        self._reports.instance_gone(shard.name, server.instance_id)
        shard.server = None
        shard.retiring = False
        await server.close()

    def rewake(self, shard: Shard, reason: common_pb2.Reason) -> None:
        """A draining shard goes on serving; one that has drained already is activated anew as soon as it is warm."""
        if shard.rewoken.is_set():
            return  # as an earlier wake has it already
        shard.wake_reason = reason
        shard.woken = time.monotonic()
        shard.rewoken.set()
        if not shard.retiring:
            self._transitions.enter(shard, ACTIVE, reason, cluster_pb2.EVENT_KIND_WOKEN, took_ms=0.0)
            self._transitions.instance(shard)

    def drain(self, shard: Shard, reason: common_pb2.Reason, kind: cluster_pb2.EventKind.ValueType) -> None:
        """An active shard begins to finish what it runs, and then becomes warm."""
        self._transitions.enter(shard, DRAINING, reason, kind)
        self._transitions.instance(shard)
        shard.rewoken.clear()
        shard.task = begin_task(self._drain(shard, reason, shard.task), f"drain {shard.name}")

    async def stop(self, error: str) -> None:
        """Gives up what still runs, so that routers have it continued elsewhere, and ends the engine."""
        servers = self._servers()
        await asyncio.gather(*(server.stop_pulling() for server in servers))
        for server in servers:
            server.fail_all(error)
        await asyncio.gather(*(server.flush(_FLUSH_S) for server in servers))
        await asyncio.gather(*(server.close() for server in servers))
        await self._relay.close()
        await asyncio.to_thread(self.engine.stop)

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
        server.fail_all(f"instance {server.instance_id} failed")  # what the engine did not have, if anything
        await server.flush(_FLUSH_S)
        await asyncio.wrap_future(self.engine.deactivate(server.instance_id))
        await self._give_up_damaged(shard)
        shard.retiring = False
        shard.want(shard.rewoken.is_set())
        self._transitions.retired(shard, reason, cluster_pb2.EVENT_KIND_DRAINED)
        if shard.rewoken.is_set():
            self._wake(shard, shard.wake_reason)
        await server.close()  # last, for nobody waits for it

    async def _give_up_damaged(self, shard: Shard) -> None:
        """Weights that computed nonsense go, so that the next wake copies them anew, from what has checksums."""
        if shard.damaged and shard.weights is not None:
            await self.preparing.end(shard)
            await asyncio.to_thread(shard.weights.shrink, 0)
        shard.damaged = False

    # News from the engine's thread and from routers

    def _from_engine(self, handler: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(handler, *arguments)

    def _servers(self) -> list[InstanceServer]:
        return [shard.server for shard in self._shards.values() if shard.server is not None]

    def _on_step(self, instance_id: str, outputs: list[SequenceOutput]) -> None:
        for shard in self._shards.values():
            server = shard.server
            if server is not None and server.instance_id == instance_id:
                server.handle(outputs)
                if server.look_at_pace():
                    self._transitions.instance(shard)

    def _on_failure(self, instance_id: str, error: Exception) -> None:
        for shard in self._shards.values():
            if shard.server is not None and shard.server.instance_id == instance_id:
                reason = common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=f"the instance failed: {error}")
                shard.retiring = True
                shard.damaged = isinstance(error, NonFiniteLogits)
                if shard.state == ACTIVE:  # a draining one ends, for nothing runs on it any more
                    self.drain(shard, reason, cluster_pb2.EVENT_KIND_FAILED)
                elif shard.state == WARMING:  # it ends with the load; what it took until then would only fail
                    self.pause(shard)

    def _on_cancel(self, request_ids: Iterable[str]) -> None:
        for server in self._servers():
            server.cancel(request_ids)

    def _on_router_lost(self, address: str) -> None:
        for server in self._servers():
            server.cancel_router(address)
