"""An agent's arena drawn on one line, to scale. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from warmserve.admin.agent_views import AgentDescription

WIDTH = 64
LEGEND = "█ weights  ▄ lent weights  ▓ KV  ▁ copying in  · promised to KV  ░ free"
_COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")


@dataclass(frozen=True)
class Part:
    """Pages that one has for one use."""

    letter: str
    """The model's; blank where no model has them."""
    pages: int
    glyph: str
    style: str


def letters(count: int) -> list[str]:
    """As many different labels: a to z, then a1, b1 ..."""
    return [chr(ord("a") + index % 26) + (str(index // 26) if index >= 26 else "") for index in range(count)]


def parts(description: AgentDescription) -> list[Part]:
    """The arena's pages in the order in which they are drawn; their sum is the arena."""
    agent = description.agent
    found = []
    labels = letters(len(description.shares))
    kv_known = 0
    for index, (label, share) in enumerate(zip(labels, description.shares, strict=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        kept = share.weight_pages - share.lent_pages
        found += [Part(label, kept, "█", colour), Part(label, share.lent_pages, "▄", colour)]
        found.append(Part(label, share.kv_pages, "▓", colour))
        kv_known += share.kv_pages
    promised = min(agent.pages_promised, agent.pages_free)
    found += [
        Part("", max(0, agent.pages_kv - kv_known), "▓", ""),  # of an instance that has just ended
        Part("", description.pages_arriving, "▁", "yellow"),
        Part("", promised, "·", "dim"),
        Part("", agent.pages_free - promised, "░", "dim"),
    ]
    return [part for part in found if part.pages]


def cells(pages: Sequence[int], width: int) -> list[int]:
    """Divides `width` cells in proportion to `pages`; whoever has a page has a cell, as far as there are as many."""
    total = sum(pages)
    if not total:
        return [0] * len(pages)
    exact = [count * width / total for count in pages]
    given = [max(int(share), 1 if count else 0) for share, count in zip(exact, pages, strict=True)]
    while sum(given) != width:
        step = 1 if sum(given) < width else -1
        able = [index for index, count in enumerate(given) if pages[index] and (step > 0 or count > 1)]
        if not able:
            break  # more parts than cells
        given[max(able, key=lambda index: step * (exact[index] - given[index]))] += step
    return given


def draw(description: AgentDescription) -> list[Text]:
    """Two lines: what each part of the arena holds, and below it the letters of whose it is."""
    found = parts(description)
    bar, below, last = Text("  "), "  ", ""
    for part, width in zip(found, cells([part.pages for part in found], WIDTH), strict=True):
        bar.append(part.glyph * width, style=part.style)
        label = part.letter if part.letter != last else ""
        below += label[:width].ljust(width)
        last = part.letter
    return [bar, Text(below.rstrip())]
