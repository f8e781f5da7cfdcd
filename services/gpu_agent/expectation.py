"""What the forecasts say the instances of this agent will run, and what images in memory are worth."""

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


def worth(spec: cluster_pb2.ModelSpec, forecast: cluster_pb2.Forecast | None) -> float:
    """What each byte of a model's image in the node's memory is worth, to be compared with other models'. Pure.

    The requests in progress that the forecast expects at once (the p90 of its peaks), times the model's priority: so
    many may wait when it is loaded. How long each would wait longer for the disk is proportional to the model's size,
    as is the memory that it takes, so size does not count.
    """
    windows = forecast.windows[:_WINDOWS] if forecast is not None else []
    return max((window.peak_load.p90 for window in windows), default=0.0) * (spec.priority or 1.0)


def follow_worths(
    models: Mirror[cluster_pb2.ModelSpec],
    forecasts: Mirror[cluster_pb2.Forecast],
    tell: Callable[[cluster_pb2.ModelSpec, float | None], None],
) -> None:
    """Has `tell(spec, worth)` called when models or forecasts in etcd change; call it before they start.

    None is the worth of a model that is not deployed any more.
    """

    def on_model(_: str, old: cluster_pb2.ModelSpec | None, new: cluster_pb2.ModelSpec | None) -> None:
        if new is not None:
            tell(new, worth(new, forecasts.items.get(new.name)))
        elif old is not None:
            tell(old, None)

    def on_forecast(_: str, old: cluster_pb2.Forecast | None, new: cluster_pb2.Forecast | None) -> None:
        about = new or old
        spec = models.items.get(about.model) if about is not None else None
        if spec is not None:
            tell(spec, worth(spec, new))

    models.on_change(on_model)
    forecasts.on_change(on_forecast)


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
