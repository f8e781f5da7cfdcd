"""Configuration of a service: one schema, read from flags, environment and a YAML file, in that order of precedence."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

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
    window_s: float = Field(300.0, gt=0, description="length of a forecast window, the same in the whole cluster")
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
    if file is not None and not os.path.isfile(file):
        sys.exit(_complaint(service, [f"--config: there is no file {file!r}"]))

    class Settings(kind):  # type: ignore[valid-type,misc]
        model_config = SettingsConfigDict(yaml_file=file, title=service)

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
                problems.append(
                    f"{name} (--{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()}): {detail['msg']}, "
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


def _complaint(service: str, problems: list[str]) -> int:
    print(f"warmserve-{service}: invalid configuration", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    return 2
