"""The safetensors files of a checkpoint: which they are, what their headers say, and a hash that identifies them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from services.gpu_agent.weights.errors import CheckpointError, Problem

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SAMPLE_BYTES = 1024
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a safetensors header describes it, or a part. `offset` is in bytes from the file's begin.

    `version` tells the file whose header that was from one that replaced it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    version: tuple[int, int, int]


@dataclass(frozen=True)
class StoredWeights:
    """All tensors of a folder by name, and a hash over the files' names, sizes, headers and samples of each tensor."""

    tensors: dict[str, StoredTensor]
    digest: bytes


def read_weights(folder: Path, permit: Callable[[Path], Path]) -> StoredWeights:
    """Reads the headers of model.safetensors, or of the shards that the index names.

    `permit` is given each file before it is opened and returns the path to open, or raises. Raises CheckpointError:
    no weights, only pickled ones, a missing shard, a truncated or corrupt file, an unsupported dtype.
    """
    single = folder / SINGLE
    if single.exists():
        names, index = [SINGLE], None
    elif (folder / INDEX).exists():
        index = _read_index(permit(folder / INDEX))
        names = sorted(set(index.values()))
    else:
        raise _no_weights(folder)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            Problem.INVALID,
            f"{folder} lacks {len(missing)} of the {len(names)} shards that {INDEX} names: {some(missing)}; "
            "copy the missing files there",
        )
    tensors: dict[str, StoredTensor] = {}
    digest = hashlib.sha256()
    for name in names:
        file = permit(folder / name)
        for tensor in _read_header(file, name, digest):
            if tensor.name in tensors:
                raise CheckpointError(Problem.INVALID, f"tensor {tensor.name} is in {name} and in another file as well")
            tensors[tensor.name] = tensor
    if index is not None:
        _check_index(folder, index, tensors, permit)
    return StoredWeights(tensors, digest.digest())


def _no_weights(folder: Path) -> CheckpointError:
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        return CheckpointError(
            Problem.INVALID,
            f"{folder} has its weights only as pickle files ({some(pickled)}), which can run code when they are read "
            "and are never opened; save the model as safetensors with transformers' save_pretrained",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f"; it has {some(others)}, but without an index" if others else ""
    return CheckpointError(Problem.INVALID, f"{folder} has neither {SINGLE} nor {INDEX}{found}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem.INVALID, f"{path} is not an index of safetensors files: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(Problem.INVALID, f"{path} names no tensors")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                Problem.INVALID, f"{path} puts {tensor} into {file!r}, which is not a safetensors file of that folder"
            )
    return weight_map


def _check_index(
    folder: Path, index: dict[str, str], tensors: dict[str, StoredTensor], permit: Callable[[Path], Path]
) -> None:
    wrong = [name for name, file in index.items() if name not in tensors or tensors[name].file != permit(folder / file)]
    if wrong:
        raise CheckpointError(
            Problem.INVALID, f"{INDEX} does not fit its shards: {some(wrong)} not in the file named for it"
        )


def _read_header(file: Path, name: str, digest: hashlib._Hash) -> list[StoredTensor]:
    """The tensors of one file. The library checks the header and that the file is as long as it says."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except PermissionError as error:
        raise CheckpointError(Problem.PERMISSION, f"{file} cannot be read: {error}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            Problem.INVALID, f"{file} is truncated or corrupt ({error}); copy or download it again"
        ) from error
    with file.open("rb") as opened:
        length = opened.read(8)
        header = opened.read(int.from_bytes(length, "little"))
        version = _version(opened)
        digest.update(json.dumps([name, version[1]]).encode())
        digest.update(header)
        tensors = []
        for key, entry in json.loads(header).items():
            if key == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    Problem.INVALID,
                    f"tensor {key} in {name} has dtype {entry['dtype']}; supported are {', '.join(DTYPES)} "
                    "(quantised checkpoints cannot be served)",
                )
            begin, end = entry["data_offsets"]
            offset = 8 + len(header) + begin
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            tensors.append(StoredTensor(key, dtype, shape, file, offset, end - begin, version))
            # Two trainings of one architecture have equal headers; a sample of each tensor tells them apart.
            opened.seek(offset)
            digest.update(opened.read(min(_SAMPLE_BYTES, end - begin)))
    return tensors


def rows_of(tensor: StoredTensor, begin: int, end: int) -> StoredTensor:
    """The rows [begin, end) of a tensor, a row being along its last dimension, as a tensor (rows, length)."""
    length = tensor.shape[-1]
    row_bytes = length * tensor.dtype.itemsize
    return dataclasses.replace(
        tensor,
        shape=(end - begin, length),
        offset=tensor.offset + begin * row_bytes,
        nbytes=(end - begin) * row_bytes,
    )


def read_pieces(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """The tensor's numbers in order, as 1-D tensors of at most 16 MiB.

    CheckpointError where the file is not the one any more whose header was read, or is being written.
    """
    left = tensor.nbytes
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        while left:
            piece = torch.empty(min(left, _PIECE_BYTES), dtype=torch.uint8)
            if file.readinto(piece.numpy().data) != piece.numel() or _version(file) != tensor.version:
                raise CheckpointError(
                    Problem.INVALID, f"{tensor.file} was changed while it was read; deploy again when it is complete"
                )
            left -= piece.numel()
            yield piece.view(tensor.dtype)


def _version(file: BinaryIO) -> tuple[int, int, int]:
    """Inode, bytes, and time of the last change in nanoseconds."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
