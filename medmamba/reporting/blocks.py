"""The parts of a report: sections of paragraphs, tables, lists and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 220  # of pictures: legible in print at the width of a page


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]
    kind: str = "bullets"


@dataclass(frozen=True)
class Table:
    """A table; `small` for many columns, `number` whether all columns but the first are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    small: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption; `width` is its share of the page in percent."""

    png: bytes
    caption: str
    width: int = 70
    kind: str = "picture"

    @property
    def address(self) -> str:
        """The picture itself as an address, so that the page needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


Block = Text | Bullets | Table | Picture


@dataclass(frozen=True)
class Section:
    """A section; `key` is its anchor, and what checklists refer to."""

    key: str
    title: str
    blocks: tuple[Block, ...] = field(default_factory=tuple)


def picture(figure: Figure, caption: str, width: int = 70) -> Picture:
    """Returns a matplotlib figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
    return Picture(buffer.getvalue(), caption, width)


def from_markdown(lines: Sequence[str]) -> list[Block]:
    """Returns the tables and paragraphs of simple Markdown, as the results of this package write it."""
    found: list[Block] = []
    rows: list[list[str]] = []

    def flush() -> None:
        if rows:
            found.append(Table(rows[0], rows[2:], small=len(rows[0]) > 6))
            rows.clear()

    for line in lines:
        if line.startswith("|"):
            cells = line.strip().strip("|").replace("\\|", "\0").split("|")
            rows.append([cell.strip().replace("\0", "|") for cell in cells])
        else:
            flush()
            if line.strip():
                found.append(Text(line.lstrip("#- ").strip()))
    flush()
    return found
