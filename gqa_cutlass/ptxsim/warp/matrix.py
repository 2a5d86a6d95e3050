"""Warp-level matrix instructions of PTX: mma.sync, ldmatrix, stmatrix and movmatrix.

Registers are uint32 arrays of (warps, 32 lanes). In every fragment lane 4g + t is "thread t of
group g" (PTX ISA, "Matrix Fragments for mma.m16n8k16"), so that a register reshaped to (w, 8, 4)
is already a block of rows of the matrix, and an instruction only puts blocks in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

F64: TypeAlias = NDArray[np.float64]
U32: TypeAlias = NDArray[np.uint32]

_GROUPS = 8
_THREADS = 4
_LANES = _GROUPS * _THREADS
# Warps that mma multiplies at a time: their float64 matrices stay in the second-level cache.
_BATCH = 128


def _decode_f16(words: U32) -> F64:
    return words.view(np.float16).astype(np.float64)


def _decode_bf16(words: U32) -> F64:
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _decode_tf32(words: U32) -> F64:
    # The low 13 bits of the register are not part of the format.
    return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class _Operand:
    """Element type of A and B: elements in a register, their values, the smallest normal one."""

    per_register: int
    decode: Callable[[U32], F64]
    smallest_normal: float


@dataclass(frozen=True, kw_only=True)
class _Accumulator:
    """Element type of C and D.

    `relative` and `absolute` bound what tensor cores lose in one conversion to the type, of normal
    and of subnormal results: they truncate to f32 and round to nearest f16.
    """

    dtype: type[np.floating[Any]]
    bits: type[np.unsignedinteger[Any]]
    infinity: int
    nan: int
    relative: float
    absolute: float

    @property
    def per_register(self) -> int:
        """Elements that a 32-bit register holds."""
        return 4 // np.dtype(self.dtype).itemsize


_OPERANDS = {
    "f16": _Operand(per_register=2, decode=_decode_f16, smallest_normal=2.0**-14),
    "bf16": _Operand(per_register=2, decode=_decode_bf16, smallest_normal=2.0**-126),
    "tf32": _Operand(per_register=1, decode=_decode_tf32, smallest_normal=2.0**-126),
}
_ACCUMULATORS = {
    "f32": _Accumulator(
        dtype=np.float32,
        bits=np.uint32,
        infinity=0x7F800000,
        nan=0x7FFFFFFF,
        relative=2.0**-23,
        absolute=2.0**-149,
    ),
    "f16": _Accumulator(
        dtype=np.float16,
        bits=np.uint16,
        infinity=0x7C00,
        nan=0x7FFF,
        relative=2.0**-11,
        absolute=2.0**-25,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Mma:
    """One `mma.sync.aligned.m16n8k<k>.row.col` instruction, D = A B + C.

    Args:
        k: Columns of A and rows of B.
        operand: Element type of A and B: "f16", "bf16" or "tf32".
        accumulator: Element type of C and D: "f32" or "f16".

    The ISA leaves order and rounding of the sum open. Here products are exact, they are summed in
    float64 and C is added last, then the sum is rounded once, to nearest even. Overflow gives
    infinity, subnormals are kept, a sum that is zero is +0, and a NaN is 0x7fffffff (f16: 0x7fff).

    The float64 sum is exact while the magnitudes summed stay below 2**53 units of the last place of
    the smallest product and of C: for A and B within 14 (f16) or 17 (bf16) binades of each other,
    for example. Beyond, it is off by at most k * 2**-53 * (|C| + |A||B|), which depends on the
    BLAS; that changes a rounded result only near a tie or after cancellation. The result of a warp
    does not depend on the other warps. Tensor cores differ by up to `mma_bound`.
    """

    k: int
    operand: str
    accumulator: str

    @property
    def registers(self) -> tuple[int, int, int]:
        """Number of 32-bit registers of a, of b, and of c or d."""
        blocks = self.k // (_THREADS * _OPERANDS[self.operand].per_register)
        return 2 * blocks, blocks, 4 // _ACCUMULATORS[self.accumulator].per_register

    def run(self, a: Sequence[U32], b: Sequence[U32], c: Sequence[U32]) -> list[U32]:
        """Execute the instruction for all warps.

        Args:
            a: Registers of the fragment of A, each (w, 32).
            b: Registers of the fragment of B, each (w, 32).
            c: Registers of the fragment of C, each (w, 32).

        Returns:
            The registers of D, each (w, 32).
        """
        operand, accumulator = _OPERANDS[self.operand], _ACCUMULATORS[self.accumulator]
        d = np.empty((len(c), *c[0].shape), np.uint32)
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, d.shape[1], _BATCH):
                part = slice(start, start + _BATCH)
                product = np.matmul(
                    _rows_a([register[part] for register in a], operand),
                    _columns_b([register[part] for register in b], operand).transpose(0, 2, 1),
                )
                addend = np.array([register[part] for register in c])
                d[:, part] = _add_and_round(product, addend, accumulator)
        return list(d)

    def matrices(
        self, a: Sequence[U32], b: Sequence[U32], c: Sequence[U32]
    ) -> tuple[F64, F64, F64]:
        """Assemble the matrices that fragments hold, as `mma_bound` takes them.

        Args:
            a: Registers of the fragment of A, each (w, 32).
            b: Registers of the fragment of B, each (w, 32).
            c: Registers of the fragment of C (or D), each (w, 32).

        Returns:
            A (w, 16, k), B (w, k, 8) and C (w, 16, 8), as float64.
        """
        operand, accumulator = _OPERANDS[self.operand], _ACCUMULATORS[self.accumulator]
        addend = np.empty((c[0].shape[0], 2 * _GROUPS, _GROUPS))
        _by_register(addend, accumulator)[...] = _elements(np.array(c), accumulator)
        return _rows_a(a, operand), _columns_b(b, operand).transpose(0, 2, 1), addend


# (shape, type of D and C, type of A and B); PTX ISA, "mma".
_INSTRUCTIONS = (
    ("m16n8k16", 16, "f32", "f16"),
    ("m16n8k16", 16, "f16", "f16"),
    ("m16n8k16", 16, "f32", "bf16"),
    ("m16n8k8", 8, "f32", "f16"),
    ("m16n8k8", 8, "f16", "f16"),
    ("m16n8k8", 8, "f32", "bf16"),
    ("m16n8k8", 8, "f32", "tf32"),
    ("m16n8k4", 4, "f32", "tf32"),
)
_MMAS: dict[tuple[str, ...], Mma] = {
    ("mma", "sync", "aligned", shape, "row", "col", d, ab, ab, d): Mma(
        k=k, operand=ab, accumulator=d
    )
    for shape, k, d, ab in _INSTRUCTIONS
}


def lookup_mma(opcode: tuple[str, ...]) -> Mma | None:
    """Find the instruction of an opcode that was split at its dots; None if there is none.

    Args:
        opcode: For example ("mma", "sync", "aligned", "m16n8k16", "row", "col", "f32", "f16",
            "f16", "f32"), with the types in the order D, A, B, C.
    """
    return _MMAS.get(opcode)


# The model that reproduces the bits of mma.sync from sm_80 to sm_120 (Xie et al., "MMA-Sim", 2025,
# arXiv:2511.10909; in accord with Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ
# CS 7:e330, 2021; Li et al., "FTTN", 2024, arXiv:2403.00232; Khattak and Mikaitis, 2025,
# arXiv:2512.07004): the instruction is one step, or two over half of k each (sm_80 to sm_89). A
# step aligns its exact products and its addend to the largest exponent among them, truncates each
# to _FRACTION_BITS (24; 25 from sm_90) below it, adds them exactly and converts to the type of D.
_FRACTION_BITS = 24
_STEPS = 2
# Room for a step's own errors in the magnitudes that the next step aligns to.
_SECOND_ORDER = 1 + 2.0**-10


def mma_bound(
    a: F64, b: F64, c: F64, *, operand: str = "f16", accumulator: str = "f32"
) -> NDArray[np.float64]:
    """Bound the difference of a tensor core's D from the exact A B + C, per element.

    Let M = |C| + |A||B|. No product, addend or partial sum exceeds M, so no exponent that terms are
    aligned to exceeds that of M. In each step the term with that exponent keeps all its bits: over
    the steps at most k terms are truncated, by less than 2**-24 M each. Each of two conversions
    adds at most 2**-23 M (f32, truncated) or 2**-11 M (f16, to nearest):

        |D - (A B + C)| <= (k * 2**-24 + 2 * 2**-23) M    for f32.

    Subnormals are aligned as the smallest normal number, so M counts them as that. The D of `Mma`
    is half a unit in the last place, its own rounding, further from a tensor core's at most.

    Args:
        a: (..., 16, k).
        b: (..., k, 8).
        c: (..., 16, 8).
        operand: Element type of A and B, as in `Mma`.
        accumulator: Element type of C and D, as in `Mma`.

    Returns:
        (..., 16, 8); infinite where a partial sum may overflow or an operand is not finite.

    Raises:
        KeyError: The element type is unknown.
    """
    target = _ACCUMULATORS[accumulator]
    limits = np.finfo(target.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        smallest = _OPERANDS[operand].smallest_normal
        magnitude = _magnitude(a, smallest) @ _magnitude(b, smallest)
        magnitude += np.abs(c) + float(limits.smallest_normal)
        magnitude *= _SECOND_ORDER
        share = a.shape[-1] * 2.0**-_FRACTION_BITS + _STEPS * target.relative
        bound = share * magnitude + _STEPS * target.absolute
    return np.where(magnitude <= float(limits.max), bound, np.inf)


def ldmatrix_rows(num: int) -> NDArray[np.int64]:
    """Give the lanes whose addresses point at the rows: lane [m, i] at row i of matrix m.

    Args:
        num: Matrices that ldmatrix or stmatrix moves: 1, 2 or 4.

    Returns:
        (num, 8).
    """
    return np.arange(num * _GROUPS).reshape(num, _GROUPS)


def distribute(rows: U32, num: int, transposed: bool) -> list[U32]:
    """Hand the rows of `ldmatrix.m8n8.b16` to the lanes' registers (PTX ISA, "ldmatrix").

    Args:
        rows: Eight rows of 16 bytes of each matrix, (w, num, 8, 4).
        num: Number of matrices: 1, 2 or 4.
        transposed: Whether the instruction has `.trans`.

    Returns:
        One register per matrix, each (w, 32).
    """
    blocks = np.array(rows.transpose(1, 0, 2, 3), order="C")
    return list(_transpose(blocks, transposed).reshape(num, -1, _LANES))


def collect(registers: Sequence[U32], num: int, transposed: bool) -> U32:
    """Collect from the lanes' registers the rows that `stmatrix.m8n8.b16` stores.

    Args:
        registers: One register per matrix, each (w, 32).
        num: Number of matrices: 1, 2 or 4.
        transposed: Whether the instruction has `.trans`.

    Returns:
        Eight rows of 16 bytes of each matrix, (w, num, 8, 4).
    """
    blocks = np.array(registers).reshape(num, -1, _GROUPS, _THREADS)
    return np.ascontiguousarray(_transpose(blocks, transposed).transpose(1, 0, 2, 3))


def movmatrix(value: U32) -> U32:
    """Transpose the matrix that a warp holds: `movmatrix.sync.aligned.m8n8.trans.b16`.

    Args:
        value: (w, 32).

    Returns:
        (w, 32).
    """
    blocks = np.ascontiguousarray(value).reshape(-1, _GROUPS, _THREADS)
    return _transpose(blocks, True).reshape(-1, _LANES)


def _transpose(blocks: U32, transposed: bool) -> U32:
    """Transpose 8 x 8 matrices of 16-bit elements, (..., 8, 4), if asked to."""
    if not transposed:
        return blocks
    return np.ascontiguousarray(blocks.view(np.uint16).swapaxes(-1, -2)).view(np.uint32)


def _rows_a(registers: Sequence[U32], operand: _Operand) -> F64:
    """Matrix A, (w, 16, k): register 2j + i holds rows 8i.. of block j of columns."""
    w, blocks = registers[0].shape[0], len(registers) // 2
    words = np.empty((w, 2, _GROUPS, blocks, _THREADS), np.uint32)
    for index, register in enumerate(registers):
        words[:, index % 2, :, index // 2] = register.reshape(w, _GROUPS, _THREADS)
    return operand.decode(words).reshape(w, 2 * _GROUPS, -1)


def _columns_b(registers: Sequence[U32], operand: _Operand) -> F64:
    """Matrix B transposed, (w, 8, k): register j holds block j of rows, group g column g."""
    w = registers[0].shape[0]
    words = np.empty((w, _GROUPS, len(registers), _THREADS), np.uint32)
    for index, register in enumerate(registers):
        words[:, :, index] = register.reshape(w, _GROUPS, _THREADS)
    return operand.decode(words).reshape(w, _GROUPS, -1)


def _add_and_round(product: F64, addend: U32, accumulator: _Accumulator) -> U32:
    """Registers of D, (registers, w, 32), from the products' sums and the registers of C."""
    result = np.empty_like(addend)
    # Whether the sum of products that are all -0 is -0 depends on the BLAS.
    product += 0.0
    np.add(
        _by_register(product, accumulator),
        _elements(addend, accumulator),
        out=_elements(result, accumulator),
        dtype=np.float64,
        casting="same_kind",
    )
    bits = result.view(accumulator.bits)
    np.putmask(bits, (bits & accumulator.nan) > accumulator.infinity, accumulator.nan)
    return result


def _elements(registers: U32, accumulator: _Accumulator) -> NDArray[Any]:
    """View registers of C as their elements: (2 row halves, 2 / p, w, 8, 4, p in a register)."""
    packed = accumulator.per_register
    shape = (2, 2 // packed, -1, _GROUPS, _THREADS, packed)
    return registers.view(accumulator.dtype).reshape(shape)


def _by_register(matrix: F64, accumulator: _Accumulator) -> F64:
    """View a matrix (w, 16, 8) in the order of `_elements`: rows 8i + g, columns 2t + e."""
    packed = accumulator.per_register
    split = matrix.reshape(-1, 2, _GROUPS, _THREADS, 2 // packed, packed)
    return split.transpose(1, 4, 0, 2, 3, 5)


def _magnitude(matrix: F64, smallest_normal: float) -> F64:
    """Absolute values, with subnormal ones, but not zeros, raised to the smallest normal."""
    size = np.abs(matrix)
    return np.where(size == 0, 0.0, np.maximum(size, smallest_normal))
