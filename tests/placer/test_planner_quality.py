"""Plans are nearly as good as can be: a small part of `python -m benchmarks.placer`."""

from __future__ import annotations

import pytest

from benchmarks.placer import at_rest, cluster, plan_published
from benchmarks.plan_optimum import optimum
from services.placer.planner import plan
from services.placer.value import expected_value


# In the last cluster a plan drops a replica whose neighbour is worth much more, and whose pages nobody needs.
@pytest.mark.parametrize(("seed", "gpus", "models"), [*((s, 1 + s % 4, 3 + s % 4) for s in range(8)), (395, 3, 4)])
def test_a_plans_value_is_near_the_optimum(seed: int, gpus: int, models: int) -> None:
    start = cluster(seed, gpus, models)
    found = optimum(start)
    assert found.proved
    best = found.bound
    rest, published = at_rest(start, plan), at_rest(start, plan_published)
    value = expected_value(rest, rest.replicas)
    assert value >= 0.97 * best - 1e-9
    assert value >= min(best, expected_value(published, published.replicas)) - 1e-9
