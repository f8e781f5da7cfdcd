"""The checks that CI trusts: that each of them notices what it is for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.dockerfile import ROOT

BIN = Path(sys.executable).parent
PROTO = "protos/warmserve/v1/placement.proto"


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with the protos, their stubs and the tools, in one commit."""
    for folder in ("protos", "tools", "sdk/warmserve/v1"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    run(tmp_path, "git", "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def commit(folder: Path) -> None:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    assert run(folder, "git", "add", "--all").returncode == 0
    assert run(folder, "git", *identity, "commit", "--quiet", "--message", "A version").returncode == 0


def edit(folder: Path, old: str, new: str) -> None:
    file = folder / PROTO
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def check_protos(folder: Path, *against: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "env", f"BUF={BIN / 'buf'}", "tools/check_protos.sh", *against)


def test_a_first_version_of_the_protos_breaks_nothing(copy: Path) -> None:
    assert check_protos(copy).returncode == 0


def test_adding_to_the_protos_is_allowed(copy: Path) -> None:
    edit(copy, "uint32 waiting_requests = 2;", "uint32 waiting_requests = 2;\n  // New.\n  string hint = 3;")
    commit(copy)
    assert check_protos(copy).returncode == 0


def test_a_field_that_is_taken_away_is_noticed(copy: Path) -> None:
    edit(copy, "uint32 waiting_requests = 2;", "")
    assert check_protos(copy, "HEAD").returncode != 0
    commit(copy)
    found = check_protos(copy)
    assert found.returncode != 0
    assert "waiting_requests" in found.stdout + found.stderr


def test_the_newest_tag_counts_and_not_the_parent(copy: Path) -> None:
    run(copy, "git", "tag", "v1")
    edit(copy, "uint32 waiting_requests = 2;", "")
    commit(copy)
    edit(copy, "// Asks for an instance.", "// Asks for one instance.")
    commit(copy)
    assert check_protos(copy).returncode != 0
    assert check_protos(copy, "HEAD~1").returncode == 0


def test_stubs_that_are_not_those_of_the_protos_are_noticed(copy: Path) -> None:
    check = ["env", f"PYTHON={sys.executable}", "tools/generate_stubs.sh"]
    assert run(copy, *check, "--check").returncode == 0
    edit(copy, "string model = 1;", "string model_name = 1;")
    assert run(copy, *check, "--check").returncode != 0
    assert run(copy, *check).returncode == 0
    assert run(copy, *check, "--check").returncode == 0


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("services/router/settings.py", "services.gpu_agent.settings"),
        ("services/common/load.py", "services.router.settings"),
        ("services/placer/__init__.py", "launcher.ports"),
        ("sdk/warmserve/errors.py", "services.common.settings"),
    ],
)
def test_an_import_across_the_borders_is_noticed(importer: str, imported: str, tmp_path: Path) -> None:
    for folder in ("services", "launcher", "sdk/warmserve"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / importer
    file.write_text(f"{file.read_text()}\nimport {imported}\n")
    here = f"PYTHONPATH={tmp_path}:{tmp_path / 'sdk'}"
    found = run(tmp_path, "env", here, BIN / "lint-imports", "--no-cache")
    assert found.returncode != 0
    assert imported in found.stdout


def closure(requirements: list[str]) -> dict[str, str]:
    """Versions of all installed distributions that requirements lead to, by name."""
    found: dict[str, str] = {}
    wanted = [Requirement(text) for text in requirements]
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            installed = distribution(name)
            found[name] = installed.version
            for text in installed.requires or []:
                further = Requirement(text)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    wanted.append(further)
    return found


def test_all_that_we_need_is_pinned_at_the_version_that_is_tested() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[canonicalize_name(name)] = version
    needed = closure(["warmserve-server[all,dev]", "warmserve[admin]"])
    assert {"torch", "triton", "xgrammar", "grpcio", "pytest", "typer"} <= needed.keys()
    loose = []
    for name, version in needed.items():
        if name in ("warmserve", "warmserve-server", "setuptools"):
            continue
        if name.startswith("nvidia-") or name == "cuda-toolkit":
            continue  # each build of torch names its own
        if pins.get(name) != version.partition("+")[0]:
            loose.append(f"{name}=={version}")
    assert not loose, "constraints.txt says otherwise; its first lines tell how it is made"
