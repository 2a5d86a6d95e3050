"""Bitwise logic, shifts and bit fields (PTX ISA, "Logic and Shift Instructions")."""

# NumPy types the operators of an array of any dtype as Any.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from gqa_cutlass.ptxsim.element.bits import Arithmetic, Bits, Builder, Opcode, Run, raw, uniform

_BYTE = 0xFF


def _bitwise(function: Callable[..., Bits], arity: int) -> Builder:
    return lambda op: uniform(op, arity, function)


def _cnot(value: Bits) -> Bits:
    return (value == 0).astype(value.dtype)


def _ones(count: Bits, width: int) -> Bits:
    """Return a word with the low `count` bits set; all of them from `width` on."""
    one = raw(width).type(1)
    # NumPy shifts everything out from the width on, as PTX does.
    return np.left_shift(one, count) - one


def _shifted(op: Opcode, sources: tuple[int, ...], run: Run) -> Arithmetic:
    """Describe an instruction whose trailing sources are 32-bit counts."""
    kind = op.kind
    return Arithmetic(results=(kind.width,), sources=sources, signed=kind.signed, run=run)


def _shl(op: Opcode) -> Arithmetic:
    def narrow(value: Bits, count: Bits) -> Bits:
        return np.left_shift(value, count).astype(np.uint16)

    width = op.kind.width
    return _shifted(op, (width, 32), narrow if width == 16 else np.left_shift)


def _shr(op: Opcode) -> Arithmetic:
    kind = op.kind

    def arithmetic(value: Bits, count: Bits) -> Bits:
        # One byte holds every count that matters and leaves the type of the value as it is.
        clamped = np.minimum(count, kind.width - 1).astype(np.uint8)
        return np.right_shift(value.view(kind.numbers), clamped).view(kind.bits)

    def narrow(value: Bits, count: Bits) -> Bits:
        return np.right_shift(value, count).astype(np.uint16)

    logical = narrow if kind.width == 16 else np.right_shift
    return _shifted(op, (kind.width, 32), arithmetic if kind.signed else logical)


def _shf(op: Opcode) -> Arithmetic:
    """Build the funnel shift of the 64 bits b:a."""
    left, wrap = "l" in op, "wrap" in op

    def run(low: Bits, high: Bits, count: Bits) -> Bits:
        amount = count & 31 if wrap else np.minimum(count, 32)
        both = np.left_shift(high, 32, dtype=np.uint64) | low
        shifted = both << amount >> np.uint64(32) if left else both >> amount
        return shifted.astype(np.uint32)

    return uniform(op, 3, run)


# The functions of two variables, by truth table: b contributes 0b1100 and c contributes 0b1010.
_PAIRWISE: tuple[Callable[[Bits, Bits], Bits], ...] = (
    lambda b, c: np.zeros_like(b),
    lambda b, c: ~(b | c),
    lambda b, c: ~b & c,
    lambda b, c: ~b,
    lambda b, c: b & ~c,
    lambda b, c: ~c,
    lambda b, c: b ^ c,
    lambda b, c: ~(b & c),
    lambda b, c: b & c,
    lambda b, c: ~(b ^ c),
    lambda b, c: c,
    lambda b, c: ~b | c,
    lambda b, c: b,
    lambda b, c: b | ~c,
    lambda b, c: b | c,
    lambda b, c: ~np.zeros_like(b),
)


def _lop3(a: Bits, b: Bits, c: Bits, table: Bits) -> Bits:
    """Look each bit triple up in a table of 8 bits, which PTX demands to be an immediate."""
    entries = int(table[0])
    without, with_a = entries & 15, entries >> 4 & 15
    base = _PAIRWISE[without](b, c)
    result = base if without == with_a else base ^ (a & _PAIRWISE[without ^ with_a](b, c))
    return _spread(result, a, b, c)


def _spread(result: Bits, *sources: Bits) -> Bits:
    """Give a result that ignores some of the sources the shape that they have together."""
    shape = np.broadcast_shapes(*(source.shape for source in sources))
    return result if result.shape == shape else np.broadcast_to(result, shape)


def _lop3_plain(op: Opcode) -> Arithmetic:
    return uniform(op, 4, _lop3)


def _lop3_predicate(op: Opcode) -> Arithmetic:
    """Build the form with a second result: (d != 0) combined with a predicate."""
    combine = np.logical_and if "and" in op else np.logical_or

    def run(a: Bits, b: Bits, c: Bits, table: Bits, predicate: Bits) -> tuple[Bits, Bits]:
        result = _lop3(a, b, c, table)
        return result, combine(result != 0, predicate)

    return Arithmetic(results=(32, 1), sources=(32, 32, 32, 32, 1), signed=False, run=run)


# prmt's modes as the selectors of the generic form, by the two low bits of c.
_MODES: dict[str, tuple[int, int, int, int]] = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


@functools.cache
def _moves(selector: int) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """Plan a byte permutation by a known selector, few operations for bytes that move together.

    Returns:
        Masks by (source, bits to shift left) of copied bytes, and masks by (source, bit) of the
        bytes that replicate that bit.
    """
    copied: dict[tuple[int, int], int] = {}
    replicated: dict[tuple[int, int], int] = {}
    for place in range(4):
        choice = selector >> 4 * place & 15
        source, byte = divmod(choice & 7, 4)
        plan, key = copied, (source, 8 * (place - byte))
        if choice & 8:
            plan, key = replicated, (source, 8 * byte + 7)
        plan[key] = plan.get(key, 0) | _BYTE << 8 * place
    return copied, replicated


def _permute_alike(a: Bits, b: Bits, selector: int) -> Bits:
    """Permute by one selector for all threads."""
    words = (a, b)
    copied, replicated = _moves(selector)
    terms = [_shift(words[source], shift) & mask for (source, shift), mask in copied.items()]
    terms += [(words[source] >> bit & 1) * mask for (source, bit), mask in replicated.items()]
    return _spread(functools.reduce(np.bitwise_or, terms), a, b)


def _shift(word: Bits, count: int) -> Bits:
    return word << count if count >= 0 else word >> -count


def _permute(a: Bits, b: Bits, selectors: Bits) -> Bits:
    """Permute by a selector for each thread."""
    pool = np.left_shift(b, 32, dtype=np.uint64) | a
    result = np.zeros(np.broadcast_shapes(pool.shape, selectors.shape), np.uint32)
    for place in range(4):
        choice = selectors >> 4 * place
        byte = (pool >> ((choice & 7) << 3)).astype(np.uint32) & _BYTE
        byte = np.where(choice & 8, (byte >> 7) * _BYTE, byte)
        result |= byte.astype(np.uint32) << 8 * place
    return result


def _prmt(op: Opcode) -> Arithmetic:
    table = np.array(_MODES[op.modifiers[0]], np.uint32) if op.modifiers else None

    def run(a: Bits, b: Bits, control: Bits) -> Bits:
        selectors = control if table is None else table[control & 3]
        if selectors.shape == (1,):
            return _permute_alike(a, b, int(selectors[0]) & 0xFFFF)
        return _permute(a, b, selectors)

    return uniform(op, 3, run)


def _count(op: Opcode) -> Arithmetic:
    run: dict[str, Run] = {
        "popc": lambda value: np.bitwise_count(value).astype(np.uint32),
        "clz": _leading_zeros,
    }
    return Arithmetic(results=(32,), sources=(op.kind.width,), signed=False, run=run[op.name])


def _leading_zeros(value: Bits) -> Bits:
    width = 8 * value.dtype.itemsize
    shift = 1
    while shift < width:
        value = value | value >> value.dtype.type(shift)
        shift *= 2
    return width - np.bitwise_count(value).astype(np.uint32)


def _bfind(op: Opcode) -> Arithmetic:
    kind, shiftamt = op.kind, "shiftamt" in op

    def run(value: Bits) -> Bits:
        if kind.signed:
            numbers = value.view(kind.numbers)
            value = (numbers ^ (numbers >> (kind.width - 1))).view(kind.bits)
        zeros = _leading_zeros(value)
        if shiftamt:
            return np.where(value == 0, np.uint32(0xFFFFFFFF), zeros)
        # Wraps to all ones where no bit is found.
        return np.uint32(kind.width - 1) - zeros

    return Arithmetic(results=(32,), sources=(kind.width,), signed=False, run=run)


_REVERSED_BYTE = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], np.uint8)


def _brev(op: Opcode) -> Arithmetic:
    def run(value: Bits) -> Bits:
        swapped = np.ascontiguousarray(value).byteswap().view(np.uint8)
        return _REVERSED_BYTE[swapped].view(op.kind.bits)

    return uniform(op, 1, run)


def _bfe(op: Opcode) -> Arithmetic:
    kind = op.kind

    def unsigned(value: Bits, start: Bits, length: Bits) -> Bits:
        return value >> (start & _BYTE) & _ones(length & _BYTE, kind.width)

    def signed(value: Bits, start: Bits, length: Bits) -> Bits:
        position, size = (start & _BYTE).astype(np.int64), (length & _BYTE).astype(np.int64)
        inside = np.clip(kind.width - position, 0, size).astype(kind.bits)
        field = _ones(inside, kind.width)
        top = np.clip(position + size - 1, 0, kind.width - 1).astype(kind.bits)
        negative = (value >> top & kind.bits.type(1)).astype(np.bool_) & (size != 0)
        extracted = value >> position.astype(kind.bits) & field
        return np.where(negative, extracted | ~field, extracted)

    run = signed if kind.signed else unsigned
    return _shifted(op, (kind.width, 32, 32), run)


def _bfi(op: Opcode) -> Arithmetic:
    width = op.kind.width

    def run(field: Bits, base: Bits, start: Bits, length: Bits) -> Bits:
        position = start & _BYTE
        mask = _ones(length & _BYTE, width) << position
        result: Bits = base & ~mask | field << position & mask
        return result

    return _shifted(op, (width, width, 32, 32), run)


def _bmsk(op: Opcode) -> Arithmetic:
    clamp = "clamp" in op

    def run(start: Bits, length: Bits) -> Bits:
        if clamp:
            return _ones(length, 32) << start
        return _ones(length & 31, 32) << (start & 31)

    return uniform(op, 2, run)


def _szext(op: Opcode) -> Arithmetic:
    kind, clamp = op.kind, "clamp" in op

    def run(value: Bits, size: Bits) -> Bits:
        size = np.minimum(size, 32) if clamp else size & 31
        # The field travels to the top of 64 bits and back, which extends it.
        wide = np.left_shift(value, 64 - size.astype(np.uint64), dtype=np.uint64)
        wide = wide.view(np.int64 if kind.signed else np.uint64)
        return (wide >> (64 - size).astype(np.uint8)).astype(np.uint32)

    return uniform(op, 2, run)


FAMILIES: dict[str, Builder] = {
    "and.pred|b16|b32|b64": _bitwise(np.bitwise_and, 2),
    "or.pred|b16|b32|b64": _bitwise(np.bitwise_or, 2),
    "xor.pred|b16|b32|b64": _bitwise(np.bitwise_xor, 2),
    "not.pred|b16|b32|b64": _bitwise(np.invert, 1),
    "cnot.b16|b32|b64": _bitwise(_cnot, 1),
    "lop3.b32": _lop3_plain,
    "lop3.and|or.b32": _lop3_predicate,
    "shl.b16|b32|b64": _shl,
    "shr.b16|b32|b64|u16|u32|u64|s16|s32|s64": _shr,
    "shf.l|r.clamp|wrap.b32": _shf,
    "prmt.b32.{f4e|b4e|rc8|ecl|ecr|rc16}": _prmt,
    "popc|clz.b32|b64": _count,
    "bfind.{shiftamt}.u32|u64|s32|s64": _bfind,
    "brev.b32|b64": _brev,
    "bfe.u32|u64|s32|s64": _bfe,
    "bfi.b32|b64": _bfi,
    "bmsk.clamp|wrap.b32": _bmsk,
    "szext.clamp|wrap.u32|s32": _szext,
}
