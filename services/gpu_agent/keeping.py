"""Keeping images in the node's memory: taken in when nothing else is read from the disk, the most valuable stay."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.common.tasks import begin_task
from services.common.telemetry import logger
from services.gpu_agent.images import Blueprint, Images
from services.gpu_agent.weights.errors import ImageCorrupt
from services.gpu_agent.weights.image import Image
from warmserve.v1 import cluster_pb2

_log = logger(__name__)


class TierKeeper:
    """Fills the host tier, one image after the other. Used on the event loop, but for `making_way`."""

    def __init__(self, images: Images, on_change: Callable[[], None]) -> None:
        self._images = images
        self._tier = images.tier
        self._on_change = on_change
        self._wanted: dict[str, tuple[Blueprint, float]] = {}  # by fingerprint
        self._task: asyncio.Task[None] | None = None
        self._way = threading.Event()  # nothing else is read from the disk
        self._way.set()
        self._ended = False
        self.described = cluster_pb2.HostTier(budget_bytes=self._tier.budget_bytes)
        """What the tier held when this agent last looked."""

    def keep(self, blueprint: Blueprint, value: float) -> None:
        """Has an image taken in, if there is room or what is there is worth less."""
        if not self._tier.budget_bytes or self._ended:
            return
        self._wanted[blueprint.checkpoint.fingerprint] = blueprint, value
        if self._task is None or self._task.done():
            self._task = begin_task(self._fill(), "fill the host tier")

    def appraise(self, blueprint: Blueprint, value: float) -> None:
        """Says what an image is worth that may be there."""
        if self._tier.budget_bytes:
            self._tier.appraise(self._images.path(blueprint).name, value)

    @contextmanager
    def making_way(self, wanted: bool) -> Iterator[None]:
        """Within it, where it is wanted, filling stands still. For one thread at a time."""
        if wanted:
            self._way.clear()
        try:
            yield
        finally:
            self._way.set()

    async def close(self) -> None:
        """Ends filling, leaving nothing half done, and the use of what is there."""
        self._ended = True
        self._way.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        await asyncio.to_thread(self._tier.close)

    def _go_on(self) -> bool:
        self._way.wait()
        return not self._ended

    async def _fill(self) -> None:
        while self._wanted and not self._ended:
            fingerprint = next(iter(self._wanted))
            blueprint, value = self._wanted.pop(fingerprint)
            try:
                self.described = await asyncio.to_thread(self._take_in, blueprint, value)
            except (OSError, ImageCorrupt) as error:
                # It can be served from the disk all the same, where damage is found and mended.
                _log.warning("not taken into the host tier", fingerprint=fingerprint, error=str(error))
            self._on_change()

    def _take_in(self, blueprint: Blueprint, value: float) -> cluster_pb2.HostTier:
        self._tier.sweep()
        with self._images.opened(blueprint) as image:
            self._tier.fill(image, value, self._go_on)
            self._tier.appraise(image.path.name, value)
            self._register(image)
        return self._describe()

    def _register(self, image: Image) -> None:
        """Registers the image with the device now, for that takes longer than a load."""
        with self._tier.reading(image) as host:
            if host is None or not host.registers:
                return
            for index in range(image.layout.num_pages):
                if not self._go_on():
                    return
                host.page(index)

    def _describe(self) -> cluster_pb2.HostTier:
        kept = self._tier.kept()
        return cluster_pb2.HostTier(
            budget_bytes=self._tier.budget_bytes,
            used_bytes=sum(image.nbytes for image in kept),
            images=[cluster_pb2.HostImage(name=i.name, bytes=i.nbytes, score=i.value) for i in kept],
        )
