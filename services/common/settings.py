"""Configuration of a service: one schema, read from flags, environment and a YAML file, in that order of precedence."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)
from redis.asyncio.connection import parse_url

from warmserve.cluster.store import Store

ENV_PREFIX = "WARMSERVE_"


class ServiceSettings(BaseSettings):
    """What every service is told. Each field is a flag (--etcd-endpoints), a variable (WARMSERVE_ETCD_ENDPOINTS) and a
    key of the YAML file that --config or WARMSERVE_CONFIG names."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    etcd_endpoints: Annotated[list[str], NoDecode] = Field(
        ["127.0.0.1:2379"], description="host:port of each etcd member, separated by commas"
    )
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="URL of the Redis that holds queues and counters")
    prefix: str = Field("warmserve", pattern=r"^[A-Za-z0-9._-]+$", description="prefix of this cluster's keys")
    id: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}",
        pattern=r"^[A-Za-z0-9._-]+$",
        description="this process's id, unique in the cluster",
    )
    host: str = Field("127.0.0.1", description="address the gRPC server listens on")
    port: int = Field(0, ge=0, le=65535, description="port of the gRPC server; 0 takes a free one")
    advertise_host: str = Field("", description="address others reach this process at; the listening one if empty")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of Prometheus metrics; 0 takes a free one")
    lease_ttl_s: int = Field(5, ge=2, le=300, description="seconds after which a dead process is taken for lost")
    window_s: float = Field(300.0, ge=1, description="seconds of a forecast window, the same in the whole cluster")
    grace_s: float = Field(30.0, ge=0, description="seconds that stopping may take to finish running work")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level to log")
    log_format: Literal["json", "console"] = Field("json", description="log lines for programs or for people")

    @field_validator("etcd_endpoints", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.split(",")
        if isinstance(value, list):
            return [part for item in value for part in str(item).split(",") if part]
        return value

    @field_validator("etcd_endpoints")
    @classmethod
    def _check_endpoints(cls, value: list[str]) -> list[str]:
        Store(value)  # reads them and contacts nobody
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        parse_url(value)
        return value

    @property
    def reachable_host(self) -> str:
        """The address to tell others."""
        if self.advertise_host:
            return self.advertise_host
        return socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = cls.model_config.get("yaml_file")
        return (
            init_settings,
            env_settings,
            *([YamlConfigSettingsSource(settings_cls, yaml_file=file)] if file else []),
        )


S = TypeVar("S", bound=ServiceSettings)


def load_settings(kind: type[S], service: str, argv: Sequence[str] | None = None) -> S:
    """Reads the settings of `service`, or ends the process: status 0 after --help, 2 after a list of what is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    file, arguments = _take_config(arguments)
    if file and (problem := _check_file(file)):
        sys.exit(_complaint(service, [f"--config: {problem}"]))

    class Settings(kind):  # type: ignore[valid-type,misc]
        model_config = SettingsConfigDict(yaml_file=file or None, title=service)

    Settings.__doc__ = (kind.__doc__ or "") + "\n\n--config FILE reads settings from a YAML file."
    try:
        flags: CliSettingsSource[S] = CliSettingsSource(
            Settings,
            cli_parse_args=arguments,
            cli_prog_name=f"warmserve-{service}",
            cli_kebab_case=True,
            cli_hide_none_type=True,
            cli_avoid_json=True,
        )
        return Settings(_cli_settings_source=flags)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            name = ".".join(str(part) for part in detail["loc"])
            if detail["type"] == "extra_forbidden":
                problems.append(f"{name}: no such setting; see --help")
            else:
                message = detail["msg"].removeprefix("Value error, ")
                problems.append(
                    f"{name} (--{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()}): {message}, "
                    f"not {detail['input']!r}"
                )
        sys.exit(_complaint(service, problems))
    except SettingsError as error:
        sys.exit(_complaint(service, [str(error)]))


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    file = os.environ.get(f"{ENV_PREFIX}CONFIG")
    rest = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--config" and position + 1 < len(arguments):
            position += 1
            file = arguments[position]
        elif argument.startswith("--config="):
            file = argument.removeprefix("--config=")
        else:
            rest.append(argument)
        position += 1
    return file, rest


def _check_file(path: str) -> str | None:
    """What is wrong with a configuration file; None where it can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot read {path!r}: {error}"
    except yaml.YAMLError as error:
        return f"{path} is not YAML: {error}"
    if content is not None and not isinstance(content, dict):
        return f"{path} must hold settings as `name: value` lines"
    return None


def _complaint(service: str, problems: list[str]) -> int:
    print(f"warmserve-{service}: invalid configuration", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    return 2
