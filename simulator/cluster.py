"""The cluster in virtual time: replicas change state by orders, as agents have it, and requests find instances."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.placer.decisions import Action, Do
from services.placer.groups import groups
from services.placer.snapshot import Agent, Key, State
from simulator.clock import Clock
from simulator.engine import Engine, Job
from simulator.loads import NodeLoads
from simulator.memory import Gpu
from simulator.replica import ModelState, Replica
from simulator.results import Found
from simulator.spec import ClusterSpec, Settings

_FOUND = {
    State.ACTIVE: Found.ACTIVE,
    State.WAKING: Found.WAKING,
    State.DRAINING: Found.WARM,
}
_RESERVE_SHARE = 16  # of an arena: an instance's first KV pages are one context, and at most this part


@dataclass
class Counts:
    """What happened, all in all."""

    wasted_bytes: float = 0.0
    drains: int = 0
    preemptions: int = 0
    refused: int = 0  # orders that could not be carried out, because pages were lacking


class Cluster:
    """GPUs, models, replicas and queues. Policies read it and give it orders (`carry_out`)."""

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
    ) -> None:
        """`start_s`: what an engine takes to start beside its weights. `lends`: whether KV pages that an instance does
        not use may hold other models' weights; else it takes all that is free when it starts."""
        self.clock = clock
        self.spec = spec
        self.settings = settings
        self.models = models
        self.by_name = {model.name: model for model in models}
        self.gpus = {
            gpu.id: gpu
            for node in range(spec.nodes)
            for gpu in (Gpu(f"n{node}g{i}", f"n{node}", i, spec.pages) for i in range(spec.gpus_per_node))
        }
        self.counts = Counts()
        self.copied: dict[str, float] = {}
        self.news: Listener = Listener()
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
            if not self._make_room(group, model.shard_pages):
                self.counts.refused += 1
                return
            replica = Replica(model, group, State.WARMING, self.clock.now, self.clock.now, accounted=self.clock.now)
            model.replicas[replica.group] = replica
            for gpu in group:
                gpu.replicas[model.name] = replica
            self._hold(replica, model.shard_pages)
        elif replica.state is State.DRAINING and wake:
            self._enter(replica, State.ACTIVE)
            model.instances.append(replica)
            self._feed(model)
            return
        elif replica.state is State.WARMING and wake:
            self._count_wake(replica)
            self._enter(replica, State.WAKING)
            if replica.load is not None:
                self.nodes[group[0].node].hurry(replica.load)
            return
        elif replica.state is not State.WARM or (replica.whole and not wake):
            return
        elif not self._make_room(group, model.shard_pages - replica.pages, replica):
            self.counts.refused += 1
            return
        else:
            self._hold(replica, model.shard_pages)
        if wake:
            self._count_wake(replica)
        self._enter(replica, State.WAKING if wake else State.WARMING)
        if replica.whole:
            self._start(replica)
        else:
            self.nodes[group[0].node].begin(replica, urgent=wake)

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
        elif replica.state is State.WAKING and not self._start_s and took_s > self.settings.delays.wake_s[1]:
            # It took requests before the last weights came, and computed their first step behind the copy.
            self._serve(replica, min(took_s, self.settings.behind_s))
        else:
            self._prepared(replica)

    def _prepared(self, replica: Replica) -> None:
        replica.starting = None
        if replica.state is State.WAKING:
            self._start(replica)
        elif replica.state is State.WARMING:
            self._enter(replica, State.WARM)
            self.news.changed(replica)

    def _start(self, replica: Replica) -> None:
        delay = self._start_s + self._random.uniform(*self.settings.delays.wake_s)
        replica.starting = self.clock.at(self.clock.now + delay, lambda: self._serve(replica))

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
            layers=model.spec.layers,
            ahead_s=ahead_s,
            memory=self,
            news=self,
        )
        engine.replica = replica
        fixed = self.kv_pages.get(replica.key)
        if fixed is not None:
            engine.reserve = engine.most = fixed
        if not self.resize(engine, engine.reserve):
            self.counts.refused += 1
            self._enter(replica, State.WARM)
            self.news.changed(replica)
            return
        if not self._lends and fixed is None:
            engine.reserve += min(gpu.free for gpu in replica.gpus)
            self.resize(engine, engine.reserve)
        replica.engine = engine
        self._enter(replica, State.ACTIVE)
        model.instances.append(replica)
        model.waiting_since = None
        self._feed(model)
        engine.ahead_s = 0.0  # nobody waited
        self.news.changed(replica)

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
        self.news.changed(replica)

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
        keep = min(keep, replica.resident)
        if replica.resident > keep:
            wasted = replica.unused_bytes * (1 - keep / replica.resident)
            self.counts.wasted_bytes += wasted
            replica.unused_bytes -= wasted
        replica.resident = keep
        self._hold(replica, keep)
        if not keep:
            del replica.model.replicas[replica.group]
            for gpu in replica.gpus:
                del gpu.replicas[replica.model.name]

    def _enter(self, replica: Replica, state: State) -> None:
        now, before = self.clock.now, replica.state
        if before in (State.ACTIVE, State.DRAINING):
            replica.model.active_gpu_s += (now - replica.since) * len(replica.gpus)
        if state in (State.WAKING, State.ACTIVE, State.WARMING) or before is not State.DRAINING:
            replica.used_at = now
        replica.state = state
        replica.since = now

    # Pages

    def _hold(self, replica: Replica, pages: int) -> None:
        """Sets the pages that a replica holds or was promised."""
        self._account(replica)
        for gpu in replica.gpus:
            gpu.weights += pages - replica.pages
        freed = pages < replica.pages
        replica.pages = pages
        if freed:
            self._pages_freed(replica.gpus)

    def _account(self, replica: Replica) -> None:
        kv = replica.engine.kv_pages if replica.engine is not None else 0
        share = (replica.pages + kv) / self.spec.pages * len(replica.gpus)
        replica.model.resident_gpu_s += share * (self.clock.now - replica.accounted)
        replica.accounted = self.clock.now

    def _make_room(self, group: Sequence[Gpu], pages: int, but: Replica | None = None) -> bool:
        """Evicts warm weights, those unused for longest first and from their ends, until so many pages are free.

        False, with nothing done, where that does not suffice.
        """
        if any(gpu.free + self._evictable(gpu, but) < pages for gpu in group):
            return False
        for gpu in group:
            warm = [replica for replica in gpu.replicas.values() if replica.state is State.WARM and replica is not but]
            for replica in sorted(warm, key=lambda replica: (replica.used_at, replica.model.index)):
                lacking = pages - gpu.free
                if lacking <= 0:
                    break
                self._evict_to(replica, max(0, replica.pages - lacking))
        return True

    def resize(self, engine: Engine, pages: int) -> bool:
        """See simulator.engine.Memory."""
        more = pages - engine.kv_pages
        if more == 0:
            return True
        if pages > engine.most:
            return False
        if more > 0 and any(gpu.free < more for gpu in engine.gpus) and not self._make_room(engine.gpus, more):
            return False
        if engine.replica is not None:
            self._account(engine.replica)
        for gpu in engine.gpus:
            gpu.kv += more
        engine.kv_pages = pages
        if more < 0:
            self._pages_freed(engine.gpus)
        return True

    def room(self, engine: Engine) -> int:
        """See simulator.engine.Memory."""
        return min(engine.most, engine.kv_pages + min(gpu.free + self._evictable(gpu) for gpu in engine.gpus))

    def limit(self, engine: Engine) -> int:
        """See simulator.engine.Memory."""
        return min(engine.most, *(self._limit(engine, gpu) for gpu in engine.gpus))

    def _limit(self, engine: Engine, gpu: Gpu) -> int:
        others = (replica.engine for replica in gpu.replicas.values())
        reserved = sum(other.reserve for other in others if other is not None and other is not engine)
        return gpu.pages - gpu.weights + self._evictable(gpu) - reserved

    def _evictable(self, gpu: Gpu, but: Replica | None = None) -> int:
        return sum(r.pages for r in gpu.replicas.values() if r.state is State.WARM and r is not but)

    def _pages_freed(self, group: Iterable[Gpu]) -> None:
        for gpu in group:
            for replica in gpu.replicas.values():
                if replica.engine is not None and replica.engine.starved:
                    self.clock.at(self.clock.now, replica.engine.look_again)

    # Requests

    def arrived(self, model: ModelState, job: Job) -> Found:
        """A request is in the model's queue; an instance with a free slot takes it at once."""
        found = self._found(model)
        model.queue.append(job)
        if model.instances:
            self._feed(model)
        elif model.waiting_since is None:
            model.waiting_since = self.clock.now
        return found

    def _found(self, model: ModelState) -> Found:
        if model.instances:
            return Found.ACTIVE
        best = Found.COLD
        for replica in model.replicas.values():
            state = _FOUND.get(replica.state)
            if state is None:
                if self.resident(replica) >= model.shard_pages:
                    state = Found.WARM
                else:
                    state = Found.PARTIAL if self.resident(replica) else Found.COLD
            best = max(best, state)
        return best

    def _feed(self, model: ModelState) -> None:
        """Instances with free slots take what waits, in turn, as readers of one stream do."""
        queue, instances = model.queue, model.instances
        began: dict[Engine, None] = {}
        full = 0
        while queue and full < len(instances):
            engine = instances[0].engine
            instances.rotate(-1)
            assert engine is not None
            if engine.jobs < engine.slots:
                full = 0
                engine.take(queue.popleft())
                began[engine] = None
            else:
                full += 1
        for engine in began:
            engine.go()

    def first_token(self, job: Job) -> None:
        """See simulator.engine.News."""
        self.news.first_token(job)

    def ended(self, engine: Engine, job: Job) -> None:
        """See simulator.engine.News."""
        self.news.finished(job)
        self._freed_slot(engine)

    def impossible(self, engine: Engine, job: Job) -> None:
        """See simulator.engine.News."""
        self.news.failed(job)
        self._freed_slot(engine)

    def _freed_slot(self, engine: Engine) -> None:
        replica = engine.replica
        assert replica is not None
        replica.used_at = self.clock.now
        if replica.state is State.ACTIVE:
            if replica.model.queue:
                self._feed(replica.model)
        elif not engine.jobs:
            # Not before the engine has left its own event.
            self.clock.at(self.clock.now, lambda: self._drained(replica))

    def _drained(self, replica: Replica) -> None:
        if replica.state is State.DRAINING and replica.engine is not None and not replica.running:
            self._retire(replica)

    def settle_accounts(self) -> None:
        """Adds up to now what is counted when states change."""
        for model in self.models:
            for replica in model.replicas.values():
                self._account(replica)
                if replica.state in (State.ACTIVE, State.DRAINING):
                    model.active_gpu_s += (self.clock.now - replica.since) * len(replica.gpus)
                    replica.since = self.clock.now
                if replica.engine is not None:
                    self._count(replica.engine, replica)

    def _count(self, engine: Engine, replica: Replica) -> None:
        replica.model.busy_gpu_s += engine.device_seconds * len(replica.gpus)
        self.counts.preemptions += engine.preemptions
        engine.device_seconds, engine.preemptions = 0.0, 0


class Listener:
    """Whom the cluster tells what happens; by default nobody."""

    def first_token(self, job: Job) -> None:
        """A request has its first token."""

    def finished(self, job: Job) -> None:
        """A request has its last token."""

    def failed(self, job: Job) -> None:
        """A request needs more KV than any instance of its model on that group could have."""

    def changed(self, replica: Replica) -> None:
        """A replica has become warm or active, or has drained."""
