"""What the forecaster tells, drawn for people. Pure: now is given, and nothing is printed here."""

from __future__ import annotations

from datetime import datetime

from rich.console import Group, RenderableType
from rich.text import Text

from warmserve.admin import units
from warmserve.admin.drawing import fact_list, make_table
from warmserve.admin.forecast_views import FIELDS, Outlook, Quantity, title
from warmserve.admin.moments import distance, length, spell_unix
from warmserve.admin.plain import Plain, plain
from warmserve.v1 import forecast_pb2

_LINES = 22
_MOST_COLUMNS = 120


def forecast(view: Outlook, quantity: Quantity, now_s: float, width: int, colors: bool) -> RenderableType:
    """`forecast show`."""
    from warmserve.admin import terminal_plot  # every warmctl would start slower for it

    drawn = terminal_plot.draw(view, quantity, now_s, min(width, _MOST_COLUMNS), _LINES, colors)
    if not drawn:
        return f"Nothing is known of {view.model} yet: the first forecast comes with the end of its first window."
    parts: list[RenderableType] = [
        Text(title(view, quantity), style="bold"),
        Text.from_ansi(drawn),
        Text(terminal_plot.LEGEND, style="dim"),
        "",
    ]
    if view.forecast:
        made = units.age(view.made_unix_ms, int(now_s * 1000))
        parts += [f"Forecast made {made} by the {view.predictor} predictor:", _coming(view, quantity)]
    else:
        parts.append(f"There is no forecast of {view.model}: it is not deployed, or was just now.")
    if view.calendar:
        parts += ["", _announced(view.calendar, now_s)]
    return Group(*parts)


def _coming(view: Outlook, quantity: Quantity) -> RenderableType:
    table = make_table("WINDOW FROM", "MEDIAN", "P90", "P99", "MOST AT ANY MOMENT: MEDIAN", "P90", "P99")
    for window in view.forecast:
        values = [
            f"{(window[name] or {}).get(quantile, 0):.3g}"
            for name in (FIELDS[quantity], FIELDS[Quantity.peak])
            for quantile in ("p50", "p90", "p99")
        ]
        table.add_row(datetime.fromtimestamp(window["start_unix_s"]).strftime("%H:%M:%S"), *values)
    return table


def _announced(calendar: list[Plain], now_s: float) -> RenderableType:
    table = make_table("ANNOUNCED", "", "LASTS", "LOAD", "SAID BY", "NOTE")
    for entry in calendar:
        begins = (spell_unix(entry["start_unix_s"]), distance(entry["start_unix_s"], now_s))
        table.add_row(*begins, length(entry["duration_s"]), f"{entry['load']:g}", entry["source"], entry["note"])
    return table


def scores(found: forecast_pb2.GetScoresResponse, ahead: int, past: str) -> RenderableType:
    """`forecast score`."""
    parts: list[RenderableType] = []
    if found.models:
        table = make_table(
            "MODEL", "WINDOWS", "MEDIAN OFF BY", "P90 LOSS", "P90 HELD", "P99 HELD", "P90 / CAME",
            "WARM IN VAIN", "MISSED", "UNFORESEEN",
        )  # fmt: skip
        for score in found.models:
            traffic = score.over_provision > 0  # else there was none to be off by
            table.add_row(
                score.model,
                str(score.windows),
                f"{100 * score.wape:.0f} %" if traffic else "-",
                f"{score.pinball_p90:.3f}" if traffic else "-",
                units.share(score.coverage_p90),
                units.share(score.coverage_p99),
                f"{score.over_provision:.2f}" if traffic else "-",
                _replica_time(score.needless_replica_s),
                _replica_time(score.missing_replica_s),
                f"{score.unforeseen_requests:.0f}",
            )
        parts += [
            table,
            "",
            f"The last {past}, forecast {ahead} window(s) ahead. Median off by, loss: shares of the mean load.",
            "Held: windows at or under the quantile (90 % and 99 % are right). Warm in vain, missed: replicas x time",
            "that p90 of the peak called for too many or too few. Unforeseen: requests in windows for which p90 called",
            "for no replica.",
        ]
    else:
        parts.append("No window has been both forecast and counted yet.")
    if found.calendar:
        table = make_table(
            "MODEL", "ANNOUNCED FOR", "LASTED", "SAID BY", "LOAD SAID", "CAME", "AT MOST", "WITHOUT IT", "NOTE"
        )
        for one in found.calendar:
            entry = plain(one.entry)
            table.add_row(
                entry["model"],
                spell_unix(entry["start_unix_s"]),
                length(entry["duration_s"]),
                entry["source"],
                f"{entry['load']:g}",
                *(
                    f"{getattr(one, name):.3g}" if one.HasField(name) else "-"
                    for name in ("actual_load", "actual_peak", "forecast_load")
                ),
                entry["note"],
            )
        parts += ["", table]
    return Group(*parts)


def _replica_time(seconds: float) -> str:
    return length(seconds) if seconds >= 1 else "-"


def predictors(found: forecast_pb2.GetPredictorResponse, restored: bool, now_ms: int) -> RenderableType:
    """`forecast predictor`."""

    def words(name: str) -> str:
        if not found.HasField(name):  # type: ignore[arg-type]
            return "none"
        info: forecast_pb2.PredictorInfo = getattr(found, name)
        if not info.fitted_unix_ms:
            return info.name
        text = (
            f"{info.name}, fitted {units.age(info.fitted_unix_ms, now_ms)} to {info.windows:,} windows of "
            f"{info.series:,} series"
        )
        return text + (f"; loss {info.relative_loss:.2f} of the published one's" if info.relative_loss else "")

    drift = f"{found.drift:.2f} of the loss when it was fitted" if found.drift else "not known yet"
    rows: list[tuple[str, str | Text]] = [
        ("champion", words("champion")),
        ("previous", words("previous")),
        ("last challenger", words("challenger")),
        ("last refit", found.last_refit or "none yet"),
        ("newest loss", drift),
    ]
    head = ["Restored."] if restored else []
    return Group(*head, fact_list(rows))
