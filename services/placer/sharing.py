"""What instances that share GPUs cost one another, and what one more of a model would spare its own requests.

A GPU's time is shared by the instances on it that have something to do: a request beside another busy instance takes
twice as long. An instance with a load of x requests in progress is busy for the share 1 - exp(-x) of the time, as
arrivals that do not know of one another make it. Costs are seconds by which requests take longer, over a service time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

FULL_SLOWDOWN = 1.5  # by which a request takes longer in a batch as large as an instance carries than alone


@dataclass(frozen=True)
class Part:
    """A model's part in one instance: requests in progress there, and how much their seconds count."""

    load: float
    priority: float

    @property
    def busy(self) -> float:
        """The share of the time in which it has something to do."""
        return 1 - math.exp(-self.load)


def beside(own: Part, others: Iterable[Part], service_s: float, slowdown: float) -> float:
    """Seconds that an instance and its neighbours cost one another until its requests have ended.

    `slowdown`: of its own requests by one another, by which they take longer than `service_s`.
    """
    return service_s * sum(
        own.priority * own.load * other.busy + slowdown * other.priority * other.load * own.busy for other in others
    )


def spared(square: float, instances: int, capacity: int, service_s: float, priority: float) -> float:
    """Seconds that requests take less over `service_s` when one more instance takes its part of what is in progress.

    Each takes longer by FULL_SLOWDOWN times the share of its instance's capacity that is taken, or more than taken, so
    that it is the square of the requests in progress that counts (`square`, or its mean).
    """
    return priority * service_s * FULL_SLOWDOWN * square / (instances * (instances + 1) * capacity)
