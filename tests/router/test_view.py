"""How ready a model is, from what agents say of their shards."""

from __future__ import annotations

import pytest

from services.router.view import best_replica_state
from warmserve.v1 import cluster_pb2, common_pb2

COLD = common_pb2.REPLICA_STATE_COLD
WARMING = common_pb2.REPLICA_STATE_WARMING
WARM = common_pb2.REPLICA_STATE_WARM
DRAINING = common_pb2.REPLICA_STATE_DRAINING


def residency(agent: str, *shards: tuple[str, int, list[str]]) -> cluster_pb2.AgentResidency:
    return cluster_pb2.AgentResidency(
        agent_id=agent,
        shards=[
            cluster_pb2.ResidentShard(model=model, state=state, group=common_pb2.Group(agent_ids=group))
            for model, state, group in shards
        ],
    )


@pytest.mark.parametrize(
    ("residencies", "expected"),
    [
        ([], COLD),
        ([residency("a", ("other", WARM, ["a"]))], COLD),
        ([residency("a", ("m", WARMING, ["a"]))], WARMING),
        ([residency("a", ("m", WARMING, ["a"])), residency("b", ("m", WARM, ["b"]))], WARM),
        ([residency("a", ("m", DRAINING, ["a"]))], WARM),
        ([residency("a", ("m", WARM, ["a", "b"]))], WARMING),  # the other shard is missing
        ([residency("a", ("m", WARM, ["a", "b"])), residency("b", ("m", WARMING, ["a", "b"]))], WARMING),
        ([residency("a", ("m", WARM, ["a", "b"])), residency("b", ("m", WARM, ["a", "b"]))], WARM),
        ([residency("a", ("m", WARM, ["a", "b"])), residency("b", ("m", WARM, ["b", "c"]))], WARMING),
    ],
)
def test_a_replica_is_as_ready_as_its_least_ready_shard(
    residencies: list[cluster_pb2.AgentResidency], expected: int
) -> None:
    assert best_replica_state("m", residencies) == expected
