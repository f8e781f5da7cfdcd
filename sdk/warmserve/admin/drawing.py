"""What drawings for people are made of, with rich."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def make_table(*columns: str) -> Table:
    """An empty table with these headings."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


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
