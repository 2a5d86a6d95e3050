"""Operands for element-wise instructions, and the comparison of their results with the oracle."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import ptxsim_oracle as oracle

from gqa_cutlass.ptxsim.element.arith import Arithmetic, lookup

Opcode = tuple[str, ...]
Case = tuple[int, ...]

COUNTS = [
    0,
    1,
    4,
    7,
    8,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    40,
    63,
    64,
    65,
    255,
    256,
    300,
    2**31,
    2**32 - 1,
]
# 1 to 4 operands: how many cases of edge values only, and how many in all.
MANY, FEW = (160, 260), (12, 16)


def name(opcode: Opcode) -> str:
    return ".".join(opcode)


def found(opcode: Opcode) -> Arithmetic:
    instruction = lookup(opcode)
    assert instruction is not None
    return instruction


def integer_edges(width: int) -> list[int]:
    top = 1 << width - 1
    values = [0, 1, 2, 3, top - 2, top - 1, top, top + 1, 2 * top - 2, 2 * top - 1]
    return values + [0x55 * (2 * top - 1) // 255, 0xFF, 0x80, 0x7F]


def float_edges(kind: str) -> list[int]:
    """Zeros, ends of the subnormal and normal ranges, one and its neighbours, infinity, NaNs."""
    exponent, fraction = oracle.FORMATS[kind]
    sign, least = 1 << exponent + fraction, 1 << fraction
    infinity, one = oracle.infinity(kind, False), oracle.infinity(kind, False) >> 1 & -least
    sizes = [0, 1, 2, least // 2, least - 1, least, least + 1, one - 1, one, one + 1]
    sizes += [one + least // 2, one + least, one + least * (fraction + 1) + 1, infinity - least]
    sizes += [
        infinity - 1,
        infinity,
        infinity + 1,
        infinity + least // 2,
        infinity + least // 2 + 5,
    ]
    return sizes + [size | sign for size in sizes]


@cache
def conversion_edges(kind: str) -> list[int]:
    """Numbers about the halves and the ends of the integer ranges and of the narrower formats."""
    marks = [Fraction(2) ** power for power in (-26, -25, -24, -15, -14, 7, 8, 15, 16, 24, 31, 32)]
    marks += [
        Fraction(2) ** power for power in (53, 63, 64, 127, 128, -126, -134, -133, -149, -150)
    ]
    marks += [Fraction(half, 2) for half in (1, 3, 5, 255, 511, 131039, 131040, 65535, 4294967295)]
    bits = [oracle.encode(mark, kind, "rn", negative_zero=False) for mark in marks]
    near = {abs(each + step) for each in bits for step in (-1, 0, 1)}
    return sorted(near | {each | 1 << oracle.WIDTH[kind] - 1 for each in near})


@cache
def byte_edges(kind: str) -> list[int]:
    """The f32 of every number of 8 bits, and those about the halves between neighbours."""
    sizes = [oracle.size_of_byte(code, kind) for code in range(0x7F)]
    numbers = [size for size in sizes if size is not None]
    numbers += [(a + b) / 2 for a, b in pairwise(numbers)] + [2 * numbers[-1] - numbers[-2]]
    bits = [oracle.encode(number, "f32", "rn", negative_zero=False) for number in numbers]
    near = {abs(each + step) for each in bits for step in (-1, 0, 1)}
    return sorted(near | {each | 1 << 31 for each in near})


def edges(opcode: Opcode, place: int, width: int) -> list[int]:
    """Return the interesting values of a source."""
    form = oracle.Form.of(opcode)
    if width == 1:
        return [0, 1]
    counted = {"bfe": 1, "bfi": 2, "shl": 1, "shr": 1, "shf": 2, "bmsk": 0, "szext": 1}
    if place >= counted.get(opcode[0], 9):
        return COUNTS
    if opcode[0] == "slct":
        kind = form.types[1 if place == 2 else 0]
    else:
        kind = form.types[-1]
    lane = kind.removesuffix("x2")
    if kind in oracle.BYTES:
        return [byte | (byte * 37 + 11 & 0xFF) << 8 for byte in range(256)]
    if lane not in oracle.FORMATS:
        return (
            [pair(value) for value in integer_edges(16)] if "x2" in kind else integer_edges(width)
        )
    values = float_edges(lane)
    if opcode[0] == "cvt":
        values = values + conversion_edges(lane)
        if form.types[0] in oracle.BYTES:
            values = values + byte_edges(form.types[0])
    return [pair(value) for value in values] if "x2" in kind else values


def pair(low: int) -> int:
    """Pack a half with another one, made from it."""
    return low | (low * 40503 + 1 & 0xFFFF) << 16


def cases(opcode: Opcode, amount: tuple[int, int]) -> list[Case]:
    """Return operands: every pair of edges if there are few, a sample of them, and random bits."""
    instruction, (some, total) = found(opcode), amount
    generator = random.Random(zlib.crc32(name(opcode).encode()))
    pools = [edges(opcode, place, width) for place, width in enumerate(instruction.sources)]
    if len(pools) == 1:
        chosen = [(value,) for value in pools[0]]
    else:
        chosen = [tuple(generator.choice(pool) for pool in pools) for _ in range(some)]
    while len(chosen) < total:
        random_bits = (generator.getrandbits(width) for width in instruction.sources)
        close = [
            bits if generator.random() < 0.7 else generator.choice(pool)
            for bits, pool in zip(random_bits, pools, strict=True)
        ]
        chosen.append(tuple(close))
    return chosen + traps(opcode, generator)


def traps(opcode: Opcode, generator: random.Random) -> list[Case]:
    """Return what a fused multiply and add gets wrong when it rounds twice.

    The product has one bit more than the format and ends in a one, so it lies halfway between two
    numbers; the addend is far too small to show, but decides.
    """
    form = oracle.Form.of(opcode)
    if opcode[0] not in ("fma", "mad", "add", "mul") or form.type not in oracle.FORMATS:
        return []
    exponent, fraction = oracle.FORMATS[form.type]
    shift = (1 << exponent - 1) - 2 + fraction
    found_traps: list[Case] = []
    while len(found_traps) < 30:
        left = generator.getrandbits(fraction // 2) * 2 + 1
        right = generator.getrandbits(fraction - fraction // 2) * 2 + 1
        if (left * right).bit_length() != fraction + 2:
            continue
        scale = generator.choice([0, 3, -shift // 2, -shift // 2 - 1, -(shift + fraction) // 2])
        other = generator.choice([0, scale, scale - 1, -shift - scale - 5])
        tiny = generator.choice([-shift, -shift + 3, scale + other - 40, scale + other - 60])
        terms = ((left, scale), (right, other), (generator.choice([1, -1]), tiny))
        numbers = [Fraction(size) * Fraction(2) ** power for size, power in terms]
        found_traps.append(encoded(numbers, form.type, len(found(opcode).sources)))
    return found_traps


def encoded(numbers: list[Fraction], kind: str, amount: int) -> Case:
    """Return the bits of the last numbers, as many as the instruction has sources."""
    last = numbers[-amount:]
    return tuple(oracle.encode(number, kind, "rn", negative_zero=False) for number in last)


def arrays(opcode: Opcode, rows: Iterable[Case]) -> list[np.ndarray]:
    columns = zip(*rows, strict=True)
    widths = found(opcode).sources
    return [np.array(column, dtype(width)) for column, width in zip(columns, widths, strict=True)]


def dtype(width: int) -> np.dtype:
    return np.dtype(bool) if width == 1 else np.dtype(f"u{width // 8}")


def execute(opcode: Opcode, sources: list[np.ndarray]) -> list[np.ndarray]:
    """Run and check what every instruction promises of its results."""
    instruction = found(opcode)
    before = [source.copy() for source in sources]
    with np.errstate(all="ignore"):
        results = instruction.run(*sources)
    assert isinstance(results, tuple) == (len(instruction.results) > 1)
    results = list(results) if isinstance(results, tuple) else [results]
    size = max(len(source) for source in sources)
    for result, width in zip(results, instruction.results, strict=True):
        assert result.shape == (size,) and result.dtype == dtype(width), name(opcode)
    assert all((source == old).all() for source, old in zip(sources, before, strict=True))
    return results


def compare(opcode: Opcode, rows: list[Case]) -> None:
    results = execute(opcode, immediate_table(opcode, arrays(opcode, rows)))
    for row, *got in zip(rows, *results, strict=True):
        expected = oracle.run(opcode, *row)
        shown = [hex(value) for value in row]
        assert tuple(map(int, got)) == tuple(map(int, expected)), (
            f"{name(opcode)} {shown}: {[hex(int(value)) for value in got]}, "
            f"expected {[hex(int(value)) for value in expected]}"
        )


def immediate_table(opcode: Opcode, sources: list[np.ndarray]) -> list[np.ndarray]:
    if opcode[0] == "lop3":
        sources[3] = sources[3][:1]
    return sources
