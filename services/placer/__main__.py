"""The placer's process."""

from __future__ import annotations

import asyncio

from services.common.process import Node, run
from services.common.telemetry import logger
from services.placer.mirrors import Mirrors
from services.placer.service import PlacementServicer
from services.placer.settings import PlacerSettings
from warmserve.v1 import placement_pb2, placement_pb2_grpc

_log = logger(__name__)


async def serve(settings: PlacerSettings, node: Node) -> None:
    """Serves until node.stop is set."""
    mirrors = Mirrors(node.store, node.keys)
    servicer = PlacementServicer(settings, node, mirrors)
    await mirrors.start()
    node.server.add(
        placement_pb2_grpc.add_PlacementServiceServicer_to_server,
        servicer,
        placement_pb2.DESCRIPTOR.services_by_name["PlacementService"],
    )
    address = await node.server.start()
    leading = asyncio.create_task(servicer.lead(address), name="leadership")
    stopped = asyncio.create_task(node.stop.wait())
    await node.server.set_serving(True)
    _log.info("serving", address=address)
    await asyncio.wait({leading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    _log.info("stopping")
    await node.server.set_serving(False)
    # Before the calls in progress end: a standby leads as soon as the lease is given back.
    leading.cancel()
    await asyncio.wait({leading})
    await node.session.close()
    await node.server.stop(settings.grace_s)
    await mirrors.close()
    stopped.cancel()
    if not leading.cancelled():
        leading.result()  # raises what ended it


def main() -> None:
    """Entry point."""
    run("placer", PlacerSettings, serve)


if __name__ == "__main__":
    main()
