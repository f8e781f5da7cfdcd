"""Settings of the forecaster."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.common.settings import ServiceSettings


class ForecasterSettings(ServiceSettings):
    """The forecaster: records each model's load per window, and forecasts the next windows."""

    data_dir: Path = Field(Path("/var/lib/warmserve/forecaster"), description="folder of the load history")
    season_s: float = Field(86_400.0, gt=0, description="seconds after which traffic resembles itself; a day")
    horizon: int = Field(12, ge=1, le=288, description="windows to forecast, the current one first")
    retention_s: float = Field(28 * 86_400.0, gt=0, description="seconds of history to keep")
