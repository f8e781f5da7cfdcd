"""Groups of agents that may hold a replica."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from services.placer.snapshot import Agent, GroupIds


def is_power_of_two(number: int) -> bool:
    """Whether a tensor-parallel degree can be placed."""
    return number > 0 and number & (number - 1) == 0


def groups(agents: Iterable[Agent], size: int) -> list[GroupIds]:
    """All groups of `size` (a power of two) agents, in order of node and device.

    A group is one block of device indices [k * size, (k + 1) * size) of a node, so that any two groups, of whatever
    sizes, are nested or disjoint.
    """
    ordered = sorted(agents, key=lambda agent: (agent.node, agent.device_index, agent.id))
    if size == 1:
        return [(agent.id,) for agent in ordered]
    blocks: defaultdict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for agent in ordered:
        blocks[agent.node, agent.device_index // size].setdefault(agent.device_index, agent.id)
    return [tuple(block.values()) for block in blocks.values() if len(block) == size]
