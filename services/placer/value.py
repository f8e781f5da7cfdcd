"""What warm replicas are worth: the planner's objective.

The worth of a model's replica of rank k (0 for the first; instances rank before warm replicas) is

    requests that would wait x seconds that it saves each of them x the model's priority,   in expected seconds.

- A replica of rank k is needed when the peak load of the windows that count exceeds what k instances carry. Its
  chance, P(needed), and the expected load above that follow from the forecast's quantiles (`chances.py`). Needed, one
  request waits the whole load, and those that arrive meanwhile half of it on average:
  P(needed) + expected load x load time / (2 x service time). Where the service time is not known, the expected load
  itself waits. For keeping what is resident, but not for loading, what only later windows need counts a tenth.
- It saves the time of loading the model cold, on the node where that is quickest, less what loading its own missing
  pages would take. A further replica's cold load may be a copy from the first one's GPU.
- Where the operator has set a target for the first token, a second within it counts a tenth of a second beyond it.

Replicas that share a GPU hurt one another when they are woken together. Of each one's worth the share
`rules.interference` is lost with the chance that one of the others is needed too: the sum of their chances, at most 1;
an instance's is 1. `expected_value` is the sum over all warm replicas, and what a plan is to make large.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from services.placer.demand import Demand, demand, needed
from services.placer.loading import load_s, quickest_s
from services.placer.scores import PINNED_S, Kind, Worth
from services.placer.snapshot import GroupIds, Model, Quantiles, Replica, Rules, Snapshot, State

_LATER = 0.1  # what the need of a later window counts
_WITHIN_TARGET = 0.1  # what a second within the target counts
_LEAST_CHANCE = 0.005  # a need less likely counts as none
CERTAIN = 1000  # the popularity of what is needed for certain
_MOST_RANKS = 64  # of one model, whatever its forecast says


@dataclass(frozen=True)
class Stakes:
    """What is at stake for one model: what being warm is worth to it."""

    model: Model
    demand: Demand
    serving: int  # instances
    chances: tuple[float, ...]  # P(needed in the windows that count) of each rank; longer ranks are not needed
    loads: tuple[float, ...]  # requests in progress that each rank is expected to carry in the peak of those windows
    waits: tuple[float, ...]  # requests that would wait for each rank, times priority
    later: tuple[float, ...]  # the same of all windows, the later ones at a tenth: what keeping a replica is for
    first_s: float  # cold load of the first replica
    further_s: float  # of any other
    _load_s: dict[tuple[bool, str], float] = field(default_factory=dict, repr=False, compare=False)  # as it was asked
    _kept: dict[tuple[int, str, float], Worth] = field(default_factory=dict, repr=False, compare=False)  # likewise

    @functools.cached_property
    def popularity(self) -> int:
        """How likely one more instance is needed, in thousandths."""
        return round(CERTAIN * self.chance(self.serving))

    def chance(self, rank: int) -> float:
        """How likely the replica of that rank is woken."""
        return self.chances[rank] if rank < len(self.chances) else 0.0

    def worth(self, rank: int, node: str, share: float = 1.0) -> float:
        """The worth of a replica of which the first `share` is resident on a node, without interference."""
        return self.waits[rank] * self._spared(rank, node, share) if rank < len(self.waits) else 0.0

    def worth_keeping(self, rank: int, node: str, share: float) -> float:
        """The same of one that is resident already, with what it spares in later windows, at a tenth."""
        return self.later[rank] * self._spared(rank, node, share) if rank < len(self.later) else 0.0

    def keeping(self, rank: int, node: str, share: float) -> Worth:
        """`worth_keeping` with what the replica is needed for; what is pinned is worth more than all that is not."""
        known = self._kept.get((rank, node, share))
        if known is None:
            pinned = PINNED_S if share == 1 and rank < self.model.pinned else 0.0
            known = Worth(self.kind(rank), self.worth_keeping(rank, node, share) + pinned)
            self._kept[rank, node, share] = known
        return known

    def _spared(self, rank: int, node: str, share: float) -> float:
        cold = self._cold_pains[rank > 0]
        if share == 1:
            return cold
        if not share:
            return 0.0
        return max(0.0, cold - self.pain((1 - share) * self.load_s(rank, node)))

    @functools.cached_property
    def _cold_pains(self) -> tuple[float, float]:
        return self.pain(self.first_s), self.pain(self.further_s)

    def load_s(self, rank: int, node: str) -> float:
        """Seconds that the whole replica of that rank takes to load on a node."""
        known = self._load_s.get((rank > 0, node))
        if known is None:
            known = self._load_s[rank > 0, node] = load_s(self.model, node, rank > 0)
        return known

    def cold_s(self, rank: int) -> float:
        """Seconds of the load that the replica of that rank spares."""
        return self.further_s if rank else self.first_s

    def pain(self, seconds: float) -> float:
        """What waiting so long counts, in seconds beyond the model's target."""
        within = min(seconds, self.model.ttft_p95_s)
        return seconds - (1 - _WITHIN_TARGET) * within

    def in_time(self, rank: int, node: str, part: float, now_s: float) -> float:
        """The share of the time the forecast speaks of in which a replica is there that has yet to load a part."""
        lasts_s = self.demand.expected.ends_s - now_s
        return max(0.0, 1 - part * self.load_s(rank, node) / lasts_s) if lasts_s > 0 else 0.0

    def kind(self, rank: int) -> Kind:
        """What the replica of that rank is needed for."""
        if rank < self.demand.foundation:
            return Kind.FOUNDATION
        return Kind.BURST if rank < self.demand.replicas else Kind.SPARE


def stakes(snapshot: Snapshot, replicas: Iterable[Replica]) -> dict[str, Stakes]:
    """What is at stake for each deployed model, given the replicas there are."""
    serving: defaultdict[str, int] = defaultdict(int)
    for replica in replicas:
        serving[replica.model] += serves(replica)
    nodes = sorted({agent.node for agent in snapshot.agents.values() if not agent.cordoned and not agent.drained})
    return {name: stakes_of(snapshot, model, serving[name], nodes) for name, model in snapshot.models.items()}


_KEPT = 4096  # models
_known: dict[str, tuple[Sequence[str], Rules, Stakes]] = {}  # by model


def stakes_of(snapshot: Snapshot, model: Model, serving: int, nodes: Sequence[str]) -> Stakes:
    """What is at stake for a model of which `serving` instances serve; `nodes`: those that take something new.

    A wake asks for that of all models that might give way to it, of which hardly one has changed since the last wake:
    what would come out the same is not computed again.
    """
    known = _known.get(model.name)
    if known is not None:
        for_nodes, for_rules, stakes = known
        if (
            stakes.model is model
            and stakes.serving == serving
            and stakes.demand.expected.holds(snapshot.now_s)
            and for_nodes == nodes
            and (for_rules is snapshot.rules or for_rules == snapshot.rules)
        ):
            return stakes
    first_s, further_s = quickest_s(model, nodes)
    # A window has to be known of in time to load for it.
    lookahead_s = max(snapshot.rules.lookahead_s, 2 * first_s)
    stakes = _stakes_of(snapshot, model, serving, lookahead_s, first_s, further_s)
    if len(_known) >= _KEPT:
        _known.clear()
    _known[model.name] = nodes, snapshot.rules, stakes
    return stakes


def _stakes_of(
    snapshot: Snapshot, model: Model, serving: int, lookahead_s: float, first_s: float, further_s: float
) -> Stakes:
    wanted = demand(model, snapshot.now_s, serving, snapshot.rules, lookahead_s)
    most = min(_MOST_RANKS, model.max_replicas or _MOST_RANKS)
    peak, later = wanted.expected.peak, wanted.expected.later
    ranks = _ranks(peak, later, max(1, model.capacity), most, model.priority, model.service_s, first_s, further_s)
    return Stakes(model, wanted, serving, *ranks, first_s, further_s)


_Numbers = tuple[float, ...]  # by rank


@functools.lru_cache(maxsize=4096)  # forecasts outlive many plans
def _ranks(
    peak: Quantiles,
    later: Quantiles,
    capacity: int,
    most: int,
    priority: float,
    service_s: float,
    first_s: float,
    further_s: float,
) -> tuple[_Numbers, _Numbers, _Numbers, _Numbers]:
    """`Stakes.chances`, `loads`, `waits` and `later`."""

    def waits(needs: Iterable[tuple[float, float]]) -> list[float]:
        return [
            priority * _requests(chance, load, further_s if rank else first_s, service_s)
            for rank, (chance, load) in enumerate(needs)
        ]

    now = needed(peak, capacity, most, _LEAST_CHANCE)
    soon = waits(now)
    ahead = [_LATER * wait for wait in waits(needed(later, capacity, most, _LEAST_CHANCE))]
    kept = tuple(max(pair) for pair in itertools.zip_longest(soon, ahead, fillvalue=0.0))
    return tuple(chance for chance, _ in now), tuple(load for _, load in now), tuple(soon), kept


def _requests(chance: float, load: float, cold_s: float, service_s: float) -> float:
    """Requests that wait for an instance that is needed with a chance, for an expected load."""
    return chance + load * cold_s / (2 * service_s) if service_s > 0 else load


def expected_value(snapshot: Snapshot, replicas: Iterable[Replica]) -> float:
    """The objective: expected seconds of waiting that the warm ones among these replicas save.

    Loads in progress count as done. Instances count only as neighbours; what lies on agents that take nothing new not
    at all. Written for its meaning, not for speed: tests hold the planner's own, incremental sum against it.
    """
    there = [replica for replica in replicas if replica.model in snapshot.models and usable(snapshot, replica)]
    known = stakes(snapshot, there)
    popularity = {name: own.popularity for name, own in known.items()}
    valued: list[tuple[Replica, float, float]] = []  # with worth and chance
    for name, own in known.items():
        of_model = [replica for replica in there if replica.model == name]
        for rank, replica in enumerate(sorted(of_model, key=lambda r: precedence(r, crowd(r, there, popularity)))):
            node = snapshot.agents[replica.group[0]].node
            worth = 0.0 if serves(replica) else own.worth(rank, node, share(replica))
            certain = serves(replica) or replica.state is State.DRAINING
            valued.append((replica, worth, 1.0 if certain else own.chance(rank)))
    total = 0.0
    for replica, worth, _ in valued:
        group = set(replica.group)
        others = sum(chance for r, _, chance in valued if r is not replica and not group.isdisjoint(r.group))
        total += worth * (1 - snapshot.rules.interference * min(1.0, others))
    return total


def serves(replica: Replica) -> bool:
    """Whether it is an instance, or about to be one."""
    return replica.state in (State.ACTIVE, State.WAKING)


def usable(snapshot: Snapshot, replica: Replica) -> bool:
    """Whether all its agents are there and take something new."""
    agents = [snapshot.agents.get(agent_id) for agent_id in replica.group]
    return all(agent is not None and not agent.cordoned and not agent.drained for agent in agents)


def share(replica: Replica) -> float:
    """The share that is resident once loads and drains in progress have ended."""
    if replica.state is State.WARM:
        return replica.residency
    return replica.pages / replica.shard_pages if replica.shard_pages else 1.0


def crowd(replica: Replica, there: Iterable[Replica], popularity: Mapping[str, int]) -> int:
    """How popular the models of those are that share an agent with a replica; `popularity` is by model."""
    return sum(
        CERTAIN if serves(other) else popularity.get(other.model, 0)
        for other in there
        if other is not replica and not set(other.group).isdisjoint(replica.group)
    )


def precedence(replica: Replica, crowd: int) -> tuple[bool, float, int, GroupIds]:
    """Orders the usable replicas of one model by rank, as they had best be woken.

    Instances come first, then the most resident, then those where the least is likely to be woken.
    """
    return not serves(replica), -share(replica), crowd, replica.group
