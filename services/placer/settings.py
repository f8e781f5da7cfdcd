"""Settings of the placer."""

from __future__ import annotations

from pydantic import Field

from services.common.settings import ServiceSettings
from services.placer.snapshot import Rules


class PlacerSettings(ServiceSettings):
    """The placer: decides which models are warm, active and cold, and where; one leads, the others stand by."""

    tick_s: float = Field(1.0, gt=0, description="seconds between plans when nothing happens")
    min_stay_s: float = Field(2.0, ge=0, description="seconds that an instance stays active at least")
    max_wait_s: float = Field(10.0, ge=0, description="seconds that requests wait before a busy instance gives way")
    kv_reserve_pages: float = Field(0.25, ge=0, lt=1, description="most of an arena that weights leave to KV")
    lookahead_s: float = Field(30.0, ge=0, description="forecast windows that begin within these seconds count as now")
    scale_up: float = Field(0.8, gt=0, le=1, description="load over capacity above which an instance is added")
    scale_down: float = Field(0.5, gt=0, le=1, description="load over capacity, of one less, below which one is freed")
    advisory: bool = Field(False, description="make plans and show them, but carry nothing out")
    node_copy_bytes_per_s: float = Field(
        0.0, ge=0, description="most that all loads of one node copy together; 0: no bound"
    )
    order_timeout_s: float = Field(5.0, gt=0, description="seconds that an agent may take to answer an order")

    @property
    def rules(self) -> Rules:
        """The planner's numbers."""
        return Rules(
            scale_up=self.scale_up,
            scale_down=self.scale_down,
            min_stay_s=self.min_stay_s,
            max_wait_s=self.max_wait_s,
            kv_reserve=self.kv_reserve_pages,
            lookahead_s=self.lookahead_s,
        )
