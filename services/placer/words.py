"""Numbers and names in plain words."""

from __future__ import annotations

from services.placer.scores import PINNED_S
from services.placer.snapshot import GroupIds


def count(number: int, what: str) -> str:
    """ "1 page", "2 pages"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def share(part: float) -> str:
    """A share as per cent; only what is whole is 100%."""
    return f"{min(99, round(part * 100)) if part < 1 else 100}%"


def names(group: GroupIds) -> str:
    """A group's agents."""
    return "+".join(group)


def load(requests: float) -> str:
    """Requests in progress: "3.2", "0.02"."""
    return f"{requests:.1f}" if requests >= 0.05 or requests == 0 else f"{requests:.1g}"


def worth(score: float) -> str:
    """What a replica is worth: "worth 0.25 s"."""
    return f"worth {score:.2f} s" if score < PINNED_S else "pinned"


def chance(probability: float) -> str:
    """A probability as per cent; only what is certain is 0% or 100%."""
    if 0 < probability < 0.01:
        return "under 1%"
    return share(probability)
