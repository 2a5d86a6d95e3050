"""Integer arithmetic (PTX ISA, "Integer Arithmetic Instructions").

The ISA leaves the results of a division by zero unspecified; here a quotient is all ones and a
remainder the dividend.
"""

# NumPy types the operators of an array of any dtype as Any.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gqa_cutlass.ptxsim.element.bits import (
    Arithmetic,
    Bits,
    Builder,
    Kind,
    Numbers,
    Opcode,
    Run,
    typed,
    uniform,
)

_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_INT32 = np.iinfo(np.int32)


def _modular(function: Callable[..., Bits], arity: int) -> Builder:
    """Build from a function that is right modulo 2 to the width, whatever the signedness."""
    return lambda op: uniform(op, arity, function)


def _ordered(function: Callable[..., Numbers], arity: int) -> Builder:
    """Build from a function that has to know the sign."""
    return lambda op: uniform(op, arity, typed(function, op.kind.lane.numbers))


def _negate(value: Bits) -> Bits:
    return np.subtract(0, value, dtype=value.dtype)


def _clip(wide: Numbers) -> Bits:
    """Saturate int64 to the range of s32."""
    return np.clip(wide, _INT32.min, _INT32.max).astype(np.int32).view(np.uint32)


def _saturating(function: np.ufunc) -> Builder:
    def run(left: Bits, right: Bits) -> Bits:
        return _clip(function(left.view(np.int32), right.view(np.int32), dtype=np.int64))

    return lambda op: uniform(op, 2, run)


def _bounded(op: Opcode) -> Arithmetic:
    """Build min and max; relu then clamps negative results to zero."""
    choose = np.minimum if op.name == "min" else np.maximum

    def rectified(left: Numbers, right: Numbers) -> Numbers:
        return np.maximum(choose(left, right), 0)

    run = typed(rectified if "relu" in op else choose, op.kind.lane.numbers)
    return uniform(op, 2, run)


def _difference(left: Numbers, right: Numbers) -> Numbers:
    return np.maximum(left, right) - np.minimum(left, right)


def _sad(left: Numbers, right: Numbers, base: Numbers) -> Numbers:
    return base + _difference(left, right)


def _wide_product(kind: Kind) -> Run:
    """Return the function that multiplies two integers of up to 32 bits exactly."""
    wide = np.dtype(f"{kind.numbers.kind}{kind.width // 4}")

    def run(left: Bits, right: Bits) -> Bits:
        product = np.multiply(left.view(kind.numbers), right.view(kind.numbers), dtype=wide)
        return product.view(f"u{kind.width // 4}")

    return run


def _high_unsigned(left: Bits, right: Bits) -> Bits:
    """Return the upper 64 bits of a 128-bit product, schoolbook fashion in words of 32 bits."""
    low, high = left & _LOW_WORD, left >> _WORD
    other_low, other_high = right & _LOW_WORD, right >> _WORD
    middle = high * other_low + (low * other_low >> _WORD)
    carried = low * other_high + (middle & _LOW_WORD)
    return high * other_high + (middle >> _WORD) + (carried >> _WORD)


def _high_signed(left: Bits, right: Bits) -> Bits:
    """Correct the unsigned product: a negative factor was read as 2 to the 64 too large."""
    zero = np.uint64(0)
    borrowed = np.where(left.view(np.int64) < 0, right, zero)
    borrowed = borrowed + np.where(right.view(np.int64) < 0, left, zero)
    return _high_unsigned(left, right) - borrowed


def _high_product(kind: Kind) -> Run:
    if kind.width == 64:
        return _high_signed if kind.signed else _high_unsigned
    product = _wide_product(kind)
    return lambda left, right: (product(left, right) >> kind.width).astype(kind.bits)


def _product(op: Opcode) -> Run:
    """Return the function that gives the half of the product that the opcode names, or all."""
    if "lo" in op:
        return np.multiply
    return _wide_product(op.kind) if "wide" in op else _high_product(op.kind)


def _mul(op: Opcode) -> Arithmetic:
    width = op.kind.width
    result = 2 * width if "wide" in op else width
    return Arithmetic(
        results=(result,), sources=(width, width), signed=op.kind.signed, run=_product(op)
    )


def _mad(op: Opcode) -> Arithmetic:
    width, product = op.kind.width, _product(op)
    result = 2 * width if "wide" in op else width
    add = _add_saturated if "sat" in op else np.add
    return Arithmetic(
        results=(result,),
        sources=(width, width, result),
        signed=op.kind.signed,
        run=lambda left, right, base: add(product(left, right), base),
    )


def _add_saturated(left: Bits, right: Bits) -> Bits:
    return _clip(np.add(left.view(np.int32), right.view(np.int32), dtype=np.int64))


def _product24(op: Opcode) -> Run:
    """Return the function that multiplies the low 24 bits, extended as the type says."""
    numbers = op.kind.numbers
    wide = np.dtype(f"{numbers.kind}8")
    drop = 16 if "hi" in op else 0

    def run(left: Bits, right: Bits) -> Bits:
        # Shifted to the top and back, so that bit 23 becomes the sign of an s32.
        factors = ((side << 8).view(numbers) >> 8 for side in (left, right))
        return (np.multiply(*factors, dtype=wide) >> drop).astype(np.uint32)

    return run


def _mul24(op: Opcode) -> Arithmetic:
    return uniform(op, 2, _product24(op))


def _mad24(op: Opcode) -> Arithmetic:
    product = _product24(op)
    add = _add_saturated if "sat" in op else np.add
    return uniform(op, 3, lambda left, right, base: add(product(left, right), base))


def _unsigned_quotient(left: Bits, right: Bits) -> Bits:
    quotient: Bits = left // right
    if right.all():
        return quotient
    return np.where(right == 0, ~np.zeros_like(right), quotient)


def _unsigned_remainder(left: Bits, right: Bits) -> Bits:
    remainder: Bits = left % right
    return remainder if right.all() else np.where(right == 0, left, remainder)


def _magnitude(value: Bits, numbers: np.dtype[np.signedinteger]) -> Bits:
    """Return the absolute value as an unsigned number, which also holds that of the least one."""
    return np.abs(value.view(numbers)).view(value.dtype)


def _div(op: Opcode) -> Arithmetic:
    """Build a division that truncates towards zero."""
    numbers = op.kind.numbers

    def run(left: Bits, right: Bits) -> Bits:
        quotient = _magnitude(left, numbers) // _magnitude(right, numbers)
        quotient = np.where((left ^ right).view(numbers) < 0, _negate(quotient), quotient)
        if right.all():
            return quotient
        return np.where(right == 0, ~np.zeros_like(right), quotient)

    return uniform(op, 2, run if op.kind.signed else _unsigned_quotient)


def _rem(op: Opcode) -> Arithmetic:
    """Build a remainder with the sign of the dividend."""
    numbers = op.kind.numbers

    def run(left: Bits, right: Bits) -> Bits:
        rest = _unsigned_remainder(_magnitude(left, numbers), _magnitude(right, numbers))
        return np.where(left.view(numbers) < 0, _negate(rest), rest)

    return uniform(op, 2, run if op.kind.signed else _unsigned_remainder)


def _parts(words: Bits, kind: Kind, width: int) -> Numbers:
    """Split (n,) words of 32 bits into (n, 32 // width) integers, the lowest first."""
    return words[:, np.newaxis].view(f"{kind.numbers.kind}{width // 8}").astype(np.int64)


def _dot(op: Opcode) -> Arithmetic:
    """Build dp4a (four bytes by four) and dp2a (two halves by the two bytes that lo, hi pick)."""
    left_kind, right_kind = op.kinds
    width = 8 if op.name == "dp4a" else 16
    first = 2 if "hi" in op else 0
    picked = slice(first, first + 32 // width)

    def run(left: Bits, right: Bits, base: Bits) -> Bits:
        products = _parts(left, left_kind, width) * _parts(right, right_kind, 8)[:, picked]
        return products.sum(axis=1).astype(np.uint32) + base

    return Arithmetic(
        results=(32,),
        sources=(32, 32, 32),
        signed=left_kind.signed or right_kind.signed,
        run=run,
    )


_ANY = "u16|s16|u32|s32|u64|s64"
FAMILIES: dict[str, Builder] = {
    f"add.{_ANY}|u16x2|s16x2": _modular(np.add, 2),
    f"sub.{_ANY}": _modular(np.subtract, 2),
    "add.sat.s32": _saturating(np.add),
    "sub.sat.s32": _saturating(np.subtract),
    f"min|max.{_ANY}|u16x2|s16x2": _bounded,
    "min|max.relu.s32|s16x2": _bounded,
    "neg.s16|s32|s64": _modular(_negate, 1),
    "abs.s16|s32|s64": _ordered(np.abs, 1),
    f"sad.{_ANY}": _ordered(_sad, 3),
    f"mul.lo|hi.{_ANY}": _mul,
    "mul.wide.u16|s16|u32|s32": _mul,
    f"mad.lo|hi.{_ANY}": _mad,
    "mad.wide.u16|s16|u32|s32": _mad,
    "mad.hi.sat.s32": _mad,
    "mul24.lo|hi.u32|s32": _mul24,
    "mad24.lo|hi.u32|s32": _mad24,
    "mad24.hi.sat.s32": _mad24,
    f"div.{_ANY}": _div,
    f"rem.{_ANY}": _rem,
    "dp4a.u32|s32.u32|s32": _dot,
    "dp2a.lo|hi.u32|s32.u32|s32": _dot,
}
