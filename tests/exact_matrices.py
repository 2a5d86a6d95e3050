"""Matrix instructions by their definition: every element from exact numbers, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from warp_instructions import MMA_SHAPES

from gqa_cutlass.ptxsim.warp.matrix import Mma

WARPS = 2
Words = list[NDArray[np.uint32]]
Value = Fraction | float  # a float only for infinities and NaN

SHAPES = {
    f"{shape}-{ab}-{d}": ("mma", "sync", "aligned", shape, "row", "col", d, ab, ab, d)
    for shape, d, ab in MMA_SHAPES
}
# Fields of each format: bits, exponent bits, fraction bits.
FORMATS = {"f16": (16, 5, 10), "bf16": (16, 8, 7), "tf32": (32, 8, 23), "f32": (32, 8, 23)}
all_shapes = pytest.mark.parametrize("opcode", SHAPES.values(), ids=SHAPES)


def decode(word: int, kind: str) -> Value:
    """The value of the bits of an element."""
    _, exponent_bits, fraction_bits = FORMATS[kind]
    if kind == "tf32":
        word &= ~0x1FFF
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1 if word >> (exponent_bits + fraction_bits) & 1 else 1
    exponent = word >> fraction_bits & (2**exponent_bits - 1)
    fraction = Fraction(word & (2**fraction_bits - 1), 2**fraction_bits)
    if exponent == 2**exponent_bits - 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * fraction * Fraction(2) ** (1 - bias)
    return sign * (1 + fraction) * Fraction(2) ** (exponent - bias)


def exponent_of(value: Fraction, smallest: int) -> int:
    """Exponent of the leading bit, or of the smallest normal number if that is larger."""
    if value == 0:
        return smallest
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    return max(exponent, smallest)


def round_to(value: Value, kind: str, rounding: Callable[[Fraction], int] = round) -> int:
    """The bits of a value, by default to nearest even; a zero is +0 and a NaN canonical."""
    bits, exponent_bits, fraction_bits = FORMATS[kind]
    infinity = (2**exponent_bits - 1) << fraction_bits
    if isinstance(value, float) and math.isnan(value):
        return 2 ** (bits - 1) - 1
    sign = 2 ** (bits - 1) if value < 0 else 0
    if isinstance(value, float):
        return sign | infinity
    smallest = 2 - 2 ** (exponent_bits - 1)
    exponent = exponent_of(value, smallest)
    significand = abs(rounding(value * Fraction(2) ** (fraction_bits - exponent)))
    # The leading bit of a normal number, and a carry out of the fraction, add to the exponent.
    return sign | min(((exponent - smallest) << fraction_bits) + significand, infinity)


def elements_a(k: int, kind: str, lane: int) -> Iterator[tuple[int, int]]:
    """(row, column) of a0, a1, ... of a lane, from the formulas of the ISA's fragment sections."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        for i in range(2 if k == 4 else 4):
            yield group + (0 if i in (0, 2) else 8), thread + (0 if i in (0, 1) else 4)
    elif k == 8:
        for i in range(4):
            yield group + (0 if i < 2 else 8), thread * 2 + (i & 1)
    else:
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            yield row, thread * 2 + (i & 1) + (0 if i < 4 else 8)


def elements_b(k: int, kind: str, lane: int) -> Iterator[tuple[int, int]]:
    """(row, column) of b0, b1, ... of a lane."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        for i in range(1 if k == 4 else 2):
            yield thread + 4 * i, group
    else:
        for i in range(2 if k == 8 else 4):
            yield thread * 2 + (i & 1) + (0 if i < 2 else 8), group


def elements_c(lane: int) -> Iterator[tuple[int, int]]:
    """(row, column) of c0 to c3 of a lane, also of d0 to d3."""
    group, thread = lane >> 2, lane % 4
    for i in range(4):
        yield group + (0 if i < 2 else 8), thread * 2 + (i & 1)


def element(registers: Words, kind: str, warp: int, lane: int, i: int) -> int:
    """The bits of element i of a fragment; two 16-bit elements share a register, low one first."""
    if FORMATS[kind][0] == 32:
        return int(registers[i][warp, lane])
    return int(registers[i // 2][warp, lane]) >> 16 * (i % 2) & 0xFFFF


Matrix = dict[tuple[int, int], Value]


def scalar_matrices(mma: Mma, a: Words, b: Words, c: Words, warp: int) -> list[Matrix]:
    matrices: list[Matrix] = [{}, {}, {}]
    for lane in range(32):
        places = (
            elements_a(mma.k, mma.operand, lane),
            elements_b(mma.k, mma.operand, lane),
            elements_c(lane),
        )
        kinds = mma.operand, mma.operand, mma.accumulator
        for matrix, where, kind, registers in zip(matrices, places, kinds, (a, b, c), strict=True):
            for i, place in enumerate(where):
                assert place not in matrix
                matrix[place] = decode(element(registers, kind, warp, lane, i), kind)
    assert [len(matrix) for matrix in matrices] == [16 * mma.k, mma.k * 8, 16 * 8]
    return matrices


def multiply(x: Value, y: Value) -> Value:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x * y
    # Only the sign and whether it is zero matter of the finite one.
    return math.nan if x == 0 or y == 0 else float(np.sign(float(x)) * np.sign(float(y))) * math.inf


def total(terms: list[Value]) -> Value:
    special = [term for term in terms if isinstance(term, float)]
    return sum(special) if special else sum(terms, Fraction(0))


def exact_elements(mma: Mma, a: Words, b: Words, c: Words) -> Iterator[tuple[Any, list[Value]]]:
    """Each element's index (warp, row, column) and terms: the products in order, then C."""
    for warp in range(a[0].shape[0]):
        left, right, addend = scalar_matrices(mma, a, b, c, warp)
        for row, column in product(range(16), range(8)):
            terms = [multiply(left[row, n], right[n, column]) for n in range(mma.k)]
            yield (warp, row, column), [*terms, addend[row, column]]


def result_bits(mma: Mma, registers: Words) -> NDArray[np.int64]:
    """The bits of D, (w, 16, 8)."""
    bits = np.empty((registers[0].shape[0], 16, 8), np.int64)
    for warp, lane in np.ndindex(registers[0].shape):
        for i, place in enumerate(elements_c(lane)):
            bits[(warp, *place)] = element(registers, mma.accumulator, warp, lane, i)
    return bits


def fragments(mma: Mma, draw: Callable[[str, int], NDArray[np.uint32]]) -> list[Words]:
    """Registers of A, B and C with words from `draw(kind, operand)`."""
    kinds = mma.operand, mma.operand, mma.accumulator
    return [
        [draw(kind, position) for _ in range(count)]
        for position, (kind, count) in enumerate(zip(kinds, mma.registers, strict=True))
    ]


def pack(values: NDArray[np.float64], kind: str) -> NDArray[np.uint32]:
    """Round (w, 32, 2) numbers to words: both to 16-bit elements, or the first to f32."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint32)[..., 0]
    words = values.astype(np.float32).view(np.uint32)
    return words[..., 0] >> 16 | words[..., 1] & 0xFFFF0000 if kind == "bf16" else words[..., 0]


def numbers(rng: np.random.Generator, low: int, high: int) -> Callable[[str, int], Any]:
    """Numbers of random sign with exponents from low to high, some of them zero."""

    def draw(kind: str, position: int) -> NDArray[np.uint32]:
        shape = (WARPS, 32, 2)
        values = rng.uniform(1, 2, shape) * np.exp2(rng.integers(low, high, shape))
        return pack(values * rng.choice([-1.0, 1.0, 1.0, -1.0, 0.0], shape), kind)

    return draw


def any_bits(rng: np.random.Generator) -> Callable[[str, int], Any]:
    def draw(kind: str, position: int) -> NDArray[np.uint32]:
        return rng.integers(0, 2**32, (WARPS, 32), dtype=np.uint32)

    return draw
