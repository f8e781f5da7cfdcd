"""What warming ahead was good for, as the metrics tell it."""

from __future__ import annotations

import itertools

from prometheus_client import REGISTRY

from services.placer.accounting import Prewarms
from services.placer.decisions import Action, Do, Reason
from services.placer.snapshot import Replica, State
from warmserve.v1 import common_pb2

_NAMES = (f"accounting-{number}" for number in itertools.count())
GROUP = ("g0",)


def order(do: Do, model: str, keep: float = 0.0) -> Action:
    return Action(do, model, GROUP, Reason(common_pb2.CAUSE_BURST, ""), keep)


def replica(model: str, resident: int = 10, state: State = State.WARM) -> Replica:
    return Replica(model, GROUP, state, 10, resident)


def counted(model: str, outcome: str) -> tuple[float, float]:
    """Prewarms and bytes with that outcome."""
    labels = {"model": model, "outcome": outcome}
    values = [
        REGISTRY.get_sample_value(f"warmserve_placer_{name}_total", labels) for name in ("prewarms", "prewarmed_bytes")
    ]
    return values[0] or 0.0, values[1] or 0.0


def wakes(model: str, found: str) -> float:
    return REGISTRY.get_sample_value("warmserve_placer_wakes_total", {"model": model, "found": found}) or 0.0


def test_a_prewarm_that_a_wake_finds_is_used_once() -> None:
    prewarms, model = Prewarms(), next(_NAMES)
    prewarms.warmed((model, GROUP), 1000)
    prewarms.ordered(order(Do.WAKE, model), replica(model))
    prewarms.ordered(order(Do.WAKE, model), replica(model))
    prewarms.ordered(order(Do.EVICT, model), replica(model))
    assert (counted(model, "used"), counted(model, "wasted")) == ((1, 1000), (0, 0))
    assert wakes(model, "warm") == 2


def test_a_prewarm_that_nobody_used_is_wasted_however_it_went() -> None:
    prewarms, model = Prewarms(), next(_NAMES)
    key = (model, GROUP)
    prewarms.warmed(key, 1000)
    prewarms.ordered(order(Do.EVICT, model), replica(model))
    assert counted(model, "wasted") == (1, 1000)
    prewarms.warmed(key, 500)
    prewarms.shown({key})
    assert counted(model, "wasted") == (1, 1000)
    prewarms.shown(set())  # its agent died, or KV cache took the pages
    assert counted(model, "wasted") == (2, 1500)
    assert counted(model, "used") == (0, 0)


def test_a_part_that_is_evicted_is_wasted_and_the_rest_may_be_used() -> None:
    prewarms, model = Prewarms(), next(_NAMES)
    prewarms.warmed((model, GROUP), 1000)
    prewarms.ordered(order(Do.EVICT, model, keep=0.4), replica(model))
    prewarms.ordered(order(Do.WAKE, model), replica(model, resident=4))
    assert (counted(model, "wasted"), counted(model, "used")) == ((0, 600), (1, 400))
    assert wakes(model, "partial") == 1


def test_a_wake_of_what_is_not_there_is_a_miss() -> None:
    prewarms, model = Prewarms(), next(_NAMES)
    prewarms.ordered(order(Do.WAKE, model), None)
    prewarms.ordered(order(Do.WAKE, model), replica(model, 3, State.WARMING))
    assert (wakes(model, "cold"), wakes(model, "warming"), counted(model, "used")) == (1, 1, (0, 0))
