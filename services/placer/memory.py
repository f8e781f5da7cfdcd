"""What the leader has to remember from one snapshot to the next. Pure: every method is told the time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from services.common.queues import QueueCounts
from services.placer.backoff import Backoff
from services.placer.measured import Measured
from services.placer.records import Records
from services.placer.snapshot import Agent, Key, Model, Replica, Rules, Snapshot, State
from warmserve.v1 import cluster_pb2

# For models that were never loaded: a file read from a cold disk, and building the module.
_ASSUMED_BYTES_PER_S = 1e9
_ASSUMED_START_S = 0.5
_CLOCK_S = 0.1  # by which the clocks drift apart before replicas are told anew


@dataclass(frozen=True)
class _Quiet:
    """A model without requests, and what it was made from."""

    spec: cluster_pb2.ModelSpec
    forecast: cluster_pb2.Forecast | None
    changes: int
    model: Model


class _Timed(NamedTuple):
    """A replica as it was given, and as it was told with its times, which are monotonic here."""

    given: Replica
    told: Replica
    since: float
    used: float


class _QuietModels(NamedTuple):
    """All models without requests, and what they were made from."""

    specs: Mapping[str, cluster_pb2.ModelSpec]
    forecasts: Mapping[str, cluster_pb2.Forecast]
    changes: int
    models: dict[str, Model]


@dataclass
class Memory:
    """Since when things are as they are, what was measured, and what failed. `now` is monotonic, in seconds.

    What has not changed since the last snapshot is the same objects in the next one: wakes wait for it.
    """

    measured: Measured = field(default_factory=Measured)
    _replicas: dict[str, dict[Key, _Timed]] = field(default_factory=dict)  # by model
    _by_id: dict[int, _Timed] = field(default_factory=dict)  # the same by what was given, which is mostly as it was
    _told: dict[int, Replica] = field(default_factory=dict)  # likewise
    _looked_at: float = 0.0  # at the replicas
    _unix_s: float = -math.inf  # Unix time less monotonic
    _waiting_since: dict[str, float] = field(default_factory=dict)
    _failures: Backoff[Key] = field(default_factory=Backoff)
    _quiet: dict[str, _Quiet] = field(default_factory=dict)
    _quiet_models: _QuietModels = field(default_factory=lambda: _QuietModels({}, {}, -1, {}))

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
        self._failures.forget(lambda key: key[0] not in records.models)
        timed = self._timed(replicas, now, unix_s)
        self.measured.learn(records)
        return Snapshot(
            now_s=unix_s,
            agents=agents,
            models=self._models(records, counts, now),
            replicas=timed,
            refused=self._failures.refused(now),
            rules=rules,
        )

    def failed(self, key: Key, text: str, now: float) -> None:
        """An order for a replica failed; it is not tried again for a while, longer each time."""
        self._failures.failed(key, text, now)

    def succeeded(self, key: Key) -> None:
        """An order for a replica was carried out."""
        self._failures.succeeded(key)

    def _timed(self, replicas: Iterable[Replica], now: float, unix_s: float) -> tuple[Replica, ...]:
        if abs(unix_s - now - self._unix_s) > _CLOCK_S:
            self._unix_s = unix_s - now
            for known in list(self._by_id.values()):
                self._put(self._with_times(known.given, known.since, known.used))
        given = {id(replica): replica for replica in replicas}
        news, gone = given.keys() - self._told.keys(), self._told.keys() - given.keys()
        for new in news:
            self._put(self._renewed(given[new], now))
        for old in gone:
            self._drop(old)
        self._looked_at = now
        return tuple(map(self._told.__getitem__, given))

    def _put(self, timed: _Timed) -> None:
        given = timed.given
        self._by_id[id(given)], self._told[id(given)] = timed, timed.told
        self._replicas.setdefault(given.model, {})[given.key] = timed

    def _drop(self, old: int) -> None:
        """What was given is given no more, or something else in its place."""
        del self._told[old]
        last = self._by_id.pop(old)
        of_model = self._replicas[last.given.model]
        if of_model[last.given.key] is last:
            del of_model[last.given.key]
        if not of_model:
            del self._replicas[last.given.model]

    def _renewed(self, replica: Replica, now: float) -> _Timed:
        before = self._replicas.get(replica.model, {}).get(replica.key)
        if before is None:
            return self._with_times(replica, now, now)
        if before.given == replica:
            return before._replace(given=replica)
        used = self._looked_at if before.given.running else before.used  # until then it was busy
        if before.given.state is replica.state:
            return self._with_times(replica, before.since, used)
        drained = before.given.state in (State.ACTIVE, State.DRAINING) and replica.state in (State.DRAINING, State.WARM)
        return self._with_times(replica, now, used if drained else now)

    def _with_times(self, given: Replica, since: float, used: float) -> _Timed:
        told = replace(given, since_s=since + self._unix_s, used_s=used + self._unix_s)
        return _Timed(given, told, since, used)

    def _models(self, records: Records, counts: Mapping[str, QueueCounts], now: float) -> Mapping[str, Model]:
        quiet = self._all_quiet(records)
        busy = {name for name, count in counts.items() if count.waiting or count.taken} & quiet.keys()
        for name in self._waiting_since.keys() - busy:
            del self._waiting_since[name]
        if not busy:
            return quiet
        return quiet | {name: self._busy(quiet[name], counts[name], now) for name in busy}

    def _busy(self, quiet: Model, counts: QueueCounts, now: float) -> Model:
        own = [timed.told for timed in self._replicas.get(quiet.name, {}).values()]
        draining = sum(replica.running for replica in own if replica.state is State.DRAINING)
        if counts.waiting and not any(replica.state is State.ACTIVE for replica in own):
            waited_s = now - self._waiting_since.setdefault(quiet.name, now)
        else:
            self._waiting_since.pop(quiet.name, None)
            waited_s = 0.0
        running = max(0, counts.taken - draining)
        return replace(quiet, waiting=counts.waiting, running=running, waited_s=waited_s)

    def _all_quiet(self, records: Records) -> dict[str, Model]:
        """The models without requests, by name; not to be changed."""
        known, changes = self._quiet_models, self.measured.changes
        if known.specs is not records.models or known.forecasts is not records.forecasts or known.changes != changes:
            for name in self._quiet.keys() - records.models.keys():
                del self._quiet[name]
            models = {
                name: self._quiet_model(spec, records.forecasts.get(name)) for name, spec in records.models.items()
            }
            known = self._quiet_models = _QuietModels(records.models, records.forecasts, changes, models)
        return known.models

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
        capacity = self.measured.capacity(spec)
        return Model(
            name=spec.name,
            shard_bytes=spec.facts.shard_bytes,
            tp=spec.tp or 1,
            capacity=capacity.requests,
            batch=capacity.batch,
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
