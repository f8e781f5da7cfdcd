"""TCP ports of 127.0.0.1 that a cluster listens on, remembered so that a restart has the same endpoints."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path

# Below Linux's range of ports for outgoing connections (32768 and up), one of which could otherwise take the port of
# a service while that is being restarted.
_RANGE = range(20_000, 32_000)


class PortTakenError(RuntimeError):
    """A port that was asked for by number is in use."""


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now. Connections that are still closing do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port that is free now."""
    for _ in range(1_000):
        port = random.choice(_RANGE)
        if is_free(port):
            return port
    raise RuntimeError(f"no free port found between {_RANGE.start} and {_RANGE.stop - 1}")


class Ports:
    """Ports by name, kept in a JSON file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._ports = read_ports(file)
        self._taken: dict[str, int] = {}  # handed out by this object

    def take(self, name: str, wish: int = 0) -> int:
        """The port for `name`: the one it had before where that is free, else `wish` where that is, else any."""
        if name in self._taken:
            return self._taken[name]
        for port in (self._ports.get(name, 0), wish):
            if port and self._is_free(port):
                return self._keep(name, port)
        while not self._is_free(port := free_port()):
            pass
        return self._keep(name, port)

    def insist(self, name: str, port: int) -> int:
        """The given port for `name`. Raises PortTakenError where it is in use."""
        if not self._is_free(port):
            raise PortTakenError(
                f"port {port} of 127.0.0.1 is in use: choose another, or leave it out to get a free one"
            )
        return self._keep(name, port)

    def _is_free(self, port: int) -> bool:
        return port not in self._taken.values() and is_free(port)

    def _keep(self, name: str, port: int) -> int:
        self._taken[name] = self._ports[name] = port
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self._ports, indent=2, sort_keys=True) + "\n")
        new.replace(self._file)
        return port


def read_ports(file: Path) -> dict[str, int]:
    """The ports that a cluster took when it last started; empty where the file is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return (
        {str(name): port for name, port in content.items() if isinstance(port, int)}
        if isinstance(content, dict)
        else {}
    )
