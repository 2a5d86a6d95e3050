"""Whole numbers: quotients, rounded up or without a division."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not smaller."""
    return ceil_div(value, multiple) * multiple


def reciprocal(number: int) -> tuple[int, int]:
    """A multiplier and a shift that divide what is below 2^31 by a number from 1 to 2^31.

    The quotient of x is `x * multiplier >> shift`. The multiplier is 2^shift / number, rounded up.
    It has 32 bits, and is off by so little that no such quotient shows it (Granlund and Montgomery,
    "Division by Invariant Integers using Multiplication", theorem 4.2).
    """
    shift = 31 + (number - 1).bit_length()
    return ceil_div(1 << shift, number), shift
