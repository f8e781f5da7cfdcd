"""What an agent computes on: its backend, chosen by itself or by its settings, and the memory of its arena there."""

from __future__ import annotations

import errno
import mmap
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ByteSize

from services.common.telemetry import logger
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.host import HostMemory
from services.gpu_agent.arena.memory import Memory
from services.gpu_agent.engine.backend import Backend
from services.gpu_agent.engine.host import HostBackend
from services.gpu_agent.settings import GpuAgentSettings
from services.gpu_agent.weights.host_image import Pin
from services.gpu_agent.weights.host_tier import HostTier
from warmserve.v1 import common_pb2

_log = logger(__name__)

_MIB = 1 << 20
_HOST_ARENA = 1 << 30
_HOST_PAGE = 1 * _MIB
_LARGEST_PAGE = 32 * _MIB  # mapping costs twice as much in half as large pages; larger ones are too coarse to lend
_PAGES = 1024  # an arena on a GPU has about as many, or more
_WORKSPACE_SHARE = 16
_LEAST_WORKSPACE = 512 * _MIB
_MOST_WORKSPACE = 4096 * _MIB
_HOST_TIER_SHARE = 4  # of the node's memory, one in so many bytes
_CODE = 256 * _MIB  # what CUDA loads of kernels later on; it counts to no one's bound

# Of what CUDA says, this leaves its context in order: the call was refused, or did not find enough memory. After any
# other error, every later call fails too.
_HARMLESS = (
    "out of memory",
    "invalid argument",
    "invalid configuration argument",
    "invalid resource handle",
    "invalid device function",
    "too many resources requested for launch",
    "no kernel image is available",
    "operation not supported",
    "operation not permitted when stream is capturing",
    "operation failed due to a previous error during capture",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_INVALID_VALUE",
    "CUBLAS_STATUS_NOT_SUPPORTED",
)


class DeviceUnavailable(OSError):
    """The device, or as much of its memory as is needed, is not to be had; the message says what to do."""


@dataclass(frozen=True)
class Device:
    """An agent's device. The memory is taken; closing it is the arena's business."""

    backend: common_pb2.Backend.ValueType
    device: torch.device
    device_name: str
    memory: Memory
    pin: Pin | None  # registers host memory for copies; None where there is nothing to register it with
    workspace_bytes: int  # most that torch may take besides the arena; 0 where that is not bounded, on the host


def open_device(settings: GpuAgentSettings) -> Device:
    """Takes the memory that the settings ask for. Raises DeviceUnavailable. To be called once in a process."""
    backend, reason = settings.backend, "configured"
    if backend == "auto":
        found = torch.cuda.is_available()
        backend, reason = ("cuda", "CUDA has a GPU here") if found else ("host", "torch finds no CUDA device here")
    try:
        device = _open_cuda(settings) if backend == "cuda" else _open_host(settings)
    except (MemoryError, ValueError) as error:
        raise DeviceUnavailable(str(error)) from error
    except RuntimeError as error:  # how torch and CUDA's driver refuse
        raise DeviceUnavailable(f"the GPU cannot be used: {error}") from error
    _log.info(
        "device",
        backend=backend,
        because=reason,
        device=str(device.device),
        name=device.device_name,
        arena_mib=device.memory.page_bytes * device.memory.num_pages // _MIB,
        page_kib=device.memory.page_bytes // 1024,
        workspace_mib=device.workspace_bytes // _MIB,
    )
    return device


def open_host_tier(settings: GpuAgentSettings, device: Device) -> HostTier:
    """The node's images in memory. OSError where its folder cannot be used, DeviceUnavailable where the GPU cannot."""
    budget = settings.host_tier_bytes
    if budget is None:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        budget = ByteSize(physical // _HOST_TIER_SHARE if device.backend == common_pb2.BACKEND_CUDA else 0)
    if budget and device.pin is not None:
        _check_pins(settings.host_tier_dir, device.memory.page_bytes, device.pin)
    return HostTier(settings.host_tier_dir, int(budget), device.pin)


def _check_pins(folder: Path, page_bytes: int, pin: Pin) -> None:
    """Registers one page of a file in `folder`: every load would fail where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, page_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DeviceUnavailable(
                f"host_tier_dir {folder} has no room for a page of {page_bytes} bytes; give its file system more, or "
                "configure host_tier_bytes=0 to do without"
            ) from error
        page = torch.frombuffer(mmap.mmap(file.fileno(), page_bytes), dtype=torch.uint8)
        try:
            pin(page.data_ptr(), page_bytes)()
        except RuntimeError as error:
            raise DeviceUnavailable(
                f"host_tier_dir {folder} cannot be registered with the GPU: {error}. It must be in a memory file "
                "system: configure host_tier_dir in /dev/shm or another tmpfs, or host_tier_bytes=0 to do without"
            ) from error


def open_backend(device: Device, arena: Arena, max_batch: int | None) -> Backend:
    """What computes on the device; max_batch bounds the sequences of any model.

    DeviceUnavailable where the device's memory does not suffice for it.
    """
    if device.backend == common_pb2.BACKEND_HOST:
        return HostBackend(arena, max_batch)
    from services.gpu_agent.engine.cuda.backend import CudaBackend

    try:
        return CudaBackend(arena, device.device, device.workspace_bytes, max_batch)
    except torch.OutOfMemoryError as error:
        raise DeviceUnavailable(f"the workspace is too small: {error}; configure a larger workspace_bytes") from error


def is_fatal(error: BaseException) -> bool:
    """Whether an error has left CUDA's context unusable, so that only a new process can go on.

    True for a kernel that touched what it must not, a lost GPU and the like, whoever of torch, Triton or the driver
    says it; False for want of memory, for calls that CUDA refused, and for whatever is no error of CUDA's.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    text = str(error)
    from_cuda = isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "Triton Error [CUDA]" in text
    return from_cuda and not any(harmless in text for harmless in _HARMLESS)


def _open_host(settings: GpuAgentSettings) -> Device:
    page_bytes = int(settings.page_bytes or _HOST_PAGE)
    memory = HostMemory(page_bytes, int(settings.arena_bytes or _HOST_ARENA) // page_bytes)
    return Device(common_pb2.BACKEND_HOST, memory.device, _cpu_name(), memory, None, 0)


def _open_cuda(settings: GpuAgentSettings) -> Device:
    if not torch.cuda.is_available():
        raise DeviceUnavailable(
            "backend is cuda, but torch finds no CUDA device; check the driver and that this is a torch built for "
            "CUDA, or configure backend=host"
        )
    try:
        from services.gpu_agent.arena.cuda import CudaMemory, granularity
    except ImportError as error:
        raise DeviceUnavailable(
            f"backend cuda needs NVIDIA's package cuda-bindings, which cannot be imported: {error}; install it, or "
            "configure backend=host"
        ) from error
    index = _gpu_index(settings)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)  # less torch's own context, which is there by now
    sizes = plan_sizes(settings, free, granularity(index))
    # Every allocation of torch's own, graph pools and cuBLAS' workspaces included, is within this bound.
    torch.cuda.set_per_process_memory_fraction(min(1.0, sizes.workspace_bytes / total), device)
    memory = CudaMemory(sizes.page_bytes, sizes.num_pages, index)
    name = torch.cuda.get_device_name(device)
    return Device(common_pb2.BACKEND_CUDA, device, name, memory, memory.pin, sizes.workspace_bytes)


def _gpu_index(settings: GpuAgentSettings) -> int:
    count = torch.cuda.device_count()
    if settings.device_index < count:
        return settings.device_index
    if settings.arena_bytes is None:
        raise DeviceUnavailable(
            f"device_index is {settings.device_index}, but there are {count} GPUs, counted from 0; for several agents "
            "on one GPU give each its arena_bytes"
        )
    return settings.device_index % count


@dataclass(frozen=True)
class Sizes:
    """How a GPU's memory is divided, in bytes."""

    page_bytes: int
    num_pages: int
    workspace_bytes: int


def plan_sizes(settings: GpuAgentSettings, free: int, granularity: int) -> Sizes:
    """Divides `free` bytes of a GPU, whose pages are multiples of `granularity`, as the settings ask. Pure.

    Raises ValueError where it is not enough, with the numbers.
    """
    wanted = None if settings.arena_bytes is None else int(settings.arena_bytes)
    share = (free if wanted is None else wanted) // _WORKSPACE_SHARE
    workspace = int(settings.workspace_bytes or min(max(share, _LEAST_WORKSPACE), _MOST_WORKSPACE))
    most = free - workspace - _CODE
    arena = most if wanted is None else wanted
    page_bytes = int(settings.page_bytes or _page_bytes(arena, granularity))
    num_pages = arena // page_bytes
    if num_pages <= 0 or num_pages * page_bytes > most:
        raise ValueError(
            f"the GPU has {free / _MIB:.0f} MiB free, of which {workspace / _MIB:.0f} go to the workspace and "
            f"{_CODE / _MIB:.0f} to CUDA's own; that leaves {most / _MIB:.0f} for the arena, too little for "
            + (f"one page of {page_bytes / _MIB:.0f}" if num_pages <= 0 else f"the {arena / _MIB:.0f} asked for")
            + "; free some, or configure arena_bytes, page_bytes or workspace_bytes"
        )
    return Sizes(page_bytes, num_pages, workspace)


def _page_bytes(arena: int, granularity: int) -> int:
    """The largest power of two times the granularity that leaves the arena _PAGES pages, within bounds."""
    page_bytes = granularity
    while page_bytes * 2 <= min(_LARGEST_PAGE, arena // _PAGES):
        page_bytes *= 2
    return page_bytes


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
