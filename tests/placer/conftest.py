"""The cluster of one test of the placer."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from launcher.backing import Backing
from tests.placer.peers import Cluster, Peers, Watch, watching
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store


@pytest.fixture
def cluster(etcd: Backing, redis_server: Backing, keys: Keys) -> Cluster:
    """Real servers, a prefix of its own."""
    return Cluster(etcd, redis_server, keys)


@pytest.fixture
async def peers(cluster: Cluster) -> AsyncIterator[Peers]:
    """No agents yet."""
    peers = Peers(cluster)
    yield peers
    await peers.close()


@pytest.fixture
async def watch(store: Store, keys: Keys) -> AsyncIterator[Watch]:
    """What etcd shows."""
    async with watching(store, keys) as watch:
        yield watch
