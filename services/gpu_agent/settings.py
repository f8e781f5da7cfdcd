"""Settings of a GPU agent."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field, field_validator, model_validator
from pydantic_settings import NoDecode

from services.common.settings import ServiceSettings


class GpuAgentSettings(ServiceSettings):
    """A GPU agent: owns one arena, keeps models' weights in it, and serves those that are active."""

    node: str = Field(default_factory=socket.gethostname, description="name of the machine; agents of one share images")
    backend: Literal["auto", "host", "cuda"] = Field(
        "auto", description="what the arena lies on and the engine computes with; auto takes a GPU where there is one"
    )
    device_index: int = Field(
        0,
        ge=0,
        description="index of the GPU, or of the slice of host memory, on the node; agents with an arena_bytes may be "
        "more than the GPUs, and share them in turn",
    )
    arena_bytes: ByteSize | None = Field(
        None, gt=0, description="size of the arena, for example 8GiB; by default all that is free of a GPU, or 1GiB"
    )
    page_bytes: ByteSize | None = Field(
        None,
        gt=0,
        description="size of a page of the arena, for example 32MiB; by default 1MiB in host memory, and on a GPU from "
        "2MiB to 32MiB, according to the size of the arena",
    )
    workspace_bytes: ByteSize | None = Field(
        None,
        gt=0,
        description="GPU memory for all that is not in the arena: activations, graphs, libraries' workspaces; by "
        "default a sixteenth of the arena, from 512MiB to 4GiB",
    )
    model_roots: Annotated[list[Path], NoDecode] = Field(
        [Path("/models")], description="folders that checkpoints may be in, separated by commas"
    )
    image_dir: Path = Field(Path("/var/lib/warmserve/images"), description="folder for images, one per node")
    host_tier_bytes: ByteSize | None = Field(
        None,
        description="memory of the node for images, shared by its agents and the same for all of them; 0 for none; by "
        "default a quarter of the memory with a GPU, and none without, where the disk's cache serves as well",
    )
    host_tier_dir: Path = Field(
        Path("/dev/shm/warmserve"), description="folder for those images, in a memory file system; one per node"
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="most sequences an instance runs where a model does not say; by default 8, and 64 on a GPU",
    )

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _some_pages(self) -> GpuAgentSettings:
        if self.arena_bytes is not None and self.page_bytes is not None and self.arena_bytes < self.page_bytes:
            raise ValueError(f"arena_bytes ({self.arena_bytes}) is less than one page ({self.page_bytes})")
        return self

    @field_validator("page_bytes")
    @classmethod
    def _whole_system_pages(cls, value: ByteSize | None) -> ByteSize | None:
        if value is not None and value % 4096:
            raise ValueError("must be a multiple of 4096")
        return value
