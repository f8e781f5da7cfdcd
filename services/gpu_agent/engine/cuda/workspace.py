"""What an agent's models share on a GPU outside the arena: taken at start, and bounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from services.gpu_agent.engine.cuda.attention import Workspace as Partials

_BUFFERS = 3  # steps whose facts may be on their way at once: two under way, and the one being written
_MAX_VOCABULARY = 260 << 10
_MAX_HEADS = 128
MAX_HEAD_DIM = 256
_FACTS = 1 << 22  # integers of one step: with 16 tokens in a block, 256 sequences of 256 Ki tokens


@dataclass
class HostBuffer:
    """The facts of a step on their way to the device, in pinned memory."""

    tensor: torch.Tensor
    array: NDArray[np.int32]
    copied: torch.cuda.Event


class Workspace:
    """One stream for all steps of all models, one memory pool for all graphs, and the buffers that they read and write.

    Steps follow one another on the stream, so that they can share everything here.
    """

    def __init__(self, device: torch.device, max_rows: int, workspace_bytes: int) -> None:
        """max_rows bounds the sequences, and so the rows of logits, of one step.

        Half of workspace_bytes, which is all that torch may take, is set aside at once for activations: a quarter for
        graphs and a quarter for steps that are not captured yet. torch.OutOfMemoryError where that is too much.
        """
        self.device = device
        self.bound_bytes = workspace_bytes
        self.activation_bytes = workspace_bytes // 4
        """Set aside for the activations of a step, once for graphs and once for steps that are not captured."""
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self.facts = torch.zeros(_FACTS, dtype=torch.int32, device=device)
        self.partials = Partials(Partials.lanes_for(max_rows, _MAX_HEADS, 1), MAX_HEAD_DIM, device)
        # Logits in half precision with a copy of them in float32 behind, or in float32.
        self._logits = torch.empty(6 * max_rows * _MAX_VOCABULARY, dtype=torch.uint8, device=device)
        self._outcome = torch.zeros(2 * max_rows, dtype=torch.int64, device=device)
        self._buffers = [_host_buffer() for _ in range(_BUFFERS)]
        self._next = 0
        with torch.cuda.stream(self.stream):
            self._reservation = self._reserve(self.activation_bytes)
        torch.cuda.synchronize(device)
        self._settled: int | None = None

    def check(self, vocabulary: int, sequences: int, blocks: int, heads: int, kv_heads: int) -> None:
        """ValueError where steps of so many sequences, of so many KV blocks each, do not fit the buffers."""
        lanes = Partials.lanes_for(sequences, heads, kv_heads)
        if lanes > self.partials.lanes:
            raise ValueError(
                f"{sequences} sequences of {heads} heads do not fit the agent's buffers for attention, which hold "
                f"{self.partials.lanes} pieces, not {lanes}; deploy with a smaller max_batch"
            )
        if sequences * vocabulary > self._logits.nbytes // 6:
            raise ValueError(
                f"{sequences} rows of {vocabulary} logits do not fit the agent's buffer of {self._logits.nbytes // 6}; "
                f"deploy with a max_batch of {self._logits.nbytes // 6 // vocabulary} or less"
            )
        if sequences * blocks > _FACTS // 2:
            raise ValueError(
                f"{sequences} sequences of {blocks} KV blocks each do not fit the agent's buffers; deploy with a "
                f"max_batch of {_FACTS // 2 // blocks} or less, or with a shorter context"
            )

    def logits(self, rows: int, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
        """Where a step leaves its logits: (rows, vocabulary), of the model's type."""
        return self._logits[: rows * vocabulary * dtype.itemsize].view(dtype).view(rows, vocabulary)

    def in_float32(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy of `logits`, or themselves where they are that: what may be edited until the next step."""
        if logits.dtype == torch.float32:
            return logits
        begin = self._logits.nbytes // 3
        return self._logits[begin : begin + 4 * logits.numel()].view(torch.float32).view(logits.shape).copy_(logits)

    def outcome(self, rows: int) -> torch.Tensor:
        """Where a step leaves the tokens that it chose: see sampling.Sampled."""
        return self._outcome[: 2 * rows].view(2, rows)

    def buffer(self) -> HostBuffer:
        """A host buffer that no copy reads any more."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        buffer.copied.synchronize()
        return buffer

    @property
    def reserved_bytes(self) -> int:
        """Device memory that torch holds in this process, outside the arena."""
        return torch.cuda.memory_reserved(self.device)

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Within it more may be reserved; what is reserved at its end is all there will be, until the next time."""
        self._settled = None
        try:
            yield
        finally:
            self._settled = self.reserved_bytes

    @property
    def grown_bytes(self) -> int:
        """Device memory taken since `growing` ended; 0 unless something allocates while serving."""
        settled = self._settled
        return 0 if settled is None else max(0, self.reserved_bytes - settled)

    def _reserve(self, nbytes: int) -> torch.cuda.CUDAGraph:
        """Has torch's allocator hold this much for graphs, and as much for steps outside of graphs."""
        graph = torch.cuda.CUDAGraph()
        # A captured graph keeps its pool alive; what is freed within the capture is there for later captures.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            torch.empty(nbytes, dtype=torch.uint8, device=self.device).zero_()
        torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return graph


def _host_buffer() -> HostBuffer:
    tensor = torch.zeros(_FACTS, dtype=torch.int32, pin_memory=True)
    return HostBuffer(tensor, tensor.numpy(), torch.cuda.Event())  # type: ignore[no-untyped-call]
