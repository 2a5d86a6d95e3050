"""Operands for warp-level instructions: membermasks, rows of matrices, and hard sums for mma."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from instructions import Array, Form, Opcode
from warp_instructions import LANES, WARP, executing, mma_of

# As in test_ptxsim_exchange: segments as a C compiler packs them, a clamp inside one, stray bits.
CLAMPS = [0x1F, 0x00, 0x101F, 0x1000, 0x181F, 0x1800, 0x1E1F, 0x1805, 0x0A13, 0xFFFFE0E0]
OFFSETS = [0, 1, 4, 7, 8, 16, 31, 32, 33, 0xFFFFFFFF]
WARPS, FULL_WARPS = 256, 128  # in all, and with all lanes
MMA_WARPS = 64  # of each sort


def exchange_operands(form: Form) -> list[Array]:
    """Return the input arrays of shfl, vote, match, redux or elect."""
    rng = np.random.default_rng(7)
    uniform = form.opcode[0] == "elect"
    mask = _masks(rng, uniform)
    draw = {"shfl": _shfl, "vote": _votes, "match": _values, "redux": _words, "elect": _nothing}
    sources = draw[form.opcode[0]](rng, form.opcode)
    return [np.ascontiguousarray(source).reshape(-1) for source in (*sources, mask)]


def _masks(rng: np.random.Generator, uniform: bool) -> Array:
    """Membermasks: full, sparse, single, and halves of a warp with one each, (w, 32)."""
    masks = np.full((WARPS, WARP), 0xFFFFFFFF, np.uint32)
    masks[FULL_WARPS:192] = rng.integers(1, 1 << 32, (64, 1), np.uint32)
    masks[192:224] = np.uint32(1) << LANES[:, None]
    if not uniform:
        masks[224:] = np.where(LANES >= 16, 0xFFFF0000, 0xFFFF)
    return masks


def _words(rng: np.random.Generator, opcode: Opcode) -> list[Array]:
    words = rng.integers(0, 1 << 32, (WARPS, WARP), np.uint32)
    words[::4] &= 0xFF
    words[1::8] = rng.choice(np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32), WARP)
    return [words]


def _nothing(rng: np.random.Generator, opcode: Opcode) -> list[Array]:
    return []


def _votes(rng: np.random.Generator, opcode: Opcode) -> list[Array]:
    shares = rng.choice([0.0, 0.03, 0.5, 0.97, 1.0], (WARPS, 1))
    return [(rng.random((WARPS, WARP)) < shares).astype(np.uint32)]


def _values(rng: np.random.Generator, opcode: Opcode) -> list[Array]:
    """Values that often match; of 64 bits, some differ in the upper half only."""
    kind = np.dtype(f"u{int(opcode[-1][1:]) // 8}")
    different = rng.choice([1, 2, 3, 32], (WARPS, 1))
    values = rng.integers(0, 1 << 8 * kind.itemsize, (WARPS, WARP), kind)
    chosen = rng.integers(0, 32, (WARPS, WARP)) % different
    values = np.take_along_axis(values, chosen, axis=1)
    if kind.itemsize == 8:
        values[::3] = values[::3] & np.uint64(0xFFFFFFFF00000000) | np.uint64(5)
    return [values]


def _shfl(rng: np.random.Generator, opcode: Opcode) -> list[Array]:
    """Every offset with every clamp, then different ones in each lane."""
    (value,) = _words(rng, opcode)
    pairs = np.array(list(itertools.product(OFFSETS, CLAMPS)), np.uint32)
    lane = rng.integers(0, 1 << 32, (WARPS, WARP), np.uint32)
    clamp = rng.integers(0, 1 << 32, (WARPS, WARP), np.uint32)
    lane[: len(pairs)], clamp[: len(pairs)] = pairs[:, :1], pairs[:, 1:]
    partly = WARPS - FULL_WARPS, 1
    lane[FULL_WARPS:], clamp[FULL_WARPS:] = rng.choice(OFFSETS, partly), rng.choice(CLAMPS, partly)
    return [value, lane, clamp]


def shfl_source_takes_part(form: Form, sources: list[Array]) -> Array:
    """Tell where shfl is defined: where the lane that is read executes it, too, with that mask."""
    *operands, mask = sources
    everyone = np.full_like(mask, 0xFFFFFFFF)
    executes = executing(mask)
    read_mask = form.run(mask, *operands[1:], everyone)[0].reshape(-1, WARP)
    present = form.run(executes.reshape(-1).astype(np.uint32), *operands[1:], everyone)[0]
    same = read_mask == mask.reshape(-1, WARP)
    return executes & same & (present.reshape(-1, WARP) == 1)


def matrix_operands(form: Form) -> list[Array]:
    """Return the input arrays of movmatrix, ldmatrix or stmatrix."""
    rng = np.random.default_rng(8)
    threads = WARPS * WARP
    words = [rng.integers(0, 1 << 32, threads, np.uint32) for _ in range(4)]
    if form.opcode[0] == "movmatrix":
        return words[:1]
    rows = rng.integers(0, 1 << 32, (threads, 4), np.uint32)
    if form.opcode[0] == "ldmatrix":
        return [rows, rng.integers(0, WARP, threads, np.uint32)]
    which = rng.permuted(np.tile(LANES, (WARPS, 1)), axis=1).reshape(-1)
    num = int(form.opcode[4][1:])
    return [rows, which, *words[:num]]


# Operands of mma: each sort gives A (w, 16, k), B (w, k, 8) and C (w, 16, 8) as float64.

Matrices = tuple[Array, Array, Array]
_OPERAND_RANGE = {"f16": (-14, 15), "bf16": (-126, 127), "tf32": (-126, 127)}
_C_RANGE = {"f16": (-14, 15), "f32": (-126, 127)}


def _normal(rng: np.random.Generator, k: int, operand: str, accumulator: str) -> Matrices:
    return tuple(rng.standard_normal((MMA_WARPS, *shape)) for shape in _shapes(k))  # type: ignore[return-value]


def _shapes(k: int) -> tuple[tuple[int, int], ...]:
    return (16, k), (k, 8), (16, 8)


def _integers(rng: np.random.Generator, k: int, operand: str, accumulator: str) -> Matrices:
    """Small integers: every sum is a number of the type, so nothing may be lost."""
    return tuple(  # type: ignore[return-value]
        rng.integers(-8, 9, (MMA_WARPS, *shape)).astype(np.float64) for shape in _shapes(k)
    )


def _wide(rng: np.random.Generator, k: int, operand: str, accumulator: str) -> Matrices:
    """Exponents all over the range in which products do not overflow."""
    low, high = _OPERAND_RANGE[operand]
    half = min(high, _C_RANGE[accumulator][1]) // 2 - 3
    ranges = [(max(low, -half), half), (max(low, -half), half), (-2 * half, 2 * half - 4)]
    return tuple(  # type: ignore[return-value]
        rng.standard_normal((MMA_WARPS, *shape)) * 2.0 ** rng.uniform(*reach, (MMA_WARPS, *shape))
        for shape, reach in zip(_shapes(k), ranges, strict=True)
    )


def _cancelling(rng: np.random.Generator, k: int, operand: str, accumulator: str) -> Matrices:
    """Sums of which only the last bits are left: the second half undoes nearly all of the first."""
    a, b, c = _normal(rng, k, operand, accumulator)
    half = k // 2
    left = a[:, :, :half]
    a[:, :, half:] = -left * (1 + rng.choice([0.0, 2.0**-7, 2.0**-10], left.shape))
    b[:, half:] = b[:, :half]
    return a, b, c * 2.0 ** rng.uniform(-24, -2, c.shape)


def _addend_decides(rng: np.random.Generator, k: int, operand: str, accumulator: str) -> Matrices:
    """A C that dwarfs the products, which are then cut off."""
    a, b, c = _normal(rng, k, operand, accumulator)
    return a, b, c * 2.0 ** rng.uniform(4, 12 if accumulator == "f16" else 26, c.shape)


def _subnormal(rng: np.random.Generator, k: int, operand: str, accumulator: str) -> Matrices:
    a, b, c = _normal(rng, k, operand, accumulator)
    least = 2.0 ** _OPERAND_RANGE[operand][0]
    a *= least * rng.choice([0.01, 0.3, 2.0], a.shape)
    b *= rng.choice([1.0, least], b.shape)
    return a, b, c * 2.0 ** _C_RANGE[accumulator][0] * rng.choice([0.0, 0.1, 1.0], c.shape)


def _special(rng: np.random.Generator, k: int, operand: str, accumulator: str) -> Matrices:
    """A few infinities, NaNs and zeros of either sign among ordinary numbers."""
    parts = _normal(rng, k, operand, accumulator)
    for part in parts:
        where = rng.random(part.shape) < 0.03
        part[where] = rng.choice([np.inf, -np.inf, np.nan, 0.0, -0.0], int(where.sum()))
    return parts


def _zeros(rng: np.random.Generator, k: int, operand: str, accumulator: str) -> Matrices:
    return tuple(rng.choice([0.0, -0.0], (MMA_WARPS, *shape)) for shape in _shapes(k))  # type: ignore[return-value]


Sort = Callable[[np.random.Generator, int, str, str], Matrices]
MMA_SORTS: dict[str, Sort] = {
    "normal": _normal,
    "integers": _integers,
    "wide": _wide,
    "cancelling": _cancelling,
    "large C": _addend_decides,
    "subnormal": _subnormal,
    "special": _special,
    "zeros": _zeros,
}


def mma_operands(form: Form) -> list[Array]:
    """Return the registers of A, B and C, MMA_WARPS warps of each sort, then random bits."""
    mma = mma_of(form.opcode)
    rng = np.random.default_rng(9)
    with np.errstate(all="ignore"):
        sorts = [sort(rng, mma.k, mma.operand, mma.accumulator) for sort in MMA_SORTS.values()]
    a, b, c = (np.concatenate(part) for part in zip(*sorts, strict=True))
    registers = [*_a(a, mma.operand), *_b(b, mma.operand), *_c(c, mma.accumulator)]
    random = (MMA_WARPS, WARP)
    return [
        np.concatenate([part, rng.integers(0, 1 << 32, random, np.uint32)]).reshape(-1)
        for part in registers
    ]


def _encode(values: Array, kind: str) -> Array:
    """Round float64 to a format's bits: 16-bit formats as uint16, others as uint32."""
    with np.errstate(all="ignore"):
        if kind == "f16":
            return values.astype(np.float16).view(np.uint16)
        single = values.astype(np.float32).view(np.uint32)
    return (single >> 16).astype(np.uint16) if kind == "bf16" else single


def _registers(values: Array, kind: str) -> Array:
    """Pack neighbours along the last axis into 32-bit words."""
    bits = np.ascontiguousarray(_encode(values, kind))
    return bits.view(np.uint32)


def _a(a: Array, kind: str) -> list[Array]:
    """Fragments of A: register 2j + i holds rows 8i.. of the j-th block of columns."""
    words = _registers(a, kind)
    return _blocks(words)


def _blocks(words: Array) -> list[Array]:
    w, _, columns = words.shape
    cut = words.reshape(w, 2, 8, columns // 4, 4)
    return [cut[:, i, :, j].reshape(w, WARP) for j in range(columns // 4) for i in range(2)]


def _b(b: Array, kind: str) -> list[Array]:
    """Fragments of B: register j holds the j-th block of rows, a group a column."""
    words = _registers(b.transpose(0, 2, 1), kind)
    w, _, rows = words.shape
    cut = words.reshape(w, 8, rows // 4, 4)
    return [cut[:, :, j].reshape(w, WARP) for j in range(rows // 4)]


def _c(c: Array, kind: str) -> list[Array]:
    """Fragments of C: pairs of columns, in one register (f16) or two."""
    if kind == "f16":
        return _blocks(_registers(c, kind))
    pairs: Any = _registers(c, kind).reshape(len(c), 2, 8, 4, 2)
    return [pairs[:, i, :, :, e].reshape(len(c), WARP) for i in range(2) for e in range(2)]
