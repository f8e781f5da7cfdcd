"""A deadline that passes while an agent waits for weights: the work there ends too, and the next request is served."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from launcher.backing import Backing
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import REASON, RunningAgent, running_agent
from tests.gpu_agent.test_agent_arrival import Halt, halt  # noqa: F401  # a fixture
from tests.router.conftest import Cluster, gathered, status_of
from tests.router.peers import make_tokenizer, until
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, common_pb2, inference_pb2

DEADLINE_S = 4.0


async def shows_running(agent: RunningAgent, count: int) -> None:
    """Returns once etcd shows an instance with so many sequences."""

    def there(_: object) -> bool:
        shard = agent.shard("m")
        return shard is not None and bool(shard.instance_id) and shard.running == count

    await asyncio.wait_for(agent.residency.wait_for(there), 30)


async def test_the_agent_drops_it(
    cluster: Cluster,
    etcd: Backing,
    redis_server: Backing,
    keys: Keys,
    tmp_path: Path,
    halt: Halt,  # noqa: F811
) -> None:
    checkpoints.llama(tmp_path / "m")
    make_tokenizer(tmp_path / "m")
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        try:
            spec = await agent.prepare("m", tmp_path / "m")
            await cluster.store.put(cluster.keys.model("m"), spec)
            router = await cluster.router()
            order = agent_pb2.WakeReplicaRequest(spec=spec, group=agent.group, reason=REASON)
            await agent.stub.WakeReplica(order)
            await shows_running(agent, 0)
            late = asyncio.create_task(status_of(router.generate(timeout=DEADLINE_S)))
            await shows_running(agent, 1)
            code, _ = await late
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            await shows_running(agent, 0)
            shard = agent.shard("m")
            assert shard is not None
            assert shard.state == common_pb2.REPLICA_STATE_WARMING  # the weights are still on their way
            await until(cluster.queue_is_empty, "nothing is left in the queue")
            following = asyncio.create_task(gathered(router.generate(max_tokens=3, ignore_eos=True)))
            await shows_running(agent, 1)
            halt.go_on.set()
            _, tokens, finished, _ = await following
            assert len(tokens) == 3
            assert finished.reason == inference_pb2.FINISH_REASON_LENGTH
        finally:
            halt.go_on.set()
