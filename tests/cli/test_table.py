"""Tables that fit."""

from __future__ import annotations

import pytest

from gqa_cutlass.cli.table import Column, lay_out

COLUMNS = (
    Column(head="kernel"),
    Column(head="config", keep=0),
    Column(head="registers", number=True),
    Column(head="shared", unit="B", number=True, keep=4),
    Column(head="state"),
)
ROWS = [["k" * 30, "c" * 30, "96", "70192", "compiled"], ["k" * 20, "c", "104", "0", "found"]]


def test_numbers_stand_at_the_right_below_their_unit() -> None:
    head, unit, first, second = lay_out(COLUMNS, ROWS, None)
    for column in ("registers", "shared"):
        end = head.index(column) + len(column)
        assert (
            first[end - 1].isdigit()
            and second[end - 1].isdigit()
            and first[end : end + 2].strip() == ""
        )
    assert unit.index("B") == head.index("shared") + len("shared") - 1
    assert not any(line.endswith(" ") for line in (head, unit, first, second))


def test_columns_go_before_rows_are_broken() -> None:
    whole = max(map(len, lay_out(COLUMNS, ROWS, None)))
    assert any("config" in line for line in lay_out(COLUMNS, ROWS, whole))
    narrower = lay_out(COLUMNS, ROWS, whole - 1)
    assert not any("config" in line for line in narrower) and len(narrower) == 4


def test_rows_are_broken_before_what_matters_goes() -> None:
    lines = lay_out(COLUMNS, ROWS, 40)
    assert lines[0] == "kernel" and lines[3] == "k" * 30 and lines[5] == "k" * 20
    assert lines[4].split() == ["96", "70192", "compiled"]


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    lines = lay_out(COLUMNS, [*ROWS, ["k" * 500, "c" * 500, "1", "2", "failed"]], width)
    assert max(map(len, lines)) <= max(width, 26)
    assert any("…" in line for line in lines)


def test_a_table_without_rows_is_its_head() -> None:
    assert lay_out(COLUMNS, [], 80) == lay_out(COLUMNS, [], None)
