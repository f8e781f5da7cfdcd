"""The cluster as the planner sees it: the snapshot that a controller would make at this moment."""

from __future__ import annotations

from services.placer.snapshot import Agent, Model, Node, Replica, Rules, Snapshot, Tier
from simulator.cluster import Cluster
from simulator.replica import ModelState
from simulator.spec import GB


def snapshot(cluster: Cluster, rules: Rules) -> Snapshot:
    """What services.placer.planner.plan is asked with."""
    now, spec = cluster.clock.now, cluster.spec
    return Snapshot(
        now_s=now,
        agents={
            gpu.id: Agent(gpu.id, gpu.node, gpu.index, spec.page_bytes, spec.pages, gpu.kv)
            for gpu in cluster.gpus.values()
        },
        models={model.name: model_seen(cluster, model) for model in cluster.models},
        replicas=tuple(
            Replica(
                model=model.name,
                group=group,
                state=replica.state,
                shard_pages=model.shard_pages,
                resident=cluster.resident(replica),
                kv_pages=replica.engine.kv_pages if replica.engine is not None else 0,
                running=replica.running,
                in_state_s=now - replica.since,
                idle_s=0.0 if replica.running else now - replica.used_at,
                slots=model.spec.max_batch if replica.engine is not None else 0,
            )
            for model in cluster.models
            for group, replica in sorted(model.replicas.items())
        ),
        rules=rules,
        nodes={
            name: Node(name, copy_bytes_per_s=spec.node_gbps * GB, host_bytes=spec.host_bytes) for name in cluster.nodes
        },
    )


def model_seen(cluster: Cluster, model: ModelState) -> Model:
    """One model as the planner sees it."""
    spec = model.spec
    images = {name: Tier.HOST if spec.name in loads.host else Tier.DISK for name, loads in cluster.nodes.items()}
    any_node = next(iter(cluster.nodes.values()))
    tiers = (Tier.PEER, Tier.HOST, Tier.DISK) if cluster.spec.nvlink_gbps else (Tier.HOST, Tier.DISK)
    load_s = {tier: any_node.seconds(model, tier) for tier in tiers}
    usual = Tier.HOST if Tier.HOST in images.values() else Tier.DISK
    return Model(
        name=spec.name,
        shard_bytes=spec.shard_bytes,
        tp=spec.tp,
        capacity=model.capacity,
        priority=spec.priority,
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        ttft_p95_s=spec.ttft_s,
        tpot_s=spec.tpot_s,
        cold_load_s=load_s[usual],
        cold_load_measured=True,
        load_s=load_s,
        images=images,
        service_s=model.service_s,
        kv_bytes_per_request=model.tokens * spec.kv_bytes_per_token / spec.tp,
        windows=model.windows,
        waiting=len(model.queue),
        running=sum(replica.running for replica in model.instances),
        waited_s=cluster.clock.now - model.waiting_since if model.waiting_since is not None else 0.0,
    )
