"""From a model's spec to its image on this node: checked, prepared once, and deleted when no model needs it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.engine.backend import Backend
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.model import UnsupportedArchitecture, inspect_model
from services.gpu_agent.settings import GpuAgentSettings
from services.gpu_agent.weights.building import STALE_S, prepare_image, remove_stale, remove_unfinished, unfinished
from services.gpu_agent.weights.checkpoint import Checkpoint
from services.gpu_agent.weights.errors import CheckpointError, ImageCorrupt, Problem
from services.gpu_agent.weights.host_tier import HostTier
from services.gpu_agent.weights.image import Image, delete_image, image_path, open_image, open_image_of
from services.gpu_agent.weights.layout import ImageLayout, check_fits, plan_layout
from warmserve.v1 import cluster_pb2, common_pb2

_DTYPES = {
    common_pb2.D_TYPE_F32: torch.float32,
    common_pb2.D_TYPE_BF16: torch.bfloat16,
    common_pb2.D_TYPE_F16: torch.float16,
}


class AbandonedError(Exception):
    """Nobody wants the image any more."""


@dataclass(frozen=True)
class Blueprint:
    """What an agent has to know of a model to hold and serve it."""

    checkpoint: Checkpoint
    layout: ImageLayout
    kv: KvSpec
    facts: cluster_pb2.ModelFacts


class Images:
    """The images of one node. Its methods read and write files: call them in a thread."""

    def __init__(self, settings: GpuAgentSettings, arena: Arena, backend: Backend, tier: HostTier) -> None:
        self.tier = tier
        self._roots = settings.model_roots
        self._folder: Path = settings.image_dir
        self._page_bytes = arena.page_bytes
        self._num_pages = arena.num_pages
        self._backend = backend
        self._preparing: dict[str, tuple[int, int]] = {}  # by name: bytes done, bytes in all

    def inspect(self, spec: cluster_pb2.ModelSpec) -> Blueprint:
        """Checks a checkpoint completely, writing nothing. Raises CheckpointError."""
        if max(spec.tp, 1) > 1:
            raise CheckpointError(
                Problem.INVALID, f"tp is {spec.tp}, but this agent serves models on one device; deploy with tp=1"
            )
        checkpoint = Checkpoint.open(spec.source, self._roots)
        dtype = _DTYPES.get(spec.dtype, checkpoint.dtype)
        context_tokens = _context_tokens(spec, checkpoint)
        try:
            kv = inspect_model(checkpoint.model_config, dtype, context_tokens=context_tokens)
            self._backend.check(checkpoint.model_config, dtype, kv, spec.limits.max_batch or None, context_tokens)
        except UnsupportedArchitecture as error:
            raise CheckpointError(Problem.INVALID, f"{checkpoint.architecture} cannot be served: {error}") from error
        except ValueError as error:
            raise CheckpointError(Problem.INVALID, str(error)) from error
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        layout = plan_layout(shapes, checkpoint.aliases, dtype, self._page_bytes, float32=checkpoint.delicate[dtype])
        check_fits(layout, self._num_pages)
        try:
            kv.slots_per_page(self._page_bytes)
        except ValueError as error:
            raise CheckpointError(Problem.TOO_LARGE, str(error)) from error
        facts = cluster_pb2.ModelFacts(
            architecture=checkpoint.architecture,
            parameters=checkpoint.parameters,
            shard_bytes=layout.total_bytes,
            kv_bytes_per_token=kv.bytes_per_token,
            context_tokens=context_tokens,
            fingerprint=checkpoint.fingerprint,
            layers=checkpoint.layers,
        )
        return Blueprint(checkpoint, layout, kv, facts)

    def inspect_deployed(self, spec: cluster_pb2.ModelSpec) -> Blueprint:
        """The same of a model that is deployed. CheckpointError also where the checkpoint is another one by now."""
        blueprint = self.inspect(spec)
        _check_unchanged(blueprint.checkpoint, spec.facts.fingerprint)
        return blueprint

    def prepare(self, blueprint: Blueprint, progress: Callable[[int, int], None]) -> Path:
        """Builds the image where it is missing. `progress(done, total)` in bytes; what it raises ends the work.

        Raises CheckpointError.
        """
        name = self.path(blueprint).name

        def noted(done: int, total: int) -> None:
            self._preparing[name] = done, total
            progress(done, total)

        try:
            path = prepare_image(blueprint.checkpoint, blueprint.layout, self._folder, noted)
            with suppress(FileNotFoundError):  # undeployed elsewhere in this moment
                os.utime(path)  # one that was there already is not swept before its model is deployed
            return path
        finally:
            self._preparing.pop(name, None)

    def preparing(self) -> list[cluster_pb2.DiskFill]:
        """The images that are built now, and how far they are. From any thread."""
        return [
            cluster_pb2.DiskFill(name=name, bytes_done=done, bytes_total=total)
            for name, (done, total) in sorted(self._preparing.copy().items())
        ]

    def open(self, blueprint: Blueprint, abandoned: threading.Event) -> Image:
        """The image, built first where it is missing or damaged.

        Raises CheckpointError, also where it must be built and the checkpoint is another one by now. AbandonedError,
        with nothing left of the image, soon after `abandoned` is set.
        """

        def progress(done: int, total: int) -> None:
            if abandoned.is_set():
                raise AbandonedError

        try:
            return self.opened(blueprint)
        except (FileNotFoundError, ImageCorrupt):
            checkpoint = Checkpoint.open(blueprint.checkpoint.folder, self._roots)
            _check_unchanged(checkpoint, blueprint.checkpoint.fingerprint)
            self.prepare(replace(blueprint, checkpoint=checkpoint), progress)
            return self.opened(blueprint)

    def path(self, blueprint: Blueprint) -> Path:
        """Where the image is on this node's disk, or will be."""
        return image_path(self._folder, blueprint.checkpoint, blueprint.layout)

    def opened(self, blueprint: Blueprint) -> Image:
        """The image as it is on the disk. FileNotFoundError; ImageCorrupt, also where it is another version's."""
        return open_image_of(self.path(blueprint), blueprint.checkpoint.fingerprint, blueprint.layout)

    def present(self, blueprint: Blueprint) -> bool:
        """Whether the image is on this node's disk."""
        return self.path(blueprint).exists()

    def named(self, name: str) -> Image:
        """An image on the disk by its file's name. FileNotFoundError, ImageCorrupt."""
        return open_image(self._folder / name)

    def sizes(self) -> dict[str, int]:
        """The images on this node's disk that have this agent's pages, by name."""
        return self._sizes(f"*-{self._page_bytes}.image")

    def on_disk(self) -> cluster_pb2.DiskTier:
        """All images of this node's disk, whoever uses them, and how full it is."""
        images = [cluster_pb2.DiskImage(name=name, bytes=nbytes) for name, nbytes in self._sizes("*.image").items()]
        usage = shutil.disk_usage(self._folder)
        return cluster_pb2.DiskTier(capacity_bytes=usage.total, free_bytes=usage.free, images=images)

    def _sizes(self, pattern: str) -> dict[str, int]:
        sizes = {}
        for path in sorted(self._folder.glob(pattern)):
            with suppress(FileNotFoundError):  # deleted in this moment
                sizes[path.name] = path.stat().st_size
        return sizes

    def discard(self, fingerprint: str) -> None:
        """Deletes a checkpoint's images on the disk, half made or whole, and in memory. Nothing without any."""
        pattern = f"{fingerprint[:32]}-*-{self._page_bytes}.image"
        for path in self._folder.glob(pattern):
            self._delete(path)
        for path in unfinished(self._folder, pattern):
            remove_unfinished(path)

    def sweep(self, fingerprints: Collection[str]) -> int:
        """Deletes what has been of no use for a day: images of other checkpoints, half made or whole.

        Such images are left by deployments that did not come about. Returns how many were deleted.
        """
        needed = {fingerprint[:32] for fingerprint in fingerprints}
        removed = remove_stale(self._folder)
        for path in self._folder.glob(f"*-{self._page_bytes}.image"):
            with suppress(FileNotFoundError):  # another agent sweeps too
                if path.name[:32] not in needed and time.time() - path.stat().st_mtime > STALE_S:
                    self._delete(path)
                    removed += 1
        return removed

    def _delete(self, path: Path) -> None:
        """On the disk first: see TierKeeper, which might take it in just now."""
        delete_image(path)
        self.tier.discard(path.name)

    def mend(self, blueprint: Blueprint, image: Image, abandoned: threading.Event) -> Image:
        """Another image for one that is damaged, which is closed: built anew, unless another agent has done that.

        Raises as `open`.
        """
        with image:
            if image.is_current:
                delete_image(image.path)
        return self.open(blueprint, abandoned)


def _check_unchanged(checkpoint: Checkpoint, fingerprint: str) -> None:
    if checkpoint.fingerprint != fingerprint:
        raise CheckpointError(
            Problem.INVALID, f"the checkpoint in {checkpoint.folder} has changed since it was deployed; deploy it again"
        )


def _context_tokens(spec: cluster_pb2.ModelSpec, checkpoint: Checkpoint) -> int:
    wanted, own = spec.limits.max_context_tokens, checkpoint.context_tokens
    if own is not None and wanted > own:
        raise CheckpointError(
            Problem.INVALID,
            f"limits.max_context_tokens is {wanted}, but the checkpoint was made for {own}; ask for less",
        )
    if not wanted and own is None:
        raise CheckpointError(
            Problem.INVALID, "the checkpoint does not say its context length; set limits.max_context_tokens"
        )
    return wanted or own or 0
