"""Plans are nearly as good as can be: a small part of `python -m benchmarks.placer`."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.placer import at_rest, cluster, plan_published, small_cluster
from benchmarks.plan_optimum import optimum
from services.placer.planner import plan
from services.placer.snapshot import Snapshot
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


def never_below_the_published_rule(start: Snapshot) -> None:
    ours, theirs = at_rest(start, plan), at_rest(start, plan_published)
    assert expected_value(ours, ours.replicas) >= expected_value(theirs, theirs.replicas) * (1 - 1e-9)


# There, parts of replicas that its evictions happen to leave are worth more than any whole ones.
@pytest.mark.parametrize("seed", [90, 295])
def test_a_plan_is_worth_no_less_than_the_published_rules_by_its_happy_accidents(seed: int) -> None:
    never_below_the_published_rule(small_cluster(seed))


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_plan_is_never_worth_less_than_the_published_rules(seed: int) -> None:
    never_below_the_published_rule(small_cluster(seed))
