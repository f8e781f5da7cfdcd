"""Our rule: what is warm has the largest expected value (`value.py`) that a search finds."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

from services.placer import lending
from services.placer.board import Board
from services.placer.demand import Demand
from services.placer.loading import load_s
from services.placer.prewarm import prewarm
from services.placer.rival import better
from services.placer.rule import Prewarming, Price, prices
from services.placer.scores import Kind, Worth
from services.placer.sharing import FULL_SLOWDOWN, Part, beside, spared
from services.placer.snapshot import Agent, GroupIds, Key, Model, Replica
from services.placer.spread import ENOUGH, Load, assign
from services.placer.target import target
from services.placer.value import CERTAIN, Stakes, precedence, serves, share, stakes_of, usable
from services.placer.worths import Setting, kept

_RESTS_AFTER_S = 60.0  # idle for so long, an instance gives its pages to models of which nothing is resident
_LEAST_S = 0.02  # what sharing a GPU has to cost for an instance to go
_ASSUMED_SERVICE_S = 1.0  # of a request, where nothing is known yet
_NOTHING = Worth(Kind.SPARE, 0.0)


class ExpectedRule:
    """See `Rule`. A model's stakes are computed when they are first asked for: a wake concerns few models."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._stakes: dict[str, Stakes] = {}
        self._worths: dict[Key, Worth] = {}
        self._parts: dict[tuple[str, int, int], Part] = {}
        self._open = {agent.id for agent in board.open_agents}
        self._nodes = sorted({agent.node for agent in board.open_agents})
        # As it was when the rule was made: what is decided meanwhile does not change what anything is worth.
        self._there = dict(board.shelves.by_model)
        setting = Setting(self._nodes, self._open, board.snapshot.rules)
        self._kept = kept(setting, board.snapshot.models, self._there, board.snapshot.now_s)

    def stakes(self, model: Model) -> Stakes:
        """What is at stake for a model."""
        known = self._stakes.get(model.name)
        if known is None:
            serving = sum(map(serves, self._there.get(model.name, ())))
            known = self._stakes[model.name] = stakes_of(self._board.snapshot, model, serving, self._nodes)
        return known

    def demand(self, model: Model) -> Demand:
        """See `Rule`."""
        return self.stakes(model).demand

    def worth(self, replica: Replica) -> Worth:
        """See `Rule`."""
        known = self._kept.worths.get(replica.key) or self._worths.get(replica.key)
        if known is None:
            model = self._board.snapshot.models.get(replica.model)
            if model is not None:
                self._assess(model)
            known = self._worths.setdefault(replica.key, _NOTHING)
        return known

    def prices(self, agent_id: str) -> Sequence[Price]:
        """See `Rule`."""
        shelf = self._board.shelves.on(agent_id)
        found = self._kept.priced(agent_id, shelf)
        if found is None:
            found = prices(shelf.replicas, self.worth)
            self._kept.keep_prices(agent_id, shelf, found)
        return found

    def _assess(self, model: Model) -> None:
        stakes, snapshot = self.stakes(model), self._board.snapshot
        every = self._there.get(model.name, ())
        there = [r for r in every if self._open.issuperset(r.group)]
        if len(there) > 1:
            there.sort(key=lambda r: precedence(r, self._crowd(r)))
        for rank, r in enumerate(there):
            self._worths[r.key] = stakes.keeping(rank, snapshot.agents[r.group[0]].node, share(r))
        if len(every) == 1:
            worth = self._worths.get(every[0].key, _NOTHING)
            self._kept.keep(every[0], worth, stakes.demand.expected, snapshot.now_s)

    def _crowd(self, replica: Replica) -> int:
        models = self._board.snapshot.models
        near = (r for r in self._board.on(replica.group) if r is not replica and r.model in models)
        return sum(CERTAIN if serves(r) else self.stakes(models[r.model]).popularity for r in near)

    def urgency(self, model: Model, serving: int) -> float:
        """See `Rule`. As many requests wait for it as the others do not carry."""
        excess = min(model.capacity, model.waiting + model.running - serving * model.capacity)
        stakes = self.stakes(model)
        return model.priority * max(0, excess) * stakes.pain(stakes.cold_s(serving))

    def loading(self, model: Model, group: GroupIds, missing: float) -> float:
        """See `Rule`."""
        seconds = missing * load_s(model, self._board.snapshot.agents[group[0]].node)
        return model.priority * max(1, model.waiting) * self.stakes(model).pain(seconds)

    def sharing(self, model: Model, group: GroupIds) -> float:
        """See `Rule`. The same of an instance that is there."""
        if self._board.calm(group):
            return 0.0
        models = self._board.snapshot.models
        busy = [r for r in self._board.on(group) if r.running or serves(r)]
        if not busy:
            return 0.0
        others = [
            self._part(models[r.model], max(1, self._serving(models[r.model])), r.running)
            for r in busy
            if r.model != model.name and r.model in models
        ]
        if not others:
            return 0.0
        instances = self._serving(model)
        if not any(r.model == model.name and serves(r) for r in busy):
            instances += 1
        own = self._part(model, instances)
        slowdown = 1 + FULL_SLOWDOWN * own.load / _batch(model)
        return beside(own, others, _service_s(model), slowdown)

    def spared(self, model: Model, serving: int) -> float:
        """See `Rule`. They are as much slower than alone as the GPU has to do, whatever target they have."""
        return spared((model.waiting + model.running) ** 2, serving, _batch(model), _service_s(model), model.priority)

    def spread(self, model: Model) -> Collection[GroupIds]:
        """See `Rule`."""
        there = {r.group for r in self._board.of(model.name) if serves(r)}
        return [group for group in self._assigned.get(model.name, ()) if group not in there]

    def may_rest(self, model: Model, instance: Replica) -> bool:
        """See `Rule`. It takes time of its neighbours where it had not best lie; or, idle, pages that others want."""
        if not instance.running and self._board.snapshot.idle_s(instance) >= _RESTS_AFTER_S and self._lacking:
            return True
        margin = self._board.snapshot.rules.margin
        loads, others = self.stakes(model).loads, self._serving(model) - 1
        relief = model.priority * loads[others] * _service_s(model) * FULL_SLOWDOWN if others < len(loads) else 0.0
        return self.sharing(model, instance.group) > margin * relief + _LEAST_S

    def reserve(self, model: Model, agent: Agent) -> int:
        """See `Rule`. More than instances need only where that is not known."""
        if model.kv_bytes_per_request:
            return 1
        return self._board.snapshot.kv_reserve(agent, self._board.snapshot.shard_pages(model, agent.id))

    def first_pages(self, model: Model, agent: Agent) -> int:
        """See `Rule`. For the requests that wait, as far as one instance carries them, and one more."""
        return lending.for_instance(self._board.snapshot, agent, model, min(model.waiting, model.capacity))

    @functools.cached_property
    def _assigned(self) -> dict[str, list[GroupIds]]:
        snapshot, agents = self._board.snapshot, self._board.open_agents
        kinds = {agent.page_bytes: agent for agent in agents}
        loads = []
        for model in snapshot.models.values():
            expected = self.demand(model).expected
            need = max(expected.peak.p99, expected.later.p99) / model.capacity
            there = self._there.get(model.name, ())
            serving = frozenset(r.group for r in there if serves(r))
            if need < ENOUGH and not serving:
                continue
            pages = {
                size: snapshot.shard_pages(model, agent.id)
                + lending.for_instance(snapshot, agent, model, min(expected.mean.p90, model.capacity))
                for size, agent in kinds.items()
            }
            warm = frozenset(r.group for r in there if share(r) == 1)
            loads.append(Load(model.name, model.tp, need, pages, model.max_replicas, serving, warm))
        return assign(agents, loads, snapshot.rules.margin)

    @functools.cached_property
    def _lacking(self) -> bool:
        """Whether a model is likely enough to be needed of which nothing is wholly resident."""
        snapshot = self._board.snapshot
        return any(
            self.stakes(model).chance(0) >= snapshot.rules.least_chance
            and not any(usable(snapshot, r) and share(r) == 1 for r in self._there.get(name, ()))
            for name, model in snapshot.models.items()
        )

    def _serving(self, model: Model) -> int:
        return sum(map(serves, self._board.of(model.name)))

    def _part(self, model: Model, instances: int, running: int = 0) -> Part:
        """What an instance of a model has to do, if there are so many."""
        key = model.name, instances, running
        if key not in self._parts:
            expected = max(self.demand(model).mean, model.waiting + model.running) / instances
            self._parts[key] = Part(max(running, expected), model.priority)
        return self._parts[key]

    def prewarm(self) -> Prewarming:
        """See `Rule`."""
        stakes = {name: self.stakes(model) for name, model in sorted(self._board.snapshot.models.items())}
        aim = target(self._board, stakes)
        return better(self._board, stakes, aim) or prewarm(self._board, aim)


def _batch(model: Model) -> int:
    """Requests with which an instance is full."""
    return max(model.batch, model.capacity)


def _service_s(model: Model) -> float:
    return model.service_s or _ASSUMED_SERVICE_S
