"""The router as a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from launcher.children import Child
from launcher.ports import free_port
from services.common.grpc_frame import channel
from tests.router.conftest import ANSWER, Cluster, gathered, status_of
from tests.router.peers import until
from warmserve.v1 import cluster_pb2, inference_pb2, inference_pb2_grpc

NO_TORCH = """
import sys
from services.router.__main__ import main
from services.router.tokenizers import ModelTokenizer
assert ModelTokenizer(sys.argv[1]).encode("hello", "prompt")
assert not [name for name in sys.modules if name.split(".")[0] == "torch" and sys.modules[name] is not None]
"""


def test_the_router_does_not_import_torch(tokenizer_folder: Path) -> None:
    subprocess.run([sys.executable, "-c", NO_TORCH, str(tokenizer_folder)], check=True, timeout=120)


def test_settings_that_are_wrong_are_told() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "services.router", "--http-port", "99999", "--max-requests", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 2
    assert "--http-port" in ended.stderr
    assert "--max-requests" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_life_from_start_to_sigterm(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.deploy()
    agent = await cluster.agent()
    agent.hold_at = 5
    await agent.activate("m")
    http_port, metrics_port = free_port(), free_port()
    child = Child(
        "router",
        [sys.executable, "-m", "services.router", "--id", "r9", "--http-port", str(http_port)],
        tmp_path / "log",
        {
            "WARMSERVE_ETCD_ENDPOINTS": cluster._etcd,
            "WARMSERVE_REDIS_URL": cluster.redis_url,
            "WARMSERVE_PREFIX": cluster.keys.prefix,
            "WARMSERVE_METRICS_PORT": str(metrics_port),
            "WARMSERVE_GRACE_S": "20",
        },
    )
    try:

        async def registered() -> bool:
            child.check()
            return await cluster.store.get(cluster.keys.router("r9"), cluster_pb2.RouterRecord) is not None

        await until(registered, "its record", timeout_s=60)
        entry = await cluster.store.get(cluster.keys.router("r9"), cluster_pb2.RouterRecord)
        assert entry is not None
        assert entry.value.http_url == f"http://127.0.0.1:{http_port}"
        async with channel(entry.value.address) as connection:
            await _live_and_stop(cluster, agent, child, entry.value, connection, metrics_port)
    finally:
        child.stop(5)
    assert "Traceback" not in (tmp_path / "log").read_text()


async def _live_and_stop(cluster, agent, child, record, connection, metrics_port) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(connection)
    health = health_pb2_grpc.HealthStub(connection)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    request = inference_pb2.GenerateRequest(model="m", prompt="x")
    running = asyncio.create_task(gathered(stub.Generate(request)))
    await until(lambda: agent.running == 1, "a request runs")

    os.kill(child.process.pid, signal.SIGTERM)
    async with openai.AsyncOpenAI(base_url=f"{record.http_url}/v1", api_key="x", max_retries=0) as client:

        async def refused() -> bool:
            try:
                await client.completions.create(model="m", prompt="x", timeout=1)
            except openai.APITimeoutError:
                return False  # taken before the signal was
            except openai.InternalServerError as error:
                return error.status_code == 503 and "retry-after" in error.response.headers
            return False

        await until(refused, "new requests are refused")
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{record.http_url}/health")).status_code == 503
        metrics = (await http.get(f"http://127.0.0.1:{metrics_port}/metrics")).text
    code, _ = await status_of(stub.Generate(request))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await cluster.store.get(cluster.keys.router("r9"), cluster_pb2.RouterRecord) is None
    assert 'warmserve_router_requests_in_progress{model="m"} 1.0' in metrics
    agent.go.set()
    text, *_ = await running  # what ran is finished
    assert text == ANSWER
    await until(lambda: not child.running, "the process has ended")
    assert child.process.returncode == 0


async def test_what_is_left_after_the_grace_period_ends_with_unavailable(cluster: Cluster) -> None:
    await cluster.deploy()
    agent = await cluster.agent()
    agent.hold_at = 5
    router = await cluster.router(grace_s=0.2)
    waiting = router.generate()
    await anext(aiter(waiting))
    stream = await router.openai.completions.create(model="m", prompt="x", stream=True)
    router.stop.set()
    code, message = await status_of(waiting)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "stopping" in message
    with pytest.raises(openai.APIError, match="stopping"):
        async for _ in stream:
            pass
    await router.task
    assert await cluster.queue_is_empty()


async def test_a_port_that_is_taken_is_told(cluster: Cluster) -> None:
    router = await cluster.router()
    port = int(router.record.http_url.rpartition(":")[2])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        await cluster.router(id="r1", http_port=port)


async def test_metrics_count_what_happened(cluster: Cluster) -> None:
    model = f"metered-{cluster.keys.prefix}"
    await cluster.deploy(model)
    agent = await cluster.agent()
    await agent.activate(model)
    router = await cluster.router()
    await gathered(router.generate(model))
    await status_of(router.generate(model, max_tokens=10_000))

    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(f"warmserve_router_{name}", {"model": model, **labels})

    await until(lambda: value("requests_total", outcome="stop", found_state="active") == 1, "the answer is counted")
    assert value("requests_total", outcome="refused", found_state="") == 1
    assert value("ttft_seconds_count", found_state="active") == 1
    assert value("queue_seconds_count", found_state="active") == 1
    assert value("output_tokens_total") == len(cluster.answer)
    assert value("requests_in_progress") == 0
