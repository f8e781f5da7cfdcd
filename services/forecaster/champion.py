"""The predictor in use, the one before it, and their files. Which one that is changes as a whole, between forecasts."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import Counter

from services.common.telemetry import logger
from services.forecaster import stored
from services.forecaster.stored import Stored
from warmserve.v1 import forecast_pb2

_log = logger(__name__)
_BROKEN = Counter("warmserve_forecaster_broken_predictors_total", "Files of predictors that could not be read")


class Champions:
    """Champion and previous champion. Methods that touch the disk are called in threads, one at a time."""

    def __init__(self, folder: Path, season: int) -> None:
        """`folder`: where the files are; `season`: windows."""
        self.champion_file = folder / "champion.predictor"
        self.challenger_file = folder / "challenger.predictor"
        self._previous_file = folder / "previous.predictor"
        self._season = season
        self.published = stored.published(season)
        self.champion = self.published
        self.previous: Stored | None = None
        self.challenger: forecast_pb2.PredictorInfo | None = None
        """What the last refit made, kept or not."""
        self.last_refit = "there was none yet"

    def load(self) -> None:
        """Reads the files. Where the champion's is broken the previous one takes its place, else the published one."""
        champion, trouble = self._read(self.champion_file)
        self.previous, more = self._read(self._previous_file)
        trouble += more
        if champion is None and self.champion_file.exists():
            self.champion_file.replace(self.champion_file.with_suffix(".broken"))
            if self.previous is not None:
                self._previous_file.replace(self.champion_file)
                champion, self.previous = self.previous, None
        self.champion = champion or self.published
        challenger, _ = self._read(self.challenger_file)
        self.challenger = challenger.info if challenger else None
        if trouble:
            self.last_refit = f"{'; '.join(trouble)}: forecasts are made with {_words(self.champion)}"
            _log.error("a predictor cannot be used", error=self.last_refit)

    def challenger_unix_s(self) -> float | None:
        """When the last refit was, in Unix seconds; None before the first."""
        return None if self.challenger is None else self.challenger.fitted_unix_ms / 1e3

    def keep(self) -> None:
        """Takes note of a challenger that was not better."""
        challenger, _ = self._read(self.challenger_file)
        self.challenger = challenger.info if challenger else None

    def crown_challenger(self) -> None:
        """Makes the challenger in its file the champion. ValueError where it cannot be read, OSError where it cannot be
        saved; then all is as before."""
        data = self.challenger_file.read_bytes()
        new = stored.from_bytes(data, self._season)
        # The previous one first: after a crash between the two, no predictor is lost.
        stored.write(self._previous_file, self._bytes(self.champion))
        stored.write(self.champion_file, data)
        self.previous, self.champion, self.challenger = self.champion, new, new.info

    def restore(self) -> None:
        """Makes the previous champion the champion again, and the other way round. LookupError where there is none,
        OSError where it cannot be saved."""
        if self.previous is None:
            raise LookupError("there is no previous predictor")
        champion, previous = self._bytes(self.previous), self._bytes(self.champion)
        stored.write(self.champion_file, champion)
        stored.write(self._previous_file, previous)
        self.champion, self.previous = self.previous, self.champion

    def _bytes(self, one: Stored) -> bytes:
        return stored.to_bytes(one.predictor, one.info)

    def _read(self, file: Path) -> tuple[Stored | None, list[str]]:
        try:
            return stored.from_bytes(file.read_bytes(), self._season), []
        except FileNotFoundError:
            return None, []
        except (ValueError, OSError) as error:
            _BROKEN.inc()
            return None, [f"{file}: {error}"]


def _words(one: Stored) -> str:
    return f"the {one.info.name} predictor"
