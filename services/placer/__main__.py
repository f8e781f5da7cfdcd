"""The placer's process."""

from __future__ import annotations

import gc
import sys

from services.common.process import Node, run
from services.common.telemetry import logger
from services.placer.mirrors import Mirrors
from services.placer.planning import Planning
from services.placer.service import PlacementServicer
from services.placer.settings import PlacerSettings
from warmserve.v1 import placement_pb2, placement_pb2_grpc

_log = logger(__name__)
_GARBAGE = 2_000  # new objects between collections: a wake waits for each, and 10,000 take 2 ms
_SWITCH_S = 0.0005  # metrics are read in a thread; Python's own 5 ms would be all the time that a wake has


async def serve(settings: PlacerSettings, node: Node) -> None:
    """Serves until node.stop is set."""
    mirrors = Mirrors(node.store, node.keys)
    planning = Planning()
    servicer = PlacementServicer(settings, node, mirrors, planning)
    await mirrors.start()
    await planning.start()  # also while others lead: whoever leads then plans at once
    node.server.add(
        placement_pb2_grpc.add_PlacementServiceServicer_to_server,
        servicer,
        placement_pb2.DESCRIPTOR.services_by_name["PlacementService"],
    )
    address = await node.server.start()
    await node.server.set_serving(True)
    _log.info("serving", address=address)
    try:
        await servicer.lead(address)
    finally:
        _log.info("stopping")
        await node.server.set_serving(False)
        await node.session.close()  # a standby leads at once, while calls in progress end here
        await node.server.stop(settings.grace_s)
        await mirrors.close()
        await planning.close()


def main() -> None:
    """Entry point."""
    sys.setswitchinterval(_SWITCH_S)
    gc.set_threshold(_GARBAGE)
    run("placer", PlacerSettings, serve)


if __name__ == "__main__":
    main()
