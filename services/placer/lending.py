"""How many pages of an agent weights leave to KV. What instances do not need holds warm replicas of other models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from services.placer.snapshot import Agent, Model, Replica, Snapshot, State
from services.placer.value import Stakes

_FIRST_SHARE = 16  # of an arena: an instance begins with the KV of one context, and at most with this part


class Lending(Protocol):
    """A rule of lending, for one snapshot."""

    def keeps(self, agent: Agent, instance: Replica) -> int:
        """KV pages that an instance keeps on an agent."""

    def reserve(self, agent: Agent) -> int:
        """KV pages left on an agent where no instance runs, for who is woken there."""


class Published:
    """The published rule, and a fixed share of an arena where no instance runs."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def keeps(self, agent: Agent, instance: Replica) -> int:
        """See `Lending`."""
        return published(agent, instance)

    def reserve(self, agent: Agent) -> int:
        """See `Lending`."""
        return self._snapshot.kv_reserve(agent)


class Foreseen:
    """By the forecasts of models: the mean load, as one window in ten exceeds it.

    That is less than a peak may need: what is lent comes back as soon as it is needed.
    """

    def __init__(self, snapshot: Snapshot, stakes: Mapping[str, Stakes]) -> None:
        self._snapshot = snapshot
        self._stakes = stakes
        self._reserves: dict[tuple[int, int], int] = {}  # by an agent's size

    def keeps(self, agent: Agent, instance: Replica) -> int:
        """See `Lending`."""
        own = self._stakes.get(instance.model)
        if own is None:
            return published(agent, instance)
        return foreseen(agent, instance, _expected(own), own.model.kv_bytes_per_request)

    def reserve(self, agent: Agent) -> int:
        """See `Lending`. What one instance needs, the mean over measured models by how likely they are woken.

        No more than the rules' share of the arena; the same on all agents, else replicas would move for it.
        """
        size = agent.page_bytes, agent.pages_total
        if size not in self._reserves:
            needs = [
                (own.chance(own.serving), for_instance(self._snapshot, agent, own.model, _expected(own)))
                for own in self._stakes.values()
                if own.model.kv_bytes_per_request
            ]
            likely = sum(chance for chance, _ in needs)
            mean = sum(chance * pages for chance, pages in needs) / likely if likely else 0.0
            most = self._snapshot.kv_reserve(agent)
            self._reserves[size] = min(most, math.ceil(mean) or most)
        return self._reserves[size]


def _expected(own: Stakes) -> float:
    """Requests of an instance in progress, as one window in ten exceeds it."""
    return min(own.model.capacity, own.demand.expected.mean.p90 / max(1, own.serving))


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


def for_instance(snapshot: Snapshot, agent: Agent, model: Model, requests: float) -> int:
    """KV pages for an instance of a model that will have so many requests, by their measured size, and one more.

    At least what an agent gives an instance to begin with. Fewer where the model's shard could else not even be
    alone on the agent.
    """
    first = agent.pages_total // _FIRST_SHARE
    if model.kv_bytes_per_context:
        first = min(first, math.ceil(model.kv_bytes_per_context / agent.page_bytes))
    needed = math.ceil((requests + 1) * model.kv_bytes_per_request / agent.page_bytes)
    return max(1, min(max(needed, first), agent.pages_total - snapshot.shard_pages(model, agent.id)))


def kept(agent: Agent, on_agent: Iterable[Replica], lending: Lending) -> int:
    """KV pages that weights of warm replicas leave free on an agent."""
    held = agent.pages_kv + agent.pages_promised
    instances = [r for r in on_agent if r.state in (State.ACTIVE, State.WAKING)]
    if not instances:
        return max(held, lending.reserve(agent))
    return min(agent.pages_total, max(held, sum(lending.keeps(agent, r) for r in instances)))
