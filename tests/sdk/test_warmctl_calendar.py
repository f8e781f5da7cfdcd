"""`warmctl calendar`, as its users run it, against a real etcd."""

from __future__ import annotations

import re
import time

import pytest

from tests.sdk.conftest import Warmctl, words
from warmserve.admin.units import now_ms
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2


async def entries(store: Store, keys: Keys) -> list[cluster_pb2.CalendarEntry]:
    found = await store.get_all(keys.calendars(), cluster_pb2.CalendarEntry)
    assert [entry.key for entry in found] == [keys.calendar(e.value.model, e.value.id) for e in found]
    return [entry.value for entry in found]


async def put(store: Store, keys: Keys, entry: cluster_pb2.CalendarEntry) -> None:
    await store.put(keys.calendar(entry.model, entry.id), entry)


async def test_traffic_is_announced_listed_and_taken_back(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys
) -> None:
    warmctl.environment["TZ"] = "CET-1CEST,M3.5.0,M10.5.0/3"
    before = time.time()
    said = ("--at", "+90m", "--load", "20", "--for", "2h", "--note", "the launch")
    done = await warmctl("calendar", "add", "org/llama", *said)
    assert done.status == 0
    [entry] = await entries(store, keys)
    assert (entry.model, entry.load, entry.duration_s, entry.note) == ("org/llama", 20, 7200, "the launch")
    assert entry.source == cluster_pb2.CALENDAR_SOURCE_OPERATOR
    assert before + 5399 <= entry.start_unix_s <= time.time() + 5400
    assert before - 1 <= entry.created_unix_ms / 1000 <= time.time()
    assert re.fullmatch(
        rf"Announced {entry.id}: 20 request\(s\) in progress of org/llama from [\d-]{{10}} [\d:]+ CES?T "
        r"\(in 1 h (29|30) min\) for 2 h\.\n",
        done.out,
    )

    listed = (await warmctl("calendar", "list")).out
    assert re.search(rf"{entry.id} +org/llama +\S+ \S+ CES?T +in 1 h \S+ min +2 h +20 +operator +the launch", listed)
    assert (await warmctl("calendar", "list", "qwen", "-o", "json")).json == []
    [document] = (await warmctl("calendar", "list", "org/llama", "-o", "json")).json
    assert (document["id"], document["start_unix_s"], document["source"]) == (entry.id, entry.start_unix_s, "operator")

    wrong = await warmctl("calendar", "remove", "nothing")
    assert (wrong.status, wrong.err) == (1, f"Error: no announcement 'nothing': there are {entry.id}\n")
    removed = await warmctl("calendar", "remove", entry.id)
    assert (removed.status, removed.out.startswith(f"Removed {entry.id}: 20 request(s)")) == (0, True)
    assert await entries(store, keys) == []
    assert "Nothing is announced" in (await warmctl("calendar", "list")).out


async def test_a_time_of_day_that_has_passed_is_tomorrows(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys
) -> None:
    # In this zone it is a little after noon, whenever the test runs.
    offset = int(time.time() % 86_400) - 43_200 - 60
    sign = "+" if offset >= 0 else "-"
    hours, rest = divmod(abs(offset), 3600)
    warmctl.environment["TZ"] = f"NOON{sign}{hours:02}:{rest // 60:02}:{rest % 60:02}"
    document = (await warmctl("calendar", "add", "qwen", "--at", "12:00", "--load", "0.5", "-o", "json")).json
    assert document["note"] == "12:00 has passed today, so tomorrow is meant"
    [entry] = await entries(store, keys)
    assert 86_000 < entry.start_unix_s - time.time() < 86_400
    assert document["entry"]["start_unix_s"] == entry.start_unix_s
    today = (await warmctl("calendar", "add", "qwen", "--at", "13:00", "--load", "0.5", "-o", "json")).json
    assert today["note"] == ""
    assert 0 < today["entry"]["start_unix_s"] - time.time() < 3600
    said = words((await warmctl("calendar", "add", "qwen", "--at", "12:00", "--load", "1")).out)
    assert said.startswith("12:00 has passed today, so tomorrow is meant. Announced ")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("qwen", "--at", "2020-01-01T10:00", "--load", "1"), 2, "has passed"),
        (("qwen", "--at", "teatime", "--load", "1"), 2, "write for example 14:00"),
        (("qwen", "--at", "+9d", "--load", "0"), 2, "above 0"),
        (("qwen", "--at", "+9d", "--load", "nan"), 2, "above 0"),
        (("qwen", "--at", "+9d", "--load", "1", "--for", "never"), 2, "no length of time"),
        (("qwen", "--load", "1"), 2, "--at"),
        (("qwem", "--at", "now", "--load", "1"), 1, "no model 'qwem' is deployed: did you mean qwen?"),
    ],
)
async def test_what_can_be_announced(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys, arguments: tuple[str, ...], status: int, says: str
) -> None:
    done = await warmctl("calendar", "add", *arguments)
    assert done.status == status
    assert says in words(done.out + done.err)
    assert len(await entries(store, keys)) == (1 if status == 0 else 0)


async def test_the_list_shows_clients_hints_and_what_goes_on(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys
) -> None:
    now = int(time.time())
    client = cluster_pb2.CALENDAR_SOURCE_CLIENT
    for model, name, start, source in (("qwen", "b", now - 600, client), ("org/llama", "a", now - 9000, client)):
        entry = cluster_pb2.CalendarEntry(model=model, id=name, start_unix_s=start, duration_s=7200, load=3.5)
        entry.source = source
        entry.created_unix_ms = now_ms()
        await put(store, keys, entry)
    await store._call(lambda client: client.put(keys.calendar("m", "bad").encode(), b"{not json"))
    listed = (await warmctl("calendar", "list")).out
    assert listed.index(" has ended ") < listed.index(" goes on for 1 h ")
    assert re.search(r"b +qwen .* 2 h +3.5 +client", listed)
    assert f"cannot be read: {keys.calendar('m', 'bad')}" in words(listed)


async def test_an_id_that_two_models_have_must_be_told_apart(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys
) -> None:
    for model in ("qwen", "org/llama"):
        await put(store, keys, cluster_pb2.CalendarEntry(model=model, id="x", duration_s=1, load=1))
    done = await warmctl("calendar", "remove", "x")
    assert (done.status, done.err) == (1, "Error: 'x' is the id of several: say one of org/llama/x, qwen/x\n")
    assert (await warmctl("calendar", "remove", "qwen/x")).status == 0
    assert [entry.model for entry in await entries(store, keys)] == ["org/llama"]
