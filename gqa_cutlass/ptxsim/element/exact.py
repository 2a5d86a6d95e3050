"""Sums, products and quotients without rounding error: rounded to odd, or by rational numbers."""

# NumPy types the operators of an array of any dtype as Any.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from gqa_cutlass.ptxsim.element.bits import Bits, Numbers
from gqa_cutlass.ptxsim.element.formats import F64, propagate, step


def odd_sum(left: Numbers, right: Numbers) -> Numbers:
    """Add float64 numbers, rounding to odd (Knuth's TwoSum finds what rounding to nearest lost).

    Neither the sum nor the error may overflow, which float64 spares all narrower formats.
    """
    total = left + right
    part = total - left
    error = (left - (total - part)) + (right - part)
    bits = total.view(np.int64)
    # NaN, the error where an operand is infinite, compares false.
    even = (np.abs(error) > 0) & (bits & 1 == 0)
    if not even.any():
        return total
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(even, bits + towards, bits).view(np.float64)


def signed_sum(left: Numbers, right: Numbers, mode: str) -> Numbers:
    """Add like `odd_sum`, with the sign that a zero has in a rounding mode (IEEE 754, 6.3)."""
    total = odd_sum(left, right)
    if mode != "rm":
        return total
    negative = np.signbit(left) | np.signbit(right)
    return np.where((total == 0) & negative, -0.0, total)


# What is left of the exact value once the nearest double is taken off, by its sign alone.
Rational = Callable[..., tuple[float, int]]


def _sign(value: Fraction) -> int:
    return (value > 0) - (value < 0)


def _nearest(exact: Fraction, zero: float) -> tuple[float, int]:
    """Round to the nearest double.

    Args:
        exact: The value.
        zero: What stands for it when it is zero, for the sign.
    """
    if not exact:
        return zero, 0
    sign = _sign(exact)
    try:
        # A value that underflows would lose its sign.
        rounded = math.copysign(float(exact), sign)
    except OverflowError:
        return math.copysign(math.inf, sign), -sign
    return rounded, _sign(exact - Fraction(rounded))


def _add(left: float, right: float) -> tuple[float, int]:
    return _nearest(Fraction(left) + Fraction(right), left + right)


def _sub(left: float, right: float) -> tuple[float, int]:
    return _add(left, -right)


def _mul(left: float, right: float) -> tuple[float, int]:
    return _nearest(Fraction(left) * Fraction(right), left * right)


def _fma(left: float, right: float, base: float) -> tuple[float, int]:
    exact = Fraction(left) * Fraction(right) + Fraction(base)
    return _nearest(exact, left * right + base if base == 0 else 0.0)


def _div(left: float, right: float) -> tuple[float, int]:
    return _nearest(Fraction(left) / Fraction(right), math.copysign(left, left * right))


def _sqrt(value: float) -> tuple[float, int]:
    rounded = math.sqrt(value)
    return rounded, _sign(Fraction(value) - Fraction(rounded) ** 2)


RATIONAL: dict[str, Rational] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "fma": _fma,
    "div": _div,
    "rcp": lambda value: _div(1.0, value),
    "sqrt": _sqrt,
}


def _special_fma(left: Numbers, right: Numbers, base: Numbers) -> Numbers:
    """Multiply and add where an operand is no finite number: rounding has no part in it."""
    finite = np.isfinite(left) & np.isfinite(right)
    return np.where(finite, base, left * right + base)


NATIVE: dict[str, Callable[..., Numbers]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": _special_fma,
    "div": np.divide,
    "rcp": lambda value: 1.0 / value,
    "sqrt": np.sqrt,
}


def double(name: str, mode: str) -> Callable[..., Bits]:
    """Return the f64 operation in a rounding mode, on raw bits.

    Rounding to nearest is NumPy's, but for fma; everything else takes rational numbers, one
    element after the other, and is slow.
    """

    def run(*sources: Bits) -> Bits:
        operands = tuple(source.view(np.float64) for source in sources)
        result = propagate(NATIVE[name](*operands), *operands)
        if mode == "rn" and name != "fma":
            return result
        return _corrected(name, mode, operands, result)

    return run


def _corrected(name: str, mode: str, operands: tuple[Numbers, ...], special: Bits) -> Bits:
    """Replace the results that have a finite exact value by its rounding."""
    spread = np.broadcast_arrays(_ordinary(name, operands), *operands)
    result = np.array(np.broadcast_to(special, spread[0].shape))
    residues = np.zeros(result.shape, np.int8)
    for place in np.flatnonzero(spread[0]):
        values = (float(operand[place]) for operand in spread[1:])
        rounded, residues[place] = RATIONAL[name](*values)
        result[place] = np.float64(rounded).view(np.uint64)
    if mode == "rn":
        return result
    sign = np.where(result & F64.sign != 0, -1, 1)
    stepped = step(result, F64, mode, larger=residues == sign, smaller=residues == -sign)
    cancelled = (result & F64.magnitude == 0) & (residues == 0)
    if mode == "rm" and name in _TERMS and cancelled.any():
        negative = np.logical_or(*(np.signbit(term) for term in _TERMS[name](*operands)))
        return np.where(cancelled & negative, np.uint64(F64.sign), stepped)
    return stepped


def _ordinary(name: str, operands: tuple[Numbers, ...]) -> Numbers:
    """Tell where all operands are finite and the operation has a value, if perhaps a huge one."""
    finite = np.logical_and.reduce(np.broadcast_arrays(*(np.isfinite(part) for part in operands)))
    if name == "sqrt":
        return finite & (operands[0] >= 0)
    return finite & (operands[-1] != 0) if name in ("div", "rcp") else finite


# The two terms of a sum, for the sign of a zero (IEEE 754, 6.3).
_TERMS: dict[str, Callable[..., tuple[Numbers, Numbers]]] = {
    "add": lambda left, right: (left, right),
    "sub": lambda left, right: (left, -right),
    "fma": lambda left, right, base: (left * right, base),
}
