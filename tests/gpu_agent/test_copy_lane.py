"""Whose turn it is to copy."""

from __future__ import annotations

import asyncio

from services.gpu_agent.copy_lane import CopyLane, CopyTurn


async def test_a_turn_withdrawn_while_it_waits_ends_at_once_and_the_others_go_on() -> None:
    lane, order = CopyLane(), []

    async def take(name: str, turn: CopyTurn) -> None:
        async with lane.turn(turn) as ours:
            order.append((name, ours))

    second, third = CopyTurn(urgent=False), CopyTurn(urgent=False)
    async with lane.turn(CopyTurn(urgent=False)) as ours:
        assert ours
        waiting = [asyncio.create_task(take("second", second)), asyncio.create_task(take("third", third))]
        await asyncio.sleep(0)
        lane.withdraw(second)
        await waiting[0]
        assert order == [("second", False)]
    await waiting[1]
    assert order == [("second", False), ("third", True)]


async def test_an_urgent_turn_cuts_another_short_and_comes_before_those_that_wait() -> None:
    lane, order = CopyLane(), []

    async def take(name: str, turn: CopyTurn) -> None:
        async with lane.turn(turn):
            order.append(name)

    first = CopyTurn(urgent=False)
    async with lane.turn(first):
        waiting = [asyncio.create_task(take("prewarming", CopyTurn(urgent=False)))]
        await asyncio.sleep(0)
        assert not first.cancel.is_set()
        waiting.append(asyncio.create_task(take("wake", CopyTurn(urgent=True))))
        await asyncio.sleep(0)
        assert first.cancel.is_set()
    await asyncio.gather(*waiting)
    assert order == ["wake", "prewarming"]


async def test_a_task_that_is_cancelled_when_it_was_just_given_the_turn_passes_it_on() -> None:
    lane = CopyLane()

    async def take(turn: CopyTurn) -> None:
        async with lane.turn(turn):
            pass

    async with lane.turn(CopyTurn(urgent=False)):
        waiting = [asyncio.create_task(take(CopyTurn(urgent=False))) for _ in range(2)]
        await asyncio.sleep(0)
    waiting[0].cancel()
    async with asyncio.timeout(30):
        await waiting[1]
