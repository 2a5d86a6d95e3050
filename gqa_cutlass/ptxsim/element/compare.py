"""Comparison, selection and moves (PTX ISA, "Comparison and Selection Instructions")."""

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
    join_lanes,
    split_lanes,
    uniform,
)
from gqa_cutlass.ptxsim.element.formats import F32, FORMATS, flush, read

Comparison = Callable[[Numbers, Numbers], Bits]


def _unordered(left: Numbers, right: Numbers) -> Bits:
    return np.isnan(left) | np.isnan(right)


def _different(left: Numbers, right: Numbers) -> Bits:
    """Tell whether two numbers differ; a NaN differs from nothing here."""
    return (left < right) | (left > right)


_INTEGER: dict[str, Comparison] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
# NumPy's comparisons with a NaN are false, but for not_equal; those that end in u are true.
_FLOAT: dict[str, Comparison] = {
    **{name: _INTEGER[name] for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": _different,
    "equ": lambda left, right: ~_different(left, right),
    "neu": np.not_equal,
    "ltu": lambda left, right: ~(left >= right),
    "leu": lambda left, right: ~(left > right),
    "gtu": lambda left, right: ~(left <= right),
    "geu": lambda left, right: ~(left < right),
    "num": lambda left, right: ~_unordered(left, right),
    "nan": _unordered,
}
_COMBINE: dict[str, np.ufunc] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def _comparison(op: Opcode) -> Run:
    """Return the comparison of one lane, on raw bits."""
    kind = op.kind.lane
    if not kind.floating:
        compare = _INTEGER[op.modifiers[0]]
        return lambda left, right: compare(left.view(kind.numbers), right.view(kind.numbers))
    shape, compare = FORMATS[kind.name], _FLOAT[op.modifiers[0]]

    def plain(left: Bits, right: Bits) -> Bits:
        return compare(read(left, shape), read(right, shape))

    def flushed(left: Bits, right: Bits) -> Bits:
        return plain(flush(left, shape), flush(right, shape))

    return flushed if "ftz" in op else plain


def _combination(op: Opcode) -> Run:
    """Return how a comparison joins the predicate that the opcode may ask for."""
    names = [name for name in op.modifiers if name in _COMBINE]
    return _COMBINE[names[0]] if names else lambda holds: holds


def _compared(op: Opcode) -> tuple[int, ...]:
    predicates = sum(name in _COMBINE for name in op.modifiers)
    return (op.kind.width, op.kind.width, *(1,) * predicates)


def _setp(op: Opcode) -> Arithmetic:
    """Build p = (a op b) and q = its complement, each combined with a predicate."""
    compare, combine = _comparison(op), _combination(op)

    def run(left: Bits, right: Bits, *predicate: Bits) -> tuple[Bits, Bits]:
        holds = compare(left, right)
        return combine(holds, *predicate), combine(~holds, *predicate)

    return Arithmetic(results=(1, 1), sources=_compared(op), signed=False, run=run)


def _setp_packed(op: Opcode) -> Arithmetic:
    """Build a comparison of pairs: p is that of the low halves, q that of the high ones."""
    compare, combine = _comparison(op), _combination(op)

    def run(left: Bits, right: Bits, *predicate: Bits) -> tuple[Bits, Bits]:
        holds = compare(split_lanes(left), split_lanes(right))
        return combine(holds[:, 0], *predicate), combine(holds[:, 1], *predicate)

    return Arithmetic(results=(1, 1), sources=_compared(op), signed=False, run=run)


def _true(kind: Kind) -> int:
    """Return what set writes for a comparison that holds: 1.0 or all ones."""
    return FORMATS[kind.name].one if kind.floating else (1 << kind.width) - 1


def _set(op: Opcode) -> Arithmetic:
    target = op.kinds[0]
    compare, combine = _comparison(op), _combination(op)
    yes, no = target.bits.type(_true(target)), target.bits.type(0)

    def run(left: Bits, right: Bits, *predicate: Bits) -> Bits:
        return np.where(combine(compare(left, right), *predicate), yes, no)

    return Arithmetic(results=(target.width,), sources=_compared(op), signed=target.signed, run=run)


def _set_packed(op: Opcode) -> Arithmetic:
    """Build the form that writes half a word for each half."""
    target = op.kinds[0]
    compare, combine = _comparison(op), _combination(op)
    yes = np.uint16(_true(target.lane) if target.floating else 0xFFFF)

    def run(left: Bits, right: Bits, *predicate: Bits) -> Bits:
        holds = compare(split_lanes(left), split_lanes(right))
        holds = combine(holds, *(each[:, np.newaxis] for each in predicate))
        return join_lanes(np.where(holds, yes, np.uint16(0)))

    return Arithmetic(results=(32,), sources=_compared(op), signed=target.signed, run=run)


def _selp(op: Opcode) -> Arithmetic:
    """Build the selection by a predicate, without np.where, which branches and is slower."""
    width = op.kind.width
    return Arithmetic(
        results=(width,),
        sources=(width, width, 1),
        signed=op.kind.signed,
        run=lambda yes, no, predicate: (yes ^ no) * predicate ^ no,
    )


def _slct(op: Opcode) -> Arithmetic:
    """Build the selection by sign; -0.0 counts as zero and a NaN as negative."""
    target, selector = op.kinds
    numbers = np.dtype(np.float32) if selector.floating else selector.numbers
    ftz = "ftz" in op

    def run(yes: Bits, no: Bits, sign: Bits) -> Bits:
        sign = flush(sign, F32) if ftz else sign
        return np.where(sign.view(numbers) >= 0, yes, no)

    return Arithmetic(
        results=(target.width,),
        sources=(target.width, target.width, selector.width),
        signed=target.signed,
        run=run,
    )


def _mov(op: Opcode) -> Arithmetic:
    return uniform(op, 1, lambda value: value)


_SCALARS = "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64"
_BITWISE = "eq|ne"
_SIGNED = "eq|ne|lt|le|gt|ge"
_UNSIGNED = f"{_SIGNED}|lo|ls|hi|hs"
_FLOATING = "|".join(_FLOAT)
_BOOL = "{and|or|xor}"
_WORDS = "u32|s32|f32|f16|bf16"
FAMILIES: dict[str, Builder] = {
    f"setp.{_BITWISE}.{_BOOL}.b16|b32|b64": _setp,
    f"setp.{_SIGNED}.{_BOOL}.s16|s32|s64": _setp,
    f"setp.{_UNSIGNED}.{_BOOL}.u16|u32|u64": _setp,
    f"setp.{_FLOATING}.{_BOOL}.{{ftz}}.f16|f32": _setp,
    f"setp.{_FLOATING}.{_BOOL}.bf16|f64": _setp,
    f"setp.{_FLOATING}.{_BOOL}.{{ftz}}.f16x2": _setp_packed,
    f"setp.{_FLOATING}.{_BOOL}.bf16x2": _setp_packed,
    f"set.{_BITWISE}.{_BOOL}.{_WORDS}.b16|b32|b64": _set,
    f"set.{_SIGNED}.{_BOOL}.{_WORDS}.s16|s32|s64": _set,
    f"set.{_UNSIGNED}.{_BOOL}.{_WORDS}.u16|u32|u64": _set,
    f"set.{_FLOATING}.{_BOOL}.{{ftz}}.u32|s32|f32|f16.f32": _set,
    f"set.{_FLOATING}.{_BOOL}.bf16.f32|f16": _set,
    f"set.{_FLOATING}.{_BOOL}.{_WORDS}.f64": _set,
    f"set.{_FLOATING}.{_BOOL}.{{ftz}}.u16|s16|u32|s32|f16.f16": _set,
    f"set.{_FLOATING}.{_BOOL}.u16|s16|u32|s32|bf16.bf16": _set,
    f"set.{_FLOATING}.{_BOOL}.{{ftz}}.u32|s32|f16x2.f16x2": _set_packed,
    f"set.{_FLOATING}.{_BOOL}.u32|s32|bf16x2.bf16x2": _set_packed,
    f"selp.{_SCALARS}": _selp,
    f"slct.{_SCALARS}.s32": _slct,
    f"slct.{{ftz}}.{_SCALARS}.f32": _slct,
    f"mov.pred|{_SCALARS}": _mov,
}
