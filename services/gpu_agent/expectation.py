"""What the forecasts say the instances of this agent will run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from warmserve.cluster.mirror import Mirror
from warmserve.v1 import cluster_pb2

_WINDOWS = 2  # this one and the next: what is prewarmed now is to last that long


def sequences_per_instance(
    model: str, forecasts: Iterable[cluster_pb2.Forecast], instances: Iterable[cluster_pb2.InstanceRecord]
) -> float:
    """Sequences that each instance of a model will run at once, by the p90 of its peaks; 0 without a forecast. Pure."""
    forecast = next((known for known in forecasts if known.model == model), cluster_pb2.Forecast())
    peaks = [window.peak_load.p90 for window in forecast.windows[:_WINDOWS]]
    return max(peaks, default=0.0) / max(1, sum(record.model == model for record in instances))


def follow(
    forecasts: Mirror[cluster_pb2.Forecast],
    instances: Mirror[cluster_pb2.InstanceRecord],
    tell: Callable[[str, float], None],
) -> None:
    """Has `tell(model, sequences)` called when forecasts or instances in etcd change; call it before they start."""

    def changed(
        _: str,
        old: cluster_pb2.Forecast | cluster_pb2.InstanceRecord | None,
        new: cluster_pb2.Forecast | cluster_pb2.InstanceRecord | None,
    ) -> None:
        for model in {record.model for record in (old, new) if record is not None}:
            tell(model, sequences_per_instance(model, forecasts.items.values(), instances.items.values()))

    forecasts.on_change(changed)
    instances.on_change(changed)
