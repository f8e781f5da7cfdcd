"""Logs and metrics."""

from __future__ import annotations

import logging
import sys
from typing import cast

import structlog
from prometheus_client import start_http_server

from services.common.settings import ServiceSettings


def configure_logging(service: str, settings: ServiceSettings) -> None:
    """Sends structlog's and the libraries' records to stderr, one line each, with service, id and bound request ids."""
    level = getattr(logging, settings.log_level.upper())

    def name_service(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        event["service"] = service
        event["id"] = settings.id
        return event

    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        name_service,
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger that takes an event and key-value pairs: log.info("model woken", model=..., ms=...)."""
    return cast(structlog.stdlib.BoundLogger, structlog.get_logger(name))


def serve_metrics(settings: ServiceSettings) -> int:
    """Serves Prometheus metrics at /metrics; returns the port."""
    server, _ = start_http_server(settings.metrics_port, addr=settings.host)
    return int(server.server_port)
