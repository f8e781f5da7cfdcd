"""Where instances had best lie, by their peaks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.placer.spread import Load, assign
from tests.placer.cluster import agent

AGENTS = [agent(f"g{i}") for i in range(8)]
PAGE = AGENTS[0].page_bytes
PAGES = AGENTS[0].pages_total


def load(model: str, need: float, tp: int = 1, pages: int = 20, most: int = 0, serving=(), warm=()) -> Load:
    return Load(model, tp, need, {PAGE: pages}, most, frozenset(serving), frozenset(warm))


def sizes(loads: list[Load], agents=AGENTS) -> dict[str, int]:
    return {model: len(places) for model, places in assign(agents, loads, 1.25).items()}


def test_the_busiest_gets_what_is_free() -> None:
    assert sizes([load("a", 4.0), load("b", 2.0)], AGENTS[:6]) == {"a": 4, "b": 2}
    assert sizes([load("wide", 2.0, tp=4), load("a", 2.0)]) == {"wide": 1, "a": 4}


def test_what_is_not_busy_is_not_spread_and_no_bound_is_exceeded() -> None:
    assert sizes([load("a", 0.2)]) == {"a": 1}
    assert sizes([load("a", 9.0, most=2)]) == {"a": 2}


def test_what_serves_or_is_warm_is_taken_first() -> None:
    found = assign(AGENTS, [load("a", 0.6, serving=[("g5",)], warm=[("g3",)]), load("b", 0.2)], 1.25)
    assert found["a"][:2] == [("g5",), ("g3",)]
    assert found["b"] not in ([("g5",)], [("g3",)])


def test_a_model_without_room_has_no_place() -> None:
    assert sizes([load("a", 1.0, pages=PAGES), load("b", 0.5, pages=1)], AGENTS[:1]) == {"a": 1}


@given(
    st.lists(
        st.tuples(st.floats(0.01, 9), st.sampled_from((1, 2, 4)), st.integers(1, PAGES), st.integers(0, 3)),
        max_size=8,
    )
)
def test_pages_and_bounds_are_kept_and_only_first_instances_share(drawn: list[tuple[float, int, int, int]]) -> None:
    loads = [load(f"m{i}", need, tp, pages, most) for i, (need, tp, pages, most) in enumerate(drawn)]
    found = assign(AGENTS, loads, 1.25)
    held = dict.fromkeys((a.id for a in AGENTS), 0)
    firsts = dict.fromkeys(held, 0)
    for own in loads:
        places = found.get(own.model, [])
        assert len(set(places)) == len(places)
        assert not own.most or len(places) <= own.most
        for number, group in enumerate(places):
            for agent_id in group:
                held[agent_id] += own.pages[PAGE]
                if number:
                    assert not firsts[agent_id]
                firsts[agent_id] += 1
    assert max(held.values()) <= PAGES
