"""Runs what the containers run, without containers: each image's files and packages in a folder and a virtual
environment of its own, its command with its variables and nothing else of this machine's environment."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launcher.children import Child, ChildFailedError
from launcher.ports import free_port
from tests.house.dockerfile import ROOT, Target

_START_S = 120.0
_PATH = "/usr/local/bin:/usr/bin:/bin"
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")  # as Dockerfile.dockerignore does


@dataclass(frozen=True)
class Image:
    """An installed target."""

    target: Target
    environment: Path  # the virtual environment

    @property
    def path(self) -> str:
        """PATH inside."""
        return f"{self.environment / 'bin'}:{_PATH}"

    def packages(self) -> set[str]:
        """Names of the installed distributions, in small letters."""
        listed = subprocess.run(
            [self.environment / "bin/python", "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze"],
            capture_output=True,
            text=True,
            check=True,
        )
        return {line.partition("==")[0].lower() for line in listed.stdout.splitlines()}

    def run(self, variables: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the image's command with arguments to its end."""
        command = _clean({"PATH": self.path, **variables}, [*self.target.command, *arguments])
        return subprocess.run(command, capture_output=True, text=True, timeout=_START_S, check=False)


def build(target: Target, folder: Path) -> Image:
    """Does what the Dockerfile says for a target, in `folder`. Raises RuntimeError with pip's output where it fails."""
    source = folder / "src"
    source.mkdir(parents=True)
    for name, _ in target.copies:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=_LEFT_OUT)
        else:
            shutil.copy(ROOT / name, source / name)
    image = Image(target, folder / "venv")
    subprocess.run([sys.executable, "-m", "venv", image.environment], check=True)
    _provide(image.environment, [word for install in target.installs for word in shlex.split(install)])
    for install in target.installs:
        done = subprocess.run(
            ["sh", "-c", install],
            cwd=source,
            env={**os.environ, "PATH": image.path},  # pip keeps the machine's configuration
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{install} failed:\n{done.stdout[-4000:]}")
    shutil.rmtree(source)
    return image


def _provide(environment: Path, words: Iterable[str]) -> None:
    """Links what an installation needs and is installed here: pip then finds it there, and checks its version.

    Unpacking torch five times would take minutes. `words`: of pip's command; of them "./sdk[x]" and ".[x]" count.
    """
    ours = {".": "warmserve-server", "./sdk": "warmserve"}
    asked = [
        (ours[place], extras.rstrip("]")) for place, _, extras in (w.partition("[") for w in words) if place in ours
    ]
    target = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    for name in sorted(_needed(asked) - set(ours.values())):
        package = metadata.distribution(name)
        for file in package.files or ():
            if ".." not in file.parts:  # scripts name the interpreter that they were installed for
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                _link(Path(str(package.locate_file(file))), target / file)


def _needed(asked: Iterable[tuple[str, str]]) -> set[str]:
    """Names of all packages installed here that these, each with an extra, need."""
    left, seen, found = list(asked), set[tuple[str, str]](), set[str]()
    while left:
        name, extra = left.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needs = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue  # pip will install it
        found.add(name)
        for need in needs:
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(need.name), also) for also in ("", *need.extras)]
    return found


def _link(source: Path, place: Path) -> None:
    try:
        place.hardlink_to(source)
    except OSError:  # another file system
        shutil.copy2(source, place)


class Container:
    """A running image, on a free port in place of the container's own."""

    def __init__(self, name: str, image: Image, folder: Path, variables: Mapping[str, str]) -> None:
        self.image = image
        self.port = free_port()
        work = folder / name
        work.mkdir()
        self.variables = {"PATH": image.path, "HOME": str(work), **image.target.environment, **variables}
        self.variables |= {
            "WARMSERVE_PORT": str(self.port),
            "WARMSERVE_METRICS_PORT": str(free_port()),
            "WARMSERVE_ADVERTISE_HOST": "127.0.0.1",
        }
        command = ["env", "-C", str(work), *_clean(self.variables, image.target.command)]
        self.child = Child(name, command, folder / f"{name}.log")

    def healthy(self) -> bool:
        """Whether the image's own health check passes now."""
        port = self.image.target.environment["WARMSERVE_PORT"]
        check = [part.replace(port, str(self.port)) for part in self.image.target.healthcheck]
        command = _clean({"PATH": self.image.path}, check)
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def wait_healthy(self) -> None:
        """Waits until the health check passes. Raises ChildFailedError where the service ends, TimeoutError."""
        deadline = time.monotonic() + _START_S
        while not self.healthy():
            self.child.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.child.name} is not healthy; the end of its log:\n{self.log()[-4000:]}")

    def log(self) -> str:
        """What it has logged."""
        return self.child.log.read_text(errors="replace")

    def stop(self) -> int:
        """Stops it as a container is stopped, with SIGTERM; returns its status. Raises ChildFailedError."""
        self.child.terminate()
        try:
            return self.child.process.wait(60)
        except subprocess.TimeoutExpired as error:
            self.child.stop(0)
            raise ChildFailedError(f"{self.child.name} did not stop; its log ends:\n{self.log()[-4000:]}") from error


def _clean(variables: Mapping[str, str], command: list[str] | tuple[str, ...]) -> list[str]:
    return ["env", "-i", *(f"{name}={value}" for name, value in variables.items()), *command]
