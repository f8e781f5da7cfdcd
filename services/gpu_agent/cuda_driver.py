"""Calls of CUDA's driver that say what went wrong."""

from __future__ import annotations

from typing import Any

from cuda.bindings import driver as cu


class CudaError(RuntimeError):
    """A call of CUDA's driver failed; `code` is CUDA's."""

    def __init__(self, call: str, code: cu.CUresult) -> None:
        _, text = cu.cuGetErrorString(code)
        said = text.decode() if text else "unknown error"
        super().__init__(f"CUDA error: {said} ({call} failed with {cu.CUresult(code).name})")
        self.code = code


def check(call: str, result: tuple[Any, ...]) -> Any:
    """What a driver call returned: nothing, one value or a tuple. Raises CudaError."""
    code, *values = result
    if code != cu.CUresult.CUDA_SUCCESS:
        raise CudaError(call, code)
    return values[0] if len(values) == 1 else tuple(values)
