"""Request queues in Redis: per model three streams (one per priority), read by the model's instances as one group.

Delivery is at least once: an entry stays until the instance that took it says `done`, and what a lost instance held can
be put back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from services.common.telemetry import logger
from warmserve.cluster.events import stream_items
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, common_pb2

_log = logger(__name__)
GROUP = "instances"
# Of each stream its entries and those taken, as one text: reading numbers one by one would hold up the caller's event
# loop for milliseconds.
_COUNT = """
local counts = {}
for _, stream in ipairs(KEYS) do
  counts[#counts + 1] = redis.call('XLEN', stream)
  local pending = redis.pcall('XPENDING', stream, ARGV[1])
  if pending.err and not string.find(pending.err, 'NOGROUP') then
    return pending
  end
  counts[#counts + 1] = pending.err and 0 or pending[1]
end
return table.concat(counts, ' ')
"""
_COUNTED = 32  # models per call: for the same reason
# Which of some entries are not there, by their places: their requests, which may be long, stay in Redis.
_MISSING = """
local missing = {}
for place, stream in ipairs(KEYS) do
  if #redis.call('XRANGE', stream, ARGV[place], ARGV[place]) == 0 then
    missing[#missing + 1] = place - 1
  end
end
return table.concat(missing, ' ')
"""
_LOOKED_FOR = 256  # entries per call: while Redis looks for them, it does nothing else
_PRIORITIES = {common_pb2.PRIORITY_HIGH: "high", common_pb2.PRIORITY_NORMAL: "normal", common_pb2.PRIORITY_LOW: "low"}


@dataclass(frozen=True)
class Ticket:
    """Where an entry is: its stream and its id there."""

    stream: str
    entry_id: str


@dataclass(frozen=True)
class Taken:
    """A request that an instance has taken; say `done(ticket)` when it has ended."""

    ticket: Ticket
    request: agent_pb2.QueuedRequest


@dataclass(frozen=True)
class QueueCounts:
    """Entries of one model's streams."""

    waiting: int = 0  # that no instance has taken
    taken: int = 0  # that instances have taken and not said `done` for


class RequestQueue:
    """The queues of all models. Methods raise redis.RedisError where Redis is away."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        """`redis` answers in bytes (decode_responses=False)."""
        self._redis = redis
        self._keys = keys
        self._count: Any = redis.register_script(_COUNT)  # mypy knows only the synchronous one
        self._missing: Any = redis.register_script(_MISSING)

    def _streams(self, model: str) -> list[str]:
        return [self._keys.queue(model, name) for name in _PRIORITIES.values()]

    async def put(self, request: agent_pb2.QueuedRequest) -> Ticket:
        """Appends a request to the stream of its model and priority."""
        name = _PRIORITIES.get(request.priority, "normal")
        stream = self._keys.queue(request.model, name)
        entry_id: Any = await self._redis.xadd(stream, {"request": request.SerializeToString()})
        return Ticket(stream, entry_id.decode())

    async def take(self, model: str, instance_id: str, count: int, block_ms: int) -> list[Taken]:
        """Takes up to `count` requests, urgent ones first; waits up to `block_ms` for the first one.

        After a wait it may be up to two more than `count`: one from each priority that got one at that moment.
        """
        streams = self._streams(model)
        taken: list[Taken] = []
        for stream in streams:
            if len(taken) < count:
                taken += await self._read(model, instance_id, [stream], count - len(taken), None)
        if not taken and block_ms > 0:
            taken = await self._read(model, instance_id, streams, 1, block_ms)
        return taken

    async def _read(
        self, model: str, instance_id: str, streams: list[str], count: int, block_ms: int | None
    ) -> list[Taken]:
        wanted: dict[Any, Any] = dict.fromkeys(streams, ">")
        try:
            answer = await self._redis.xreadgroup(GROUP, instance_id, wanted, count=count, block=block_ms)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            await self._make_groups(model)
            return []
        taken = []
        for stream, entries in stream_items(answer).items():
            for entry_id, fields in entries:
                ticket = Ticket(stream.decode(), entry_id.decode())
                try:
                    taken.append(Taken(ticket, agent_pb2.QueuedRequest.FromString((fields or {})[b"request"])))
                except (DecodeError, KeyError) as error:
                    _log.error("dropped an entry that is not a request", ticket=ticket, error=repr(error))
                    await self.done(ticket)
        return taken

    async def _make_groups(self, model: str) -> None:
        for stream in self._streams(model):
            try:
                await self._redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def done(self, ticket: Ticket) -> None:
        """Forgets an entry: its request has ended, was withdrawn, or was put back under another ticket."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xack(ticket.stream, GROUP, ticket.entry_id)
            pipe.xdel(ticket.stream, ticket.entry_id)
            await pipe.execute()

    async def missing(self, tickets: Iterable[Ticket]) -> set[Ticket]:
        """Those whose entries are not there any more, neither taken nor waiting."""
        asked, missing = list(tickets), set[Ticket]()
        for first in range(0, len(asked), _LOOKED_FOR):
            some = asked[first : first + _LOOKED_FOR]
            answer: bytes = await self._missing(
                keys=[ticket.stream for ticket in some], args=[ticket.entry_id for ticket in some]
            )
            missing.update(some[int(place)] for place in answer.split())
        return missing

    async def held(self, model: str, instance_ids: Collection[str]) -> list[Ticket]:
        """The entries that these instances have taken and not said `done` for."""
        held = []
        for stream in self._streams(model):
            for instance_id in instance_ids:
                try:
                    pending: Any = await self._redis.xpending_range(stream, GROUP, "-", "+", 10_000, instance_id)
                except ResponseError as error:
                    if not str(error).startswith("NOGROUP"):
                        raise
                    continue
                held += [Ticket(stream, item["message_id"].decode()) for item in pending]
        return held

    async def release(self, model: str, instance_id: str, keep: Collection[Ticket]) -> int:
        """Puts back what an instance took from Redis but never started (its reading was cut off), except `keep`.

        Returns how many entries were put back.
        """
        released = 0
        for ticket in await self.held(model, [instance_id]):
            if ticket in keep:
                continue
            entries: Any = await self._redis.xrange(ticket.stream, ticket.entry_id, ticket.entry_id)
            async with self._redis.pipeline(transaction=True) as pipe:
                for _, fields in entries:
                    pipe.xadd(ticket.stream, fields)
                pipe.xack(ticket.stream, GROUP, ticket.entry_id)
                pipe.xdel(ticket.stream, ticket.entry_id)
                await pipe.execute()
            released += len(entries)
        return released

    async def leave(self, model: str, instance_id: str) -> None:
        """Takes an instance that has ended out of the group, except where entries are still its: `held` finds those."""
        for stream in self._streams(model):
            try:
                if not await self._redis.xpending_range(stream, GROUP, "-", "+", 1, instance_id):
                    await self._redis.xgroup_delconsumer(stream, GROUP, instance_id)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise

    async def readers(self, models: Iterable[str]) -> dict[str, set[str]]:
        """The instances that each model's group of readers has, those included that ended without `leave`."""
        names = list(models)
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                for stream in self._streams(name):
                    pipe.xinfo_consumers(stream, GROUP)
            answers = iter(await pipe.execute(raise_on_error=False))
        found: dict[str, set[str]] = {name: set() for name in names}
        for name in names:
            for _ in _PRIORITIES:
                answer = next(answers)
                if not isinstance(answer, Exception):
                    found[name] |= {reader["name"].decode() for reader in answer}
                elif not str(answer).startswith(("NOGROUP", "no such key")):  # nobody has put or read anything yet
                    raise answer
        return found

    async def expel(self, model: str, instance_id: str) -> int:
        """Forgets what an instance has taken that ended without a word, and the instance; returns how many entries.

        Routers put back what they wait for: see services/router/recovery.py.
        """
        held = await self.held(model, [instance_id])
        for ticket in held:
            await self.done(ticket)
        await self.leave(model, instance_id)
        return len(held)

    async def waiting(self, model: str) -> int:
        """Entries in the model's streams that no instance has taken."""
        return (await self.counts([model]))[model].waiting

    async def counts(self, models: Iterable[str]) -> dict[str, QueueCounts]:
        """How many entries each model's streams have, in one round trip per few models."""
        names, counts = list(models), dict[str, QueueCounts]()
        for first in range(0, len(names), _COUNTED):
            some = names[first : first + _COUNTED]
            answer: bytes = await self._count(keys=[key for name in some for key in self._streams(name)], args=[GROUP])
            numbers, size = list(map(int, answer.split())), 2 * len(_PRIORITIES)
            for position, name in enumerate(some):
                own = numbers[size * position :][:size]
                length, taken = sum(own[0::2]), sum(own[1::2])
                counts[name] = QueueCounts(max(length - taken, 0), taken)
        return counts

    async def drop(self, model: str) -> None:
        """Deletes the streams of a model that is gone."""
        await self._redis.delete(*self._streams(model))
