"""Floating-point formats: reading bits as numbers, rounding numbers to bits, special results.

Rounding goes through float64. What is rounded there must be exact or "odd": truncated, with the
last bit set when something was lost (Boldo and Melquiond, "Emulation of a FMA and correctly rounded
sums: proved algorithms using rounding to odd", 2008). Since float64 has more than two bits above
every format here but f64 itself, one further rounding then gives what one rounding of the exact
value would.
"""

# NumPy types the operators of an array of any dtype as Any.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_cutlass.ptxsim.element.bits import Bits, Numbers, Opcode, raw


@dataclass(frozen=True, kw_only=True)
class Format:
    """An IEEE-like binary format of sign, exponent and fraction.

    Args:
        name: PTX's name of the type.
        width: Bits in all.
        fraction: Bits of the fraction field.
        nan: The NaN that arithmetic produces.
        numbers: A dtype that holds every value exactly and in which NumPy computes.
    """

    name: str
    width: int
    fraction: int
    nan: int
    numbers: np.dtype[Any]

    @property
    def bits(self) -> np.dtype[Any]:
        """The dtype of the raw bits."""
        return raw(self.width)

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (self.width - 1)

    @property
    def magnitude(self) -> int:
        """Every bit but the sign."""
        return self.sign - 1

    @property
    def smallest(self) -> int:
        """The least positive normal number."""
        return 1 << self.fraction

    @property
    def infinity(self) -> int:
        """Positive infinity; one less is the greatest finite number."""
        return self.magnitude & -self.smallest

    @property
    def one(self) -> int:
        """1.0."""
        return self.infinity >> 1 & -self.smallest


FORMATS: dict[str, Format] = {
    shape.name: shape
    for shape in (
        Format(name="f16", width=16, fraction=10, nan=0x7FFF, numbers=np.dtype(np.float16)),
        Format(name="bf16", width=16, fraction=7, nan=0x7FFF, numbers=np.dtype(np.float32)),
        Format(name="f32", width=32, fraction=23, nan=0x7FFFFFFF, numbers=np.dtype(np.float32)),
        # What the hardware's own double-precision operations give where no operand is a NaN.
        Format(name="f64", width=64, fraction=52, nan=0xFFF8 << 48, numbers=np.dtype(np.float64)),
    )
}
F16, BF16, F32, F64 = FORMATS.values()
_QUIET = np.uint64(1 << 51)


def read(bits: Bits, shape: Format) -> Numbers:
    """Return the values as numbers of the format's dtype, a view where possible."""
    if shape is BF16:
        return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
    return bits.view(shape.numbers)


def write(numbers: Numbers, shape: Format) -> Bits:
    """Return the bits of numbers that the format represents; every NaN becomes the format's."""
    bits = numbers.view(f"u{numbers.itemsize}")
    if shape is BF16:
        bits = (bits >> 16).astype(np.uint16)
    nan = np.isnan(numbers)
    return np.where(nan, shape.bits.type(shape.nan), bits) if nan.any() else bits


def widen(bits: Bits, shape: Format) -> Numbers:
    """Return the values as float64."""
    return read(bits, shape).astype(np.float64)


def _odd_single(numbers: Numbers) -> Bits:
    """Round float64 to the bits of an f32 that is odd where it is inexact; a NaN stays one."""
    nearest = numbers.astype(np.float32)
    back = nearest.astype(np.float64)
    excess = np.abs(back) > np.abs(numbers)
    return nearest.view(np.uint32) - excess | (back != numbers)


def nearest_brain(bits: Bits) -> Bits:
    """Round the bits of f32 to those of bf16, to nearest with ties to even."""
    rounded = (bits + ((bits >> 16 & 1) + 0x7FFF) >> 16).astype(np.uint16)
    nan = np.isnan(bits.view(np.float32))
    return np.where(nan, np.uint16(BF16.nan), rounded) if nan.any() else rounded


def nearest(numbers: Numbers, shape: Format) -> Bits:
    """Round float64 to the format, to nearest with ties to even."""
    if shape is BF16:
        return nearest_brain(_odd_single(numbers))
    return write(numbers.astype(shape.numbers), shape)


def step(bits: Bits, shape: Format, mode: str, *, larger: Numbers, smaller: Numbers) -> Bits:
    """Turn a result that was rounded to nearest into a directed rounding.

    Args:
        bits: The result rounded to nearest, with the sign of the exact value.
        shape: Its format.
        mode: "rz", "rm" or "rp".
        larger: Where the exact value is larger in magnitude than the result.
        smaller: Where it is smaller in magnitude.
    """
    if mode == "rz":
        return bits - smaller
    outward = bits & shape.sign != 0
    if mode == "rp":
        outward = ~outward
    return bits + (larger & outward) - (smaller & ~outward)


def _round(numbers: Numbers, shape: Format, mode: str) -> Bits:
    bits = nearest(numbers, shape)
    if mode == "rn":
        return bits
    back, exact = np.abs(widen(bits, shape)), np.abs(numbers)
    return step(bits, shape, mode, larger=exact > back, smaller=exact < back)


def narrow(numbers: Numbers, shape: Format, mode: str = "rn", *, ftz: bool = False) -> Bits:
    """Round exact or odd float64 to a format once.

    Args:
        numbers: The float64 values.
        shape: The format, not f64.
        mode: "rn", "rz", "rm" or "rp".
        ftz: Whether results below the normal range become zero. What counts is the result as
            rounded with an unbounded exponent, so some that round up to the least normal number
            in the subnormal range do, too.
    """
    bits = _round(numbers, shape, mode)
    if not ftz:
        return bits
    # Scaled so that every number that could round up to the least normal one is normal itself.
    power = shape.fraction + 1
    scaled = _round(numbers * 2.0**power, shape, mode) & shape.magnitude
    least = (power + 1) << shape.fraction
    return np.where(scaled < least, bits & shape.sign, bits)


def flush(bits: Bits, shape: Format) -> Bits:
    """Replace subnormal numbers by zeros of the same sign."""
    magnitudes = bits & shape.magnitude
    if magnitudes.min() >= shape.smallest:
        return bits
    return np.where(magnitudes < shape.smallest, bits & shape.sign, bits)


def saturate(bits: Bits, shape: Format) -> Bits:
    """Clamp to 0.0 to 1.0; NaN and -0.0 become +0.0."""
    one = shape.bits.type(shape.one)
    # As unsigned numbers, all NaNs and all negative numbers lie above infinity.
    return np.where(bits > shape.infinity, shape.bits.type(0), np.minimum(bits, one))


def rectify(bits: Bits, shape: Format) -> Bits:
    """Clamp negative numbers to +0.0; NaNs are the format's, which is positive."""
    return np.where(bits >= shape.sign, shape.bits.type(0), bits)


def clamp_finite(bits: Bits, shape: Format) -> Bits:
    """Replace infinities by the greatest finite number of the same sign."""
    return bits - (bits & shape.magnitude == shape.infinity)


def after(op: Opcode, shape: Format) -> Callable[[Bits], Bits] | None:
    """Return what a sat, relu or satfinite modifier does to a rounded result, or None."""
    steps = [
        function
        for name, function in (("satfinite", clamp_finite), ("sat", saturate), ("relu", rectify))
        if name in op
    ]
    if not steps:
        return None

    def run(bits: Bits) -> Bits:
        for function in steps:
            bits = function(bits, shape)
        return bits

    return run


def propagate(result: Numbers, *operands: Numbers) -> Bits:
    """Return the bits of f64 results; NaN is the first operand's, quiet, or else the default one.

    The ISA leaves the payload open; double precision passes one on, unlike the other formats.
    """
    bits = result.view(np.uint64)
    nan = np.isnan(result)
    if not nan.any():
        return bits
    payload: Bits = np.full(bits.shape, F64.nan, np.uint64)
    for operand in reversed(operands):
        payload = np.where(np.isnan(operand), operand.view(np.uint64) | _QUIET, payload)
    return np.where(nan, payload, bits)
