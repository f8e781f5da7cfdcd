"""What the leader has to remember from one snapshot to the next. Pure: every method is told the time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from services.common.queues import QueueCounts
from services.placer import records as convert
from services.placer.records import Records
from services.placer.snapshot import Key, Model, Replica, Rules, Snapshot, State
from warmserve.v1 import cluster_pb2

_DEFAULT_CAPACITY = 8
# For models that were never loaded: a file read from a cold disk, and building the module.
_ASSUMED_BYTES_PER_S = 1e9
_ASSUMED_START_S = 0.5
_FIRST_BACKOFF_S = 0.25
_MOST_BACKOFF_S = 30.0


@dataclass
class _Failure:
    times: int
    until: float
    text: str


@dataclass
class Memory:
    """Since when things are as they are, what loads took, and what failed. `now` is monotonic, in seconds."""

    _state_since: dict[Key, tuple[State, float]] = field(default_factory=dict)
    _busy_at: dict[Key, float] = field(default_factory=dict)  # when a replica last was loaded, woken or busy
    _waiting_since: dict[str, float] = field(default_factory=dict)
    _cold_load_s: dict[str, float] = field(default_factory=dict)
    _slots: dict[str, int] = field(default_factory=dict)
    _failures: dict[Key, _Failure] = field(default_factory=dict)

    def snapshot(
        self,
        records: Records,
        replicas: Iterable[Replica],
        counts: Mapping[str, QueueCounts],
        rules: Rules,
        now: float,
        unix_s: float,
    ) -> Snapshot:
        """The cluster as the planner sees it. `replicas` are those in `records`, with orders on their way applied."""
        self._forget_undeployed(records)
        timed = [self._timed(replica, now) for replica in replicas]
        self._forget_replicas({replica.key for replica in timed})
        for shard in records.shards:
            if shard.cold_load_ms and shard.model in records.models:
                self._cold_load_s[shard.model] = shard.cold_load_ms / 1e3
        for instance in records.instances.values():
            self._slots[instance.model] = instance.slots or self._slots.get(instance.model, 0)
        return Snapshot(
            now_s=unix_s,
            agents=convert.agents(records),
            models={
                name: self._model(spec, records.forecasts.get(name), timed, counts.get(name, QueueCounts()), now)
                for name, spec in records.models.items()
            },
            replicas=tuple(timed),
            refused={key: f.text for key, f in self._failures.items() if f.until > now},
            rules=rules,
        )

    def failed(self, key: Key, text: str, now: float) -> None:
        """An order for a replica failed; it is not tried again for a while, longer each time."""
        times = self._failures[key].times + 1 if key in self._failures else 1
        pause = min(_MOST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (times - 1))
        self._failures[key] = _Failure(times, now + pause, text)

    def succeeded(self, key: Key) -> None:
        """An order for a replica was carried out."""
        self._failures.pop(key, None)

    def _timed(self, replica: Replica, now: float) -> Replica:
        state, since = self._state_since.get(replica.key, (None, now))
        if state is not replica.state:
            since = now
            self._state_since[replica.key] = (replica.state, now)
        drained = state in (State.ACTIVE, State.DRAINING) and replica.state in (State.DRAINING, State.WARM)
        if replica.running or (state is not replica.state and not drained):
            self._busy_at[replica.key] = now
        return replace(replica, in_state_s=now - since, idle_s=now - self._busy_at[replica.key])

    def _model(
        self,
        spec: cluster_pb2.ModelSpec,
        forecast: cluster_pb2.Forecast | None,
        replicas: Iterable[Replica],
        counts: QueueCounts,
        now: float,
    ) -> Model:
        own = [replica for replica in replicas if replica.model == spec.name]
        draining = sum(replica.running for replica in own if replica.state is State.DRAINING)
        if counts.waiting and not any(replica.state is State.ACTIVE for replica in own):
            waited_s = now - self._waiting_since.setdefault(spec.name, now)
        else:
            self._waiting_since.pop(spec.name, None)
            waited_s = 0.0
        measured = self._cold_load_s.get(spec.name)
        return Model(
            name=spec.name,
            shard_bytes=spec.facts.shard_bytes,
            tp=spec.tp or 1,
            capacity=spec.limits.max_batch or self._slots.get(spec.name, 0) or _DEFAULT_CAPACITY,
            priority=spec.priority or 1.0,
            min_replicas=spec.min_replicas,
            max_replicas=spec.max_replicas,
            cold_load_s=measured or _ASSUMED_START_S + spec.facts.shard_bytes / _ASSUMED_BYTES_PER_S,
            cold_load_measured=measured is not None,
            windows=convert.windows(forecast),
            waiting=counts.waiting,
            running=max(0, counts.taken - draining),
            waited_s=waited_s,
        )

    def _forget_undeployed(self, records: Records) -> None:
        for by_model in (self._waiting_since, self._cold_load_s, self._slots):
            for name in by_model.keys() - records.models.keys():
                del by_model[name]
        for key in [key for key in self._failures if key[0] not in records.models]:
            del self._failures[key]

    def _forget_replicas(self, present: set[Key]) -> None:
        for by_key in (self._state_since, self._busy_at):
            for key in by_key.keys() - present:
                del by_key[key]
