"""How windows lie on disk: compressed arrays of 32-bit floats, of which the last bits are left out. Pure."""

from __future__ import annotations

import warnings
import zlib

import numpy as np
from numpy.typing import NDArray

from services.forecaster.predictors import PEAK_LOAD

Array = NDArray[np.float32]

BLOCK = 288
"""Windows that lie together; a day of 300 s."""


def pack(values: NDArray[np.floating], bits: int) -> bytes:
    """Compresses values, NaN included, of which `bits` bits after the leading one are kept (at most 23)."""
    whole = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    drop = 23 - bits
    rounded = (whole + (1 << drop >> 1)) >> drop << drop
    kept = np.where(np.isnan(values), whole, rounded).astype("<u4")
    # Bytes of the same weight side by side: those left out cost nothing, and exponents resemble one another.
    return zlib.compress(kept.view(np.uint8).reshape(-1, 4).T.tobytes(), 6)


def unpack(data: bytes, *shape: int) -> Array:
    """What `pack` compressed."""
    planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(4, -1)
    values: Array = np.ascontiguousarray(planes.T).view("<f4").reshape(shape)
    return values


def pack_ids(ids: NDArray[np.int64]) -> bytes:
    """Compresses numbers, best those that ascend."""
    return zlib.compress(np.diff(ids, prepend=0).astype("<i4").tobytes(), 6)


def unpack_ids(data: bytes) -> NDArray[np.int64]:
    """What `pack_ids` compressed."""
    return np.cumsum(np.frombuffer(zlib.decompress(data), "<i4"), dtype=np.int64)


def joined(values: NDArray[np.floating], factor: int) -> Array:
    """Joins every `factor` windows into one: means, and of the peak the maximum, over those that are known.

    `values`: shape (windows, quantities), a multiple of `factor` long, NaN in gaps. A joined window of which fewer than
    half are known is unknown.
    """
    parts = values.reshape(-1, factor, values.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of windows of which nothing is known
        result: Array = np.array(np.nanmean(parts, axis=1), np.float32)
        result[:, PEAK_LOAD] = np.nanmax(parts[:, :, PEAK_LOAD], axis=1)
    known = ~np.isnan(parts).any(axis=2)
    result[known.mean(axis=1) < 0.5] = np.nan
    return result


def hourly(window_s: float) -> int:
    """How many windows are joined into one when they are old: about an hour's, so that they fill a block evenly."""
    most = max(1.0, 3600 / window_s)
    return max(factor for factor in range(1, BLOCK + 1) if BLOCK % factor == 0 and factor <= most)
