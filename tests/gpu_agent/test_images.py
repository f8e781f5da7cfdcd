"""One node's images: what they are built from, and when they go."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.host import HostMemory
from services.gpu_agent.engine.host import HostBackend
from services.gpu_agent.images import Blueprint, Images
from services.gpu_agent.settings import GpuAgentSettings
from services.gpu_agent.weights.errors import CheckpointError
from services.gpu_agent.weights.host_tier import HostTier
from tests.gpu_agent import checkpoints
from warmserve.v1 import cluster_pb2

PAGE = 64 << 10
DAY_S = 24 * 3600


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Images]:
    arena = Arena(HostMemory(PAGE, 64))
    tier = HostTier(tmp_path / "tier", 64 * PAGE)
    (tmp_path / "images").mkdir()
    settings = GpuAgentSettings(id="a0", image_dir=tmp_path / "images", model_roots=[tmp_path])
    yield Images(settings, arena, HostBackend(arena, None), tier)
    tier.close()
    arena.close()


def spec_of(folder: Path, images: Images, seed: int = 1) -> cluster_pb2.ModelSpec:
    """A deployed model with its image on the disk."""
    checkpoints.llama(folder, seed=seed)
    spec = cluster_pb2.ModelSpec(name=folder.name, source=str(folder))
    blueprint = images.inspect(spec)
    images.prepare(blueprint, lambda done, total: None)
    spec.facts.CopyFrom(blueprint.facts)
    return spec


def rebuilt(images: Images, blueprint: Blueprint) -> bytes:
    """The image's bytes after it was damaged and mended."""
    with images.mend(blueprint, images.opened(blueprint), threading.Event()) as image:
        return image.path.read_bytes()


def test_an_image_is_mended_from_the_checkpoint_that_was_deployed_alone(images: Images, tmp_path: Path) -> None:
    blueprint = images.inspect_deployed(spec_of(tmp_path / "m", images, seed=1))
    good = images.path(blueprint).read_bytes()
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    checkpoints.llama(tmp_path / "m", seed=2)
    with pytest.raises(CheckpointError, match="has changed since it was deployed; deploy it again"):
        rebuilt(images, blueprint)
    assert not list((tmp_path / "images").iterdir())
    shutil.copytree(tmp_path / "copy", tmp_path / "m", dirs_exist_ok=True)  # as it was, in another file
    with images.open(blueprint, threading.Event()) as image:
        assert image.path.read_bytes() == good
    assert rebuilt(images, blueprint) == good


def test_a_checkpoint_replaced_while_its_image_is_built_leaves_no_image(images: Images, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m", seed=1)
    checkpoints.llama(tmp_path / "other", seed=2)
    blueprint = images.inspect(cluster_pb2.ModelSpec(name="m", source=str(tmp_path / "m")))

    def replace(done: int, total: int) -> None:
        if done > total / 2 and (tmp_path / "other").exists():
            os.rename(tmp_path / "other" / "model.safetensors", tmp_path / "m" / "model.safetensors")
            shutil.rmtree(tmp_path / "other")

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        images.prepare(blueprint, replace)
    assert not list((tmp_path / "images").iterdir())


def test_images_that_no_model_needs_go_after_a_day(images: Images, tmp_path: Path) -> None:
    """A deployment that failed on another node, or was interrupted behind the image, leaves one."""
    needed, left = spec_of(tmp_path / "m", images, seed=1), spec_of(tmp_path / "n", images, seed=2)
    old, other = (images.path(images.inspect(spec)) for spec in (needed, left))
    with images.named(other.name) as image:
        images.tier.fill(image, 1.0)
    fingerprints = {needed.facts.fingerprint}
    assert images.sweep(fingerprints) == 0
    for path in (old, other):
        os.utime(path, (0, time.time() - 2 * DAY_S))
    images.prepare(images.inspect(left), lambda done, total: None)  # it is about to be deployed after all
    assert images.sweep(fingerprints) == 0
    os.utime(other, (0, time.time() - 2 * DAY_S))
    assert images.sweep(fingerprints) == 1
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [old.name, old.name + ".json"]
    assert images.tier.kept() == []
