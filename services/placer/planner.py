"""What to do with the replicas of a cluster. Pure: snapshot in, plan out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from services.placer.board import Board, Room
from services.placer.decisions import Action, Do, Outcome, Plan, Reason, Wake
from services.placer.demand import Demand
from services.placer.expected_rule import ExpectedRule
from services.placer.offers import Wish
from services.placer.outlooks import outlook
from services.placer.published_rule import PublishedRule
from services.placer.rule import Prewarming, Rule
from services.placer.snapshot import Model, Replica, Snapshot, State
from services.placer.value import serves
from services.placer.wake import choose
from services.placer.words import count, load, names, worth
from warmserve.v1 import common_pb2

RULE = "expected value"
_CHANGE = 0.3  # of a replica's worth, and at least so many seconds: for less nobody is told
_LEAST_CHANGE_S = 0.01


def plan(snapshot: Snapshot, *, outlooks: bool = True) -> Plan:
    """What to wake, drain, warm and evict by our rule. The same snapshot gives the same plan.

    `outlooks`: whether it tells of every model why it is as it is; without them it takes a tenth less.
    """
    return plan_by(snapshot, ExpectedRule, outlooks=outlooks)


def plan_published(snapshot: Snapshot, *, outlooks: bool = True) -> Plan:
    """The same by the published rule: what ours is compared with."""
    return plan_by(snapshot, PublishedRule, outlooks=outlooks)


def plan_by(snapshot: Snapshot, rule: Callable[[Board], Rule], *, outlooks: bool = True) -> Plan:
    """The same by any rule."""
    return _Planner(snapshot, rule).plan(outlooks)


def wake(snapshot: Snapshot, *models: str) -> Plan:
    """What requests that wait need at once, with the outlooks of some models: the plan's first part alone, so that a
    wake need not wait for the rest."""
    return _Planner(snapshot, ExpectedRule).wake(models)


def wake_published(snapshot: Snapshot, *models: str) -> Plan:
    """The same by the published rule."""
    return _Planner(snapshot, PublishedRule).wake(models)


class _Planner:
    def __init__(self, snapshot: Snapshot, rule: Callable[[Board], Rule]) -> None:
        self._snapshot = snapshot
        self._board = Board(snapshot)
        self._actions: list[Action] = []
        self._wakes: dict[str, Wake] = {}
        self._clear_away()
        self._rule = rule(self._board)  # what models need and replicas are worth, without what was cleared away

    @functools.cached_property
    def _models(self) -> list[Model]:
        return sorted(self._snapshot.models.values(), key=lambda model: model.name)

    def plan(self, outlooks: bool) -> Plan:
        self._wake(self._models, self._spread)
        self._drain_low_load()
        prewarming = self._rule.prewarm()
        self._actions += prewarming.actions
        self._tell_scores()
        return self._done(self._models if outlooks else [], prewarming)

    def wake(self, told: Collection[str]) -> Plan:
        models = self._snapshot.models
        self._wake([model for model in models.values() if model.waiting], lambda model, serving: None)
        return self._done([models[name] for name in sorted(told) if name in models], Prewarming())

    def _done(self, told: list[Model], prewarming: Prewarming) -> Plan:
        outlooks = tuple(
            outlook(self._board, self._rule, model, self._wakes.get(model.name), prewarming) for model in told
        )
        return Plan(tuple(self._actions), outlooks, self._wakes)

    # What has no place any more

    def _clear_away(self) -> None:
        stays = {agent.id for agent in self._snapshot.agents.values() if not agent.drained}
        models = self._snapshot.models
        if self._board.shelves.by_model.keys() <= models.keys() and self._board.shelves.by_agent.keys() <= stays:
            return
        gone = [r for r in self._snapshot.replicas if r.model not in models or not stays.issuperset(r.group)]
        for replica in sorted(gone, key=lambda r: r.key):
            reason = self._has_to_go(replica)
            if replica.state in (State.ACTIVE, State.WAKING):
                self._drain(replica, reason)
            elif replica.state in (State.WARM, State.WARMING):
                self._actions.append(Action(Do.EVICT, replica.model, replica.group, reason))
                self._board.remove(replica)

    def _has_to_go(self, replica: Replica) -> Reason:
        agents = self._snapshot.agents
        if replica.model not in self._snapshot.models:
            return Reason(common_pb2.CAUSE_UNDEPLOYED, f"{replica.model} was undeployed")
        lost = [agent_id for agent_id in replica.group if agent_id not in agents]
        if lost:
            return Reason(common_pb2.CAUSE_AGENT_LOST, f"{names(replica.group)} cannot serve without {', '.join(lost)}")
        drained = [agent_id for agent_id in replica.group if agents[agent_id].drained]
        return Reason(common_pb2.CAUSE_OPERATOR, f"an operator drains {', '.join(drained)}")

    def _drain(self, replica: Replica, reason: Reason) -> None:
        self._actions.append(Action(Do.DRAIN, replica.model, replica.group, reason))
        self._board.put(replace(replica, state=State.DRAINING))

    # Instances

    def _wake(self, models: list[Model], spread: Callable[[Model, int], Wish | None]) -> None:
        """`spread`: the wish of a model that has enough instances, of which it has so many."""
        # Who has waited longest, weighted by priority, chooses first and keeps what is being freed for it.
        for model in sorted(models, key=lambda m: (-m.waited_s * m.priority, -m.waiting, m.name)):
            while (wish := self._wish(model, spread)) is not None:
                decision = choose(self._board, self._rule, model, wish)
                if wish.places is not None and decision.wake.outcome is not Outcome.NOW:
                    break
                self._wakes.setdefault(model.name, decision.wake)
                self._make_room(model, decision.wake, decision.room)
                if decision.wake.outcome is not Outcome.NOW:
                    break
                self._carry_out(model, decision.wake)

    def _wish(self, model: Model, spread: Callable[[Model, int], Wish | None]) -> Wish | None:
        """Why the model wants one more instance; None where it has enough."""
        serving = len(_serving(self._board.of(model.name)))
        if not model.waiting and not model.running and serving >= model.min_replicas:
            return None
        if serving >= self._rule.demand(model).wake:
            return spread(model, serving)
        if serving < model.min_replicas and not model.waiting:
            text = f"its minimum is {count(model.min_replicas, 'active replica')}"
            return Wish(common_pb2.CAUSE_OPERATOR, text)
        if serving == 0:
            waiting = count(model.waiting, "request")
            text = f"{waiting} {'waits' if model.waiting == 1 else 'wait'} and no instance is active"
            return Wish(common_pb2.CAUSE_WAITING_REQUESTS, text)
        carried = serving * model.capacity
        text = (
            f"{count(model.waiting + model.running, 'request')} in progress, {count(serving, 'instance')} for {carried}"
        )
        return Wish(
            common_pb2.CAUSE_WAITING_REQUESTS,
            text,
            self._rule.urgency(model, serving),
            self._rule.spared(model, serving),
        )

    def _spread(self, model: Model, serving: int) -> Wish | None:
        """A wish for an instance that is not needed yet, where a GPU is free for the peaks to come."""
        if not serving or (model.max_replicas and serving >= model.max_replicas):
            return None
        places = self._rule.spread(model)
        if not places:
            return None
        text = (
            f"{count(model.waiting + model.running, 'request')} in progress on {count(serving, 'instance')}: "
            "in its peaks one more relieves them"
        )
        return Wish(common_pb2.CAUSE_WAITING_REQUESTS, text, 0.0, self._rule.spared(model, serving), places)

    def _make_room(self, model: Model, wake: Wake, room: Room) -> None:
        place = names(wake.group)
        if wake.outcome is Outcome.NOW:
            for replica, keep in room.evictions:
                score = self._rule.worth(replica).score
                text = (
                    f"{model.name} is woken on {place} ({wake.reason.text.partition(';')[0]}); gives "
                    f"{replica.pages - keep} of {count(replica.pages, 'page')}, {worth(score)}"
                )
                reason = Reason(common_pb2.CAUSE_MADE_ROOM, text, model.name, score)
                share_left = keep / replica.shard_pages if keep else 0.0
                self._actions.append(Action(Do.EVICT, replica.model, replica.group, reason, share_left))
                self._board.evict(replica, keep)
        elif wake.outcome is Outcome.AFTER_DRAIN:
            for replica in room.drains:
                if replica.running:
                    limit = self._snapshot.rules.max_wait_s
                    why = (
                        f"{model.name} has waited {model.waited_s:.1f} s (limit {limit:g} s); "
                        f"of what is on {place} this runs the least, {count(replica.running, 'request')}, "
                        "and finishes it first"
                    )
                else:
                    idle_s = self._snapshot.idle_s(replica)
                    why = f"it has been idle for {idle_s:.1f} s and {model.name} needs its pages on {place}"
                self._drain(
                    replica, Reason(common_pb2.CAUSE_MADE_ROOM, why, model.name, self._rule.worth(replica).score)
                )
            self._board.promise(model, wake.group)

    def _carry_out(self, model: Model, wake: Wake) -> None:
        self._actions.append(Action(Do.WAKE, model.name, wake.group, wake.reason))
        own = self._board.get(model.name, wake.group)
        pages = max(self._snapshot.shard_pages(model, agent_id) for agent_id in wake.group)
        self._board.put(Replica(model.name, wake.group, State.WAKING, pages, own.resident if own else 0))

    def _drain_low_load(self) -> None:
        snapshot, rules = self._snapshot, self._snapshot.rules
        for model in self._models:
            needed = self._rule.demand(model)
            serving = _serving(self._board.of(model.name))
            surplus, further = len(serving) - needed.keep, len(serving) - needed.least
            beyond = len(serving) - model.max_replicas if model.max_replicas else 0
            candidates = [r for r in serving if r.state is State.ACTIVE and snapshot.in_state_s(r) >= rules.min_stay_s]
            if needed.keep == 0:  # the last one goes only when it has nothing to do
                candidates = [
                    r
                    for r in candidates
                    if not r.running and snapshot.idle_s(r) >= rules.min_stay_s and not model.waiting
                ]
            candidates.sort(key=lambda r: (r.running, -snapshot.idle_s(r), r.group))
            for replica in candidates:
                if further <= 0:
                    break
                if beyond > 0:
                    text = f"{count(len(serving), 'instance')} serve, and its maximum is {model.max_replicas}"
                    reason = Reason(common_pb2.CAUSE_OPERATOR, text)
                elif surplus > 0 and self._rule.may_rest(model, replica):
                    reason = self._low_load(model, needed, replica, len(serving))
                elif needed.least < needed.keep and (why := self._burden(model, replica)) is not None:
                    reason = why
                else:
                    continue
                surplus, further, beyond = surplus - 1, further - 1, beyond - 1
                self._drain(replica, reason)

    def _burden(self, model: Model, instance: Replica) -> Reason | None:
        """Why an instance goes that is there for its requests' time per token alone; None where it may stay.

        Where it shares a GPU, all of them may have their tokens later than without it.
        """
        others = len(_serving(self._board.of(model.name))) - 1
        costs, spares = self._rule.sharing(model, instance.group), self._rule.spared(model, others)
        if costs <= self._snapshot.rules.margin * spares:
            return None
        text = f"shares {names(instance.group)}: it costs {costs:.2f} s there and spares its requests {spares:.2f} s"
        return Reason(common_pb2.CAUSE_LOW_LOAD, text)

    def _tell_scores(self) -> None:
        """Agents evict what is worth least: they are told where a warm replica's worth has changed much."""
        for replica in self._board.all():
            if replica.state is not State.WARM or replica.residency < 1 or replica.score is None:
                continue
            score = self._rule.worth(replica).score
            if abs(score - replica.score) > max(_LEAST_CHANGE_S, _CHANGE * max(score, replica.score)):
                text = f"{worth(score)} now, {worth(replica.score)} before"
                reason = Reason(common_pb2.CAUSE_FOUNDATION, text, score=score)
                self._actions.append(Action(Do.WARM, replica.model, replica.group, reason))

    def _low_load(self, model: Model, needed: Demand, replica: Replica, serving: int) -> Reason:
        in_progress = model.waiting + model.running
        if in_progress == 0:
            text = (
                f"idle for {self._snapshot.idle_s(replica):.1f} s, and mean load {load(needed.mean)} needs no instance"
            )
        else:
            text = f"load {in_progress} needs {needed.keep} of {count(serving, 'instance')}"
        return Reason(common_pb2.CAUSE_LOW_LOAD, text)


def _serving(replicas: Iterable[Replica]) -> list[Replica]:
    return [replica for replica in replicas if serves(replica)]
