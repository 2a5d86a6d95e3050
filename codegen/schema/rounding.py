"""Whole numbers, rounded up."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not smaller."""
    return ceil_div(value, multiple) * multiple
