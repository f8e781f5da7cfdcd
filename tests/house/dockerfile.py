"""The targets of deploy/Dockerfile and the services of deploy/compose.yaml, read so that tests can do what they say."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"
COMPOSE = ROOT / "deploy/compose.yaml"
COMPOSE_GPU = ROOT / "deploy/compose.gpu.yaml"


@dataclass(frozen=True)
class Target:
    """What an image built for one target holds and does."""

    name: str
    copies: tuple[tuple[str, str], ...] = ()  # (source in the repository, destination under the source folder)
    environment: dict[str, str] = field(default_factory=dict)
    installs: tuple[str, ...] = ()  # shell commands that run pip
    exposed: tuple[str, ...] = ()
    workdir: str = "/"
    user: str = "root"
    healthcheck: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def read_targets() -> dict[str, Target]:
    """The targets of the Dockerfile by name. Raises ValueError at an instruction that is not understood here."""
    targets: dict[str, Target] = {}
    target = Target("")
    for step in DockerfileParser(str(DOCKERFILE)).structure:
        if step["instruction"] == "FROM":
            parent, _, name = step["value"].split()
            target = replace(targets.get(parent, Target("")), name=name)
        else:
            target = _apply(target, step["instruction"], step["value"])
        targets[target.name] = target
    del targets[""]
    return targets


def _apply(target: Target, instruction: str, value: str) -> Target:
    match instruction:
        case "COMMENT" | "ARG" | "VOLUME":
            return target
        case "RUN" if value.startswith("pip install "):
            return replace(target, installs=(*target.installs, value))
        case "RUN" if value.startswith(("useradd ", "apt-get ")):  # the machine has its own
            return target
        case "ENV":
            pairs = dict(pair.split("=", 1) for pair in shlex.split(value))
            return replace(target, environment=target.environment | pairs)
        case "COPY":
            *sources, destination = value.split()
            pairs = tuple((source, destination) for source in sources)
            return replace(target, copies=target.copies + pairs)
        case "EXPOSE":
            return replace(target, exposed=(*target.exposed, *value.split()))
        case "WORKDIR":
            return replace(target, workdir=value)
        case "USER":
            return replace(target, user=value)
        case "HEALTHCHECK":
            return replace(target, healthcheck=tuple(json.loads(value.partition("CMD ")[2])))
        case "CMD" | "ENTRYPOINT":
            return replace(target, command=tuple(json.loads(value)))
        case _:
            raise ValueError(f"{instruction} {value}: teach this reader, and the test that follows it, what it does")


def read_compose(file: Path = COMPOSE) -> dict[str, Any]:
    """A compose file with variables at their defaults."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", file.read_text())
    content: dict[str, Any] = yaml.safe_load(text)
    return content
