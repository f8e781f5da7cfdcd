"""How a captured step is begun, in as few calls as can be.

The device waits for nothing but these where a prompt comes to an idle instance, and torch's own ways to them take
several times as long, most of all on a core that did something else before.
"""

from __future__ import annotations

import torch
from cuda.bindings import driver as cu

from services.gpu_agent.cuda_driver import check
from services.gpu_agent.engine.cuda.workspace import HostBuffer, Workspace


def mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event behind all that the stream has been given, which tells when it comes to that."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's constructor has no types
    event.record(stream)
    return event


class Launches:
    """Begins steps on a workspace's stream. Used by the engine's thread, or one that it waits for."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._stream = cu.CUstream(workspace.stream.cuda_stream)
        self._facts = workspace.facts.data_ptr()

    def begin(self, graph: torch.cuda.CUDAGraph, facts: HostBuffer, used: int) -> torch.cuda.Event:
        """Copies the first `used` integers to the workspace's facts, and launches a graph that reads them.

        Returns an event before both. Raises CudaError.
        """
        workspace, stream = self._workspace, self._stream
        torch.cuda.set_device(workspace.device)
        began = mark(workspace.stream)
        nbytes = used * facts.tensor.itemsize
        check("cuMemcpyHtoDAsync", cu.cuMemcpyHtoDAsync(self._facts, facts.tensor.data_ptr(), nbytes, stream))
        facts.copied.record(workspace.stream)
        check("cuGraphLaunch", cu.cuGraphLaunch(cu.CUgraphExec(graph.raw_cuda_graph_exec()), stream))
        return began
