"""Matrix instructions of a warp, against matrices built element by element from the ISA's text."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from exact_matrices import (
    WARPS,
    Words,
    all_shapes,
    any_bits,
    decode,
    elements_a,
    elements_b,
    exact_elements,
    exponent_of,
    fragments,
    numbers,
    pack,
    result_bits,
    round_to,
    scalar_matrices,
    total,
)
from numpy.typing import NDArray
from warp_instructions import mma_of

from gqa_cutlass.ptxsim.warp.matrix import (
    Mma,
    collect,
    distribute,
    ldmatrix_rows,
    lookup_mma,
    mma_bound,
    movmatrix,
)


def check_rounded_exactly(mma: Mma, a: Words, b: Words, c: Words) -> None:
    """Require D to be the exact sum, rounded once, bit for bit."""
    before = [register.copy() for register in (*a, *b, *c)]
    d = mma.run(a, b, c)
    assert [len(words) for words in (a, b, c, d)] == [*mma.registers, mma.registers[2]]
    assert all(word.shape == (WARPS, 32) and word.dtype == np.uint32 for word in d)
    assert all(map(np.array_equal, before, (*a, *b, *c)))
    bits = result_bits(mma, d)
    for index, terms in exact_elements(mma, a, b, c):
        assert bits[index] == round_to(total(terms), mma.accumulator)


@all_shapes
def test_mma_rounds_the_exact_sum_once(opcode: tuple[str, ...]) -> None:
    mma = mma_of(opcode)
    check_rounded_exactly(mma, *fragments(mma, numbers(np.random.default_rng(1), -6, 7)))


@all_shapes
def test_mma_keeps_subnormals(opcode: tuple[str, ...]) -> None:
    """Of operands, of C and of D: products here are below the normal numbers of the result."""
    mma, rng = mma_of(opcode), np.random.default_rng(2)
    smallest = {"f16": -24, "bf16": -133, "tf32": -136, "f32": -149}

    def draw(kind: str, position: int) -> NDArray[np.uint32]:
        low = 0 if position == 1 else smallest[kind]
        return numbers(rng, low, low + 6)(kind, position)

    check_rounded_exactly(mma, *fragments(mma, draw))


@all_shapes
def test_mma_special_values(opcode: tuple[str, ...]) -> None:
    """Infinities, NaN with any payload, 0 * inf, inf - inf and overflow, one per row or so."""
    mma, rng = mma_of(opcode), np.random.default_rng(3)
    ordinary = numbers(rng, -2, 3)
    specials = pack(
        np.array([math.inf, -math.inf, 0.0, -0.0, math.nan, 6e4])[:, None].repeat(2, 1), mma.operand
    )

    def draw(kind: str, position: int) -> NDArray[np.uint32]:
        words = ordinary(kind, position)
        if position < 2:
            chosen = rng.random(words.shape) < 0.06
            words[chosen] = rng.choice(specials, words.shape)[chosen]
        return words

    a, b, c = fragments(mma, draw)
    c[0][0, ::3] = pack(np.full((11, 2), -math.inf), mma.accumulator)
    c[-1][1, ::5] = pack(np.full((7, 2), math.nan), mma.accumulator)
    check_rounded_exactly(mma, a, b, c)


@all_shapes
def test_mma_huge_cancellation(opcode: tuple[str, ...]) -> None:
    """Large products that cancel leave the small one, which single precision would lose."""
    mma = mma_of(opcode)
    # f16 reaches 65504 only; its square and one unit of the last place fit into 53 bits.
    large, small = (60000.0, 2.0**-4) if mma.operand == "f16" else (2.0**40, 2.0**-10)
    left = np.zeros((16, mma.k))
    left[:, 0], left[:, 1], left[:, -1] = large, -large, small
    right = np.ones((mma.k, 8))
    right[:2] = large if mma.accumulator == "f32" else 1.0
    a, b = to_fragments(mma, left, right)
    c = [np.zeros((WARPS, 32), np.uint32) for _ in range(mma.registers[2])]
    check_rounded_exactly(mma, a, b, c)
    assert (result_bits(mma, mma.run(a, b, c)) == round_to(Fraction(small), mma.accumulator)).all()


def to_fragments(mma: Mma, left: Any, right: Any) -> tuple[Words, Words]:
    """Registers that hold the same A and B in every warp."""
    sizes = 2 if mma.operand != "tf32" else 1
    fragments: list[Words] = []
    for matrix, places, count in zip(
        (left, right), (elements_a, elements_b), mma.registers, strict=False
    ):
        values = np.zeros((count, 32, 2))
        for lane in range(32):
            for i, place in enumerate(places(mma.k, mma.operand, lane)):
                values[i // sizes, lane, i % sizes] = matrix[place]
        fragments.append([pack(row[None].repeat(WARPS, 0), mma.operand) for row in values])
    return fragments[0], fragments[1]


@all_shapes
def test_mma_of_any_bits_is_near_the_exact_sum(opcode: tuple[str, ...]) -> None:
    """Exponents too wide for float64 cost at most k * 2**-53 of the magnitudes summed."""
    mma = mma_of(opcode)
    a, b, c = fragments(mma, any_bits(np.random.default_rng(4)))
    bits = result_bits(mma, mma.run(a, b, c))
    for index, terms in exact_elements(mma, a, b, c):
        wanted = total(terms)
        if isinstance(wanted, float):
            assert bits[index] == round_to(wanted, mma.accumulator)
            continue
        slack = sum(abs(term) for term in terms) * Fraction(mma.k, 2**53)
        low, high = (round_to(wanted + e, mma.accumulator) for e in (-slack, slack))
        values = [decode(word, mma.accumulator) for word in (low, int(bits[index]), high)]
        assert values[0] <= values[1] <= values[2]


@all_shapes
def test_mma_zero_is_positive(opcode: tuple[str, ...]) -> None:
    mma = mma_of(opcode)
    negative = pack(np.full((WARPS, 32, 2), -0.0), mma.operand)
    one = pack(np.ones((WARPS, 32, 2)), mma.operand)
    addend = pack(np.full((WARPS, 32, 2), -0.0), mma.accumulator)
    counts = mma.registers
    d = mma.run([negative] * counts[0], [one] * counts[1], [addend] * counts[2])
    assert not np.any(d)


@all_shapes
def test_mma_of_a_warp_does_not_depend_on_the_others(opcode: tuple[str, ...]) -> None:
    """Nor on how many there are: 600 warps are more than are multiplied at a time."""
    mma, rng = mma_of(opcode), np.random.default_rng(5)
    a, b, c = fragments(
        mma, lambda kind, position: rng.integers(0, 2**32, (600, 32), dtype=np.uint32)
    )
    together = mma.run(a, b, c)
    for warp in (0, 127, 128, 599):
        alone = mma.run(*([word[warp : warp + 1] for word in words] for words in (a, b, c)))
        assert all(
            np.array_equal(word[warp], one[0]) for word, one in zip(together, alone, strict=True)
        )


@all_shapes
def test_mma_matrices_follow_the_fragment_layout(opcode: tuple[str, ...]) -> None:
    mma = mma_of(opcode)
    a, b, c = fragments(mma, numbers(np.random.default_rng(6), -6, 7))
    assembled = mma.matrices(a, b, c)
    for warp in range(WARPS):
        for matrix, wanted in zip(assembled, scalar_matrices(mma, a, b, c, warp), strict=True):
            assert all(matrix[(warp, *place)] == value for place, value in wanted.items())


@pytest.mark.parametrize(
    "opcode",
    [
        "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f16",
        "mma.sync.aligned.m16n8k16.row.col.f32.tf32.tf32.f32",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    ],
)
def test_lookup_of_an_unknown_instruction(opcode: str) -> None:
    assert lookup_mma(tuple(opcode.split("."))) is None


def tensor_core(mma: Mma, terms: list[Fraction], exponents: list[int], model: Any) -> int:
    """D's bits as a tensor core computes it: arXiv:2511.10909, truncated fused dot product.

    `terms` and `exponents` are those of the products and, last, of C; `model` is the number of
    fraction bits kept, the number of steps and how a term is truncated.
    """
    fraction_bits, steps, truncate = model
    smallest = -14 if mma.accumulator == "f16" else -126
    rounding = round if mma.accumulator == "f16" else math.trunc
    partial, exponent = terms[-1], exponents[-1]
    size = mma.k // steps
    bits = 0
    for start in range(0, mma.k, size):
        summands = [*terms[start : start + size], partial]
        aligned = [*exponents[start : start + size], exponent]
        highest = max((e for e, s in zip(aligned, summands, strict=True) if s), default=-126)
        unit = Fraction(2) ** (highest - fraction_bits)
        sum_ = sum((truncate(summand / unit) * unit for summand in summands), Fraction(0))
        bits = round_to(sum_, mma.accumulator, rounding)
        value = decode(bits, mma.accumulator)
        assert isinstance(value, Fraction)
        partial, exponent = value, exponent_of(value, smallest)
    return bits


MODELS = {
    "sm_90": (25, 1, math.trunc),
    "sm_80": (24, 2, math.trunc),
    "sm_80-downwards": (24, 2, math.floor),
}


# Exponents of A, B and C, from and to.
SPREADS = {
    "near": [(-3, 3)] * 3,
    "wide": [(-12, 3)] * 3,
    "small": [(-24, -10)] * 3,
    "subnormal": [(-24, -22), (-8, -4), (-34, -30)],
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
@all_shapes
def test_mma_bound_holds_for_models_of_tensor_cores(
    opcode: tuple[str, ...], spread: list[tuple[int, int]], model: Any
) -> None:
    mma, rng = mma_of(opcode), np.random.default_rng(7)
    a, b, c = fragments(mma, lambda kind, at: numbers(rng, *spread[at])(kind, at))
    bound = mma_bound(*mma.matrices(a, b, c), operand=mma.operand, accumulator=mma.accumulator)
    smallest = {"f16": -14, "bf16": -126, "tf32": -126, "f32": -126}
    left, right, addend = scalar_matrices(mma, a, b, c, 0)
    for row, column in product(range(16), range(8)):
        pairs = [(left[row, n], right[n, column]) for n in range(mma.k)]
        exponents = [sum(exponent_of(x, smallest[mma.operand]) for x in pair) for pair in pairs]
        last = addend[row, column]
        exponents.append(exponent_of(last, smallest[mma.accumulator]))
        terms = [x * y for x, y in pairs] + [last]
        got = decode(tensor_core(mma, terms, exponents, model), mma.accumulator)
        assert abs(got - sum(terms)) <= Fraction(float(bound[0, row, column]))


def test_mma_bound_is_a_few_units_of_the_magnitudes() -> None:
    ones = np.ones((1, 16, 16)), np.ones((1, 16, 8)), np.zeros((1, 16, 8))
    assert np.allclose(mma_bound(*ones), 20 * 16 * 2.0**-24, rtol=2e-3)
    assert np.allclose(mma_bound(*ones, accumulator="f16"), 16 * 2.0**-10, rtol=4e-3)


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38])
def test_mma_bound_of_an_overflow_is_infinite(value: float) -> None:
    a, b = np.full((1, 16, 8), value), np.ones((1, 8, 8))
    c = np.zeros((1, 16, 8))
    assert np.isinf(mma_bound(a, b, c, operand="bf16")).all()


def bytes_of(row: NDArray[np.uint32]) -> NDArray[np.uint16]:
    return np.array([word >> 16 * half & 0xFFFF for word in row for half in (0, 1)], np.uint16)


@pytest.mark.parametrize("transposed", [False, True], ids=["normal", "trans"])
@pytest.mark.parametrize("num", [1, 2, 4])
def test_distribute_gives_each_lane_two_neighbours_of_a_row(num: int, transposed: bool) -> None:
    rng = np.random.default_rng(8)
    rows = rng.integers(0, 2**32, (WARPS, num, 8, 4), dtype=np.uint32)
    before = rows.copy()
    registers = distribute(rows, num, transposed)
    assert len(registers) == num
    assert np.array_equal(rows, before)
    assert not any(np.shares_memory(rows, register) for register in registers)
    for warp, m, lane in product(range(WARPS), range(num), range(32)):
        matrix = np.array([bytes_of(row) for row in rows[warp, m]])
        if transposed:
            matrix = matrix.T
        low, high = (int(matrix[lane // 4, 2 * (lane % 4) + i]) for i in (0, 1))
        assert registers[m][warp, lane] == low | high << 16


@pytest.mark.parametrize("transposed", [False, True], ids=["normal", "trans"])
@pytest.mark.parametrize("num", [1, 2, 4])
def test_collect_undoes_distribute(num: int, transposed: bool) -> None:
    rng = np.random.default_rng(9)
    rows = rng.integers(0, 2**32, (WARPS, num, 8, 4), dtype=np.uint32)
    back = collect(distribute(rows, num, transposed), num, transposed)
    assert back.dtype == np.uint32
    assert np.array_equal(back, rows)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_row_addresses_come_from_the_lanes_in_order(num: int) -> None:
    """Threads 0-7 address the first matrix, 8-15 the second, and so on."""
    lanes = ldmatrix_rows(num)
    assert lanes.shape == (num, 8)
    assert lanes.ravel().tolist() == list(range(8 * num))


def test_movmatrix_transposes() -> None:
    value = np.random.default_rng(10).integers(0, 2**32, (WARPS, 32), dtype=np.uint32)
    result = movmatrix(value)
    for warp in range(WARPS):
        matrix: dict[tuple[int, int], int] = {}
        for lane, half in product(range(32), (0, 1)):
            matrix[lane // 4, 2 * (lane % 4) + half] = int(value[warp, lane]) >> 16 * half & 0xFFFF
        for lane, half in product(range(32), (0, 1)):
            got = int(result[warp, lane]) >> 16 * half & 0xFFFF
            assert got == matrix[2 * (lane % 4) + half, lane // 4]
    assert np.array_equal(movmatrix(result), value)
