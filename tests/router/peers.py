"""The router's peers for its tests: agents and a placer that speak the real protocol, with scripted tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from redis.asyncio import Redis
from redis.exceptions import RedisError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from services.common.grpc_frame import channel
from services.common.queues import RequestQueue, Taken
from services.common.session import Session
from services.common.tasks import end_tasks
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    cluster_pb2,
    common_pb2,
    inference_pb2,
    placement_pb2,
    placement_pb2_grpc,
)

TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve café, 日本語, 🙂🙃! " * 4
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}{{ raise_exception('system must come first') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Tokenizer:
    """Trains a small byte-level BPE and saves it as a checkpoint's folder holds it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ascii_text = TEXT.encode("ascii", "ignore").decode()  # so that other characters take several tokens
    tokenizer.train_from_iterator(
        [ascii_text], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float = 20.0) -> None:
    """Waits for a condition; fails the test where it does not come."""
    deadline = time.monotonic() + timeout_s
    while True:
        holds = condition()
        if not isinstance(holds, bool):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < deadline, f"did not come about: {what}"
        await asyncio.sleep(0.01)


def logprob(request: agent_pb2.QueuedRequest, token: int, offset: int) -> inference_pb2.TokenLogprob:
    """What a PeerAgent says of a token: -offset, and the tokens from itself on as alternatives."""
    top = [
        inference_pb2.TopLogprob(token_id=token + i, logprob=-offset - 0.5 * i)
        for i in range(request.sampling.logprobs)
    ]
    return inference_pb2.TokenLogprob(token_id=token, logprob=-offset, top=top)


class _Link:
    """An agent's relay stream to one router."""

    def __init__(self, agent_id: str, address: str, on_cancel: Callable[[str], None]) -> None:
        self._channel = channel(address)
        self._outgoing: asyncio.Queue[agent_pb2.RelayRequest] = asyncio.Queue()
        self._outgoing.put_nowait(agent_pb2.RelayRequest(hello=agent_pb2.RelayHello(agent_id=agent_id)))
        self.call = agent_pb2_grpc.TokenRelayServiceStub(self._channel).Relay(self._messages())
        self._reader = asyncio.create_task(self._read(on_cancel))

    async def _messages(self) -> AsyncIterator[agent_pb2.RelayRequest]:
        while True:
            yield await self._outgoing.get()

    async def _read(self, on_cancel: Callable[[str], None]) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for response in self.call:
                for request_id in response.cancel_request_ids:
                    on_cancel(request_id)

    def send(self, *updates: agent_pb2.SequenceUpdate) -> None:
        self._outgoing.put_nowait(agent_pb2.RelayRequest(step=agent_pb2.RelayStep(updates=updates)))

    async def close(self) -> None:
        self.call.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close(None)


class PeerAgent:
    """Pulls from the real queue and relays scripted tokens; can be held, and can die."""

    def __init__(self, agent_id: str, store: Store, keys: Keys, redis: Redis, answer: Sequence[int]) -> None:
        self.id = agent_id
        self.answer = list(answer)
        self.taken: list[agent_pb2.QueuedRequest] = []
        self.cancelled: list[str] = []
        self.report = True  # False: takes requests and says nothing
        self.hold_at: int | None = None  # offset before which sequences wait for `go`
        self.go = asyncio.Event()
        self.drops_at = -1  # the token at which it drops a first attempt without being asked
        self.finish = inference_pb2.FINISH_REASON_STOP
        self.error = ""
        self.error_reason = inference_pb2.FINISH_REASON_ERROR
        self.sends_logprobs = True
        self.answer_to: Callable[[agent_pb2.QueuedRequest], Sequence[int]] = lambda request: self.answer
        self.links: dict[str, _Link] = {}
        self._keys = keys
        self._queue = RequestQueue(redis, keys)
        self._session = Session(store, 2)
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._sequences: dict[str, asyncio.Task[None]] = {}
        self._records: dict[str, cluster_pb2.InstanceRecord] = {}

    async def start(self) -> None:
        await self._session.start()
        await self._session.put(
            self._keys.agent(self.id), cluster_pb2.AgentRecord(id=self.id, node="n0", page_bytes=1 << 20)
        )

    async def tell_residency(
        self, model: str, state: common_pb2.ReplicaState.ValueType, pages_kv_most: int = 0
    ) -> None:
        shard = cluster_pb2.ResidentShard(
            model=model,
            state=state,
            group=common_pb2.Group(agent_ids=[self.id]),
            instance_id=f"{self.id}-{model}" if pages_kv_most else "",
            pages_kv_most=pages_kv_most,
        )
        record = cluster_pb2.AgentResidency(agent_id=self.id, shards=[shard])
        await self._session.put(self._keys.residency(self.id), record)

    async def activate(self, model: str) -> str:
        instance_id = f"{self.id}-{model}"
        record = cluster_pb2.InstanceRecord(
            id=instance_id,
            model=model,
            group=common_pb2.Group(agent_ids=[self.id], node="n0"),
            state=common_pb2.REPLICA_STATE_ACTIVE,
            slots=8,
        )
        self._records[model] = record
        await self._session.put(self._keys.instance(model, instance_id), record)
        self.start_pulling(model)
        return instance_id

    def start_pulling(self, model: str) -> None:
        self._pulls[model] = asyncio.create_task(self._pull(model, self._records[model].id))

    async def stop_pulling(self) -> None:
        await end_tasks(self._pulls.values())

    async def _pull(self, model: str, instance_id: str) -> None:
        while True:
            try:
                taken = await self._queue.take(model, instance_id, 8, 100)
            except RedisError:
                await asyncio.sleep(0.05)
                continue
            for item in taken:
                self.taken.append(item.request)
                if self.report:
                    self.begin(item, instance_id)

    def begin(self, item: Taken, instance_id: str) -> None:
        self._sequences[item.request.request_id] = asyncio.create_task(self._sequence(item, instance_id))

    def link(self, address: str) -> _Link:
        if address not in self.links or self.links[address].call.done():
            self.links[address] = _Link(self.id, address, self._cancel)
        return self.links[address]

    def _cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        if request_id in self._sequences:
            # Not before it has begun: a task cancelled before its first step would end without a word.
            asyncio.get_running_loop().call_soon(self._sequences[request_id].cancel)

    async def _sequence(self, item: Taken, instance_id: str) -> None:
        request = item.request
        link = self.link(request.relay_address)
        head: dict[str, Any] = {
            "request_id": request.request_id,
            "attempt": request.attempt,
            "instance_id": instance_id,
        }
        try:
            link.send(agent_pb2.SequenceUpdate(**head, offset=request.generated))
            if self.error:
                link.send(agent_pb2.SequenceUpdate(**head, finish_reason=self.error_reason, error=self.error))
                return
            answer = self.answer_to(request)
            for offset in range(request.generated, len(answer)):
                if offset == self.hold_at:
                    await self.go.wait()
                last = offset == len(answer) - 1
                full = offset + 1 == request.sampling.max_tokens
                finish = self.finish if last else inference_pb2.FINISH_REASON_LENGTH if full else 0
                if offset == self.drops_at and not request.attempt:
                    finish = inference_pb2.FINISH_REASON_CANCELLED
                link.send(
                    agent_pb2.SequenceUpdate(
                        **head,
                        token_ids=[answer[offset]],
                        offset=offset,
                        finish_reason=finish,
                        logprobs=[logprob(request, answer[offset], offset)]
                        if request.sampling.HasField("logprobs") and self.sends_logprobs
                        else [],
                    )
                )
                if finish:
                    break
        except asyncio.CancelledError:
            # Heard by nobody where the agent is dying, for its streams are closed by then.
            link.send(agent_pb2.SequenceUpdate(**head, finish_reason=inference_pb2.FINISH_REASON_CANCELLED))
            raise
        finally:
            if self._sequences.get(request.request_id) is asyncio.current_task():  # and not a later attempt
                del self._sequences[request.request_id]
            with contextlib.suppress(RedisError):
                await self._queue.done(item.ticket)

    @property
    def running(self) -> int:
        return len(self._sequences)

    async def break_streams(self) -> None:
        """As after a network fault: the relay streams end, sequences are dropped, the agent lives on."""
        for task in list(self._sequences.values()):
            task.cancel()
        for link in self.links.values():
            await link.close()

    async def die(self, lease_ends: bool = True) -> None:
        """As after kill -9: nothing is said in parting. With `lease_ends`, the lease has run out as well."""
        await self.stop_pulling()
        sequences = list(self._sequences.values())
        self._queue = _DeadQueue()  # type: ignore[assignment]  # a dead agent acknowledges nothing
        for task in sequences:
            task.cancel()
        for link in self.links.values():
            await link.close()
        if lease_ends:
            await self._session.close()

    async def unregister(self) -> None:
        """Its lease ends, but it lives."""
        await self._session.close()

    async def close(self) -> None:
        await self.die()


class _DeadQueue:
    async def take(self, *_: object) -> list[Taken]:
        raise asyncio.CancelledError  # a cancellation that redis-py had swallowed

    async def done(self, ticket: object) -> None:
        return None


class PeerPlacer(placement_pb2_grpc.PlacementServiceServicer):
    """A leading placer that wakes models on one agent, or says why not."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self.calls: list[placement_pb2.WakeModelRequest] = []
        self.agent: PeerAgent | None = None  # which to wake on; None: no capacity
        self.gate = asyncio.Event()  # waking ends once this is set
        self.gate.set()
        self._keys = keys
        self._session = Session(store, 2)
        self._server = grpc.aio.server()
        self._wakes: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        placement_pb2_grpc.add_PlacementServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        await self._session.start()
        record = cluster_pb2.LeaderRecord(id="p0", address=f"127.0.0.1:{port}")
        await self._session.put(self._keys.placer_leader(), record)

    async def WakeModel(self, request: placement_pb2.WakeModelRequest, context: Any) -> Any:
        self.calls.append(request)
        if self.agent is None:
            reason = common_pb2.Reason(cause=common_pb2.CAUSE_NO_CAPACITY, text="all pages hold active models")
            return placement_pb2.WakeModelResponse(state=common_pb2.REPLICA_STATE_COLD, reason=reason)
        if request.model not in self._wakes:
            self._wakes[request.model] = asyncio.create_task(self._wake(self.agent, request.model))
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_WAITING_REQUESTS, text="requests wait")
        return placement_pb2.WakeModelResponse(
            state=common_pb2.REPLICA_STATE_WARMING, reason=reason, estimated_ms=40_000
        )

    async def _wake(self, agent: PeerAgent, model: str) -> None:
        await self.gate.wait()
        await agent.activate(model)

    async def close(self) -> None:
        for task in self._wakes.values():
            task.cancel()
        await self._session.close()
        await self._server.stop(0)
