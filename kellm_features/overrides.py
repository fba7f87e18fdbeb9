"""A person's word on links to Wikipedia: a CSV file that the linker obeys, and the report shows and saves again."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from kellm_features.errors import DataError

COLUMNS = ("item_id", "page", "note")
NO_PAGE = "none"


@dataclass(frozen=True)
class Overrides:
    """The file cell by cell: saved again, it keeps columns and order that this project knows nothing of.

    `page` is the id of a page, its exact title, or `none`. Digits alone are an id.
    """

    header: tuple[str, ...] = COLUMNS
    rows: tuple[tuple[str, ...], ...] = ()

    def pages(self) -> dict[str, str]:
        """Item id -> page id, page title or "none"; of several rows the last."""
        item, page = self.header.index("item_id"), self.header.index("page")
        return {row[item].strip(): row[page].strip() for row in self.rows}

    def decisions(self) -> list[tuple[str, str]]:
        """(item id, page) as written, each pair once, items in the file's order. An item may have several pages.

        Raises:
            DataError: one of the two is empty, or an item has a page and `none`.
        """
        item, page = self.header.index("item_id"), self.header.index("page")
        found: dict[str, list[str]] = {}
        for row in self.rows:
            key, wanted = row[item].strip(), row[page].strip()
            if not key or not wanted:
                raise DataError(
                    f"overrides: item_id {key!r}, page {wanted!r}; both are needed, page being a page id, an exact "
                    f"title or {NO_PAGE}"
                )
            known = found.setdefault(key, [])
            if wanted not in known:
                known.append(wanted)
        for key, pages in found.items():
            if len(pages) > 1 and NO_PAGE in pages:
                raise DataError(f"overrides: item {key} has {' and '.join(pages)}; a page or {NO_PAGE} is accepted")
        return [(key, wanted) for key, pages in found.items() for wanted in pages]


def read_overrides(path: Path | None) -> Overrides:
    """The overrides of `link.overrides`, none where it is not set.

    Raises:
        DataError: no such file, not CSV in UTF-8, a row of another length than the header, or no column item_id
            or page. A page made without them would save a file that lacks them.
    """
    if path is None:
        return Overrides()
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            lines = [row for row in csv.reader(handle, strict=True) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"link.overrides is {path}, which is not readable as CSV in UTF-8: {error}") from error
    header = tuple(name.strip() for name in lines[0]) if lines else COLUMNS
    missing = [name for name in ("item_id", "page") if name not in header]
    if missing:
        raise DataError(
            f"{path} lacks the column {' and '.join(missing)}: link.overrides needs {', '.join(COLUMNS)}; "
            f"seen: {', '.join(header)}"
        )
    for row in lines[1:]:
        if len(row) != len(header):
            raise DataError(
                f"{path}: the row {','.join(row)!r} has {len(row)} cells and the header {len(header)}; "
                "quote a title that holds a comma"
            )
    rows = [tuple(row) for row in lines[1:]]
    if "note" not in header:
        header, rows = (*header, "note"), [(*row, "") for row in rows]
    return Overrides(header, tuple(rows))
