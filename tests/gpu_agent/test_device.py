"""Which device an agent takes, how much of it, and which of its errors end the process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ByteSize, ValidationError

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.host import HostMemory
from services.gpu_agent.device import (
    Device,
    DeviceUnavailable,
    is_fatal,
    open_backend,
    open_device,
    open_host_tier,
    plan_sizes,
)
from services.gpu_agent.settings import GpuAgentSettings
from services.gpu_agent.weights.host_image import Pin
from warmserve.v1 import common_pb2

MIB = 1 << 20
GIB = 1 << 30
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@NO_GPU
def test_without_a_gpu_the_agent_computes_on_the_host() -> None:
    device = open_device(GpuAgentSettings(arena_bytes="8MiB"))
    assert (device.backend, device.device.type) == (common_pb2.BACKEND_HOST, "cpu")
    assert (device.memory.page_bytes, device.memory.num_pages) == (MIB, 8)
    assert device.workspace_bytes == 0
    assert device.device_name
    device.memory.close()


@NO_GPU
def test_a_gpu_that_was_asked_for_and_is_not_there_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DeviceUnavailable, match=r"torch finds no CUDA device; .*configure backend=host"):
        open_device(GpuAgentSettings(backend="cuda", arena_bytes="8MiB"))


def test_a_host_arena_that_is_too_large_is_an_error_with_numbers() -> None:
    with pytest.raises(DeviceUnavailable, match=r"arena of 1073741824 MiB .* configure a smaller arena"):
        open_device(GpuAgentSettings(backend="host", arena_bytes="1PiB", page_bytes="1GiB"))


def test_an_arena_smaller_than_a_page_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than one page"):
        GpuAgentSettings(arena_bytes="1MiB", page_bytes="2MiB")
    with pytest.raises(DeviceUnavailable, match="at least one page"):
        open_device(GpuAgentSettings(backend="host", arena_bytes="64KiB"))


@pytest.mark.parametrize(
    ("settings", "free", "page", "arena", "workspace"),
    [
        ({}, 79 * GIB, 32 * MIB, 79 * GIB - 4 * GIB - 256 * MIB, 4 * GIB),
        ({}, 23 * GIB, 16 * MIB, 23 * GIB - 23 * GIB // 16 - 256 * MIB, 23 * GIB // 16),
        ({"arena_bytes": "94MiB"}, 79 * GIB, 2 * MIB, 94 * MIB, 512 * MIB),
        ({"arena_bytes": "1GiB"}, 79 * GIB, 2 * MIB, GIB, 512 * MIB),
        ({"arena_bytes": "16GiB", "workspace_bytes": "2GiB"}, 79 * GIB, 16 * MIB, 16 * GIB, 2 * GIB),
        ({"arena_bytes": "16GiB", "page_bytes": "64MiB"}, 79 * GIB, 64 * MIB, 16 * GIB, GIB),
    ],
)
def test_how_a_gpu_is_divided(settings: dict[str, str], free: int, page: int, arena: int, workspace: int) -> None:
    sizes = plan_sizes(GpuAgentSettings(**settings), free, 2 * MIB)
    assert (sizes.page_bytes, sizes.workspace_bytes) == (page, workspace)
    assert 0 <= arena - sizes.num_pages * page < page


@pytest.mark.parametrize(
    ("settings", "free", "message"),
    [
        ({}, 700 * MIB, r"700 MiB free, of which 512 go to the workspace .* too little for one page of 2"),
        (
            {"arena_bytes": "8GiB"},
            8 * GIB,
            r"leaves 7424 for the arena, too little for the 8192 asked for; .*arena_bytes",
        ),
        ({"arena_bytes": "1MiB"}, 8 * GIB, r"too little for one page of 2"),
    ],
)
def test_too_little_of_a_gpu_is_refused_with_the_numbers(settings: dict[str, str], free: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sizes(GpuAgentSettings(**settings), free, 2 * MIB)


@given(
    free=st.integers(0, 200 * GIB),
    arena=st.none() | st.integers(1, 200 * GIB),
    workspace=st.none() | st.integers(1, 20 * GIB),
)
def test_what_is_divided_is_there(free: int, arena: int | None, workspace: int | None) -> None:
    settings = GpuAgentSettings(arena_bytes=arena, workspace_bytes=workspace)
    try:
        sizes = plan_sizes(settings, free, 2 * MIB)
    except ValueError:
        return
    taken = sizes.num_pages * sizes.page_bytes
    assert sizes.num_pages >= 1
    assert sizes.page_bytes % (2 * MIB) == 0
    assert taken + sizes.workspace_bytes < free
    if arena is not None:
        assert arena - sizes.page_bytes < taken <= arena


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_which_errors_end_the_process(error: Exception, fatal: bool) -> None:
    assert is_fatal(error) is fatal


_FATAL_FAULT = """
import torch
from services.gpu_agent.device import is_fatal
if KIND == "assert":
    touch = lambda: torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]
else:
    from services.gpu_agent.arena.arena import Arena
    from services.gpu_agent.arena.cuda import CudaMemory
    weights = Arena(CudaMemory(2 << 20, 2, 0)).add_weights("m", 2 << 20)
    tensor = weights.tensor(torch.float32, (8,), 0)  # nothing is resident
    touch = lambda: tensor + 1
for _ in range(2):  # and it stays so
    try:
        touch()
        torch.cuda.synchronize()
    except Exception as error:
        assert is_fatal(error), repr(error)
    else:
        raise SystemExit("there was no error")
print("fatal")
"""


def _with_pin(pin: Pin) -> Device:
    memory = HostMemory(1 << 16, 2)
    return Device(common_pb2.BACKEND_CUDA, memory.device, "a GPU", memory, pin, 0)


def test_a_host_tier_that_the_gpu_cannot_register_is_refused_at_start(tmp_path: Path) -> None:
    """As CUDA does with files of a disk; without the check, every load would fail."""

    def refuse(address: int, nbytes: int) -> Callable[[], None]:
        raise RuntimeError("CUDA error: invalid argument")

    settings = GpuAgentSettings(host_tier_dir=tmp_path / "tier", host_tier_bytes="1MiB")
    with pytest.raises(DeviceUnavailable, match=r"host_tier_dir .*tier cannot be .*configure .* /dev/shm or another"):
        open_host_tier(settings, _with_pin(refuse))
    none = settings.model_copy(update={"host_tier_bytes": ByteSize(0)})
    assert open_host_tier(none, _with_pin(refuse)).budget_bytes == 0


def test_the_page_that_is_registered_to_see_whether_it_works_is_given_back(tmp_path: Path) -> None:
    registered: list[int] = []

    def pin(address: int, nbytes: int) -> Callable[[], None]:
        registered.append(nbytes)
        return registered.clear

    tier = open_host_tier(GpuAgentSettings(host_tier_dir=tmp_path, host_tier_bytes="1MiB"), _with_pin(pin))
    assert registered == []
    tier.close()
    assert not [path for path in tmp_path.iterdir() if path.name[0] != "."]


@pytest.mark.gpu
@pytest.mark.usefixtures("own_memory")
def test_a_file_of_a_disk_cannot_be_registered_and_one_of_a_tmpfs_can() -> None:
    device = open_device(GpuAgentSettings(arena_bytes="94MiB"))
    with tempfile.TemporaryDirectory(dir=Path.home()) as disk, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        with pytest.raises(DeviceUnavailable, match="must be in a memory file system"):
            open_host_tier(GpuAgentSettings(host_tier_dir=Path(disk), host_tier_bytes="1GiB"), device)
        open_host_tier(GpuAgentSettings(host_tier_dir=Path(memory), host_tier_bytes="1GiB"), device).close()
    device.memory.close()


@pytest.mark.gpu
@pytest.mark.usefixtures("own_memory")
def test_a_workspace_that_is_too_small_is_refused_and_leaves_the_device_usable() -> None:
    device = open_device(GpuAgentSettings(arena_bytes="94MiB", workspace_bytes="176MiB"))
    with pytest.raises(DeviceUnavailable, match="configure a larger workspace_bytes"):
        open_backend(device, Arena(device.memory), 64)
    torch.cuda.synchronize()  # refused where a capture is left behind
    device.memory.close()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["assert", "fault"])
def test_what_kills_cudas_context_is_fatal(kind: str) -> None:
    program = f"KIND = {kind!r}\n{_FATAL_FAULT}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert "fatal" in ended.stdout, ended.stderr


_BOUNDED = """
import torch
from services.gpu_agent.device import is_fatal, open_device
from services.gpu_agent.settings import GpuAgentSettings
device = open_device(GpuAgentSettings(arena_bytes="94MiB", device_index=INDEX))
assert device.memory.page_bytes == 2 << 20 and device.memory.num_pages == 47
assert device.workspace_bytes == 512 << 20
assert device.device.index == INDEX % torch.cuda.device_count()
kept = torch.empty(200 << 20, dtype=torch.uint8, device=device.device)
assert 200 << 20 <= torch.cuda.memory_reserved(device.device) <= device.workspace_bytes
try:
    torch.empty(400 << 20, dtype=torch.uint8, device=device.device)
except torch.OutOfMemoryError as error:
    assert not is_fatal(error)
else:
    raise SystemExit("the workspace is not bounded")
print("bounded", flush=True)
input()
"""


@pytest.mark.gpu
def test_two_small_agents_share_one_gpu_each_within_its_bounds() -> None:
    agents = [
        subprocess.Popen(
            [sys.executable, "-c", f"INDEX = {index}\n{_BOUNDED}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in (0, torch.cuda.device_count())
    ]
    try:
        for agent in agents:
            assert agent.stdout is not None
            assert any("bounded" in line for line in agent.stdout)  # while the other one has its memory too
    finally:
        for agent in agents:
            agent.communicate("\n", timeout=60)
    assert [agent.returncode for agent in agents] == [0, 0]
