"""uvicorn inside this process's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

_CLOSE_S = 5  # for connections to end once no request is in progress


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process handles signals itself

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


class HttpServer:
    """Serves an ASGI application."""

    def __init__(self, app: ASGIApp, host: str, port: int, reachable_host: str) -> None:
        self._host = host
        self._port = port
        self._reachable_host = reachable_host
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=_CLOSE_S, ws="none"
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listens. Returns the URL to tell others. Raises OSError where the port is taken."""
        listening = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self._host, self._port))
        except OSError as error:
            listening.close()
            raise OSError(f"cannot listen on {self._host}:{self._port}: {error.strerror}") from error
        port = listening.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve([listening]), name="http server")
        await self._server.ready.wait()
        return f"http://{self._reachable_host}:{port}"

    async def stop(self) -> None:
        """Closes the port and the connections."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
