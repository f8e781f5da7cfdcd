"""GPU memory as an arena's pages, by CUDA's virtual memory management.

All pages are created once. The KV range maps each of them for ever; weight ranges are reserved addresses that pages are
mapped into and taken from while tensors, and graphs captured over them, stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cuda.bindings import driver as cu

from services.gpu_agent.arena.memory import AddressRange, Memory, runs
from services.gpu_agent.cuda_driver import CudaError, check

# While it unmaps, the driver begins no other work: 16 GB take it 13 ms, for which other models' steps would wait. A
# step is some twenty calls, each of which would wait for a piece; so a step is launched between two pieces.
_UNMAPPED_AT_ONCE = 512 << 20


class CudaMemory(Memory):
    """Memory (see memory.py) on one GPU. Any thread may call it; each call makes the GPU that thread's current one."""

    def __init__(self, page_bytes: int, num_pages: int, device_index: int) -> None:
        """Takes num_pages * page_bytes bytes of the GPU's memory at once.

        `device_index` counts the GPUs that this process sees. page_bytes must be a multiple of the GPU's granularity,
        2 MiB on those of today. Raises ValueError where it is not, MemoryError, with nothing taken, where so much is
        not free, and CudaError where there is no such GPU.
        """
        check("cuInit", cu.cuInit(0))
        device = check("cuDeviceGet", cu.cuDeviceGet(device_index))
        # The context that torch uses too. It is never let go of: tensors over the arena may outlive this object.
        self._context = check("cuDevicePrimaryCtxRetain", cu.cuDevicePrimaryCtxRetain(device))
        self._enter()
        self._properties, self._access = _on_device(device_index)
        step = _granularity(self._properties)
        if page_bytes <= 0 or page_bytes % step:
            raise ValueError(f"on this GPU page_bytes must be a positive multiple of {step}, not {page_bytes}")
        super().__init__(page_bytes, num_pages, torch.device("cuda", device_index))
        self._handles = self._create_pages()
        # A memory that was forgotten rather than closed gives its pages back too.
        self._give_back = weakref.finalize(self, _release_pages, self._context, self._handles)
        self._give_back.atexit = False
        whole = self._reserve(page_bytes * num_pages)
        self._map(whole.address, range(num_pages))
        whole.mapped.update(range(num_pages))
        self._kv = whole.tensor(torch.uint8, (whole.nbytes,), 0)

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Registers host memory, so that copies from it run at the speed of the bus; what it returns takes it back."""
        self._enter()
        flags = cu.CU_MEMHOSTREGISTER_PORTABLE
        check("cuMemHostRegister", cu.cuMemHostRegister(address, nbytes, flags))

        def unpin() -> None:
            self._enter()
            check("cuMemHostUnregister", cu.cuMemHostUnregister(address))

        return unpin

    def _create_pages(self) -> list[Any]:
        nbytes = self.page_bytes * self.num_pages
        free, total = check("cuMemGetInfo", cu.cuMemGetInfo())
        if nbytes > free:
            raise MemoryError(
                f"an arena of {nbytes / 2**20:.0f} MiB was asked for, but the GPU has {free / 2**20:.0f} of "
                f"{total / 2**20:.0f} MiB free; configure a smaller arena"
            )
        handles: list[Any] = []
        try:
            for _ in range(self.num_pages):
                handles.append(check("cuMemCreate", cu.cuMemCreate(self.page_bytes, self._properties, 0)))
        except CudaError as error:
            created = len(handles)
            _release_pages(self._context, handles)
            if error.code == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise MemoryError(
                    f"the GPU had room for {created} of {self.num_pages} pages of {self.page_bytes / 2**20:.0f} MiB, "
                    "though more was free a moment ago: another process takes memory too; configure a smaller arena"
                ) from error
            raise
        return handles

    def _reserve(self, nbytes: int) -> AddressRange:
        self._enter()
        address = int(check("cuMemAddressReserve", cu.cuMemAddressReserve(nbytes, self.page_bytes, 0, 0)))
        owner = _Addresses(address, nbytes)
        # torch asks CUDA whose the pointer is, which it knows only of mapped addresses. So any page lies there for this
        # moment, untouched; later tensors are views of this one, over which nobody asks again.
        try:
            self._map(address, [0])
            try:
                base = torch.as_tensor(owner, device=self.device)
            finally:
                self._unmap(address, self.page_bytes)
            if base.data_ptr() != address:
                raise RuntimeError("torch copied the range instead of laying a tensor over it")
        except BaseException:
            _free(self._context, address, nbytes, self.page_bytes, set())
            raise
        reserved = AddressRange(base, self.page_bytes)
        # Not at interpreter exit: CUDA may be gone by then, and the process takes its memory along.
        ending = weakref.finalize(owner, _free, self._context, address, nbytes, self.page_bytes, reserved.mapped)
        ending.atexit = False
        return reserved

    def _map(self, address: int, pages: Sequence[int]) -> None:
        self._enter()
        done = 0
        try:
            with self.turns:
                for page in pages:
                    place = address + done * self.page_bytes
                    check("cuMemMap", cu.cuMemMap(place, self.page_bytes, 0, self._handles[page], 0))
                    done += 1
                # Once for all of them: per page it would cost more than the mapping itself.
                check("cuMemSetAccess", cu.cuMemSetAccess(address, done * self.page_bytes, [self._access], 1))
        except CudaError as error:
            if done:
                self._unmap(address, done * self.page_bytes)
            if error.code == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise MemoryError(f"the GPU has no memory left to map {len(pages)} pages: {error}") from error
            raise

    def _unmap(self, address: int, nbytes: int) -> None:
        self._enter()
        piece = max(1, _UNMAPPED_AT_ONCE // self.page_bytes) * self.page_bytes
        for begin in range(0, nbytes, piece):
            with self.turns:
                check("cuMemUnmap", cu.cuMemUnmap(address + begin, min(piece, nbytes - begin)))

    def _close(self) -> None:
        self._give_back()

    def _enter(self) -> None:
        check("cuCtxSetCurrent", cu.cuCtxSetCurrent(self._context))


class _Addresses:
    """Reserved addresses as torch takes them; tensors over them keep it alive, and its end frees them."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _on_device(index: int) -> tuple[cu.CUmemAllocationProp, cu.CUmemAccessDesc]:
    """How pages are allocated, and who may touch them."""
    properties = cu.CUmemAllocationProp()
    properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = index
    access = cu.CUmemAccessDesc()
    access.location = properties.location
    access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return properties, access


def granularity(device_index: int) -> int:
    """What page_bytes must be a multiple of on a GPU, in bytes."""
    check("cuInit", cu.cuInit(0))
    return _granularity(_on_device(device_index)[0])


def _granularity(properties: cu.CUmemAllocationProp) -> int:
    kind = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(check("cuMemGetAllocationGranularity", cu.cuMemGetAllocationGranularity(properties, kind)))


def _release_pages(context: Any, handles: list[Any]) -> None:
    """The pages' memory goes when nothing is mapped to them any more."""
    check("cuCtxSetCurrent", cu.cuCtxSetCurrent(context))
    while handles:
        check("cuMemRelease", cu.cuMemRelease(handles.pop()))


def _free(context: Any, address: int, nbytes: int, page_bytes: int, mapped: set[int]) -> None:
    """Unmaps what is mapped, which is only in the KV range or if a range was forgotten, and frees the addresses."""
    check("cuCtxSetCurrent", cu.cuCtxSetCurrent(context))
    for index, length in runs(mapped):
        check("cuMemUnmap", cu.cuMemUnmap(address + index * page_bytes, length * page_bytes))
    check("cuMemAddressFree", cu.cuMemAddressFree(address, nbytes))
