"""A cluster's state, written as its services would write it."""

from __future__ import annotations

import hashlib

from redis.asyncio import Redis

from warmserve.admin.units import now_ms
from warmserve.cluster.events import EventStream
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, common_pb2

PAGE = 16 << 20
WINDOW_S = 10_000_000  # so long that none ends during a test


def group(*agents: str) -> common_pb2.Group:
    return common_pb2.Group(agent_ids=agents, node="node-1")


def reason(cause: str, text: str, by_model: str = "", score: float = 0) -> common_pb2.Reason:
    return common_pb2.Reason(cause=common_pb2.Cause.Value(f"CAUSE_{cause}"), text=text, by_model=by_model, score=score)


def fingerprint(model: str) -> str:
    return hashlib.sha256(model.encode()).hexdigest()


def image(model: str) -> str:
    return f"{fingerprint(model)[:32]}-bfloat16-{PAGE}.image"


def spec(name: str, tp: int = 1) -> cluster_pb2.ModelSpec:
    return cluster_pb2.ModelSpec(
        name=name,
        source=f"/models/{name}",
        tp=tp,
        deployed_unix_ms=now_ms() - 7_200_000,
        facts=cluster_pb2.ModelFacts(
            architecture="LlamaForCausalLM",
            parameters=8_030_000_000,
            shard_bytes=10 * PAGE,
            kv_bytes_per_token=131_072,
            context_tokens=8192,
            fingerprint=fingerprint(name),
            layers=32,
        ),
    )


def shard(model: str, state: str, resident: int, on: common_pb2.Group, **more: object) -> cluster_pb2.ResidentShard:
    return cluster_pb2.ResidentShard(
        model=model,
        group=on,
        state=common_pb2.ReplicaState.Value(f"REPLICA_STATE_{state}"),
        residency=resident / 10,
        pages_resident=resident,
        pages_total=10,
        tier=common_pb2.TIER_HOST,
        since_unix_ms=now_ms() - 60_000,
        **more,  # type: ignore[arg-type]
    )


def agent(agent_id: str, index: int) -> cluster_pb2.AgentRecord:
    return cluster_pb2.AgentRecord(
        id=agent_id,
        address=f"127.0.0.1:{7000 + index}",
        node="node-1",
        device_index=index,
        device_name="Test GPU",
        backend=common_pb2.BACKEND_HOST,
        page_bytes=PAGE,
        pages_total=100,
        version="0.1.0",
        started_unix_ms=now_ms() - 3_600_000,
    )


async def write_busy_agent(store: Store, keys: Keys) -> None:
    """On a0 llama serves, sharded lends what it has, and qwen is copied in; images lie in memory and on the disk."""
    peak, waiting = reason("BURST", "peak"), reason("WAITING_REQUESTS", "2 requests wait")
    serving = shard("org/llama", "ACTIVE", 10, group("a0"), instance_id="i-1", pages_kv=25, running=3, reason=waiting)
    arriving = shard("qwen", "WARMING", 4, group("a0"), bytes_per_s=PAGE * 2, pages_lent=4, score=3.5)
    await store.put(
        keys.residency("a0"),
        cluster_pb2.AgentResidency(
            agent_id="a0",
            pages_free=40,
            pages_promised=8,
            pages_kv=25,
            pages_weights=35,
            pages_lent=9,
            shards=[
                shard("sharded", "WARM", 5, group("a0", "a1"), pages_lent=5, score=0.25, reason=peak),
                serving,
                arriving,
            ],
            host_tier=cluster_pb2.HostTier(
                budget_bytes=100 * PAGE,
                used_bytes=10 * PAGE,
                images=[cluster_pb2.HostImage(name=image("qwen"), bytes=10 * PAGE, score=3.5)],
                filling=cluster_pb2.HostFill(
                    name=image("org/llama"), bytes_done=5 * PAGE, bytes_total=10 * PAGE, bytes_per_s=1e9
                ),
            ),
            disk=cluster_pb2.DiskTier(
                capacity_bytes=1000 * PAGE,
                free_bytes=250 * PAGE,
                images=[
                    cluster_pb2.DiskImage(name=name, bytes=10 * PAGE)
                    for name in (image("org/llama"), image("qwen"), "0123-float32-4096.image")
                ],
                preparing=[cluster_pb2.DiskFill(name=image("sharded"), bytes_done=PAGE, bytes_total=4 * PAGE)],
            ),
            updated_unix_ms=now_ms() - 1500,
        ),
    )


async def write_cluster(store: Store, keys: Keys) -> None:
    """llama is active on a0; sharded (tp 2) is warm in part on a0 + a1; qwen is cold, as the plan explains."""
    for model in (spec("org/llama"), spec("qwen"), spec("sharded", tp=2)):
        await store.put(keys.model(model.name), model)
    for index, agent_id in enumerate(("a0", "a1")):
        await store.put(keys.agent(agent_id), agent(agent_id, index))
    kept = reason("FOUNDATION", "the mean load of the next window needs 1", score=3.5)
    both = group("a0", "a1")
    await store.put(
        keys.residency("a0"),
        cluster_pb2.AgentResidency(
            agent_id="a0",
            pages_free=70,
            pages_kv=15,
            pages_weights=15,
            shards=[
                shard("org/llama", "ACTIVE", 10, group("a0"), instance_id="i-1", pages_kv=15, reason=kept),
                shard("sharded", "WARM", 5, both, reason=reason("BURST", "its peak needs 1")),
            ],
        ),
    )
    await store.put(
        keys.residency("a1"),
        cluster_pb2.AgentResidency(
            agent_id="a1",
            pages_free=90,
            pages_weights=10,
            shards=[shard("sharded", "WARM", 10, both, reason=reason("BURST", "its peak needs 1"))],
        ),
    )
    await store.put(
        keys.instance("org/llama", "i-1"),
        cluster_pb2.InstanceRecord(
            id="i-1",
            model="org/llama",
            group=group("a0"),
            state=common_pb2.REPLICA_STATE_ACTIVE,
            slots=8,
            pace=cluster_pb2.Pace(base_ms=6, per_sequence_ms=0.25),
        ),
    )
    await store.put(
        keys.router("r0"),
        cluster_pb2.RouterRecord(id="r0", address="127.0.0.1:8000", http_url="http://127.0.0.1:8080"),
    )
    await store.put(keys.placer_leader(), cluster_pb2.LeaderRecord(id="p0", address="127.0.0.1:9"))
    await store.put(
        keys.plan(),
        cluster_pb2.Plan(
            fence=5,
            made_unix_ms=now_ms() - 4_000,
            planner="published",
            placer_id="p0",
            actions=[
                cluster_pb2.Action(
                    kind=cluster_pb2.ACTION_KIND_EVICT,
                    model="qwen",
                    group=group("a1"),
                    reason=reason("MADE_ROOM", "its pages are worth more elsewhere", by_model="sharded", score=0.25),
                )
            ],
            outlooks=[
                cluster_pb2.ModelOutlook(
                    model="qwen",
                    foundation_replicas=0,
                    burst_replicas=1,
                    reason=reason("MADE_ROOM", "sharded saves 3.1 s with these pages, qwen 0.2 s", by_model="sharded"),
                ),
                cluster_pb2.ModelOutlook(model="org/llama", foundation_replicas=1, active_replicas=1, reason=kept),
            ],
        ),
    )
    await store.put(
        keys.forecast("qwen"),
        cluster_pb2.Forecast(
            model="qwen",
            made_unix_ms=now_ms() - 9_000,
            window_s=WINDOW_S,
            predictor="published",
            windows=[
                cluster_pb2.WindowForecast(
                    start_unix_s=(now_ms() // 1000 // WINDOW_S + step) * WINDOW_S,
                    mean_load=cluster_pb2.Quantiles(p50=0.25 + step, p90=0.75),
                    peak_load=cluster_pb2.Quantiles(p50=1.5, p90=4),
                )
                for step in range(3)
            ],
        ),
    )


async def write_events(redis: Redis, keys: Keys) -> EventStream:
    """qwen was warmed and then evicted for sharded; between the two, much happened to org/llama."""
    stream = EventStream(redis, keys)

    async def add(kind: str, model: str, why: common_pb2.Reason, **more: object) -> None:
        await stream.append(
            cluster_pb2.Event(
                unix_ms=now_ms(),
                kind=cluster_pb2.EventKind.Value(f"EVENT_KIND_{kind}"),
                model=model,
                agent_ids=["a1"],
                reason=why,
                **more,  # type: ignore[arg-type]
            )
        )

    cold, warming, warm = common_pb2.REPLICA_STATE_COLD, common_pb2.REPLICA_STATE_WARMING, common_pb2.REPLICA_STATE_WARM
    await add(
        "WARMED",
        "qwen",
        reason("BURST", "its peak needs 1"),
        duration_ms=1250,
        bytes=10 * PAGE,
        copy_ms=1000,
        tier=common_pb2.TIER_HOST,
        from_state=warming,
        to_state=warm,
    )
    for _ in range(30):
        await add("WOKEN", "org/llama", reason("WAITING_REQUESTS", "2 requests wait"), duration_ms=12)
    made_room = reason("MADE_ROOM", "its pages are worth more elsewhere", by_model="sharded")
    await add("EVICTED", "qwen", made_room, from_state=warm, to_state=cold)
    return stream
