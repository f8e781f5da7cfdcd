"""Copies an image into its weight range, page after page."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.gpu_agent.arena.arena import WeightRange
from services.gpu_agent.weights.image import Image
from services.gpu_agent.weights.staging import page_source


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is."""

    pages_done: int  # resident pages, those from earlier loads included
    pages_total: int
    bytes_per_s: float  # of this load so far; 0 before its first page

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
) -> LoadProgress:
    """Copies the missing pages in layer order and returns how far it came.

    Between two pages it looks at `cancel`, and stops there if it is set. However it ends, the resident pages are a
    prefix with the right data. Raises ImageCorrupt, OutOfPages (evict, then go on), OSError where the disk fails, and
    ArenaClosed where the range is removed meanwhile. To be called in a thread; the interpreter lock is free while it
    copies.
    """
    layout = image.layout
    if (layout.num_pages, layout.page_bytes) != (weights.num_pages, weights.page_bytes):
        raise ValueError(
            f"{image.path} has {layout.num_pages} pages of {layout.page_bytes} bytes, but the range of {weights.name} "
            f"has {weights.num_pages} of {weights.page_bytes}"
        )
    began = time.monotonic()
    copied = 0
    done = LoadProgress(weights.resident_pages, weights.num_pages, 0.0)
    with page_source(image, weights.resident_pages, weights.device) as fill:
        while not done.complete and not cancel.is_set():
            weights.append(fill)
            copied += layout.page_bytes
            done = LoadProgress(weights.resident_pages, weights.num_pages, copied / (time.monotonic() - began))
            progress(done)
    return done
