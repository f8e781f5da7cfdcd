"""Making a shard's weights resident: its image opened, its program built, its pages copied when it is their turn."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

from services.common.telemetry import logger
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.copy_lane import CopyLane, CopyTurn
from services.gpu_agent.engine.backend import Backend
from services.gpu_agent.images import AbandonedError, Images
from services.gpu_agent.keeping import TierKeeper
from services.gpu_agent.shard import Shard
from services.gpu_agent.weights.errors import ImageCorrupt
from services.gpu_agent.weights.host_image import HostImageCorrupt
from services.gpu_agent.weights.image import Image
from services.gpu_agent.weights.loader import LoadProgress, load
from warmserve.v1 import common_pb2

_log = logger(__name__)
_NEAR_S = 1.0  # requests are taken this long before the last weights arrive: for longer, another may serve them sooner


class Loader:
    """The loads of one agent, of which one copies at a time. `on_progress()` is called when there is news."""

    def __init__(
        self,
        arena: Arena,
        backend: Backend,
        images: Images,
        on_progress: Callable[[], None],
        on_pages: Callable[[], None],
        on_near: Callable[[Shard], None],
        is_computing: Callable[[], bool],
    ) -> None:
        """`on_pages()` is called from threads when more is resident, `on_near(shard)` when a wake's copy ends soon.

        Prewarming takes less of the bus while `is_computing()`; it is asked from threads too.
        """
        self._arena = arena
        self._backend = backend
        self._images = images
        self._on_progress = on_progress
        self._on_pages = on_pages
        self._on_near = on_near
        self._is_computing = is_computing
        self._lane = CopyLane()
        self._tier = images.tier
        self.keeper = TierKeeper(images, on_progress)

    async def load(self, shard: Shard) -> None:
        """Returns when the shard is complete, or soon after it was abandoned. Must not be cancelled: a thread copies.

        Warming gives way to instances that need its pages for KV: then it returns before the shard is complete.
        Raises CheckpointError, ImageCorrupt, OutOfPages (what is resident stays), OSError.
        """
        image: Image | None = None
        damaged = mended = False
        try:
            image = await self._bind(shard)
            while not shard.complete and not shard.abandoned.is_set():
                shard.turn = CopyTurn(shard.wanted_active)
                async with self._lane.turn(shard.turn) as ours:
                    if not ours:
                        continue
                    wanted = shard.wanted_active  # what follows may be refused to warming, and not to a wake
                    try:
                        done = await self._copy(shard, image, shard.turn)
                        shard.gave_way |= done.gave_way
                        if done.overtaken and not shard.wanted_active:
                            return
                    except OutOfPages:
                        if wanted:
                            raise
                        if shard.wanted_active:
                            continue  # it was woken meanwhile
                        return  # there was room when it began; what is resident is of use all the same
                    except HostImageCorrupt as error:
                        _log.warning("image in the host tier is damaged; removed", model=shard.name, error=str(error))
                        await asyncio.to_thread(self._tier.discard, image.path.name)
                        self.keeper.arrived()
                    except ImageCorrupt as error:
                        if mended:
                            raise
                        _log.warning("image is damaged; building it anew", model=shard.name, error=str(error))
                        mended = damaged = True
                if damaged:  # not in its turn: others may copy meanwhile
                    old, image, damaged = image, None, False
                    assert shard.blueprint is not None
                    image = await asyncio.to_thread(self._images.mend, shard.blueprint, old, shard.abandoned)
        except AbandonedError:
            return
        finally:
            if image is not None:
                image.close()
            if shard.complete:
                self.keeper.loaded(from_disk=shard.tier != common_pb2.TIER_HOST)
            shard.turn = None
            shard.bytes_per_s = 0.0

    async def close(self) -> None:
        """Ends the use of the host tier; no load may be in progress."""
        await self.keeper.close()

    def abandon(self, shard: Shard, reason: common_pb2.Reason) -> None:
        """Cuts a load in progress short."""
        shard.abandoned_for = reason
        shard.abandoned.set()
        if shard.turn is not None:
            self._lane.withdraw(shard.turn)

    def hurry(self, shard: Shard) -> None:
        """Puts a load in progress before others."""
        if shard.turn is not None:
            self._lane.hurry(shard.turn)

    def relax(self, shard: Shard) -> None:
        """Has a load in progress, which is no wake's any more, give its pages back and queue as warming does."""
        if shard.turn is not None:
            self._lane.withdraw(shard.turn)

    async def _bind(self, shard: Shard) -> Image:
        """The image, and on the first load the program over the weight range."""
        if shard.blueprint is None:
            shard.blueprint = await asyncio.to_thread(self._images.inspect_deployed, shard.spec)
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
                gc.collect(1)  # what is garbage already
                gc.freeze()  # as at the process's start: it is no garbage, nor are the modules imported for it
        except BaseException:
            image.close()
            raise
        return image

    async def _copy(self, shard: Shard, image: Image, turn: CopyTurn) -> LoadProgress:
        """Copies until all is resident, the turn is cut short, or KV takes pages back."""
        assert shard.weights is not None
        loop = asyncio.get_running_loop()
        page_bytes = shard.weights.page_bytes
        near = False

        def progress(done: LoadProgress) -> None:
            nonlocal near
            shard.bytes_per_s = done.bytes_per_s
            shard.copied_bytes += done.pages_new * page_bytes
            if not shard.wanted_active:
                shard.prewarming.copied(done.pages_new * page_bytes)
            self._on_pages()
            if not near and shard.wanted_active:
                left = (done.pages_total - done.pages_done) * page_bytes
                if near := left <= _NEAR_S * done.bytes_per_s:
                    loop.call_soon_threadsafe(self._on_near, shard)

        def copy(weights: WeightRange) -> LoadProgress:
            # Filling reads the same disk; and what registers its pages with the device holds up a wake's calls to it.
            with self._tier.reading(image) as host, self.keeper.making_way(host is None or shard.wanted_active):
                shard.tier = common_pb2.TIER_DISK if host is None else common_pb2.TIER_HOST
                return load(
                    image,
                    weights,
                    cancel=turn.cancel,
                    progress=progress,
                    claim=lambda: shard.wanted_active,
                    gives_way=self._is_computing,
                    host=host,
                )

        self._on_progress()
        began = time.monotonic()
        try:
            return await asyncio.to_thread(copy, shard.weights)
        finally:
            shard.copy_s += time.monotonic() - began
            self._on_progress()
