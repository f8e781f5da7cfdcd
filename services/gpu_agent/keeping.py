"""The node's images: kept in its memory, taken in when nothing else is read from the disk; and what is where."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from services.gpu_agent.images import Blueprint, Images
from services.gpu_agent.weights.errors import ImageCorrupt
from services.gpu_agent.weights.image import Image
from warmserve.v1 import cluster_pb2

_log = logger(__name__)
_LOOK_S = 5.0  # the node's other agents change the tiers without a word
_DISK_NEWS = 100  # so many parts of a disk: what changes by less than one is not told


class TierKeeper:
    """Fills the host tier, one image after the other, and looks at the tiers. On the loop, but for `making_way`."""

    def __init__(self, images: Images, on_change: Callable[[], None]) -> None:
        self._images = images
        self._tier = images.tier
        self._on_change = on_change
        self._wanted: dict[str, tuple[Blueprint, float]] = {}  # by fingerprint
        self._task: asyncio.Task[None] | None = None
        self._way = threading.Event()  # nothing else is read from the disk
        self._way.set()
        self._ended = False
        self._filling: _Fill | None = None
        self._host = cluster_pb2.HostTier(budget_bytes=self._tier.budget_bytes)
        self._looking: asyncio.Task[None] | None = None
        self._due = asyncio.Event()  # the tiers are to be looked at
        self.disk = cluster_pb2.DiskTier()
        """What the node's disk held when this agent last looked."""

    def start(self) -> None:
        """Begins to look at the tiers."""
        self._looking = begin_task(self._look_on(), "look at the tiers")

    def look(self) -> None:
        """Has the tiers looked at now: something in them has changed."""
        self._due.set()

    def host(self) -> cluster_pb2.HostTier:
        """What the host tier held when this agent last looked, and what is on its way there now."""
        filling = self._filling
        if filling is None:
            return self._host
        told = cluster_pb2.HostTier(filling=filling.progress())
        told.MergeFrom(self._host)
        return told

    def keep(self, blueprint: Blueprint, value: float) -> None:
        """Has an image, which is on the disk, taken in, if there is room or what is there is worth less."""
        self.look()
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
        await end_tasks([self._looking])
        await asyncio.to_thread(self._tier.close)

    def _go_on(self) -> bool:
        self._way.wait()
        return not self._ended

    async def _fill(self) -> None:
        while self._wanted and not self._ended:
            fingerprint = next(iter(self._wanted))
            blueprint, value = self._wanted.pop(fingerprint)
            try:
                await asyncio.to_thread(self._take_in, blueprint, value)
            except (OSError, ImageCorrupt) as error:
                # It can be served from the disk all the same, where damage is found and mended.
                _log.warning("not taken into the host tier", fingerprint=fingerprint, error=str(error))
            self.look()

    def _take_in(self, blueprint: Blueprint, value: float) -> None:
        self._tier.sweep()
        with self._images.opened(blueprint) as image:
            filling = _Fill(image.path.name, image.layout.num_pages, image.layout.page_bytes)

            def go_on() -> bool:
                if not self._go_on():
                    return False
                self._filling = filling
                filling.page()
                return True

            try:
                self._tier.fill(image, value, go_on)
            finally:
                self._filling = None
            self._tier.appraise(image.path.name, value)
            self._register(image)

    def _register(self, image: Image) -> None:
        """Registers the image with the device now, for that takes longer than a load."""
        with self._tier.reading(image) as host:
            if host is None or not host.registers:
                return
            for index in range(image.layout.num_pages):
                if not self._go_on():
                    return
                host.page(index)

    async def _look_on(self) -> None:
        while True:
            self._due.clear()
            try:
                host, disk = await asyncio.to_thread(self._describe)
            except OSError as error:
                _log.warning("the tiers cannot be looked at", error=str(error))
            else:
                if host != self._host or _differs(disk, self.disk):
                    self._host, self.disk = host, disk
                    self._on_change()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._due.wait()

    def _describe(self) -> tuple[cluster_pb2.HostTier, cluster_pb2.DiskTier]:
        kept = self._tier.kept() if self._tier.budget_bytes else []
        host = cluster_pb2.HostTier(
            budget_bytes=self._tier.budget_bytes,
            used_bytes=sum(image.nbytes for image in kept),
            images=[cluster_pb2.HostImage(name=i.name, bytes=i.nbytes, score=i.value) for i in kept],
        )
        return host, self._images.on_disk()


class _Fill:
    """How far an image is that is taken in. Told by the threads that read it."""

    def __init__(self, name: str, num_pages: int, page_bytes: int) -> None:
        self._name = name
        self._num_pages = num_pages
        self._page_bytes = page_bytes
        self._pages = 0
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def page(self) -> None:
        """One more page is read."""
        with self._lock:
            self._pages += 1

    def progress(self) -> cluster_pb2.HostFill:
        """As the agent's record has it."""
        done = self._pages * self._page_bytes
        return cluster_pb2.HostFill(
            name=self._name,
            bytes_done=done,
            bytes_total=self._num_pages * self._page_bytes,
            bytes_per_s=done / max(time.monotonic() - self._began, 1e-6),
        )


def _differs(new: cluster_pb2.DiskTier, old: cluster_pb2.DiskTier) -> bool:
    """Whether it is worth telling: other images, or clearly more or less that is free."""
    moved = abs(new.free_bytes - old.free_bytes) > new.capacity_bytes / _DISK_NEWS
    return moved or (list(new.images), new.capacity_bytes) != (list(old.images), old.capacity_bytes)
