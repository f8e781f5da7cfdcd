"""Preparing models: once for each, by the engine's thread, between other models' steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import Counter

from services.common.tasks import begin_task
from services.common.telemetry import logger
from services.gpu_agent.engine.loop import EngineLoop, EngineStopped
from services.gpu_agent.shard import Shard
from services.gpu_agent.transitions import Transitions
from warmserve.v1 import cluster_pb2, common_pb2

_log = logger(__name__)

_CAPTURES = Counter(
    "warmserve_gpu_agent_graph_captures_total",
    "CUDA graphs captured: once for each shape of step of a model, however often its weights come and go",
    ["model"],
)


class Preparing:
    """Has the engine prepare shards' programs, piece by piece, as long as their weights are there (Program.prepare).

    What an interruption leaves undone is done when the shard is loaded or woken the next time.
    """

    def __init__(self, engine: EngineLoop, transitions: Transitions) -> None:
        self._engine = engine
        self._transitions = transitions

    async def ahead(self, shard: Shard) -> None:
        """Prepares what has just been loaded; returns at once when it is needed, or not wanted any more."""

        def go_on() -> bool:
            return not (shard.wanted_active or shard.abandoned.is_set())

        if go_on():  # else it must not wait for its turn with the engine
            await self._prepare(shard, go_on)

    def beside(self, shard: Shard) -> None:
        """Begins to prepare what serves already, unless that goes on still."""
        if shard.preparing is None or shard.preparing.done():
            shard.preparing = begin_task(self._beside(shard), f"prepare {shard.name}")

    async def end(self, shard: Shard) -> None:
        """Returns when nothing prepares the shard any more, so that its weights may go."""
        if shard.preparing is not None:
            shard.unprepared.set()
            await asyncio.wait([shard.preparing])
            shard.unprepared.clear()
            shard.preparing = None

    async def _beside(self, shard: Shard) -> None:
        try:
            await self._prepare(shard, lambda: not shard.unprepared.is_set())
        except EngineStopped:
            return
        except Exception as error:
            # It serves all the same, but not as fast as it should.
            _log.exception("could not be prepared", model=shard.name)
            reason = common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=f"could not be prepared: {error}")
            self._transitions.enter(shard, shard.state, reason, cluster_pb2.EVENT_KIND_FAILED)

    async def _prepare(self, shard: Shard, go_on: Callable[[], bool]) -> None:
        program, weights = shard.program, shard.weights
        assert program is not None
        assert weights is not None

        def piece() -> bool:
            with weights.in_use():  # else an instance that needs pages might take them from under it
                prepared = go_on() and weights.complete and program.prepare()
            if prepared:
                _CAPTURES.labels(shard.name).inc()
            return prepared

        await asyncio.wrap_future(self._engine.work(piece))
