"""The layout of keys in etcd and Redis. All of it lies under one prefix, so that clusters can share servers."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MODEL_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?")


def check_model_name(name: str) -> None:
    """Raises ValueError, saying what is allowed, where `name` cannot name a model."""
    if not _MODEL_NAME.fullmatch(name) or "//" in name:
        raise ValueError(
            f"model name {name!r} is not allowed: use 1 to 128 letters, digits, '.', '_', '-' and single '/', "
            "beginning and ending with a letter or digit"
        )


@dataclass(frozen=True)
class Keys:
    """Keys of one cluster. Methods ending in `s` give the prefix under which the others lie."""

    prefix: str = "warmserve"

    def models(self) -> str:
        return f"{self.prefix}/models/"

    def model(self, name: str) -> str:
        return self.models() + name

    def agents(self) -> str:
        return f"{self.prefix}/agents/"

    def agent(self, agent_id: str) -> str:
        return self.agents() + agent_id

    def residencies(self) -> str:
        return f"{self.prefix}/residency/"

    def residency(self, agent_id: str) -> str:
        return self.residencies() + agent_id

    def instances(self) -> str:
        return f"{self.prefix}/instances/"

    def instance(self, model: str, instance_id: str) -> str:
        return f"{self.instances()}{model}/{instance_id}"

    def routers(self) -> str:
        return f"{self.prefix}/routers/"

    def router(self, router_id: str) -> str:
        return self.routers() + router_id

    def controls(self) -> str:
        return f"{self.prefix}/controls/"

    def control(self, agent_id: str) -> str:
        return self.controls() + agent_id

    def forecasts(self) -> str:
        return f"{self.prefix}/forecasts/"

    def forecast(self, model: str) -> str:
        return self.forecasts() + model

    def forecasters(self) -> str:
        return f"{self.prefix}/forecasters/"

    def forecaster(self, forecaster_id: str) -> str:
        return self.forecasters() + forecaster_id

    def calendars(self) -> str:
        return f"{self.prefix}/calendar/"

    def calendar(self, model: str, entry_id: str) -> str:
        return f"{self.calendars()}{model}/{entry_id}"

    def plan(self) -> str:
        return f"{self.prefix}/plan"

    def placer_leader(self) -> str:
        return f"{self.prefix}/election/placer"

    def placer_mode(self) -> str:
        return f"{self.prefix}/mode/placer"

    # Redis

    def queue(self, model: str, priority: str) -> str:
        """Stream of waiting requests. `priority` is high, normal or low."""
        return f"{self.prefix}:queue:{model}:{priority}"

    def events(self) -> str:
        """Capped stream of events."""
        return f"{self.prefix}:events"

    def load(self, window: int, reporter: str) -> str:
        """Hash of what one router counted in one window, by model. `window` is its number since 1970."""
        return f"{self.prefix}:load:{window}:{reporter}"

    def load_reporters(self, window: int) -> str:
        """Hash of the routers that counted in a window, and for how long; without it, the window is a gap and not zero
        traffic."""
        return f"{self.prefix}:load-reporters:{window}"

    def load_windows(self) -> str:
        """Hash of the windows of which there are counts, and of how often each was written."""
        return f"{self.prefix}:load-windows"
