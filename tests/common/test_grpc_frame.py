"""The frame that every service stands in, shown on a small service in a process of its own, over real sockets."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from launcher import backing
from launcher.backing import Backing
from launcher.children import Child
from launcher.ports import free_port
from services.common.grpc_frame import channel
from services.common.process import make_node
from services.common.settings import ServiceSettings
from tests.common.example_service import SECRET
from warmserve.v1 import inference_pb2, inference_pb2_grpc, placement_pb2, placement_pb2_grpc


class Example:
    """The example service as a child process."""

    def __init__(self, folder: Path, etcd: str, redis: str, **settings: object) -> None:
        self.address = f"127.0.0.1:{settings.get('port', 0)}"
        variables = {"etcd_endpoints": etcd, "redis_url": f"redis://{redis}/0", "prefix": f"test-{folder.name}"}
        self.child = Child(
            "example",
            [sys.executable, "-m", "tests.common.example_service"],
            folder / "example.log",
            {f"WARMSERVE_{name.upper()}": str(value) for name, value in (variables | settings).items()},
        )

    def log(self) -> list[dict[str, Any]]:
        """What it has logged so far; gRPC's core writes lines of its own, which are left out."""
        return [json.loads(line) for line in self.child.log.read_text().splitlines() if line.startswith("{")]

    async def logged(self, event: str) -> dict[str, Any]:
        """The first log line of an event, as soon as it is there. Raises ChildFailedError where the process ends."""
        while True:
            for line in self.log():
                if line["event"] == event:
                    return line
            self.child.check()
            await asyncio.sleep(0.02)

    def ended(self) -> int:
        """Waits for the end; returns the status."""
        return self.child.process.wait(30)


@pytest.fixture(scope="module")
def example(etcd: Backing, redis_server: Backing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    running = Example(tmp_path_factory.mktemp("example"), etcd.address, redis_server.address)
    line = asyncio.run(running.logged("serving"))
    running.address = line["address"]
    yield running
    running.child.stop(5)


async def wake(example: Example, wish: str, request_id: str | None = None) -> placement_pb2.WakeModelResponse:
    metadata = (("x-request-id", request_id),) if request_id else ()
    async with channel(example.address) as connection:
        stub = placement_pb2_grpc.PlacementServiceStub(connection)
        return await stub.WakeModel(placement_pb2.WakeModelRequest(model=wish), metadata=metadata)


@pytest.mark.parametrize("serves", [True, False])
async def test_what_a_failed_start_leaves_open_is_closed(etcd: Backing, serves: bool) -> None:
    node = make_node(ServiceSettings(etcd_endpoints=[etcd.address]), asyncio.Event())
    if serves:
        await node.server.start()
        await node.server.set_serving(True)
    await node.close()
    async with channel(node.server.address or f"127.0.0.1:{free_port()}") as connection:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health_pb2_grpc.HealthStub(connection).Check(health_pb2.HealthCheckRequest())
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_status_error_reaches_the_caller(example: Example) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await wake(example, "refuse")
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert refused.value.details() == "there is no such model; did you mean 'a'?"


async def test_a_crash_is_internal_and_only_the_log_tells_more(example: Example) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as crashed:
        await wake(example, "crash", "the-crash")
    assert crashed.value.code() == grpc.StatusCode.INTERNAL
    assert "request id the-crash" in (crashed.value.details() or "")
    told = f"{crashed.value.details()} {crashed.value.debug_error_string()} {crashed.value.trailing_metadata()}"
    assert SECRET not in told
    assert "Traceback" not in told
    [line] = [line for line in example.log() if line["event"] == "call failed" and line["request_id"] == "the-crash"]
    assert SECRET in line["exception"]
    assert "Traceback" in line["exception"]
    assert line["method"] == "/warmserve.v1.PlacementService/WakeModel"


@pytest.mark.parametrize(("wish", "code"), [("refuse", grpc.StatusCode.NOT_FOUND), ("crash", grpc.StatusCode.INTERNAL)])
async def test_a_stream_that_fails_keeps_what_was_sent(wish: str, code: grpc.StatusCode, example: Example) -> None:
    async with channel(example.address) as connection:
        stub = inference_pb2_grpc.InferenceServiceStub(connection)
        call = stub.Generate(inference_pb2.GenerateRequest(model=wish))
        assert (await call.read()).delta.text == "first"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
    assert failed.value.code() == code
    assert SECRET not in (failed.value.details() or "")


async def test_a_crash_harms_no_other_call(example: Example) -> None:
    outcomes = await asyncio.gather(*(wake(example, wish) for wish in ["crash", "fine"] * 10), return_exceptions=True)
    assert [isinstance(outcome, grpc.aio.AioRpcError) for outcome in outcomes] == [True, False] * 10


async def test_log_lines_carry_the_callers_request_id_or_one_of_their_own(example: Example) -> None:
    await asyncio.gather(*(wake(example, f"wish {number}", f"id-{number}") for number in range(20)))
    await asyncio.gather(wake(example, "nameless 1"), wake(example, "nameless 2"))
    ids = {line["wish"]: line["request_id"] for line in example.log() if line["event"] == "asked"}
    assert [ids[f"wish {number}"] for number in range(20)] == [f"id-{number}" for number in range(20)]
    assert len({ids["nameless 1"], ids["nameless 2"]}) == 2
    assert len(ids["nameless 1"]) >= 16


async def test_what_a_service_does_not_serve_is_unimplemented(example: Example) -> None:
    async with channel(example.address) as connection:
        stub = inference_pb2_grpc.InferenceServiceStub(connection)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListModels(inference_pb2.ListModelsRequest())
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_health_is_told_of_the_whole_and_of_each_service(example: Example) -> None:
    async with channel(example.address) as connection:
        stub = health_pb2_grpc.HealthStub(connection)
        for service in ("", "warmserve.v1.InferenceService", "warmserve.v1.PlacementService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.Check(health_pb2.HealthCheckRequest(service="warmserve.v1.AgentService"))
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services_and_describes_them(example: Example) -> None:
    async def questions() -> Any:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="warmserve.v1.PlacementService")

    async with channel(example.address) as connection:
        stub = reflection_pb2_grpc.ServerReflectionStub(connection)
        listed, described = [answer async for answer in stub.ServerReflectionInfo(questions())]
    names = {service.name for service in listed.list_services_response.service}
    assert names >= {"warmserve.v1.InferenceService", "warmserve.v1.PlacementService", "grpc.health.v1.Health"}
    assert described.file_descriptor_response.file_descriptor_proto


async def test_metrics_are_served_where_the_log_says(example: Example) -> None:
    url = (await example.logged("starting"))["metrics"]
    async with httpx.AsyncClient() as client:
        assert "process_cpu_seconds_total" in (await client.get(url)).text


async def test_a_port_in_use_is_a_readable_end(
    example: Example, etcd: Backing, redis_server: Backing, tmp_path: Path
) -> None:
    port = example.address.rpartition(":")[2]
    second = Example(tmp_path, etcd.address, redis_server.address, port=port)
    assert second.ended() == 1
    [line] = [line for line in second.log() if line["level"] == "error"]
    assert f"127.0.0.1:{port}" in line["error"]
    assert "another process" in line["error"]
    assert "Traceback" not in second.child.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_refuses_new_calls_lets_running_ones_finish_and_ends_with_0(
    number: signal.Signals, etcd: Backing, redis_server: Backing, tmp_path: Path
) -> None:
    stopping = Example(tmp_path, etcd.address, redis_server.address)
    stopping.address = (await stopping.logged("serving"))["address"]
    async with channel(stopping.address) as connection:
        stub = inference_pb2_grpc.InferenceServiceStub(connection)
        call = stub.Generate(inference_pb2.GenerateRequest(model="until stop"))
        assert (await call.read()).delta.text == "first"
        stopping.child.process.send_signal(number)
        assert (await call.read()).delta.text == "last"
        assert await call.read() is grpc.aio.EOF
    assert await asyncio.to_thread(stopping.ended) == 0
    assert stopping.log()[-1]["event"] == "stopped"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await wake(stopping, "fine")
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_without_etcd_it_waits_and_says_so(redis_server: Backing, tmp_path: Path) -> None:
    port, peer_port = free_port(), free_port()
    early = Example(tmp_path, f"127.0.0.1:{port}", redis_server.address)
    waiting = await early.logged("waiting for etcd")
    assert waiting["endpoints"] == [f"127.0.0.1:{port}"]
    assert str(port) in waiting["error"]
    etcd = await asyncio.to_thread(backing.etcd(tmp_path / "data", tmp_path / "etcd.log", port, peer_port).wait)
    try:
        early.address = (await early.logged("serving"))["address"]
        await wake(early, "fine")
        early.child.terminate()
        assert await asyncio.to_thread(early.ended) == 0
    finally:
        early.child.stop(5)
        etcd.child.stop(5)


async def test_a_stop_while_it_waits_for_etcd_ends_with_0(redis_server: Backing, tmp_path: Path) -> None:
    early = Example(tmp_path, f"127.0.0.1:{free_port()}", redis_server.address)
    await early.logged("waiting for etcd")
    early.child.terminate()
    assert await asyncio.to_thread(early.ended) == 0


async def healthcheck(*arguments: str) -> tuple[int, str]:
    """Status and stderr of the containers' health check."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.common.healthcheck", *arguments, stderr=asyncio.subprocess.PIPE
    )
    _, printed = await process.communicate()
    return process.returncode or 0, printed.decode()


async def test_the_containers_health_check_passes_only_where_the_service_serves(example: Example) -> None:
    assert await healthcheck(example.address) == (0, "")
    status, printed = await healthcheck(f"127.0.0.1:{free_port()}")
    assert status == 1
    assert "UNAVAILABLE" in printed
    assert "Traceback" not in printed
    assert (await healthcheck())[0] != 0
