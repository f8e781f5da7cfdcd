"""The best that plans could be: the largest expected value of what is warm, by a mixed-integer program (HiGHS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from services.placer import lending
from services.placer.groups import groups
from services.placer.loading import load_s
from services.placer.snapshot import Agent, GroupIds, Replica, Snapshot, State
from services.placer.value import Stakes, stakes

SECONDS = 10.0  # longest time for one program


@dataclass
class _Candidate:
    model: str
    rank: int
    group: GroupIds
    pages: int
    worth: float  # of the whole
    lines: list[tuple[float, float]]  # a and b of those a * share + b whose least is the worth of a share
    chance: float


@dataclass(frozen=True)
class Optimum:
    """What a mixed-integer program has found out."""

    bound: float  # no placement beside the instances that serve has a larger expected value
    found: float  # of the best placement it found; the same where it was done in time
    proved: bool  # whether it was


def optimum(snapshot: Snapshot) -> Optimum:
    """The largest expected value of any placement beside the instances that serve.

    What is warm now counts for nothing: the program places everything anew. Of each possible replica (model, rank,
    group) a binary variable says whether it is there and a continuous one, how much of it is resident, in parts of
    pages. Replicas are placed whole or not at all. Of two ranks of a model
    the lower is placed first; each agent's pages suffice, and it holds a model once. The worth is concave in the share,
    so some lines bound it exactly. A continuous variable is at least the sum of the chances of all others on a
    replica's agents, or 1 (another binary one): that much is lost of the interference's share. The loss of a whole
    replica is exact; of a part p it is at least lost + p - 1 instead of lost x p, which favours the program.
    """
    serving = [replica for replica in snapshot.replicas if replica.state is State.ACTIVE]
    known = stakes(snapshot, serving)
    lent = lending.Foreseen(snapshot, known)
    rooms = {agent.id: _room(agent, serving, lent) for agent in snapshot.agents.values()}
    candidates: list[_Candidate] = []
    for name, own in known.items():
        model = snapshot.models[name]
        taken = {agent_id for replica in serving if replica.model == name for agent_id in replica.group}
        usable = [group for group in groups(snapshot.agents.values(), model.tp) if taken.isdisjoint(group)]
        for rank in range(own.serving, min(len(own.chances), own.serving + len(usable))):
            for group in usable:
                node = snapshot.agents[group[0]].node
                worth = own.worth(rank, node)
                if worth > 0:
                    pages = snapshot.shard_pages(model, group[0])
                    lines = _lines(own, rank, node)
                    candidates.append(_Candidate(name, rank, group, pages, worth, lines, own.chance(rank)))
    if not candidates:
        return Optimum(0.0, 0.0, True)
    return _solve(snapshot, serving, rooms, candidates)


def _lines(own: Stakes, rank: int, node: str) -> list[tuple[float, float]]:
    """The worth of a share: where its missing pages load beyond the target, and where they load within it."""
    wait, whole_s, target = own.waits[rank], load_s(own.model, node, rank > 0), own.model.ttft_p95_s
    cold = own.pain(own.cold_s(rank))
    if not target:
        return [(wait * whole_s, wait * (cold - whole_s))]
    within = own.pain(target) / target * whole_s
    return [
        (wait * whole_s, wait * (cold - whole_s + target - own.pain(target))),
        (wait * within, wait * (cold - within)),
    ]


def _solve(
    snapshot: Snapshot, serving: list[Replica], rooms: Mapping[str, int], candidates: list[_Candidate]
) -> Optimum:
    n = len(candidates)
    there, part, worth, lost, loss, all_lost = (range(k * n, (k + 1) * n) for k in range(6))
    rows: list[dict[int, float]] = []
    most: list[float] = []

    def at_most(row: dict[int, float], bound: float) -> None:
        rows.append(row)
        most.append(bound)

    unit = max(one.worth for one in candidates)
    placed: dict[tuple[str, int], list[int]] = {}
    for i, one in enumerate(candidates):
        placed.setdefault((one.model, one.rank), []).append(i)
        at_most({part[i]: 1.0, there[i]: -1.0}, 0)
        at_most({part[i]: -1.0, there[i]: 1.0}, 0)
        for slope, start in one.lines:
            at_most({worth[i]: 1.0, part[i]: -slope / unit, there[i]: -start / unit}, 0)
        at_most({part[i]: 1.0, lost[i]: 1.0, loss[i]: -1.0}, 1)
    for (name, rank), those in placed.items():
        at_most({there[i]: 1.0 for i in those}, 1)
        if before := placed.get((name, rank - 1)):
            at_most({there[i]: 1.0 for i in those} | {there[i]: -1.0 for i in before}, 0)
    for agent in snapshot.agents.values():
        here = [i for i, one in enumerate(candidates) if agent.id in one.group]
        at_most({part[i]: float(candidates[i].pages) for i in here}, rooms[agent.id])
        for name in {candidates[i].model for i in here}:
            at_most({there[i]: 1.0 for i in here if candidates[i].model == name}, 1)
    for i, one in enumerate(candidates):
        instances = sum(not set(one.group).isdisjoint(replica.group) for replica in serving)
        others = {
            j: other.chance
            for j, other in enumerate(candidates)
            if other.model != one.model and other.chance and not set(one.group).isdisjoint(other.group)
        }
        hottest = instances + _hottest(candidates, others)
        heat = {there[j]: chance for j, chance in others.items()}
        at_most({**heat, there[i]: hottest, lost[i]: -1.0, all_lost[i]: -hottest}, hottest - instances)
        at_most({all_lost[i]: 1.0, there[i]: 1.0, lost[i]: -1.0}, 1)
    entries = [(r, c, value) for r, row in enumerate(rows) for c, value in row.items()]
    matrix = coo_matrix(
        ([e[2] for e in entries], ([e[0] for e in entries], [e[1] for e in entries])), shape=(len(rows), 6 * n)
    )
    goal, whole = np.zeros(6 * n), np.zeros(6 * n)
    goal[worth] = -1
    goal[loss] = [snapshot.rules.interference * one.worth / unit for one in candidates]
    whole[there] = whole[all_lost] = 1
    found = milp(
        goal,
        constraints=LinearConstraint(matrix.tocsr(), -np.inf, np.array(most)),
        integrality=whole,
        bounds=Bounds(np.where(np.isin(np.arange(6 * n), worth), -np.inf, 0), np.ones(6 * n)),
        options={"time_limit": SECONDS, "mip_rel_gap": 1e-4},
    )
    if found.mip_dual_bound is None:
        raise RuntimeError(f"the program was not solved: {found.message}")
    bound, proved = -float(found.mip_dual_bound) * unit, found.status == 0
    if proved:
        return Optimum(bound, bound, True)
    return Optimum(bound, -float(found.fun) * unit if found.fun is not None else 0.0, False)


def _hottest(candidates: list[_Candidate], others: dict[int, float]) -> float:
    """The most that these chances come to: of one model on one agent at most the highest."""
    highest: dict[tuple[str, GroupIds], float] = {}
    for j, chance in others.items():
        key = candidates[j].model, candidates[j].group
        highest[key] = max(highest.get(key, 0.0), chance)
    return sum(highest.values())


def _room(agent: Agent, serving: list[Replica], lent: lending.Lending) -> int:
    """Pages for warm replicas, by the planner's lending rule."""
    here = [replica for replica in serving if agent.id in replica.group]
    held = sum(replica.pages for replica in here)
    return max(0, agent.pages_total - held - lending.kept(agent, here, lent))
