"""Plans are nearly as good as can be: a small part of `python -m benchmarks.placer`."""

from __future__ import annotations

import pytest

from benchmarks.placer import at_rest, cluster, optimum, plan_published
from services.placer.planner import plan
from services.placer.value import expected_value


@pytest.mark.parametrize("seed", range(8))
def test_a_plans_value_is_near_the_optimum(seed: int) -> None:
    start = cluster(seed, 1 + seed % 4, 3 + seed % 4)
    found = optimum(start)
    assert found.proved
    best = found.bound
    rest, published = at_rest(start, plan), at_rest(start, plan_published)
    value = expected_value(rest, rest.replicas)
    assert value >= 0.97 * best - 1e-9
    assert value >= min(best, expected_value(published, published.replicas)) - 1e-9
