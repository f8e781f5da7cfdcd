"""What the leader has to remember from one snapshot to the next. Pure: every method is told the time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from services.common.queues import QueueCounts
from services.placer.backoff import Backoff
from services.placer.measured import Measured
from services.placer.records import Records
from services.placer.snapshot import Agent, Key, Model, Replica, Rules, Snapshot, State
from warmserve.v1 import cluster_pb2

# For models that were never loaded: a file read from a cold disk, and building the module.
_ASSUMED_BYTES_PER_S = 1e9
_ASSUMED_START_S = 0.5


@dataclass(frozen=True)
class _Quiet:
    """A model without requests, and what it was made from."""

    spec: cluster_pb2.ModelSpec
    forecast: cluster_pb2.Forecast | None
    changes: int
    model: Model


@dataclass
class Memory:
    """Since when things are as they are, what was measured, and what failed. `now` is monotonic, in seconds."""

    measured: Measured = field(default_factory=Measured)
    _state_since: dict[Key, tuple[State, float]] = field(default_factory=dict)
    _busy_at: dict[Key, float] = field(default_factory=dict)  # when a replica last was loaded, woken or busy
    _waiting_since: dict[str, float] = field(default_factory=dict)
    _failures: Backoff[Key] = field(default_factory=Backoff)
    _quiet: dict[str, _Quiet] = field(default_factory=dict)

    def snapshot(
        self,
        records: Records,
        agents: Mapping[str, Agent],
        replicas: Iterable[Replica],
        counts: Mapping[str, QueueCounts],
        rules: Rules,
        now: float,
        unix_s: float,
    ) -> Snapshot:
        """The cluster as the planner sees it.

        `agents` and `replicas` are those in `records`, the latter with orders on their way applied.
        """
        self._forget_undeployed(records)
        timed = [self._timed(replica, now) for replica in replicas]
        self._forget_replicas({replica.key for replica in timed})
        self.measured.learn(records)
        own: defaultdict[str, list[Replica]] = defaultdict(list)
        for replica in timed:
            own[replica.model].append(replica)
        return Snapshot(
            now_s=unix_s,
            agents=agents,
            models={
                name: self._model(spec, records, own[name], counts.get(name, QueueCounts()), now)
                for name, spec in records.models.items()
            },
            replicas=tuple(timed),
            refused=self._failures.refused(now),
            rules=rules,
        )

    def failed(self, key: Key, text: str, now: float) -> None:
        """An order for a replica failed; it is not tried again for a while, longer each time."""
        self._failures.failed(key, text, now)

    def succeeded(self, key: Key) -> None:
        """An order for a replica was carried out."""
        self._failures.succeeded(key)

    def _timed(self, replica: Replica, now: float) -> Replica:
        state, since = self._state_since.get(replica.key, (None, now))
        if state is not replica.state:
            since = now
            self._state_since[replica.key] = (replica.state, now)
        drained = state in (State.ACTIVE, State.DRAINING) and replica.state in (State.DRAINING, State.WARM)
        if replica.running or (state is not replica.state and not drained):
            self._busy_at[replica.key] = now
        r = replica  # every one at every wake: `replace` takes three times as long
        return Replica(
            *(r.model, r.group, r.state, r.shard_pages, r.resident, r.kv_pages, r.running),
            in_state_s=now - since,
            idle_s=now - self._busy_at[r.key],
            slots=r.slots,
            score=r.score,
        )

    def _model(
        self, spec: cluster_pb2.ModelSpec, records: Records, own: Collection[Replica], counts: QueueCounts, now: float
    ) -> Model:
        draining = sum(replica.running for replica in own if replica.state is State.DRAINING)
        if counts.waiting and not any(replica.state is State.ACTIVE for replica in own):
            waited_s = now - self._waiting_since.setdefault(spec.name, now)
        else:
            self._waiting_since.pop(spec.name, None)
            waited_s = 0.0
        quiet = self._quiet_model(spec, records.forecasts.get(spec.name))
        running = max(0, counts.taken - draining)
        if not counts.waiting and not running and not waited_s:
            return quiet
        return replace(quiet, waiting=counts.waiting, running=running, waited_s=waited_s)

    def _quiet_model(self, spec: cluster_pb2.ModelSpec, forecast: cluster_pb2.Forecast | None) -> Model:
        """The model without requests, made anew only where something of it has changed: wakes wait for this."""
        known = self._quiet.get(spec.name)
        if (
            known is None
            or known.spec is not spec
            or known.forecast is not forecast
            or known.changes != self.measured.changes
        ):
            made = self._make_model(spec, forecast)
            if known is not None and made == known.model:  # something was learnt of another: what is kept of it holds
                made = known.model
            known = self._quiet[spec.name] = _Quiet(spec, forecast, self.measured.changes, made)
        return known.model

    def _make_model(self, spec: cluster_pb2.ModelSpec, forecast: cluster_pb2.Forecast | None) -> Model:
        loaded_s = self.measured.cold_load_s(spec.name)
        traffic = self.measured.traffic(spec, forecast)
        return Model(
            name=spec.name,
            shard_bytes=spec.facts.shard_bytes,
            tp=spec.tp or 1,
            capacity=self.measured.capacity(spec).requests,
            priority=spec.priority or 1.0,
            min_replicas=spec.min_replicas,
            max_replicas=spec.max_replicas,
            pinned=spec.pinned_replicas,
            ttft_p95_s=spec.target.ttft_p95_ms / 1e3,
            cold_load_s=loaded_s or _ASSUMED_START_S + spec.facts.shard_bytes / _ASSUMED_BYTES_PER_S,
            cold_load_measured=loaded_s is not None,
            load_s=dict(self.measured.load_s(spec.name)),
            images=dict(self.measured.images(spec.name)),
            service_s=traffic.service_s,
            kv_bytes_per_request=traffic.kv_bytes_per_request,
            kv_bytes_per_context=spec.facts.kv_bytes_per_token * spec.facts.context_tokens,
            windows=traffic.windows,
        )

    def _forget_undeployed(self, records: Records) -> None:
        for by_model in (self._waiting_since, self._quiet):
            for name in by_model.keys() - records.models.keys():
                del by_model[name]
        self._failures.forget(lambda key: key[0] not in records.models)

    def _forget_replicas(self, present: set[Key]) -> None:
        for by_key in (self._state_since, self._busy_at):
            for key in by_key.keys() - present:
                del by_key[key]
