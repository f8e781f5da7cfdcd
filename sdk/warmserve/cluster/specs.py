"""What a model's spec may say, whoever writes it."""

from __future__ import annotations

import math

from warmserve.v1 import cluster_pb2


def check_wishes(spec: cluster_pb2.ModelSpec) -> None:
    """Raises ValueError, saying what is wrong, where an operator's wishes about a model contradict themselves."""
    if not math.isfinite(spec.priority) or spec.priority < 0:
        raise ValueError(f"priority is {spec.priority}: it must be a number above 0, or 0 for the default of 1")
    for name, value in (("ttft_p95_ms", spec.target.ttft_p95_ms), ("tpot_ms", spec.target.tpot_ms)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"the target {name} is {value}: it must be a number of milliseconds, or 0 for none")
    if not spec.max_replicas:
        return
    for name, wish in (("min_replicas", spec.min_replicas), ("pinned_replicas", spec.pinned_replicas)):
        if wish > spec.max_replicas:
            raise ValueError(f"{name} is {wish}, more than max_replicas, which is {spec.max_replicas}")
