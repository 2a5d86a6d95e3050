"""Tables of plain text that fit the width they are given."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

_GAP = "  "
_CUT = "…"
_LEAST = 8  # of a cell that is cut
_BEFORE_A_BREAK, _FEW = 2, 3


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column.

    Args:
        head: What its cells are.
        unit: What they are in; below the head.
        number: Whether they are numbers, which stand at the right.
        keep: Where there is no room, columns of less go first; None: it never goes. Those of 0
            and 1 go before a row is broken into two lines.
    """

    head: str
    unit: str = ""
    number: bool = False
    keep: int | None = None


def lay_out(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None
) -> list[str]:
    """Lines of a table.

    Where the columns that matter have no room beside each other, the first cell of every row gets a
    line of its own, and the others stand below it.

    Args:
        columns: The columns.
        rows: Their cells.
        width: Characters of a line at most; None: as many as it takes.
    """
    kept = _fitted(columns, rows, list(range(len(columns))), width, _BEFORE_A_BREAK)
    if width is None or _total(columns, rows, kept) <= width or len(columns) < _FEW:
        return _lines(columns, rows, kept, width)
    room = width - len(_GAP)
    rest = _fitted(columns, rows, list(range(1, len(columns))), room)
    head, *body = _blocks(_lines(columns, rows, rest, room), len(rows))
    lines = [cut(columns[0].head, width), *(f"{_GAP}{line}" for line in head)]
    for row, block in zip(rows, body, strict=True):
        lines += [cut(row[0], width), *(f"{_GAP}{line}" for line in block)]
    return lines


def _fitted(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    kept: list[int],
    width: int | None,
    below: int = sys.maxsize,
) -> list[int]:
    """Columns that are left when those of the least `keep` went until the others have room.

    Args:
        columns: All of them.
        rows: Their cells.
        kept: Which of them to begin with.
        width: The room.
        below: Only columns of a smaller `keep` go.
    """
    keeps = {i: keep for i in kept if (keep := columns[i].keep) is not None and keep < below}
    for dropped in sorted(keeps, key=keeps.__getitem__):
        if width is None or _total(columns, rows, kept) <= width:
            break
        kept = [i for i in kept if i != dropped]
    return kept


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], kept: list[int]) -> list[int]:
    return [
        max(len(columns[i].head), len(columns[i].unit), *(len(row[i]) for row in rows), 0)
        for i in kept
    ]


def _total(columns: Sequence[Column], rows: Sequence[Sequence[str]], kept: list[int]) -> int:
    return sum(_widths(columns, rows, kept)) + len(_GAP) * (len(kept) - 1)


def _lines(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    kept: list[int],
    width: int | None,
) -> list[str]:
    """Head and rows; the widest cells are cut where there is no room still."""
    widths = _widths(columns, rows, kept)
    while width is not None and sum(widths) + len(_GAP) * (len(kept) - 1) > width:
        widest = max(range(len(widths)), key=widths.__getitem__)
        if widths[widest] <= _LEAST:
            break
        widths[widest] -= 1
    heads = [[columns[i].head for i in kept]]
    if any(columns[i].unit for i in kept):
        heads.append([columns[i].unit for i in kept])
    return [
        _GAP.join(
            cut(cell, size).rjust(size) if columns[i].number else cut(cell, size).ljust(size)
            for i, cell, size in zip(kept, cells, widths, strict=True)
        ).rstrip()
        for cells in (*heads, *([row[i] for i in kept] for row in rows))
    ]


def _blocks(lines: list[str], rows: int) -> list[list[str]]:
    """The lines of the head, and those of each row."""
    split = len(lines) - rows
    return [lines[:split], *([line] for line in lines[split:])]


def cut(text: str, width: int | None) -> str:
    """A text of so many characters at most."""
    return text if width is None or len(text) <= width else text[: max(width - 1, 0)] + _CUT
