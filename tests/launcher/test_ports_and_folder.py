"""Ports that are remembered, and a folder that one launcher has at a time."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.children import Child
from launcher.folder import DataFolder, FolderError, FolderInUseError, ports_of
from launcher.ports import Ports, PortTakenError, is_free


def listen(port: int) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


def test_ports_are_remembered_while_free(tmp_path: Path) -> None:
    file = tmp_path / "ports.json"
    first = Ports(file)
    chosen = {name: first.take(name) for name in ("etcd", "redis", "router")}
    assert len(set(chosen.values())) == 3
    assert first.take("router") == chosen["router"], "asked twice, the same"
    with listen(chosen["redis"]):
        again = Ports(file)
        assert again.take("etcd") == chosen["etcd"]
        assert again.take("router") == chosen["router"]
        other = again.take("redis")
        assert other not in chosen.values()
        assert is_free(other)
    assert Ports(file).take("redis") == other


def test_a_wish_is_granted_where_it_can_be(tmp_path: Path) -> None:
    ports = Ports(tmp_path / "ports.json")
    wished = ports.take("a")
    assert ports.take("b", wish=wished) != wished
    assert Ports(tmp_path / "other.json").take("b", wish=wished) == wished
    with listen(wished), pytest.raises(PortTakenError, match=str(wished)):
        Ports(tmp_path / "third.json").insist("c", wished)


def test_a_damaged_file_of_ports_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "ports.json").write_text("{")
    assert is_free(Ports(tmp_path / "ports.json").take("a"))
    assert set(ports_of(tmp_path)) == {"a"}


def test_a_port_whose_last_connection_is_closing_is_free(tmp_path: Path) -> None:
    port = Ports(tmp_path / "ports.json").take("a")
    server = listen(port)
    with socket.create_connection(("127.0.0.1", port)):
        accepted, _ = server.accept()
        accepted.close()  # the server's end closes first, and stays in TIME_WAIT
    server.close()
    assert is_free(port)


def test_a_folder_has_one_launcher(tmp_path: Path) -> None:
    with DataFolder(tmp_path / "data"):
        with pytest.raises(FolderInUseError, match=f"process id {os.getpid()}; stop that one"):
            DataFolder(tmp_path / "data")
        with DataFolder(tmp_path / "other"):
            pass
    with DataFolder(tmp_path / "data"):
        pass


def test_what_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="file cannot be the data folder: File exists"):
        DataFolder(tmp_path / "file")


def test_what_a_killed_launcher_left_is_waited_for(tmp_path: Path) -> None:
    # A launcher that leaves a child behind which still has the folder's lock, and ends when its input does.
    left = subprocess.Popen(
        [sys.executable, "-c", _LEAVE_A_CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert left.stdout is not None
    assert left.stdin is not None
    assert left.stdout.readline() == "left\n"
    left.wait()
    with (tmp_path / "lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    waiting = subprocess.Popen([sys.executable, "-c", _OPEN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert waiting.poll() is None
    left.stdin.close()
    out, _ = waiting.communicate(timeout=30)
    assert (waiting.returncode, out) == (0, "opened\n")


_LEAVE_A_CHILD = """
import subprocess, sys
from pathlib import Path
from launcher.folder import DataFolder
folder = DataFolder(Path(sys.argv[1]))
subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], pass_fds=[folder.lock_descriptor])
print("left", flush=True)
"""

_OPEN = """
import sys
from pathlib import Path
from launcher.folder import DataFolder
with DataFolder(Path(sys.argv[1])):
    print("opened")
"""


async def test_a_child_that_is_killed_is_seen_to_end(tmp_path: Path) -> None:
    child = Child("sleeper", ["sleep", "1000"], tmp_path / "log")
    os.kill(child.process.pid, signal.SIGKILL)
    assert await child.ended() == -signal.SIGKILL
    assert not child.running
    assert await child.ended() == -signal.SIGKILL


async def test_a_child_that_does_not_want_to_end_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w'); signal.pause()"
    child = Child("stubborn", [sys.executable, "-c", code], tmp_path / "log")
    while not ready.exists():
        child.check()
    assert not await child.stop_gently(0.1)
    assert not child.running


def test_the_end_of_a_log_says_why_a_child_ended(tmp_path: Path) -> None:
    child = Child("broken", [sys.executable, "-c", "raise SystemExit('this is why')"], tmp_path / "log")
    child.process.wait()
    with pytest.raises(RuntimeError, match=r"broken ended with status 1.*\n.*this is why"):
        child.check()
