"""Pages of warm weights that others took: one or a few at a time, so it is told for several at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from prometheus_client import Counter

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.shard import Shard
from services.gpu_agent.transitions import Transitions
from warmserve.v1 import common_pb2

_TAKEN_BACK = Counter(
    "warmserve_gpu_agent_pages_taken_back_total", "Pages of warm weights that KV caches and wakes took", ["model"]
)
_TELL_S = 0.2


class TakenBack:
    """Hears from the arena's threads what was taken back, and tells it on the event loop."""

    def __init__(self, arena: Arena, shards: Mapping[str, Shard], transitions: Transitions) -> None:
        """`shards` are all of the agent's, by name, and change under it."""
        self._page_bytes = arena.page_bytes
        self._shards = shards
        self._transitions = transitions
        self._untold: dict[str, tuple[int, str]] = {}  # pages by model, and who took the last
        loop = asyncio.get_running_loop()

        def on_taken_back(model: str, pages: int, owner: str) -> None:
            loop.call_soon_threadsafe(self._note, model, pages, owner)

        arena.on_taken_back = on_taken_back

    def _note(self, model: str, pages: int, owner: str) -> None:
        _TAKEN_BACK.labels(model).inc(pages)
        if model in self._shards:
            self._shards[model].prewarming.lost(pages * self._page_bytes)
        if not self._untold:
            asyncio.get_running_loop().call_later(_TELL_S, self._tell)
        self._untold[model] = self._untold.get(model, (0, ""))[0] + pages, owner

    def _tell(self) -> None:
        names = {shard.server.instance_id: shard.name for shard in self._shards.values() if shard.server}
        news, self._untold = self._untold, {}
        for model, (pages, owner) in news.items():
            shard = self._shards.get(model)
            if shard is None:
                continue
            by_model = names.get(owner, owner if owner in self._shards else "")
            what = "its weights" if owner == by_model else "its KV cache"
            reason = common_pb2.Reason(
                cause=common_pb2.CAUSE_MADE_ROOM,
                text=f"{pages} pages went to {by_model or owner}, which needed them for {what}",
                by_model=by_model,
                score=shard.score,
            )
            self._transitions.lost_pages(shard, pages * self._page_bytes, reason)
