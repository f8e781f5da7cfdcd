"""The published rule, which ours is compared with, by example."""

from __future__ import annotations

import math

import pytest

from services.placer.decisions import Do
from services.placer.planner import plan_published as plan
from tests.placer.cluster import agent, done, model, replica, snapshot
from warmserve.v1 import common_pb2


def outlook(of, name):
    return next(o for o in of.outlooks if o.model == name)


def test_scores_are_the_published_ones() -> None:
    spec = model("a", mean=9, peak=20, capacity=8, cold_load_s=3.0)
    made = plan(snapshot([agent(f"g{i}") for i in range(4)], [spec]))
    scores = [a.reason.score for a in made.actions]
    burstiness = (20 - 9) / (3 * 8)  # the share of what three instances carry that only the peak fills
    assert scores == pytest.approx([3, 3 * math.exp(-1 / 3), 3 * math.exp(-2 / 3) * burstiness])


def test_foundation_replicas_come_before_burst_replicas() -> None:
    # Room for one of them: the burst replica of the dear model scores higher, the foundation replica goes first.
    dear = model("dear", mean=0, peak=9, cold_load_s=60)
    cheap = model("cheap", mean=1, cold_load_s=1)
    made = plan(snapshot([agent("g0", pages=24)], [dear, cheap]))
    assert done(made, Do.WARM) == [("cheap", "g0")]
    assert outlook(made, "dear").reason.cause == common_pb2.CAUSE_NO_CAPACITY
    assert "nothing is resident; it is loaded as soon as" in outlook(made, "dear").reason.text


def test_a_cheap_foundation_replica_does_not_push_out_a_dear_burst_replica() -> None:
    models = [model("dear", 40, mean=0, peak=9, cold_load_s=60), model("cheap", 40, mean=1, cold_load_s=1)]
    assert plan(snapshot([agent("g0")], models, [replica("dear", "g0", pages=40)])).actions == ()
    made = plan(snapshot([agent("g0")], models, [replica("cheap", "g0", pages=40)]))
    assert done(made, Do.EVICT) == [("cheap", "g0")]
