"""Copies an image into its weight range, some pages at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.arena.weight_range import Filling, WeightRange
from services.gpu_agent.weights.host_image import HostImage
from services.gpu_agent.weights.image import Image
from services.gpu_agent.weights.staging import MOST_AT_ONCE, page_source

# Prewarming gives way within so many pages. A wake has more copies under way: its first prompt is computed in Python
# beside them, and the interpreter lock then comes too late for the bus to be kept busy page by page.
_AHEAD_OF_PREWARMING = 8
_LONGEST_PAUSE_S = 0.005  # as long as a wake of the same model may wait; a page takes 0.6 ms


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is."""

    pages_done: int  # resident pages, those from earlier loads included
    pages_total: int
    pages_new: int  # of those, how many have come since it was told last
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

    A few pages are mapped, copied and told at a time, so that who computes beside it has the interpreter lock. Between
    them it looks at `cancel`, and stops there if it is set or KV has taken pages back. As soon as `claim` says so, it
    takes all pages that are missing, before KV does. Until then, while `gives_way` says so, it leaves the bus idle for
    as long as each page took: beside a copy at full speed steps take a fifteenth longer. However it ends, the resident
    pages are a prefix with the right data. Raises ImageCorrupt, OutOfPages (evict, then go on), OSError
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
        done = LoadProgress(filling.first, weights.num_pages, 0, 0.0)
        begun = filling.first
        under_way: deque[int] = deque()  # how many pages were begun at a time
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
                source.begin(begun, pages)
                under_way.append(len(pages))
                begun += len(pages)
                if cancel.is_set():
                    break
            count = under_way.popleft()
            source.end(done.pages_done, count)
            if not filling.done(count):
                continue
            copied += count * layout.page_bytes
            speed = copied / (time.monotonic() - began)
            gave_way = done.gave_way or paced
            done = LoadProgress(done.pages_done + count, weights.num_pages, count, speed, gave_way=gave_way)
            progress(done)
            if paced:
                cancel.wait(min(time.monotonic() - turned, _LONGEST_PAUSE_S))
    return done


def _next_count(begun: int, under_way: int, left: int, ahead: int) -> int:
    """How many pages are to be mapped and begun now; 0 where so many are under way that they must wait. Pure.

    First one, for the bus waits for it, then more and more; towards the end fewer, for what is computed behind them
    waits for all that came at a time.
    """
    count = min(max(1, ahead // 2), MOST_AT_ONCE, max(1, begun), (left + 1) // 2)
    return count if under_way + count <= ahead else 0


def _mapped(filling: Filling, n: int) -> torch.Tensor:
    """The next n pages, or one where there are not as many. OutOfPages."""
    try:
        return filling.map(n)
    except OutOfPages:
        if n <= 1:
            raise
        return filling.map(1)
