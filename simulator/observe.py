"""The cluster as the planner sees it: the snapshot that a controller would make at this moment."""

from __future__ import annotations

from collections.abc import Mapping

from services.placer.snapshot import Agent, GroupIds, Model, Node, Replica, Rules, Snapshot, Tier
from simulator import replica as there
from simulator.cluster import Cluster
from simulator.memory import Gpu
from simulator.paces import Told
from simulator.replica import ModelState
from simulator.spec import GB


class Observer:
    """Makes snapshots of one cluster. What has not changed since the last one is not made anew."""

    def __init__(self, cluster: Cluster, rules: Rules) -> None:
        self._cluster = cluster
        self._rules = rules
        spec = cluster.spec
        self._nodes = {name: Node(name, spec.node_gbps * GB, spec.host_bytes) for name in cluster.nodes}
        loads = next(iter(cluster.nodes.values()))
        tiers = (Tier.PEER, Tier.HOST, Tier.DISK) if spec.nvlink_gbps else (Tier.HOST, Tier.DISK)
        self._load_s: list[Mapping[Tier, float]] = [
            {tier: loads.seconds(model, tier) for tier in tiers} for model in cluster.models
        ]
        self._told = Told()
        self._agents: dict[str, Agent] = {}
        self._seen: dict[int, tuple[tuple[object, ...], Model]] = {}

    def snapshot(self) -> Snapshot:
        """What services.placer.planner.plan is asked with."""
        cluster, now = self._cluster, self._cluster.clock.now
        return Snapshot(
            now_s=now,
            agents={gpu.id: self._agent(gpu) for gpu in cluster.gpus.values()},
            models={model.name: self._model(model) for model in cluster.models},
            replicas=tuple(
                self._replica(group, replica)
                for model in cluster.models
                for group, replica in sorted(model.replicas.items())
            ),
            rules=self._rules,
            nodes=self._nodes,
        )

    def _agent(self, gpu: Gpu) -> Agent:
        known = self._agents.get(gpu.id)
        if known is None or known.pages_kv != gpu.kv:
            spec = self._cluster.spec
            known = Agent(gpu.id, gpu.node, gpu.index, spec.page_bytes, spec.pages, gpu.kv)
            self._agents[gpu.id] = known
        return known

    def _replica(self, group: GroupIds, replica: there.Replica) -> Replica:
        model, engine = replica.model, replica.engine
        running = engine.jobs if engine is not None else 0
        return Replica(
            model=model.name,
            group=group,
            state=replica.state,
            shard_pages=model.shard_pages,
            resident=replica.resident if replica.load is None else self._cluster.resident(replica),
            kv_pages=engine.kv_pages if engine is not None else 0,
            running=running,
            since_s=replica.since,
            used_s=replica.used_at,
            slots=model.spec.max_batch if engine is not None else 0,
        )

    def _model(self, model: ModelState) -> Model:
        nodes = self._cluster.nodes
        waited = self._cluster.clock.now - model.waiting_since if model.waiting_since is not None else 0.0
        running = sum(replica.running for replica in model.instances)
        in_host = tuple(model.name in loads.host for loads in nodes.values())
        capacity = self._told.capacity(model, self._cluster.clock.now)
        key = (len(model.queue), running, waited, in_host, capacity)
        known = self._seen.get(model.index)
        if known is not None and known[0] == key and known[1].windows is model.windows:
            return known[1]
        spec, load_s = model.spec, self._load_s[model.index]
        told = any(window.mean.p50 > 0 for window in model.windows)  # what a request is like is known from forecasts
        made = Model(
            name=spec.name,
            shard_bytes=spec.shard_bytes,
            tp=spec.tp,
            capacity=capacity,
            batch=max(model.most, capacity) if spec.tpot_s else capacity,
            priority=spec.priority,
            min_replicas=spec.min_replicas,
            max_replicas=spec.max_replicas,
            ttft_p95_s=spec.ttft_s,
            cold_load_s=load_s[Tier.HOST if any(in_host) else Tier.DISK],
            cold_load_measured=True,
            load_s=load_s,
            images={name: Tier.HOST if there else Tier.DISK for name, there in zip(nodes, in_host, strict=True)},
            service_s=model.service_s if told else 0.0,
            kv_bytes_per_request=model.kv_bytes_per_request if told else 0.0,
            kv_bytes_per_context=spec.context_tokens * spec.kv_bytes_per_token / spec.tp,
            windows=model.windows,
            waiting=len(model.queue),
            running=running,
            waited_s=waited,
        )
        self._seen[model.index] = key, made
        return made
