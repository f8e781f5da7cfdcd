"""Groups of agents that may hold a replica."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from services.placer.snapshot import Agent, GroupIds


def is_power_of_two(number: int) -> bool:
    """Whether a tensor-parallel degree can be placed."""
    return number > 0 and number & (number - 1) == 0


def groups(agents: Iterable[Agent], size: int) -> list[GroupIds]:
    """All groups of `size` (a power of two) agents, in order of node and device.

    A group is one block of device indices [k * size, (k + 1) * size) of a node, so that any two groups, of whatever
    sizes, are nested or disjoint.
    """
    return [group for there in groups_by_node(agents, size).values() for group in there]


def groups_by_node(agents: Iterable[Agent], size: int) -> Mapping[str, Sequence[GroupIds]]:
    """The same by node, without nodes that have none."""
    return _groups_by_node(tuple((agent.node, agent.device_index, agent.id) for agent in agents), size)


@functools.lru_cache(maxsize=64)
def _groups_by_node(places: tuple[tuple[str, int, str], ...], size: int) -> Mapping[str, Sequence[GroupIds]]:
    by_node: defaultdict[str, list[GroupIds]] = defaultdict(list)
    blocks: defaultdict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for node, device_index, agent_id in sorted(places):
        if size == 1:
            by_node[node].append((agent_id,))
        else:
            blocks[node, device_index // size].setdefault(device_index, agent_id)
    for (node, _), block in blocks.items():
        if len(block) == size:
            by_node[node].append(tuple(block.values()))
    return dict(by_node)
