"""How many pages of an agent weights leave to KV. What instances do not need holds warm replicas of other models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from services.placer.snapshot import Agent, Replica, Snapshot, State
from services.placer.value import Stakes

# KV pages that an instance keeps on an agent.
Keeps = Callable[[Agent, Replica], int]


def published(agent: Agent, instance: Replica, expected: float = 0.0) -> int:
    """max(C Q / B, T + C / B): C all KV pages it could have, Q its requests, B the most at a time, T pages in use.

    `expected`: requests that it will have, where they are more than those it has.
    """
    could = max(1, agent.pages_total - instance.shard_pages)
    slots = max(1, instance.slots)
    requests = min(slots, max(instance.running, expected))
    return min(could, math.ceil(max(could * requests / slots, instance.kv_pages + could / slots)))


def foreseen(agent: Agent, instance: Replica, expected: float, bytes_per_request: float) -> int:
    """What the requests that are expected need, by their measured size, and one more; at least what is in use.

    Never more than the published rule would keep for them.
    """
    bound = published(agent, instance, expected)
    if not bytes_per_request:
        return bound
    requests = max(instance.running, expected) + 1
    return min(bound, max(instance.kv_pages, math.ceil(requests * bytes_per_request / agent.page_bytes)))


def by_forecast(stakes: Mapping[str, Stakes]) -> Keeps:
    """What instances keep by the forecast of their models: of the mean load, as one window in ten exceeds it.

    That is less than a peak may need: what is lent comes back as soon as it is needed.
    """

    def keeps(agent: Agent, instance: Replica) -> int:
        own = stakes.get(instance.model)
        if own is None:
            return published(agent, instance)
        expected = own.demand.expected.mean.p90 / max(1, own.serving)
        return foreseen(agent, instance, expected, own.model.kv_bytes_per_request)

    return keeps


def kept(snapshot: Snapshot, agent: Agent, on_agent: Iterable[Replica], keeps: Keeps) -> int:
    """KV pages that weights of warm replicas leave free on an agent.

    Where no instance runs, the share of the arena that the rules reserve, for who is woken there.
    """
    instances = [r for r in on_agent if r.state in (State.ACTIVE, State.WAKING)]
    if not instances:
        return max(agent.pages_kv, snapshot.kv_reserve(agent))
    return min(agent.pages_total, max(agent.pages_kv, sum(keeps(agent, r) for r in instances)))
