"""How long loading a replica takes, by where its image is."""

from __future__ import annotations

from collections.abc import Iterable

from services.placer.snapshot import Model, Tier


def load_s(model: Model, node: str, beside: bool = False) -> float:
    """Seconds that a whole replica takes to load on a node.

    `beside`: another replica of the model is on the node by then, so that it may be copied from GPU to GPU.
    """
    tier = model.images.get(node)
    seconds = model.cold_load_s if tier is None else model.load_s.get(tier, model.cold_load_s)
    if beside and Tier.PEER in model.load_s:
        seconds = min(seconds, model.load_s[Tier.PEER])
    return seconds


def quickest_s(model: Model, nodes: Iterable[str]) -> tuple[float, float]:
    """Seconds on the best of these nodes: of the first replica, and of one beside another of the model."""
    alone = [load_s(model, node) for node in nodes]
    if not alone:
        return model.cold_load_s, model.cold_load_s
    first_s = min(alone)
    return first_s, min(first_s, model.load_s.get(Tier.PEER, first_s))


def load_bytes_per_s(model: Model, seconds: float) -> float:
    """What a load that takes so long copies per second, all shards together."""
    return model.shard_bytes * model.tp / seconds if seconds > 0 else 0.0
