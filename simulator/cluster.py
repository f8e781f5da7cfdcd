"""The cluster in virtual time: replicas change state by orders, as agents have it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.gpu_agent.engine.pace import PaceMeter
from services.placer.decisions import Action, Do
from services.placer.groups import groups
from services.placer.snapshot import Agent, Key, State
from simulator.arenas import Arenas
from simulator.clock import Clock
from simulator.engine import Engine
from simulator.loads import NodeLoads
from simulator.memory import Gpu
from simulator.replica import ModelState, Replica
from simulator.requests import Listener, Requests
from simulator.spec import ClusterSpec, Settings

_RESERVE_SHARE = 16  # of an arena: an instance's first KV pages are one context, and at most this part


@dataclass
class Counts:
    """What happened, all in all."""

    drains: int = 0
    preemptions: int = 0
    refused: int = 0  # orders that could not be carried out, because pages were lacking


class Cluster:
    """GPUs, models and replicas. Policies read it and give it orders (`carry_out`)."""

    def __init__(
        self,
        clock: Clock,
        spec: ClusterSpec,
        models: Sequence[ModelState],
        settings: Settings,
        *,
        start_s: float,
        lends: bool,
        seed: int,
        news: Listener,
    ) -> None:
        """`start_s`: what an engine takes to start beside its weights. `lends`: whether KV pages that an instance does
        not use may hold other models' weights; else it takes all that is free when it starts."""
        self.clock = clock
        self.spec = spec
        self.settings = settings
        self.models = models
        self.by_name = {model.name: model for model in models}
        self.arenas = Arenas(clock, spec)
        self.gpus = self.arenas.gpus
        self.counts = Counts()
        self.copied: dict[str, float] = {}
        self.requests = Requests(clock, news, self.resident, self.open, self._retire)
        self._news = news
        self._start_s = start_s
        self._lends = lends
        self.kv_pages: Mapping[Key, int] = {}  # replicas whose KV is fixed
        self._random = random.Random(seed)
        self._begun: set[tuple[int, str]] = set()  # (model, GPU) where it has been resident
        self._groups: dict[int, list[tuple[Gpu, ...]]] = {}
        self.nodes = {
            f"n{node}": NodeLoads(
                clock,
                spec,
                f"n{node}",
                [gpu for gpu in self.gpus.values() if gpu.node == f"n{node}"],
                self._loaded,
                self.copied,
            )
            for node in range(spec.nodes)
        }
        for model in models:  # deployed before the run: images are in memory, as far as there is room
            for loads in self.nodes.values():
                loads.host.use(model)

    # What policies read

    def groups(self, tp: int) -> list[tuple[Gpu, ...]]:
        """All aligned groups of `tp` GPUs, in order of node and index."""
        if tp not in self._groups:
            agents = [Agent(gpu.id, gpu.node, gpu.index, 1, 1) for gpu in self.gpus.values()]
            self._groups[tp] = [tuple(self.gpus[agent] for agent in group) for group in groups(agents, tp)]
        return self._groups[tp]

    def replica(self, model: ModelState, group: Iterable[Gpu]) -> Replica | None:
        """The model's replica on exactly that group."""
        return model.replicas.get(tuple(gpu.id for gpu in group))

    def open(self, replica: Replica) -> bool:
        """Whether an instance that is being woken takes requests already, its last weights being on their way."""
        if self._start_s or self.clock.now < replica.opens_at:
            return False
        return self.nodes[replica.gpus[0].node].left_s(replica) <= self.settings.behind_s

    def resident(self, replica: Replica) -> int:
        """Its resident pages at this moment, also while they are copied."""
        return self.nodes[replica.gpus[0].node].resident(replica)

    def loads(self, node: str) -> NodeLoads:
        """A node's tiers and links."""
        return self.nodes[node]

    def reserve(self, model: ModelState) -> int:
        """KV pages that an instance holds from its first moment: one full context, but no more than its share."""
        context = -(-model.spec.context_tokens // model.tokens_per_page)
        return max(1, min(context, self.spec.pages // _RESERVE_SHARE))

    # Orders

    def carry_out(self, actions: Iterable[Action]) -> None:
        """Carries out a plan's actions in their order. One that has no room, or no object any more, is left out."""
        for action in actions:
            model = self.by_name[action.model]
            group = tuple(self.gpus[gpu] for gpu in action.group)
            replica = self.replica(model, group)
            match action.do:
                case Do.EVICT:
                    if replica is not None:
                        self._evict_to(replica, int(action.keep * model.shard_pages + 0.5))
                case Do.DRAIN:
                    if replica is not None:
                        self._drain(replica)
                case Do.WARM:
                    self._warm(model, group, replica, wake=False)
                case Do.WAKE:
                    self._warm(model, group, replica, wake=True)

    def _warm(self, model: ModelState, group: tuple[Gpu, ...], replica: Replica | None, *, wake: bool) -> None:
        """Begins, or goes on, to make a replica whole; `wake`: it then serves."""
        if replica is None:
            if any(model.name in gpu.replicas for gpu in group):
                raise ValueError(f"{model.name} has a replica on a part of {'+'.join(gpu.id for gpu in group)} already")
            if not self.arenas.make_room(group, model.shard_pages):
                self.counts.refused += 1
                return
            replica = Replica(model, group, State.WARMING, self.clock.now, self.clock.now, accounted=self.clock.now)
            model.replicas[replica.group] = replica
            for gpu in group:
                gpu.replicas[model.name] = replica
            self.arenas.hold(replica, model.shard_pages)
        elif replica.state is State.DRAINING and wake:
            self._enter(replica, State.ACTIVE)
            model.instances.append(replica)
            self.requests.feed(model)
            return
        elif replica.state is State.WARMING and wake:
            self._wake(replica)
            if replica.load is not None:
                self.nodes[group[0].node].hurry(replica.load)
            return
        elif replica.state is not State.WARM or (replica.whole and not wake):
            return
        elif not self.arenas.make_room(group, model.shard_pages - replica.pages, replica):
            self.counts.refused += 1
            return
        else:
            self.arenas.hold(replica, model.shard_pages)
        if wake:
            self._wake(replica)
        else:
            self._enter(replica, State.WARMING)
        if replica.whole:
            self._start(replica)
        else:
            self.nodes[group[0].node].begin(replica, urgent=wake)

    def _wake(self, replica: Replica) -> None:
        self._count_wake(replica)
        self._enter(replica, State.WAKING)
        replica.opens_at = self.clock.now + self._random.uniform(*self.settings.delays.wake_s)

    def _count_wake(self, replica: Replica) -> None:
        wakes, resident = replica.model.wakes, self.resident(replica)
        if resident >= replica.model.shard_pages:
            wakes.warm += 1
        elif resident:
            wakes.partial += 1
        else:
            wakes.cold += 1

    def _loaded(self, replica: Replica, took_s: float) -> None:
        replica.used_at = self.clock.now
        first = {(replica.model.index, gpu.id) for gpu in replica.gpus} - self._begun
        self._begun |= first
        if first and self.settings.first_load_s:
            replica.starting = self.clock.at(
                self.clock.now + self.settings.first_load_s, lambda: self._prepared(replica)
            )
        elif replica.state is State.WAKING and not self._start_s:
            self._loaded_while_opening(replica, took_s)
        else:
            self._prepared(replica)

    def _loaded_while_opening(self, replica: Replica, took_s: float) -> None:
        """An instance opens while its weights come. Open before the last of them, it has taken requests and computed
        their first step behind the copy."""
        if replica.opens_at <= self.clock.now:
            self._serve(replica, min(took_s, self.clock.now - replica.opens_at, self.settings.behind_s))
        else:
            replica.starting = self.clock.at(replica.opens_at, lambda: self._serve(replica))

    def _prepared(self, replica: Replica) -> None:
        replica.starting = None
        if replica.state is State.WAKING:
            self._start(replica)
        elif replica.state is State.WARMING:
            self._enter(replica, State.WARM)
            self._news.changed(replica)

    def _start(self, replica: Replica) -> None:
        due = replica.opens_at  # its order is that long ago
        if self._start_s:  # an engine that begins when all is there
            due = self.clock.now + self._start_s + self._random.uniform(*self.settings.delays.wake_s)
        replica.starting = self.clock.at(due, lambda: self._serve(replica))

    def _serve(self, replica: Replica, ahead_s: float = 0.0) -> None:
        model = replica.model
        replica.starting = None
        replica.unused_bytes = 0.0
        engine = Engine(
            self.clock,
            model.cost,
            replica.gpus,
            slots=model.spec.max_batch,
            tokens_per_page=model.tokens_per_page,
            reserve=self.reserve(model),
            budgets=(self.settings.token_budget, self.settings.prefill_budget),
            under_way=self.settings.under_way,
            layers=model.spec.layers,
            ahead_s=ahead_s,
            meter=PaceMeter(model.spec.max_batch) if model.spec.tpot_s else None,
            memory=self.arenas,
            news=self.requests,
        )
        engine.replica = replica
        fixed = self.kv_pages.get(replica.key)
        if fixed is not None:
            engine.reserve = engine.most = fixed
        if not self.arenas.resize(engine, engine.reserve):
            self.counts.refused += 1
            self._enter(replica, State.WARM)
            self._news.changed(replica)
            return
        if not self._lends and fixed is None:
            engine.reserve += min(gpu.free for gpu in replica.gpus)
            self.arenas.resize(engine, engine.reserve)
        replica.engine = engine
        self._enter(replica, State.ACTIVE)
        model.instances.append(replica)
        model.waiting_since = None
        self.requests.feed(model)
        engine.ahead_s = 0.0  # nobody waited
        self._news.changed(replica)

    def _drain(self, replica: Replica) -> None:
        if replica.state is State.WAKING:
            self._enter(replica, State.WARMING)
            if replica.load is None and replica.whole:
                if replica.starting is not None:
                    self.clock.cancel(replica.starting)
                self._prepared(replica)
            return
        if replica.state is not State.ACTIVE:
            return
        self.counts.drains += 1
        replica.model.instances.remove(replica)
        self._enter(replica, State.DRAINING)
        if not replica.running:
            self._retire(replica)

    def _retire(self, replica: Replica) -> None:
        assert replica.engine is not None
        engine = replica.engine
        engine.close()
        replica.engine = None
        self._count(engine, replica)
        self._enter(replica, State.WARM)
        self._news.changed(replica)

    def _evict_to(self, replica: Replica, keep: int) -> None:
        """Leaves the first `keep` pages of a replica that does not serve."""
        if replica.state is State.WAKING and replica.load is None:
            return  # all there, about to serve
        if replica.state in (State.WARMING, State.WAKING):
            if replica.load is not None:
                self.nodes[replica.gpus[0].node].cancel(replica.load)
            elif replica.starting is not None:
                self.clock.cancel(replica.starting)
                replica.starting = None
            self._enter(replica, State.WARM)
        if replica.state is not State.WARM:
            return
        self.arenas.cut(replica, keep)

    def _enter(self, replica: Replica, state: State) -> None:
        now, before = self.clock.now, replica.state
        if before in (State.ACTIVE, State.DRAINING):
            replica.model.active_gpu_s += (now - replica.since) * len(replica.gpus)
        if state in (State.WAKING, State.ACTIVE, State.WARMING) or before is not State.DRAINING:
            replica.used_at = now
        replica.state = state
        replica.since = now

    def begin_accounts(self) -> None:
        """Forgets what was counted until now: before the first request."""
        self.settle_accounts()
        for model in self.models:
            model.busy_gpu_s = model.active_gpu_s = model.resident_gpu_s = 0.0

    def settle_accounts(self) -> None:
        """Adds up to now what is counted when states change."""
        for model in self.models:
            for replica in model.replicas.values():
                self.arenas.account(replica)
                if replica.state in (State.ACTIVE, State.DRAINING):
                    model.active_gpu_s += (self.clock.now - replica.since) * len(replica.gpus)
                    replica.since = self.clock.now
                if replica.engine is not None:
                    self._count(replica.engine, replica)

    def _count(self, engine: Engine, replica: Replica) -> None:
        replica.model.busy_gpu_s += engine.device_seconds * len(replica.gpus)
        self.counts.preemptions += engine.preemptions
        engine.device_seconds, engine.preemptions = 0.0, 0
