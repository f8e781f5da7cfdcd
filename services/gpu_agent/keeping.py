"""The node's images: which are kept in its memory, and what is where.

What the forecasts say is worth most is taken in ahead, when this agent reads nothing else from the disk, and replaces
what is worth less.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from services.gpu_agent.images import Images
from services.gpu_agent.weights.errors import ImageCorrupt
from services.gpu_agent.weights.host_tier import Kept
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
        self._values: dict[str, tuple[str, float]] = {}  # by model: its fingerprint, its image's worth
        self._news = False  # what is to be taken in may be something else now
        self._task: asyncio.Task[None] | None = None
        self._way = threading.Event()  # nothing else is read from the disk
        self._way.set()
        self._turned_away = False  # something found no place in the tier, perhaps because what is worth less was read
        self._ended = False
        self._filling: _Fill | None = None
        self._host = cluster_pb2.HostTier(budget_bytes=self._tier.budget_bytes)
        self._looking: asyncio.Task[None] | None = None
        self._due = asyncio.Event()  # the tiers are to be looked at
        self._disk = cluster_pb2.DiskTier()

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

    def disk(self) -> cluster_pb2.DiskTier:
        """What the node's disk held when this agent last looked, and what this agent writes there now."""
        preparing = self._images.preparing()
        if not preparing:
            return self._disk
        told = cluster_pb2.DiskTier(preparing=preparing)
        told.MergeFrom(self._disk)
        return told

    def value(self, model: str, fingerprint: str, value: float) -> None:
        """Says what each byte of a model's image in memory is worth, in any unit; see expectation.worth."""
        if self._values.get(model) != (fingerprint, value):
            self._values[model] = fingerprint, value
            self._refill()

    def forget(self, model: str) -> None:
        """A model is not deployed any more."""
        self._values.pop(model, None)

    def arrived(self) -> None:
        """An image has come to the disk or gone from it, or was loaded from there: there may be room in memory."""
        self.look()
        self._refill()

    def loaded(self, from_disk: bool) -> None:
        """A load has ended: what it read in the tier may go now, if something was waiting for that."""
        if from_disk or self._turned_away:
            self.arrived()

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

    def _refill(self) -> None:
        if not self._tier.budget_bytes or self._ended:
            return
        self._news = True
        if self._task is None or self._task.done():
            self._task = begin_task(self._fill(), "fill the host tier")

    async def _fill(self) -> None:
        """Takes in what is worth most, one image after the other; with news it begins again with the first."""
        while self._news and not self._ended:
            self._news = False
            self._turned_away = False
            missing = await asyncio.to_thread(self._missing, self._worths())
            self.look()
            for chosen in missing:
                if self._news or self._ended:
                    break
                try:
                    await asyncio.to_thread(self._take_in, chosen)
                except (OSError, ImageCorrupt) as error:
                    # It can be served from the disk all the same, where damage is found and mended.
                    _log.warning("not taken into the host tier", image=chosen.name, error=str(error))
                self.look()

    def _worths(self) -> dict[str, float]:
        """By the first 32 digits of fingerprints; what several models need is worth the sum."""
        worths: defaultdict[str, float] = defaultdict(float)
        for fingerprint, value in self._values.values():
            worths[fingerprint[:32]] += value
        return worths

    def _missing(self, worths: Mapping[str, float]) -> list[Kept]:
        """The images that are to be taken in, the most valuable first; the tier is told what all of them are worth."""
        found = [Kept(name, nbytes, worths.get(name[:32], 0.0)) for name, nbytes in self._images.sizes().items()]
        for image in found:
            self._tier.appraise(image.name, image.value)
        return [image for image in self._tier.chosen(found) if not self._tier.ready(image.name)]

    def _take_in(self, chosen: Kept) -> None:
        """Has an image in memory, if there is room for it or what is there is worth less, and ready for loads."""
        self._tier.sweep()
        with self._images.named(chosen.name) as image:
            filling = _Fill(image.path.name, image.layout.num_pages, image.layout.page_bytes)

            def go_on() -> bool:
                if not self._go_on():
                    return False
                self._filling = filling
                filling.page()
                return True

            try:
                if not self._tier.fill(image, chosen.value, go_on):
                    self._turned_away = True
            finally:
                self._filling = None
            if image.is_current:
                self._register(image)
            else:  # deleted meanwhile, and from the tier before it was there
                self._tier.discard(chosen.name)

    def _register(self, image: Image) -> None:
        """Registers the image with the device now, for that takes longer than a load."""
        with self._tier.reading(image) as host:
            if host is None or host.registered:
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
                if {image.name for image in host.images} - {image.name for image in self._host.images}:
                    self._refill()  # another agent has taken it in; here it is yet to be registered
                if host != self._host or _differs(disk, self._disk):
                    self._host, self._disk = host, disk
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
