"""The lock for work that comes in pieces."""

from __future__ import annotations

import threading

from services.gpu_agent.arena.turns import Turns


def waiting(turns: Turns, count: int) -> None:
    """Returns once so many threads wait for their turn."""
    while len(turns._waiting) < count:
        threading.Event().wait(0.001)


def test_a_thread_that_takes_it_in_a_loop_lets_others_in_between() -> None:
    turns, order = Turns(), []

    def other(name: str) -> None:
        with turns:
            order.append(name)

    threads = [threading.Thread(target=other, args=(name,)) for name in "ab"]
    with turns:
        for count, thread in enumerate(threads):
            thread.start()
            waiting(turns, count + 1)
        order.append("first piece")
    with turns:
        order.append("second piece")
    for thread in threads:
        thread.join(10)
    assert order == ["first piece", "a", "b", "second piece"]


def test_one_thread_at_a_time_has_it() -> None:
    turns, inside, most = Turns(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(2000):
            with turns:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, inside) == (1, 0)


def test_what_fails_within_gives_it_back() -> None:
    turns = Turns()
    try:
        with turns:
            raise ValueError
    except ValueError:
        pass
    with turns:
        pass
