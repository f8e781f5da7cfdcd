"""What the placer learns of models from what the cluster shows."""

from __future__ import annotations

import pytest

from services.placer.measured import Measured
from services.placer.records import Records
from services.placer.snapshot import Tier
from warmserve.v1 import cluster_pb2, common_pb2

WARMING, WARM = common_pb2.REPLICA_STATE_WARMING, common_pb2.REPLICA_STATE_WARM
SPEC = cluster_pb2.ModelSpec(name="a", facts=cluster_pb2.ModelFacts(kv_bytes_per_token=1000))


def records(
    slots: dict[str, int] | None = None,
    devices: dict[str, str] | None = None,
    shards: list[cluster_pb2.ResidentShard] | None = None,
    deployed: bool = True,
) -> Records:
    """Instances of "a" by agent, with their slots; agents with their devices; shards on g0."""
    devices = devices or {"g0": "H100", "g1": "T4"}
    return Records(
        agents={name: cluster_pb2.AgentRecord(id=name, node="n0", device_name=kind) for name, kind in devices.items()},
        residency={"g0": cluster_pb2.AgentResidency(agent_id="g0", shards=shards or [])},
        instances={
            f"a/{name}": cluster_pb2.InstanceRecord(
                id=name, model="a", group=common_pb2.Group(agent_ids=[name]), slots=count
            )
            for name, count in (slots or {}).items()
        },
        models={"a": SPEC} if deployed else {},
        controls={},
        forecasts={},
    )


def limited(most: int) -> cluster_pb2.ModelSpec:
    return cluster_pb2.ModelSpec(name="a", limits=cluster_pb2.ModelLimits(max_batch=most))


def test_capacity_is_the_least_of_the_devices_that_are_there() -> None:
    measured = Measured()
    measured.learn(records())
    assert (measured.capacity(SPEC).requests, measured.capacity(SPEC).source[:7]) == (8, "assumed")
    assert measured.capacity(limited(3)).requests == 3
    measured.learn(records(slots={"g0": 32, "g1": 6}))
    assert measured.capacity(SPEC).requests == 6
    assert "T4" in measured.capacity(SPEC).source
    measured.learn(records(devices={"g0": "H100"}))  # the T4 is gone, and no instance is there at the moment
    assert measured.capacity(SPEC).requests == 32
    assert measured.capacity(limited(12)).requests == 12
    assert measured.capacity(limited(64)).requests == 32
    measured.learn(records(deployed=False))
    measured.learn(records())
    assert measured.capacity(SPEC).requests == 8


def shard(state: common_pb2.ReplicaState, tier: common_pb2.Tier, cold_load_ms: float = 0) -> cluster_pb2.ResidentShard:
    group = common_pb2.Group(agent_ids=["g0"], node="n0")
    return cluster_pb2.ResidentShard(model="a", group=group, state=state, tier=tier, cold_load_ms=cold_load_ms)


def test_a_load_counts_for_the_slowest_tier_that_it_came_from() -> None:
    measured = Measured()
    assert measured.cold_load_s("a") is None
    measured.learn(records(shards=[shard(WARMING, common_pb2.TIER_REMOTE)]))
    measured.learn(records(shards=[shard(WARMING, common_pb2.TIER_DISK)]))
    measured.learn(records(shards=[shard(WARM, common_pb2.TIER_GPU, 9000)]))
    assert measured.load_s("a") == {Tier.REMOTE: 9.0}
    assert measured.images("a") == {"n0": Tier.DISK}
    measured.learn(records(shards=[shard(WARMING, common_pb2.TIER_HOST)]))
    measured.learn(records(shards=[shard(WARM, common_pb2.TIER_GPU, 300)]))
    assert measured.load_s("a") == {Tier.REMOTE: 9.0, Tier.HOST: 0.3}
    assert (measured.cold_load_s("a"), measured.images("a")) == (0.3, {"n0": Tier.HOST})


def forecast(rate: float, load: float, prompt: float, output: float) -> cluster_pb2.Forecast:
    def exactly(value: float) -> cluster_pb2.Quantiles:
        return cluster_pb2.Quantiles(p50=value, p90=value, p99=value)

    window = cluster_pb2.WindowForecast(
        start_unix_s=600,
        mean_load=exactly(load),
        request_rate=exactly(rate),
        prompt_tokens_per_s=exactly(prompt),
        output_tokens_per_s=exactly(output),
    )
    return cluster_pb2.Forecast(model="a", window_s=300, windows=[window])


def test_a_request_is_what_the_forecast_says_of_one() -> None:
    traffic = Measured().traffic(SPEC, forecast(rate=2, load=6, prompt=200, output=100))
    assert traffic.service_s == 3  # Little's law
    assert traffic.kv_bytes_per_request == pytest.approx((100 + 50 / 2) * 1000)
    assert (traffic.windows[0].start_s, traffic.windows[0].end_s) == (600, 900)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_forecast_without_sense_says_nothing_of_requests(rate: float) -> None:
    traffic = Measured().traffic(SPEC, forecast(rate, 6, 200, 100))
    assert (traffic.service_s, traffic.kv_bytes_per_request) == (0, 0)
