"""Each service as its container runs it: its own environment with its extra alone, the container's command and
variables, against an etcd and a Redis that were started separately. Then all of them together, with one request."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from launcher.backing import Backing
from launcher.checkpoints import make_checkpoints
from launcher.ports import free_port
from tests.house.containers import Container, Image, build
from tests.house.dockerfile import read_targets
from tests.house.test_compose import OURS, SERVICES, environment

pytestmark = pytest.mark.timeout(600)

# What only the others need.
FOREIGN = {
    "router": {"torch", "triton"},
    "gpu-agent": {"starlette", "uvicorn"},
    "forecaster": {"torch", "transformers", "starlette", "uvicorn", "jinja2", "rich", "typer"},
    "placer": {"torch", "transformers", "starlette", "uvicorn", "jinja2", "rich", "typer"},
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Image]]:
    """Builds an image, once for all tests here."""
    built: dict[str, Image] = {}

    def of(target: str) -> Image:
        if target not in built:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PIP_NO_COMPILE", "1")  # compiled when imported, as little of it is here
                built[target] = build(read_targets()[target], tmp_path_factory.mktemp(target, numbered=False))
        return built[target]

    yield of
    for each in built.values():
        shutil.rmtree(each.environment)  # more than a GB


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def variables(etcd: Backing, redis_server: Backing, tmp_path: Path, prefix: str) -> Callable[[str], dict[str, str]]:
    """A container's variables, with addresses and mounted folders that exist here in place of the compose file's."""
    folders = {
        "WARMSERVE_MODEL_ROOTS": tmp_path / "models",
        "WARMSERVE_IMAGE_DIR": tmp_path / "images",
        "WARMSERVE_DATA_DIR": tmp_path / "history",
    }
    for folder in folders.values():
        folder.mkdir()

    def of(name: str) -> dict[str, str]:
        told = environment(OURS[name])
        here = {
            "WARMSERVE_ETCD_ENDPOINTS": etcd.address,
            "WARMSERVE_REDIS_URL": f"redis://{redis_server.address}/0",
            **{variable: str(folder) for variable, folder in folders.items() if variable in told},
        }
        if "WARMSERVE_HTTP_PORT" in told:
            here["WARMSERVE_HTTP_PORT"] = str(free_port())
        return told | here | {"WARMSERVE_PREFIX": prefix}

    return of


@pytest.fixture
def start(
    image: Callable[[str], Image], variables: Callable[[str], dict[str, str]], tmp_path: Path
) -> Iterator[Callable[[str], Container]]:
    """Starts a container of the compose file."""
    with contextlib.ExitStack() as stack:

        def one(name: str) -> Container:
            container = Container(name, image(OURS[name]["build"]["target"]), tmp_path, variables(name))
            stack.callback(container.child.stop, 5)
            return container

        yield one


@pytest.mark.parametrize("name", ["router", "gpu-agent-0", "forecaster", "placer"])
def test_a_service_alone_in_its_environment_serves_and_stops(
    name: str, image: Callable[[str], Image], start: Callable[[str], Container]
) -> None:
    packages = image(SERVICES[name]["build"]["target"]).packages()
    assert not packages & FOREIGN[SERVICES[name]["build"]["target"]]
    container = start(name)
    container.wait_healthy()
    assert container.stop() == 0, container.log()[-4000:]
    assert "Traceback" not in container.log()


def test_the_services_together_deploy_a_model_and_answer(
    image: Callable[[str], Image],
    start: Callable[[str], Container],
    variables: Callable[[str], dict[str, str]],
    tmp_path: Path,
) -> None:
    checkpoints = make_checkpoints(tmp_path / "models", report=lambda _: None)
    containers = {name: start(name) for name in SERVICES}
    for container in containers.values():
        container.wait_healthy()

    name, folder = next(iter(checkpoints.items()))
    operator = variables("warmctl")
    deployed = image("warmctl").run(operator, "models", "deploy", name, "--source", str(folder))
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr

    router = containers["router"]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{router.variables['WARMSERVE_HTTP_PORT']}/v1", api_key="none")
    question = [{"role": "user", "content": "Who serves?"}]
    answer = client.chat.completions.create(model=name, messages=question, max_tokens=8, temperature=0)
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 8
    listed = image("warmctl").run(operator, "models", "list")
    assert name in listed.stdout

    for container in containers.values():
        assert container.stop() == 0, container.log()[-4000:]
        assert "Traceback" not in container.log()
