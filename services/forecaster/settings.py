"""Settings of the forecaster."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.common.settings import ServiceSettings


class ForecasterSettings(ServiceSettings):
    """The forecaster: records each model's load per window, and forecasts the next windows."""

    data_dir: Path = Field(Path("/var/lib/warmserve/forecaster"), description="folder of the load history")
    season_s: float = Field(86_400.0, gt=0, description="seconds after which traffic resembles itself; a day")
    horizon: int = Field(12, ge=1, le=12, description="windows to forecast, the current one first")
    retention_s: float = Field(
        365 * 86_400.0, gt=0, description="seconds of history to keep; windows older than 28 seasons joined into hours"
    )
    refit_s: float = Field(86_400.0, ge=0, description="seconds from one refit of the predictor to the next; 0: never")
    refit_memory_bytes: int = Field(2 << 30, ge=256 << 20, description="memory that a refit may take")

    @property
    def season(self) -> int:
        """Windows of a season."""
        return max(1, round(self.season_s / self.window_s))

    @property
    def full_s(self) -> float:
        """Seconds for which windows are kept as they are, and forecasts look back."""
        return min(28 * self.season_s, self.retention_s)
