"""Plans that are made in a process of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.placer import cluster, with_forecasts
from services.placer import planner
from services.placer.decisions import Action, Do, Reason
from services.placer.measured import Capacity
from services.placer.planning import Planning, PlanningError
from services.placer.planning_frames import Publish
from tests.placer.cluster import agent, model, snapshot
from tests.placer.peers import Cluster, running_placer
from warmserve.v1 import common_pb2


@pytest.fixture
async def planning() -> AsyncIterator[Planning]:
    """A planning process."""
    planning = Planning()
    yield planning
    await planning.close()


def children() -> set[int]:
    """This process's children that are not over."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends meanwhile
            found.update(map(int, (task / "children").read_text().split()))
    return found


def wish(unless: bytes = b"", actions: tuple[Action, ...] = ()) -> Publish:
    return Publish(7, "p0", False, actions, {"m000": Capacity(3, "as it says")}, unless)


async def test_plans_are_those_that_the_planner_makes_whatever_was_told_before(planning: Planning) -> None:
    first = cluster(3, 8, 40)
    fewer = replace(first, models={name: own for name, own in first.models.items() if name != "m001"})
    for told in (first, first, with_forecasts(first, 5), fewer, first, cluster(4, 16, 30)):
        assert await planning.plan(told) == list(planner.plan(told).actions)


async def test_a_plan_is_published_once(planning: Planning) -> None:
    told = cluster(3, 4, 5)
    await planning.plan(told)
    action = Action(Do.WARM, "m000", ("n0-g1",), Reason(common_pb2.CAUSE_BURST, "why"))
    published = await planning.publish(wish(actions=(action,)))
    assert published is not None
    record = json.loads(published.value)
    assert record["fence"] == "7"
    assert record["actions"][0]["group"] == {"agent_ids": ["n0-g1"], "node": "n0"}
    assert [outlook["model"] for outlook in record["outlooks"]] == sorted(told.models)
    assert record["outlooks"][0]["capacity_source"] == "as it says"
    assert int(record["made_unix_ms"]) > 0
    assert await planning.publish(wish(published.digest, (action,))) is None
    assert await planning.publish(wish(published.digest)) is not None


async def test_what_was_never_planned_is_not_published(planning: Planning) -> None:
    with pytest.raises(PlanningError):
        await planning.publish(wish())


async def test_a_process_that_dies_is_followed_by_another(planning: Planning) -> None:
    before = children()
    told = snapshot([agent("g0")], [model("a", mean=1)])
    actions = await planning.plan(told)
    [process] = children() - before
    os.kill(process, signal.SIGKILL)
    with pytest.raises(PlanningError, match="status -9"):
        await planning.plan(told)
    assert await planning.plan(told) == actions
    [other] = children() - before
    await planning.close()
    assert process != other
    assert children() == before


async def test_a_question_that_is_given_up_spoils_none_after_it(planning: Planning) -> None:
    large, small = cluster(1, 16, 20), snapshot([agent("g0")], [model("a", mean=1)])
    await planning.plan(small)
    asked = asyncio.create_task(planning.plan(large))
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.wait([asked])
    assert await planning.plan(small) == list(planner.plan(small).actions)


async def test_a_placer_leaves_no_process_behind(cluster: Cluster) -> None:
    before = children()
    async with running_placer(cluster):
        assert len(children() - before) == 1
    assert children() == before


STARTER = """
import asyncio
from pathlib import Path
from services.placer.planning import Planning

async def main():
    await Planning().start()
    print(*(task.joinpath("children").read_text() for task in Path("/proc/self/task").iterdir()), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_placer_that_is_killed_leaves_no_process_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True) as placer:
        assert placer.stdout is not None
        planning = int(placer.stdout.readline())
        placer.kill()
    with contextlib.suppress(ProcessLookupError):  # it is over already
        ended = os.pidfd_open(planning)
        try:
            assert select.select([ended], [], [], 30)[0]
        finally:
            os.close(ended)
