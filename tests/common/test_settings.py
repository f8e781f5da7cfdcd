"""One schema for a service's settings: where values come from, and what a person reads when one is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import Field

from services.common.settings import ServiceSettings, load_settings


class BakerySettings(ServiceSettings):
    """A service that bakes."""

    ovens: int = Field(2, ge=1, description="ovens to heat")


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WARMSERVE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bakery.yaml"
    path.write_text("port: 1001\novens: 3\nlog_level: debug\n")
    return path


def load(*arguments: str) -> BakerySettings:
    return load_settings(BakerySettings, "bakery", list(arguments))


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is printed when these flags are refused; the status is always 2, and there is never a traceback."""
    with pytest.raises(SystemExit) as ended:
        load(*arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "warmserve-bakery: " in printed
    return printed


def test_flags_come_before_the_environment_and_that_before_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMSERVE_PORT", "1002")
    monkeypatch.setenv("WARMSERVE_OVENS", "4")
    settings = load("--config", str(file), "--port", "1003")
    assert (settings.port, settings.ovens, settings.log_level) == (1003, 4, "debug")
    assert settings.lease_ttl_s == 5  # a default that nobody overrode


def test_a_window_has_at_least_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    assert "greater than or equal to 1" in complaint(capsys, "--window-s=0.5")  # windows begin at whole seconds


@pytest.mark.parametrize("by", ["flag", "flag with =", "environment"])
def test_the_file_is_named_by_flag_or_environment(by: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "environment":
        monkeypatch.setenv("WARMSERVE_CONFIG", str(file))
    flags = {"flag": ["--config", str(file)], "flag with =": [f"--config={file}"], "environment": []}
    assert load(*flags[by]).ovens == 3


def test_a_config_flag_is_preferred_to_the_environments(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMSERVE_CONFIG", str(tmp_path / "not there"))
    assert load("--config", str(file)).ovens == 3


@pytest.mark.parametrize("by", ["flag", "environment", "file"])
def test_lists_are_split_at_commas(by: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = []
    if by == "flag":
        arguments = ["--etcd-endpoints", "a:1,b:2"]
    elif by == "environment":
        monkeypatch.setenv("WARMSERVE_ETCD_ENDPOINTS", "a:1,b:2")
    else:
        file.write_text("etcd_endpoints: [a:1, b:2]\n")
        arguments = ["--config", str(file)]
    assert load(*arguments).etcd_endpoints == ["a:1", "b:2"]


def test_all_that_is_wrong_is_told_at_once_with_where_to_change_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMSERVE_OVENS", "none")
    printed = complaint(capsys, "--port", "70000", "--etcd-endpoints", "nowhere", "--redis-url", "localhost")
    lines = {line.split()[0]: line for line in printed.splitlines()[1:]}
    assert lines.keys() == {"port", "etcd_endpoints", "redis_url", "ovens"}
    assert "WARMSERVE_OVENS" in lines["ovens"]
    assert "integer" in lines["ovens"]
    assert "--port" in lines["port"]
    assert "65535" in lines["port"]
    assert "host:port" in lines["etcd_endpoints"]
    assert "redis://" in lines["redis_url"]


def test_an_unknown_key_in_the_file_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("ovens: 3\novnes: 4\n")
    assert "ovnes: no such setting" in complaint(capsys, "--config", str(file))


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ovnes" in complaint(capsys, "--ovnes", "4")


@pytest.mark.parametrize(
    ("content", "told"),
    [("ovens: [1\n", "is not YAML"), ("- ovens\n", "name: value"), (None, "No such file")],
    ids=["broken", "a list", "missing"],
)
def test_a_file_that_cannot_be_read_is_named(
    content: str | None, told: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    printed = complaint(capsys, "--config", str(file))
    assert str(file) in printed
    assert told in printed


def test_help_names_every_setting_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("--help")
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--config FILE" in printed
    for name, field in BakerySettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in printed
        assert field.description
        assert field.description in printed


def test_others_are_told_an_address_they_can_reach() -> None:
    assert load("--host", "127.0.0.1").reachable_host == "127.0.0.1"
    assert load("--host", "0.0.0.0").reachable_host not in ("0.0.0.0", "")
    assert load("--host", "0.0.0.0", "--advertise-host", "router.example").reachable_host == "router.example"
