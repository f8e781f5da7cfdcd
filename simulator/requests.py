"""Requests on their way: routers' queues, the instances that read them, and who is told what comes of each."""

from __future__ import annotations

from collections.abc import Callable

from services.placer.snapshot import State
from simulator.clock import Clock
from simulator.engine import Engine, Job
from simulator.replica import ModelState, Replica
from simulator.results import Found

_FOUND = {
    State.ACTIVE: Found.ACTIVE,
    State.WAKING: Found.WAKING,
    State.DRAINING: Found.WARM,
}


class Listener:
    """Whom a cluster tells what happens; by default nobody."""

    def first_token(self, job: Job) -> None:
        """A request has its first token."""

    def finished(self, job: Job) -> None:
        """A request has its last token."""

    def failed(self, job: Job) -> None:
        """A request needs more KV than any instance of its model on that group could have."""

    def changed(self, replica: Replica) -> None:
        """A replica has become warm or active, or has drained."""


class Requests:
    """The queues of all models. Engines tell here what becomes of a job: see simulator.engine.News."""

    def __init__(
        self,
        clock: Clock,
        news: Listener,
        resident: Callable[[Replica], int],
        is_open: Callable[[Replica], bool],
        drained: Callable[[Replica], None],
    ) -> None:
        """`resident`: pages of a replica that are there now. `is_open`: whether one that is being woken takes requests
        already. `drained`: told when a draining one has nothing left."""
        self._clock = clock
        self._news = news
        self._resident = resident
        self._is_open = is_open
        self._drained = drained

    def arrived(self, model: ModelState, job: Job) -> Found:
        """A request is in the model's queue; an instance with a free slot takes it at once."""
        found = self._found(model)
        model.queue.append(job)
        if model.instances:
            self.feed(model)
        elif model.waiting_since is None:
            model.waiting_since = self._clock.now
        return found

    def feed(self, model: ModelState) -> None:
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
        self._news.first_token(job)

    def ended(self, engine: Engine, job: Job) -> None:
        """See simulator.engine.News."""
        self._news.finished(job)
        self._freed_slot(engine)

    def impossible(self, engine: Engine, job: Job) -> None:
        """See simulator.engine.News."""
        self._news.failed(job)
        self._freed_slot(engine)

    def _found(self, model: ModelState) -> Found:
        if model.instances:
            return Found.ACTIVE
        best = Found.COLD
        for replica in model.replicas.values():
            state = _FOUND.get(replica.state)
            if state is None:
                resident = self._resident(replica)
                whole = resident >= model.shard_pages
                state = Found.WARM if whole else Found.PARTIAL if resident else Found.COLD
            elif state is Found.WAKING and self._is_open(replica):
                state = Found.OPEN
            best = max(best, state)
        return best

    def _freed_slot(self, engine: Engine) -> None:
        replica = engine.replica
        assert replica is not None
        replica.used_at = self._clock.now
        if replica.state is State.ACTIVE:
            if replica.model.queue:
                self.feed(replica.model)
        elif not engine.jobs:
            # Not before the engine has left its own event.
            self._clock.at(self._clock.now, lambda: self._ended_all(replica))

    def _ended_all(self, replica: Replica) -> None:
        if replica.state is State.DRAINING and replica.engine is not None and not replica.running:
            self._drained(replica)
