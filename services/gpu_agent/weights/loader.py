"""Copies an image into its weight range, page after page."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.arena.weight_range import Filling, WeightRange
from services.gpu_agent.weights.host_image import HostImage
from services.gpu_agent.weights.image import Image
from services.gpu_agent.weights.staging import page_source

# Prewarming gives way within so many pages. A wake has more copies under way: its first prompt is computed in Python
# beside them, and the interpreter lock then comes too late for the bus to be kept busy page by page.
_AHEAD_OF_PREWARMING = 8
_LONGEST_PAUSE_S = 0.005  # as long as a wake of the same model may wait; a page takes 0.6 ms
# Most pages mapped at once: the bus waits for the first of them, and steps of instances for all.
_MAPPED_AT_ONCE = 8


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is."""

    pages_done: int  # resident pages, those from earlier loads included
    pages_total: int
    bytes_per_s: float  # of this load so far; 0 before its first page
    overtaken: bool = False  # it ended because KV took pages back
    gave_way: bool = False  # it left the bus to instances for a while: no measure of how long a wake takes

    @property
    def complete(self) -> bool:
        """Whether every page is resident."""
        return self.pages_done == self.pages_total


def load(
    image: Image,
    weights: WeightRange,
    *,
    cancel: threading.Event,
    progress: Callable[[LoadProgress], None],
    claim: Callable[[], bool] = lambda: False,
    gives_way: Callable[[], bool] = lambda: False,
    host: HostImage | None = None,
) -> LoadProgress:
    """Copies the missing pages in layer order, from `host` where it is given, and returns how far it came.

    Between two pages it looks at `cancel`, and stops there if it is set or KV has taken pages back. As soon as `claim`
    says so, it takes all pages that are missing, before KV does. Until then, while `gives_way` says so, it leaves the
    bus idle for as long as each page took: beside a copy at full speed steps take a fifteenth longer. However it ends,
    the resident pages are a prefix with the right data. Raises ImageCorrupt, OutOfPages (evict, then go on), OSError
    where the disk fails, and ArenaClosed where the range is removed before. To be called in a thread; the interpreter
    lock is free while it copies.
    """
    layout = image.layout
    if (layout.num_pages, layout.page_bytes) != (weights.num_pages, weights.page_bytes):
        raise ValueError(
            f"{image.path} has {layout.num_pages} pages of {layout.page_bytes} bytes, but the range of {weights.name} "
            f"has {weights.num_pages} of {weights.page_bytes}"
        )
    began = time.monotonic()
    copied = 0
    with weights.filling() as filling, page_source(image, host, filling.first, weights.device) as source:
        done = LoadProgress(filling.first, weights.num_pages, 0.0)
        begun = filling.first
        while not done.complete and not cancel.is_set():
            if filling.overtaken:
                return replace(done, pages_done=weights.resident_pages, overtaken=True)
            if urgent := claim():
                filling.claim()
            paced = source.ahead > 1 and not urgent and gives_way()
            ahead = source.ahead if urgent else min(source.ahead, 1 if paced else _AHEAD_OF_PREWARMING)
            turned = time.monotonic()
            while count := _next_count(
                begun - filling.first, begun - done.pages_done, weights.num_pages - begun, ahead
            ):
                try:
                    pages = _mapped(filling, count)
                except OutOfPages:
                    if begun == done.pages_done:
                        raise
                    break  # those under way come first
                for page in pages:
                    source.begin(begun, page)
                    begun += 1
                if cancel.is_set():
                    break
            source.end(done.pages_done)
            if not filling.done():
                continue
            copied += layout.page_bytes
            speed = copied / (time.monotonic() - began)
            done = LoadProgress(done.pages_done + 1, weights.num_pages, speed, gave_way=done.gave_way or paced)
            progress(done)
            if paced:
                cancel.wait(min(time.monotonic() - turned, _LONGEST_PAUSE_S))
    return done


def _next_count(begun: int, under_way: int, left: int, ahead: int) -> int:
    """How many pages are to be mapped and begun now: first one, for the bus waits for it, then more and more. Pure."""
    count = min(max(1, ahead // 2), _MAPPED_AT_ONCE, max(1, begun))
    return min(count, left) if under_way + count <= ahead else 0


def _mapped(filling: Filling, n: int) -> list[torch.Tensor]:
    """The next n pages, or one where there are not as many. OutOfPages."""
    try:
        return filling.map(n)
    except OutOfPages:
        if n <= 1:
            raise
        return filling.map(1)
