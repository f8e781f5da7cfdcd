"""Making a shard's weights resident: its image opened, its program built, its pages copied when it is their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.common.telemetry import logger
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.copy_lane import CopyLane, CopyTurn
from services.gpu_agent.engine.backend import Backend
from services.gpu_agent.images import AbandonedError, Images
from services.gpu_agent.shard import Shard
from services.gpu_agent.weights.errors import ImageCorrupt
from services.gpu_agent.weights.image import Image
from services.gpu_agent.weights.loader import LoadProgress, load
from warmserve.v1 import common_pb2

_log = logger(__name__)


class Loader:
    """The loads of one agent, of which one copies at a time. `on_progress()` is called when there is news."""

    def __init__(
        self,
        arena: Arena,
        backend: Backend,
        images: Images,
        on_progress: Callable[[], None],
    ) -> None:
        self._arena = arena
        self._backend = backend
        self._images = images
        self._on_progress = on_progress
        self._lane = CopyLane()

    async def load(self, shard: Shard) -> None:
        """Returns when the shard is complete, or soon after it was abandoned. Must not be cancelled: a thread copies.

        Warming gives way to instances that need its pages for KV: then it returns before the shard is complete.
        Raises CheckpointError, ImageCorrupt, OutOfPages (what is resident stays), OSError.
        """
        image: Image | None = None
        mended = False
        try:
            image = await self._bind(shard)
            while not shard.complete and not shard.abandoned.is_set():
                shard.turn = CopyTurn(shard.wanted_active)
                async with self._lane.turn(shard.turn) as ours:
                    if not ours:
                        continue
                    try:
                        done = await self._copy(shard, image, shard.turn)
                        if done.overtaken and not shard.wanted_active:
                            return
                    except OutOfPages:
                        if shard.wanted_active:
                            raise
                        return  # there was room when it began; what is resident is of use all the same
                    except ImageCorrupt as error:
                        if mended:
                            raise
                        _log.warning("image is damaged; building it anew", model=shard.name, error=str(error))
                        mended = True
                        image.close()
                        image = None
                        image = await self._rebuild(shard)
        except AbandonedError:
            return
        finally:
            if image is not None:
                image.close()
            shard.turn = None
            shard.bytes_per_s = 0.0

    async def abandon(self, shard: Shard) -> None:
        """Cuts a load in progress short."""
        shard.abandoned.set()
        if shard.turn is not None:
            await self._lane.withdraw(shard.turn)

    def hurry(self, shard: Shard) -> None:
        """Puts a load in progress before others."""
        if shard.turn is not None:
            self._lane.hurry(shard.turn)

    async def _bind(self, shard: Shard) -> Image:
        """The image, and on the first load the program over the weight range."""
        if shard.blueprint is None:
            shard.blueprint = await asyncio.to_thread(self._images.inspect, shard.spec)
            present = await asyncio.to_thread(self._images.present, shard.blueprint)
            shard.tier = common_pb2.TIER_DISK if present else common_pb2.TIER_REMOTE
        blueprint = shard.blueprint
        image = await asyncio.to_thread(self._images.open, blueprint, shard.abandoned)
        try:
            shard.tier = common_pb2.TIER_DISK
            if shard.weights is None:
                shard.weights = self._arena.add_weights(shard.name, blueprint.layout.total_bytes)
                shard.lend()
            if shard.program is None:
                shard.program = await asyncio.to_thread(
                    self._backend.program,
                    blueprint.checkpoint.model_config,
                    blueprint.layout,
                    shard.weights,
                    shard.spec.limits.max_batch or None,
                    shard.context_tokens,
                )
        except BaseException:
            image.close()
            raise
        return image

    async def _copy(self, shard: Shard, image: Image, turn: CopyTurn) -> LoadProgress:
        """Copies until all is resident, the turn is cut short, or KV takes pages back."""
        assert shard.weights is not None

        def progress(done: LoadProgress) -> None:
            shard.bytes_per_s = done.bytes_per_s

        self._on_progress()
        try:
            return await asyncio.to_thread(load, image, shard.weights, cancel=turn.cancel, progress=progress)
        finally:
            self._on_progress()

    async def _rebuild(self, shard: Shard) -> Image:
        assert shard.blueprint is not None
        await asyncio.to_thread(self._images.discard, shard.blueprint.checkpoint.fingerprint)
        return await asyncio.to_thread(self._images.open, shard.blueprint, shard.abandoned)
