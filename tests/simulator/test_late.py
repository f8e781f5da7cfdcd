"""Why requests were late, told from what happened to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from services.placer.decisions import Do
from simulator.late import causes
from simulator.policies.static import Dedicated
from simulator.run import simulate
from simulator.spec import ClusterSpec, ModelSpec, Settings, llama2_7b
from tests.simulator.test_core_run import QUICK, Scripted
from warmserve.traces import Request

ONE = llama2_7b("one")
SETTINGS: Settings = QUICK


def why(model: ModelSpec, requests: list[Request], script: Scripted | None = None) -> dict[str, int]:
    policy = script or Dedicated()
    results = simulate(ClusterSpec(1, 1), [model], requests, policy, settings=SETTINGS)
    found = causes(results, percentile=0.0)  # all of them
    assert sum(cause.requests for cause in found) == len(requests)
    assert [cause.requests for cause in found] == sorted((cause.requests for cause in found), reverse=True)
    return {cause.text: cause.requests for cause in found}


def test_who_waited_for_weights_and_for_waking_is_told_apart() -> None:
    script = Scripted((0.001, Do.WAKE), (15.0, Do.DRAIN), (30.001, Do.WAKE))
    requests = [Request(at, "one", 100, 10) for at in (0.0, 0.05, 30.0, 31.0)]
    assert why(ONE, requests, script) == {
        "nothing of the model was resident: all was loaded": 1,
        "was being woken for a request before": 1,
        "resident, and had to be woken": 1,
        "active, and its prompt took that long, with what shared the GPU": 1,
    }


def test_who_waited_for_a_slot_and_behind_prompts_is_told_apart() -> None:
    many = [Request(0.0, "one", 4000, 10) for _ in range(3)]
    assert why(replace(ONE, max_batch=1), many) == {
        "active, and all its instances' slots were taken": 2,
        "active, and its prompt took that long, with what shared the GPU": 1,
    }
    assert why(ONE, many) == {
        "active, and it waited for prompts before it": 1,  # the last one for two, which took longer than its own
        "active, and its prompt took that long, with what shared the GPU": 2,
    }


def test_who_waited_for_kv_is_told_apart() -> None:
    """Two contexts do not fit at a time."""
    tight = ModelSpec("tight", 300_000_000, 12, 500_000, max_batch=16, context_tokens=1200)
    cluster = ClusterSpec(1, 1, arena_bytes=32 * (20 + 18 + 4) << 20)
    requests = [Request(0.0, "tight", 1000, 100), Request(0.0, "tight", 1000, 100)]
    results = simulate(cluster, [tight], requests, Dedicated(), settings=SETTINGS)
    assert np.isfinite(results.ttft_s).all()
    (latest,) = causes(results, percentile=100.0)
    assert latest.text == "active, and KV pages were lacking"


def test_who_was_not_served_is_told() -> None:
    script = Scripted()
    assert why(ONE, [Request(0.0, "one", 100, 10)], script) == {"not served": 1}
