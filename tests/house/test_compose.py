"""The compose file: right by its schema, and in what it tells the services, by theirs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.common.settings import ENV_PREFIX, ServiceSettings, load_settings
from services.gpu_agent.settings import GpuAgentSettings
from tests.house.dockerfile import COMPOSE, COMPOSE_GPU, read_compose, read_targets

SETTINGS = {
    "router": "services.router.settings.RouterSettings",
    "gpu-agent": "services.gpu_agent.settings.GpuAgentSettings",
    "forecaster": "services.forecaster.settings.ForecasterSettings",
    "placer": "services.placer.settings.PlacerSettings",
}
OURS = {name: service for name, service in read_compose()["services"].items() if "build" in service}
SERVICES = {name: service for name, service in OURS.items() if service["build"]["target"] in SETTINGS}


def settings_class(target: str) -> type[ServiceSettings]:
    module, _, name = SETTINGS[target].rpartition(".")
    kind: type[ServiceSettings] = getattr(importlib.import_module(module), name)
    return kind


def environment(service: dict[str, Any]) -> dict[str, str]:
    """The WARMSERVE_ variables in a container: the image's, then the compose file's."""
    image = read_targets()[service["build"]["target"]].environment
    told = image | service.get("environment", {})
    return {name: value for name, value in told.items() if name.startswith(ENV_PREFIX)}


def settings_from(
    told: dict[str, str], kind: type[ServiceSettings], target: str, monkeypatch: pytest.MonkeyPatch
) -> ServiceSettings:
    """The settings of a service with these variables alone."""
    unknown = [variable for variable in told if variable.removeprefix(ENV_PREFIX).lower() not in kind.model_fields]
    assert not unknown
    for variable in [variable for variable in os.environ if variable.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(variable)
    for variable, value in told.items():
        assert isinstance(value, str), f"{variable} needs quotes in the compose file"
        monkeypatch.setenv(variable, value)
    return load_settings(kind, target, [])  # ends the process, with the reason, where a value is wrong


@pytest.mark.parametrize("file", [COMPOSE, COMPOSE_GPU], ids=["host", "gpu"])
def test_the_compose_file_follows_the_compose_specification(file: Path) -> None:
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_there_is_a_target_and_a_container_for_every_service() -> None:
    assert {service["build"]["target"] for service in SERVICES.values()} == set(SETTINGS)
    assert set(SETTINGS) <= set(read_targets())


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_is_a_setting_and_its_value_a_valid_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = SERVICES[name]["build"]["target"]
    kind = settings_class(target)
    told = environment(SERVICES[name])
    settings = settings_from(told, kind, target, monkeypatch)
    assert settings.etcd_endpoints == ["etcd:2379"]
    assert settings.redis_url == "redis://redis:6379/0"
    assert settings.host == "0.0.0.0"


@pytest.mark.parametrize("name", OURS)
def test_images_run_without_root_and_tell_their_health(name: str) -> None:
    target = read_targets()[OURS[name]["build"]["target"]]
    assert target.user == "warmserve"
    if name in SERVICES:
        assert target.healthcheck
        port = target.environment["WARMSERVE_PORT"]
        assert target.healthcheck[-1] == f"127.0.0.1:{port}"
        assert port in target.exposed


def test_a_container_has_longer_to_stop_than_its_service_takes() -> None:
    for name, service in SERVICES.items():
        grace_s = float(environment(service).get("WARMSERVE_GRACE_S", ServiceSettings.model_fields["grace_s"].default))
        assert float(service["stop_grace_period"].removesuffix("s")) > grace_s, name


def test_routers_and_agents_see_the_models_at_one_path_and_agents_share_images() -> None:
    mounts = {}
    for name in ("router", "gpu-agent-0", "gpu-agent-1"):
        mounts[name] = {mount.split(":")[1]: mount.split(":")[0] for mount in SERVICES[name]["volumes"]}
    told = environment(SERVICES["gpu-agent-0"])
    assert told["WARMSERVE_MODEL_ROOTS"] in mounts["router"].keys() & mounts["gpu-agent-0"].keys()
    assert mounts["router"]["/models"] == mounts["gpu-agent-0"]["/models"] == mounts["gpu-agent-1"]["/models"]
    images = told["WARMSERVE_IMAGE_DIR"]
    assert mounts["gpu-agent-0"][images] == mounts["gpu-agent-1"][images] in read_compose()["volumes"]
    assert environment(SERVICES["gpu-agent-1"])["WARMSERVE_NODE"] == told["WARMSERVE_NODE"]
    assert environment(SERVICES["gpu-agent-1"])["WARMSERVE_DEVICE_INDEX"] != told["WARMSERVE_DEVICE_INDEX"]


def test_what_must_outlive_a_container_is_on_a_volume() -> None:
    for name, variable in (("gpu-agent-0", "WARMSERVE_IMAGE_DIR"), ("forecaster", "WARMSERVE_DATA_DIR")):
        volumes = {mount.split(":")[1]: mount.split(":")[0] for mount in SERVICES[name]["volumes"]}
        assert volumes[environment(SERVICES[name])[variable]] in read_compose()["volumes"]


def test_on_gpus_the_same_agents_get_them_and_take_all_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    override = read_compose(COMPOSE_GPU)["services"]
    agents = {name for name, service in SERVICES.items() if service["build"]["target"] == "gpu-agent"}
    assert set(override) == agents
    for name, service in override.items():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        # A GPU has the same number in the container as on the node: the placer forms groups by it.
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", "all", ["gpu"])
        told = {k: v for k, v in (environment(SERVICES[name]) | service["environment"]).items() if v is not None}
        settings = settings_from(told, GpuAgentSettings, "gpu-agent", monkeypatch)
        assert isinstance(settings, GpuAgentSettings)
        assert settings.backend == "cuda"
        assert settings.arena_bytes is None
