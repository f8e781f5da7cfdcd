"""What the cluster has shown of its models: what instances carry, loads take, requests are like. Pure."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from services.placer import records as convert
from services.placer.paces import Paces
from services.placer.records import Records
from services.placer.snapshot import Key, Tier, WindowLoad
from warmserve.v1 import cluster_pb2, common_pb2

K = TypeVar("K")
V = TypeVar("V")

_ASSUMED_CAPACITY = 8
_TIERS = {
    common_pb2.TIER_PEER: Tier.PEER,
    common_pb2.TIER_HOST: Tier.HOST,
    common_pb2.TIER_DISK: Tier.DISK,
    common_pb2.TIER_REMOTE: Tier.REMOTE,
}
_SLOWEST_LAST = list(Tier)


@dataclass(frozen=True)
class Capacity:
    """Requests that one instance carries, and where the number is from, for people."""

    requests: int
    source: str
    batch: int = 0  # requests that it has room for; 0: as many as it carries


@dataclass(frozen=True)
class Traffic:
    """A forecast as the planner takes it, and what it says of one request. 0: not known."""

    windows: tuple[WindowLoad, ...] = ()
    service_s: float = 0.0  # mean seconds in progress
    kv_bytes_per_request: float = 0.0  # mean while it runs, on one agent


@dataclass
class Measured:
    """Everything by model; forgotten when a model is undeployed, and kept while no instance of it runs."""

    changes: int = 0  # how often something was learnt that was not known
    _slots: dict[str, dict[str, int]] = field(default_factory=dict)  # by kind of device, the newest instance's
    _paces: Paces = field(default_factory=Paces)
    _devices: set[str] = field(default_factory=set)  # kinds that are registered
    _loads: dict[str, dict[Tier, float]] = field(default_factory=dict)  # seconds by tier
    _last_load_s: dict[str, float] = field(default_factory=dict)
    _images: dict[str, dict[str, Tier]] = field(default_factory=dict)  # by node
    _loading_from: dict[Key, Tier] = field(default_factory=dict)  # the slowest tier seen during a load
    _traffic: dict[str, tuple[cluster_pb2.Forecast, Traffic]] = field(default_factory=dict)
    # The records that were learnt from, and of which models: they are many, and few change at a time.
    _instances: dict[str, cluster_pb2.InstanceRecord] = field(default_factory=dict)
    _residencies: dict[str, cluster_pb2.AgentResidency] = field(default_factory=dict)
    _agents: Mapping[str, cluster_pb2.AgentRecord] = field(default_factory=dict)
    _models: Mapping[str, cluster_pb2.ModelSpec] = field(default_factory=dict)

    def learn(self, records: Records) -> None:
        """Takes note of what the records say. What has changed is another object, and so is the mapping it is in."""
        redeployed = records.models is not self._models and records.models.keys() != self._models.keys()
        if redeployed:
            for by_model in (self._slots, self._loads, self._last_load_s, self._images, self._traffic):
                for name in by_model.keys() - records.models.keys():
                    del by_model[name]
            for name in self._models.keys() - records.models.keys():
                self._paces.forget(name)
        if records.agents is not self._agents:
            self._agents = records.agents
            devices = {record.device_name for record in records.agents.values()}
            if devices != self._devices:
                self._devices = devices
                self.changes += 1
        for name in self._instances.keys() - records.instances.keys():
            instance = self._instances.pop(name)
            if self._paces.gone(name, instance):
                self._changed_pace(records, instance.model)
        for name in self._residencies.keys() - records.residency.keys():
            del self._residencies[name]
        self._models = records.models
        if redeployed:
            self._instances.clear()
            self._residencies.clear()
        for name, instance in records.instances.items():
            if self._instances.get(name) is instance:
                continue
            agent = next((records.agents[a] for a in instance.group.agent_ids if a in records.agents), None)
            if agent is not None:
                self._instances[name] = instance
                if instance.slots and instance.model in records.models:
                    self._note(self._slots.setdefault(instance.model, {}), agent.device_name, instance.slots)
                    if self._paces.learn(name, instance, agent.device_name, records.instances):
                        self._changed_pace(records, instance.model)
        for name, residency in records.residency.items():
            if self._residencies.get(name) is not residency and name in records.agents:
                self._residencies[name] = residency
                for shard in residency.shards:
                    if shard.model in records.models:
                        self._learn_load(shard)

    def _changed_pace(self, records: Records, model: str) -> None:
        spec = records.models.get(model)
        if spec is not None and spec.target.tpot_ms:  # else nothing depends on it
            self.changes += 1

    def _learn_load(self, shard: cluster_pb2.ResidentShard) -> None:
        key = (shard.model, tuple(shard.group.agent_ids))
        tier = _TIERS.get(shard.tier)
        if tier is not None and tier is not Tier.PEER:
            self._note(self._images.setdefault(shard.model, {}), shard.group.node, tier)
        if shard.state == common_pb2.REPLICA_STATE_WARMING and tier is not None:
            self._loading_from[key] = max(self._loading_from.get(key, tier), tier, key=_SLOWEST_LAST.index)
        elif shard.cold_load_ms:
            self._note(self._last_load_s, shard.model, shard.cold_load_ms / 1e3)
            loaded_from = self._loading_from.pop(key, None)
            if loaded_from is not None:
                self._note(self._loads.setdefault(shard.model, {}), loaded_from, shard.cold_load_ms / 1e3)

    def _note(self, known: dict[K, V], key: K, value: V) -> None:
        if known.get(key) != value:
            known[key] = value
            self.changes += 1

    def capacity(self, spec: cluster_pb2.ModelSpec) -> Capacity:
        """What one instance carries, by what instances on the present devices say: their slots, within the spec's limit
        and its target for the time per token."""
        known = self._slots.get(spec.name, {})
        slots = {device: count for device, count in known.items() if device in self._devices} or known
        if slots:
            return min(
                (self._carried(spec, device, slots[device]) for device in sorted(slots)),
                key=operator.attrgetter("requests"),
            )
        if limit := spec.limits.max_batch:
            return Capacity(limit, "its limit; no instance has reported yet")
        return Capacity(_ASSUMED_CAPACITY, "assumed, until an instance reports")

    def _carried(self, spec: cluster_pb2.ModelSpec, device: str, slots: int) -> Capacity:
        limit, target_ms = spec.limits.max_batch or slots, spec.target.tpot_ms
        most, where = min(limit, slots), device or "its agents"
        kept = self._paces.within(spec.name, device, target_ms, most) if target_ms else None
        if kept is not None and kept < most:
            alone_ms = self._paces.alone_ms(spec.name, device)
            if alone_ms > target_ms:
                source = f"even one takes {alone_ms:.3g} ms per token on {where}; its target is {target_ms:g}"
            else:
                source = f"so many keep its {target_ms:g} ms per token on {where}, which offers {slots}"
            return Capacity(kept, source, most)
        if limit < slots:
            return Capacity(limit, f"its limit; instances on {where} offered {slots}")
        return Capacity(slots, f"as its instances report on {where}")

    def cold_load_s(self, model: str) -> float | None:
        """What the newest load of a whole replica took; None where none was seen."""
        return self._last_load_s.get(model)

    def load_s(self, model: str) -> Mapping[Tier, float]:
        """What loads of a whole replica took, by where they came from."""
        return self._loads.get(model, {})

    def images(self, model: str) -> Mapping[str, Tier]:
        """Where each node has the model's images, as far as its agents have told."""
        return self._images.get(model, {})

    def traffic(self, spec: cluster_pb2.ModelSpec, forecast: cluster_pb2.Forecast | None) -> Traffic:
        """The forecast, converted once however often it is asked for."""
        if forecast is None:
            return Traffic()
        known = self._traffic.get(spec.name)
        if known is None or known[0] is not forecast:
            known = self._traffic[spec.name] = (forecast, _traffic(spec, forecast))
        return known[1]


def _traffic(spec: cluster_pb2.ModelSpec, forecast: cluster_pb2.Forecast) -> Traffic:
    """By Little's law, over the windows with traffic; a request holds its prompt and, on average, half its answer."""
    totals: defaultdict[str, float] = defaultdict(float)
    for window in forecast.windows:
        if window.request_rate.p50 > 0:
            totals["rate"] += window.request_rate.p50
            totals["load"] += window.mean_load.p50
            totals["tokens"] += window.prompt_tokens_per_s.p50 + window.output_tokens_per_s.p50 / 2
    windows = convert.windows(forecast)
    if not totals["rate"] > 0 or not all(0 <= value < float("inf") for value in totals.values()):
        return Traffic(windows)
    per_request = totals["tokens"] / totals["rate"] * spec.facts.kv_bytes_per_token
    return Traffic(windows, totals["load"] / totals["rate"], per_request)
