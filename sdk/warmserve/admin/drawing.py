"""What drawings for people are made of, with rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from warmserve.admin.plain import Plain

_GAP = "  "
_STYLES = {"active": "green", "warm": "cyan", "draining": "yellow", "warming": "yellow", "cold": "dim"}


def make_table(*columns: str) -> Table:
    """An empty table with these headings."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def noted_table(columns: Sequence[str], rows: Iterable[tuple[Sequence[str | Text], str]]) -> RenderableType:
    """A table of one row or more, each with a sentence, which stands below it and takes the lines it needs."""
    drawn = [([cell if isinstance(cell, Text) else Text(cell) for cell in cells], note) for cells, note in rows]
    widths = [max(len(column), *(cells[i].cell_len for cells, _ in drawn)) for i, column in enumerate(columns)]
    heading = _GAP.join(column.ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip()
    rule = "─" * (sum(widths) + len(_GAP) * (len(widths) - 1))
    parts: list[RenderableType] = [Text(heading, style="bold"), Text(rule, no_wrap=True, overflow="crop")]
    for cells, note in drawn:
        line = Text()
        for cell, width in zip(cells, widths, strict=True):
            line.append_text(cell).append(" " * (width - cell.cell_len) + _GAP)
        line.rstrip()
        parts.append(line)
        if note:
            parts.append(Padding(Text(note, style="dim"), (0, 0, 0, 4), expand=False))
    return Group(*parts)


def fact_list(rows: Iterable[tuple[str, str | Text]]) -> RenderableType:
    """Names with what they stand for, one below another."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return Padding(table, (0, 0, 0, 2), expand=False)


def note_lines(notes: Iterable[str]) -> list[Text]:
    """What an operator should not overlook."""
    return [Text(f"! {note}", style="yellow") for note in notes]


def state_text(state: str) -> Text:
    """A replica's state, in its colour."""
    return Text(state, style=_STYLES.get(state, ""))


def because(reason: Plain) -> str:
    """A reason's sentence, or its cause, and whom it serves."""
    text = str(reason.get("text") or cause(reason))
    return f"{text} (for {reason['by_model']})" if reason.get("by_model") and reason["by_model"] not in text else text


def cause(reason: Plain) -> str:
    """A reason's cause in words, and its score."""
    cause = str(reason.get("cause", "unspecified"))
    words = "" if cause == "unspecified" else cause.replace("_", " ")
    return f"{words}, score {reason['score']:.3g}" if words and reason.get("score") else words
