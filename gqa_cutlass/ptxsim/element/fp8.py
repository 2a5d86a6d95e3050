"""Conversions from and to pairs of the two types of 8 bits (PTX ISA, "cvt")."""

# NumPy types the operators of an array of any dtype as Any.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from gqa_cutlass.ptxsim.element.bits import Arithmetic, Bits, Builder, Numbers, Opcode, join_lanes
from gqa_cutlass.ptxsim.element.formats import F16, rectify

_NAN, _SIGN = 0x7F, 0x80
_FIRST_INFINITE = {"e4m3": 0x7F, "e5m2": 0x7C}  # behind the last number; e4m3 has a NaN there
_FRACTION = {"e4m3": 3, "e5m2": 2}


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A type.

    Args:
        halves: Its 256 values, as float16.
        sizes: Its numbers without a sign, in order, as float64.
    """

    halves: Bits
    sizes: Numbers


@cache
def _table(name: str) -> _Table:
    fraction = _FRACTION[name]
    codes = np.arange(_SIGN)
    exponents, fractions = codes >> fraction, codes & (1 << fraction) - 1
    least = 2 - (1 << 6 - fraction)  # exponent of the smallest normal number
    values = np.where(
        exponents == 0,
        np.ldexp(fractions.astype(np.float64), least - fraction),
        np.ldexp(fractions + float(1 << fraction), exponents + least - 1 - fraction),
    )
    last = _FIRST_INFINITE[name]
    halves = np.full(_SIGN, F16.nan, np.uint16)
    halves[:last] = values[:last].astype(np.float16).view(np.uint16)
    if name == "e5m2":
        halves[last] = F16.infinity
    return _Table(halves=np.concatenate([halves, _signed(halves)]), sizes=values[:last])


def _signed(halves: Bits) -> Bits:
    """The same below zero; NaN is the format's."""
    return np.where(halves == F16.nan, halves, halves | np.uint16(F16.sign))


def _widening(op: Opcode) -> Arithmetic:
    """Build the exact conversion of a pair to float16."""
    halves = _table(op.kinds[1].name.removesuffix("x2")).halves

    def run(pairs: Bits) -> Bits:
        both = halves[np.ascontiguousarray(pairs[:, np.newaxis]).view(np.uint8)]
        return join_lanes(rectify(both, F16) if "relu" in op else both)

    return Arithmetic(results=(32,), sources=(16,), signed=False, run=run)


def _narrowing(op: Opcode) -> Arithmetic:
    """Build the rounding of two f32, the first of which goes to the upper byte."""
    sizes = _table(op.kinds[0].name.removesuffix("x2")).sizes
    halfway = (sizes[:-1] + sizes[1:]) / 2

    def rounded(bits: Bits) -> Bits:
        numbers = bits.view(np.float32).astype(np.float64)
        size = np.abs(numbers)
        # As many as there are halfway points below; on one, the even neighbour.
        below, up_to = (np.searchsorted(halfway, size, side=side) for side in ("left", "right"))
        code = np.where(below % 2 == 0, below, up_to)
        code |= np.where(np.signbit(numbers), _SIGN, 0)
        if "relu" in op:
            code[np.signbit(numbers)] = 0
        return np.where(np.isnan(numbers), _NAN, code).astype(np.uint8)

    def run(upper: Bits, lower: Bits) -> Bits:
        both = np.empty((max(len(upper), len(lower)), 2), np.uint8)
        both[:, 0], both[:, 1] = rounded(lower), rounded(upper)
        return both.view(np.uint16)[:, 0]

    return Arithmetic(results=(16,), sources=(32, 32), signed=False, run=run)


FAMILIES: dict[str, Builder] = {
    "cvt.rn.{relu}.f16x2.e4m3x2|e5m2x2": _widening,
    "cvt.rn.satfinite.{relu}.e4m3x2|e5m2x2.f32": _narrowing,
}
