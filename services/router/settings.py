"""Configuration of a router."""

from __future__ import annotations

from pydantic import Field

from services.common.settings import ServiceSettings


class RouterSettings(ServiceSettings):
    """Takes requests over gRPC and OpenAI-compatible HTTP, and streams answers back."""

    http_port: int = Field(0, ge=0, le=65535, description="port of the OpenAI-compatible HTTP door; 0 takes a free one")
    request_timeout_s: float = Field(
        600.0, gt=0, le=86_400, description="deadline of a request whose client gives none, in seconds"
    )
    max_requests: int = Field(4096, ge=1, description="most requests in progress at this router")
    max_requests_per_model: int = Field(1024, ge=1, description="most requests in progress of one model at this router")
    max_body_bytes: int = Field(4 << 20, ge=1024, description="largest HTTP request body, in bytes")
    max_prompt_chars: int = Field(1_000_000, ge=1, description="longest prompt or conversation, in characters")
    wake_retry_s: float = Field(
        2.0, gt=0, description="seconds after which the placer is asked again for a model that requests still wait for"
    )
    check_s: float = Field(
        1.0, gt=0, description="seconds between checks that every waiting request is still in its queue"
    )
