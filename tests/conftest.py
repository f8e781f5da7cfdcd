"""What all tests share: one etcd and one Redis for the whole run, and a prefix of its own for each test."""

from __future__ import annotations

import signal
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from launcher.backing import Backing, start_etcd, start_redis
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store

# A shell that runs the tests in the background has them, and the processes they start, ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

_LONG = {"house", "launcher", "system"}  # folders of few tests that take long, each file on one worker


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that no worker is left alone with it."""
    items.sort(key=lambda item: item.path.parent.name not in _LONG)


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backing]:
    """A real etcd; `.address` is its host:port."""
    folder = tmp_path_factory.mktemp("etcd")
    backing = start_etcd(folder / "data", folder / "log")
    yield backing
    backing.child.stop(5)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backing]:
    """A real Redis; `.address` is its host:port."""
    folder = tmp_path_factory.mktemp("redis")
    backing = start_redis(folder / "data", folder / "log")
    yield backing
    backing.child.stop(5)


@pytest.fixture
def keys() -> Keys:
    """Keys under a prefix that no other test has."""
    return Keys(f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture
async def store(etcd: Backing) -> AsyncIterator[Store]:
    """A store on the real etcd."""
    store = Store([etcd.address])
    yield store
    await store.close()


@pytest.fixture
async def redis(redis_server: Backing) -> AsyncIterator[Redis]:
    """A client of the real Redis."""
    client = Redis.from_url(f"redis://{redis_server.address}/0")
    yield client
    await client.aclose()
