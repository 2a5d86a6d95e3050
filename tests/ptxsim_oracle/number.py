"""Floating-point numbers: their formats, what bits mean, and one rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

# Exponent and fraction bits.
FORMATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0xFFF8 << 48}
WIDTH = {"pred": 1, "tf32": 32} | {name: 1 + sum(shape) for name, shape in FORMATS.items()}
WIDTH |= {f"{sort}{width}": width for sort in "bus" for width in (8, 16, 32, 64)}
PACKED = ("u16x2", "s16x2", "f16x2", "bf16x2")
BYTES = {"e4m3x2": (4, 3), "e5m2x2": (5, 2)}  # pairs of 8 bits: exponent and fraction bits of each
WIDTH |= dict.fromkeys(BYTES, 16)
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")


@dataclass(frozen=True)
class Number:
    """A decoded floating-point number."""

    negative: bool
    size: Fraction = Fraction(0)
    infinite: bool = False
    nan: bool = False

    @property
    def value(self) -> Fraction:
        return -self.size if self.negative else self.size

    @property
    def finite(self) -> bool:
        return not (self.infinite or self.nan)

    @property
    def zero(self) -> bool:
        return self.finite and not self.size


def decode(bits: int, name: str, *, ftz: bool = False) -> Number:
    exponent_bits, fraction_bits = FORMATS[name]
    fraction = bits & (1 << fraction_bits) - 1
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    negative = bool(bits >> exponent_bits + fraction_bits)
    least = 2 - (1 << exponent_bits - 1)
    if exponent == (1 << exponent_bits) - 1:
        return Number(negative, infinite=not fraction, nan=bool(fraction))
    if exponent == 0:
        size = Fraction(0) if ftz else Fraction(fraction) * Fraction(2) ** (least - fraction_bits)
        return Number(negative, size)
    significand = Fraction(fraction + (1 << fraction_bits))
    return Number(negative, significand * Fraction(2) ** (least + exponent - 1 - fraction_bits))


def _exponent(size: Fraction) -> int:
    """Return the exponent of the leading bit."""
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    return guess if size >= Fraction(2) ** guess else guess - 1


def round_integer(value: Fraction, mode: str) -> int:
    return {
        "n": lambda: round(value),
        "z": lambda: math.trunc(value),
        "m": lambda: math.floor(value),
        "p": lambda: math.ceil(value),
    }[mode[1]]()


def encode(value: Fraction, name: str, mode: str, *, negative_zero: bool, ftz: bool = False) -> int:
    """Round an exact value once; `negative_zero` is the sign of an exact zero."""
    exponent_bits, fraction_bits = FORMATS[name]
    sign = 1 << exponent_bits + fraction_bits
    if not value:
        return sign if negative_zero else 0
    negative, size = value < 0, abs(value)
    # Rounding a magnitude: down and up swap for negative numbers.
    mode = {"rm": "rp", "rp": "rm"}.get(mode, mode) if negative else mode
    least = 2 - (1 << exponent_bits - 1)
    exponent = _exponent(size)
    if ftz:
        unit = Fraction(2) ** (exponent - fraction_bits)
        if round_integer(size / unit, mode) * unit < Fraction(2) ** least:
            return sign if negative else 0
    exponent = max(exponent, least)
    steps = round_integer(size / Fraction(2) ** (exponent - fraction_bits), mode)
    bits = ((exponent - least) << fraction_bits) + steps
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    if exponent > -least + 1:
        bits = infinity if mode in ("rn", "rp") else infinity - 1
    return (sign if negative else 0) | min(bits, infinity)


def infinity(name: str, negative: bool) -> int:
    exponent_bits, fraction_bits = FORMATS[name]
    return (((1 << exponent_bits) - 1) << fraction_bits) | negative << exponent_bits + fraction_bits


def order(number: Number) -> tuple[int, Fraction]:
    """Return a key that sorts numbers and infinities."""
    return (0, number.value) if number.finite else (-1 if number.negative else 1, Fraction(0))
