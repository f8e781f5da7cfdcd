"""Clients announce traffic: over real sockets, into a real etcd."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import grpc
import pytest

from services.router.errors import RequestError
from services.router.prewarm import MAX_OPEN, check_prewarm
from tests.router.conftest import Cluster, RunningRouter
from warmserve.v1 import cluster_pb2, common_pb2, inference_pb2

NOW = 1_800_000_000.0
WEEK_S = 7 * 86_400


@pytest.fixture
async def router(cluster: Cluster) -> RunningRouter:
    for name in ("m", "m/b"):
        await cluster.deploy(name)
    return await cluster.router()


async def prewarm(router: RunningRouter, **fields: Any) -> inference_pb2.PrewarmResponse:
    request = inference_pb2.PrewarmRequest(**{"model": "m", "load": 20, **fields})
    response: inference_pb2.PrewarmResponse = await router.grpc.Prewarm(request)
    return response


async def entries(cluster: Cluster) -> list[cluster_pb2.CalendarEntry]:
    found = await cluster.store.get_all(cluster.keys.calendars(), cluster_pb2.CalendarEntry)
    assert [entry.key for entry in found] == [cluster.keys.calendar(e.value.model, e.value.id) for e in found]
    return [entry.value for entry in found]


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_an_announcement_is_in_the_calendar(cluster: Cluster, router: RunningRouter) -> None:
    agent = await cluster.agent()
    await agent.activate("m/b")
    start = int(time.time()) + 3600
    response = await prewarm(router, model="m/b", load=2.5, start_unix_s=start, duration_s=120, note="Größe: launch")
    [entry] = await entries(cluster)
    assert entry == cluster_pb2.CalendarEntry(
        model="m/b",
        start_unix_s=start,
        duration_s=120,
        load=2.5,
        note="Größe: launch",
        id=response.id,
        source=cluster_pb2.CALENDAR_SOURCE_CLIENT,
        created_unix_ms=entry.created_unix_ms,
    )
    assert abs(entry.created_unix_ms / 1000 - time.time()) < 60
    assert (response.model.name, response.model.context_tokens) == ("m/b", 512)
    assert response.model.state == common_pb2.REPLICA_STATE_ACTIVE


async def test_it_begins_now_and_lasts_ten_minutes_where_nothing_else_is_said(
    cluster: Cluster, router: RunningRouter
) -> None:
    before = math.floor(time.time())
    response = await prewarm(router)
    [entry] = await entries(cluster)
    assert before <= entry.start_unix_s <= time.time()
    assert entry.duration_s == 600
    assert response.model.state == common_pb2.REPLICA_STATE_COLD


async def test_nonsense_is_refused_and_leaves_nothing_behind(cluster: Cluster, router: RunningRouter) -> None:
    error = await refusal(prewarm(router, model="mm"))
    assert (error.code(), error.details()) == (
        grpc.StatusCode.NOT_FOUND,
        "model 'mm' is not deployed; did you mean 'm'?",
    )
    assert ("warmserve-suggestion", "m") in [tuple(item) for item in error.trailing_metadata() or ()]
    for field, value in (("model", ""), ("load", 0), ("load", math.nan), ("duration_s", 86_401), ("start_unix_s", 5)):
        error = await refusal(prewarm(router, **{field: value}))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (error.details() or "").startswith(f"{field}: ")
    assert await entries(cluster) == []


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"load": -1}, "load"),
        ({"load": math.inf}, "load"),
        ({"load": 100_001}, "load"),
        ({"duration_s": -1}, "duration_s"),
        ({"duration_s": 86_401}, "duration_s"),
        ({"start_unix_s": int(NOW) - 61}, "start_unix_s: it is 61 s in the past"),
        ({"start_unix_s": int(NOW) + WEEK_S + 1}, "start_unix_s: .* ahead"),
        ({"start_unix_s": -1}, "start_unix_s"),
        ({"note": "x" * 201}, "note"),
        ({"note": "red \x1b[31m"}, "note"),
    ],
)
def test_what_announcements_may_say(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        check_prewarm(inference_pb2.PrewarmRequest(**{"model": "m", "load": 1, **fields}), NOW)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"load": 100_000, "duration_s": 86_400, "start_unix_s": int(NOW) + WEEK_S, "note": "x" * 200},
        {"start_unix_s": int(NOW) - 60, "duration_s": 1},
    ],
)
def test_the_limits_themselves_are_allowed(fields: dict[str, Any]) -> None:
    check_prewarm(inference_pb2.PrewarmRequest(**{"model": "m", "load": 0.1, **fields}), NOW)


async def test_a_model_has_a_bounded_number_of_open_announcements(cluster: Cluster, router: RunningRouter) -> None:
    now = int(time.time())
    for number, (model, source, duration_s) in enumerate(
        [
            ("m", cluster_pb2.CALENDAR_SOURCE_OPERATOR, 3600),  # not a client's
            ("m", cluster_pb2.CALENDAR_SOURCE_CLIENT, 5),  # has ended
            ("m/b", cluster_pb2.CALENDAR_SOURCE_CLIENT, 3600),  # another model's
        ]
    ):
        entry = cluster_pb2.CalendarEntry(
            model=model, id=f"e{number}", start_unix_s=now - 10, duration_s=duration_s, load=1, source=source
        )
        await cluster.store.put(cluster.keys.calendar(model, entry.id), entry)
    results = await asyncio.gather(*(prewarm(router) for _ in range(MAX_OPEN + 5)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert len(refused) == 5
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert "20 open announcements" in (refused[0].details() or "")
    [retry_ms] = [int(value) for key, value in refused[0].trailing_metadata() or () if key.endswith("retry-after-ms")]
    assert 0 < retry_ms <= 600_000
    assert len(await entries(cluster)) == MAX_OPEN + 3
    await prewarm(router, model="m/b")
