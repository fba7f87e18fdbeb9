"""Tables of a page between markers, made anew from rows: what the scripts that write them share.

A table stands between `<!-- table NAME ARGUMENTS from FILE -->` and `<!-- end -->`: NAME is one of the script's tables,
FILE a CSV of benchmarks/data without its ending.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

DATA = Path(__file__).resolve().parent / "data"
BLOCK = re.compile(r"(<!-- table (\w+)((?: [\w+-]+)*) from (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FORM = "<!-- table NAME ARGUMENTS from FILE --> … <!-- end -->"
Rows = TypeVar("Rows")


def table(head: Sequence[str], lines: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A pipe table whose first columns are texts and the rest numbers."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *escaped)) + "\n"


def rewritten(page: str, tables: Mapping[str, Callable[..., str]], read: Callable[[Path], Rows]) -> str:
    """The page with its tables made from the rows.

    Args:
        page: its text.
        tables: what makes each NAME, from rows and ARGUMENTS.
        read: the rows of a CSV; each is read once.

    Raises:
        ValueError: a page without markers, a marker out of form or not closed, one that names no known table.
    """
    rows_of = cache(lambda file: read(DATA / f"{file}.csv"))
    whole = {match.start() for match in BLOCK.finditer(page)}
    opened = [match.start() for match in re.finditer("<!-- table", page)]
    if not opened:
        raise ValueError(f"the page has no marker of a table; put {FORM} where one should stand")
    for start in opened:
        if start not in whole:
            line = page[start:].split("\n", 1)[0]
            raise ValueError(f"marker {line!r}: mend it to the form {FORM}, or close the one before it")

    def one(match: re.Match[str]) -> str:
        head, name, arguments, file, end = match.groups()
        if name not in tables:
            raise ValueError(f"marker {head.strip()!r} names the table {name!r}; there are: {', '.join(tables)}")
        return f"{head}{tables[name](rows_of(file), *arguments.split())}{end}"

    return BLOCK.sub(one, page)
