"""A table as data, and how it is shown: in the terminal, as Markdown and as CSV.

Cells hold figures, not texts, so that every rendering is of the same numbers. What comes from outside (labels) is
escaped in each.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Kind = Literal["text", "verdict", "metric", "delta", "p", "count"]
NOTHING = "–"
"""Stands where nothing was measured: never a zero."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    is_signed: bool = False
    """Whether it is a difference, and shows its + too."""


Cell = str | int | float | Estimate | None


@dataclass(frozen=True)
class Column:
    """A column: its key in CSV, its head for people, and how its cells are written."""

    key: str
    head: str
    kind: Kind = "text"
    brief: Literal["full", "value", "none"] = "full"
    """What the terminal shows of it: value leaves the intervals out, none the column."""
    folds: bool = False
    """Whether a value that repeats the line above is left blank for people."""

    @property
    def is_number(self) -> bool:
        return self.kind not in ("text", "verdict")


@dataclass(frozen=True)
class Grid:
    """A table with a title, and what a reader must know to read it."""

    key: str
    """Name of its CSV file and its anchor."""
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def column(self, key: str) -> list[Cell]:
        """The cells of one column."""
        place = [column.key for column in self.columns].index(key)
        return [row[place] for row in self.rows]

    def pieces(self) -> Iterator[list[tuple[Column, str, str]]]:
        """Lines as people read them: (column, figure, its interval or ""); what a folding column repeats is blank."""
        above: tuple[Cell, ...] = ()
        for row in self.rows:
            line = []
            same = bool(above)
            for place, (cell, column) in enumerate(zip(row, self.columns, strict=True)):
                same = same and column.folds and above[place] == cell
                line.append((column, "", "") if same else (column, text(cell, column), interval(cell, column)))
            above = row
            yield line


def text(cell: Cell, column: Column) -> str:
    """A cell without its interval, as people read it: `0.7791`, `+0.0031`, `<0.001`, `12,345`, `–`."""
    if cell is None:
        return NOTHING
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Estimate):
        return number(cell.value, _kind(cell, column))
    return number(cell, column.kind)


def interval(cell: Cell, column: Column) -> str:
    """The interval of a cell, `[0.7780, 0.7802]`; empty where it has none."""
    if not isinstance(cell, Estimate) or cell.low is None or cell.high is None:
        return ""
    kind = _kind(cell, column)
    return f"[{number(cell.low, kind)}, {number(cell.high, kind)}]"


def _kind(cell: Estimate, column: Column) -> Kind:
    return "delta" if cell.is_signed else column.kind


def number(value: float, kind: Kind) -> str:
    """One number by its kind: four digits are what a paired interval on a million examples resolves."""
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "p":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    rounded = round(value, 4) + 0.0  # + 0.0: no minus before a zero
    return f"{rounded:+.4f}" if kind == "delta" and rounded else f"{rounded:.4f}"


def rich_table(grid: Grid) -> RichTable:
    """For a terminal of 110 columns: intervals of differences stay, those of plain figures are in the files."""
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
        title=Text(grid.title),  # Text: what comes from outside holds no markup
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in grid.columns:
        if column.brief == "none":
            continue
        if column.key == "label":  # gives way to the figures
            table.add_column(column.head, overflow="fold", min_width=18)
        else:
            table.add_column(column.head, justify="right" if column.is_number else "left", no_wrap=True)
    for line in grid.pieces():
        table.add_row(
            *(
                Text(figure if column.brief == "value" else f"{figure} {span}".rstrip())
                for column, figure, span in line
                if column.brief != "none"
            )
        )
    return table


def markdown(grid: Grid, *, level: int = 3) -> str:
    """A heading, a pipe table and the note."""
    lines = [f"{'#' * level} {_markdown_text(grid.title)}", ""]
    if grid.rows:
        lines.append(_markdown_line([column.head for column in grid.columns]))
        lines.append("|" + "|".join("---:" if column.is_number else "---" for column in grid.columns) + "|")
        for line in grid.pieces():
            lines.append(_markdown_line([f"{figure} {span}".rstrip() for _, figure, span in line]))
    else:
        lines.append("Nothing measured yet.")
    if grid.note:
        lines += ["", _markdown_text(grid.note)]
    return "\n".join(lines) + "\n"


def csv_text(grid: Grid) -> str:
    """Comma-separated, a header, bare numbers: an estimate is three columns KEY, KEY_low and KEY_high."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    spread = [column.kind in ("metric", "delta") for column in grid.columns]
    head: list[str] = []
    for column, wide in zip(grid.columns, spread, strict=True):
        head += [column.key, f"{column.key}_low", f"{column.key}_high"] if wide else [column.key]
    writer.writerow(head)
    for row in grid.rows:
        cells: list[Cell] = []
        for cell, wide in zip(row, spread, strict=True):
            if not wide:
                cells.append(cell)
            elif isinstance(cell, Estimate):
                cells += [cell.value, cell.low, cell.high]
            else:
                cells += [cell, None, None]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


def _markdown_line(cells: list[str]) -> str:
    return "| " + " | ".join(_markdown_text(cell) for cell in cells) + " |"


def _markdown_text(value: str) -> str:
    """One line in which neither Markdown nor HTML of a label's own takes effect."""
    line = " ".join(value.split()).replace("\\", "\\\\").replace("&", "&amp;")
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)  # <0.001 begins no tag
    for mark in "|*_`~":
        line = line.replace(mark, f"\\{mark}")
    # intervals, [0.1, 0.2], are no links as long as no ( or : follows the bracket
    return line.replace("](", "]\\(").replace("]:", "]\\:").replace("][", "]\\[").replace("![", "!\\[")
