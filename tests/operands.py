"""Operands for instructions by the thousand: edges crossed, random bits, values that interact."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import ptxsim_cases
import ptxsim_oracle as oracle
from instructions import BLOCK, Array, Form, Opcode

from gqa_cutlass.ptxsim.element.arith import lookup

CROSSED = 4096  # tuples of edge values only
MIXED = 4096  # tuples of values of all sorts
_APPROXIMATED = 1 << 17  # of each sort, for an approximation of 32 or 64 bits
_COUNTED = {"bfe": 1, "bfi": 2, "shl": 1, "shr": 1, "shf": 2, "bmsk": 0, "szext": 1}


def operands(form: Form) -> list[Array]:
    """Return the input arrays of an element-wise instruction: all operands but the immediates."""
    found = lookup(form.opcode)
    assert found is not None
    key = _key(form.opcode)
    if len(found.sources) == 1 and ("approx" in form.opcode) and found.sources[0] > 16:
        return _approximated(key, found.sources[0])
    traps = _traps(key)
    arrays = _tuples(key, found.sources)
    if traps:
        columns = ptxsim_cases.arrays(form.opcode, traps)
        arrays = [np.concatenate(pair) for pair in zip(columns, arrays, strict=True)]
    kept = [array for place, array in enumerate(arrays) if place not in form.constants]
    return [_whole_blocks(array) for array in kept]


def _key(opcode: Opcode) -> Opcode:
    """Return mnemonic and types, on which interesting operands depend."""
    return (opcode[0], *oracle.Form.of(opcode).types)


def _whole_blocks(array: Array) -> Array:
    return np.resize(array, -(-len(array) // BLOCK) * BLOCK)


@cache
def _traps(key: Opcode) -> tuple[ptxsim_cases.Case, ...]:
    """Return what goes wrong when a multiply and add rounds twice, for scalar floating point."""
    rounded = (key[0], "rn", *key[1:])
    if key[0] not in ("fma", "mad", "add", "mul") or lookup(rounded) is None:
        return ()
    return tuple(ptxsim_cases.cases(rounded, (0, 0)))


@lru_cache(maxsize=64)
def _tuples(key: Opcode, widths: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(zlib.crc32(repr((key, widths)).encode()))
    if len(widths) == 1 and widths[0] <= 16:
        every = np.arange(1 << widths[0], dtype=np.uint64)
        return [np.resize(every, max(len(every), 2048)).astype(_memory(widths[0]))]
    pools = [
        np.array(ptxsim_cases.edges(key, place, width), np.uint64) & _ones(width)
        for place, width in enumerate(widths)
    ]
    crossed = _cross(pools, rng)
    mixed = _mix(key, widths, pools, rng)
    return [
        np.concatenate(pair).astype(_memory(width))
        for *pair, width in zip(crossed, mixed, widths, strict=True)
    ]


def _memory(width: int) -> np.dtype:
    """Return the dtype of an operand in memory: a predicate is a byte."""
    return np.dtype(f"u{max(width, 8) // 8}")


def _ones(width: int) -> np.uint64:
    return np.uint64((1 << width) - 1)


def _cross(pools: list[Array], rng: np.random.Generator) -> list[Array]:
    """Return every combination of edges, or a sample of them."""
    total = int(np.prod([len(pool) for pool in pools]))
    if total <= CROSSED:
        columns = np.array(list(itertools.product(*pools)), np.uint64).T
        return list(columns)
    return [rng.choice(pool, CROSSED) for pool in pools]


def _mix(
    key: Opcode, widths: tuple[int, ...], pools: list[Array], rng: np.random.Generator
) -> list[Array]:
    """Draw each operand from edges, random bits, moderate values, and neighbours of the first."""
    columns: list[Array] = []
    for place, (width, pool) in enumerate(zip(widths, pools, strict=True)):
        raw = rng.integers(0, 1 << 64, MIXED, np.uint64) & _ones(width)
        moderate = _moderate(_kind(key, place, width), width, rng, MIXED)
        near = (columns[0] if columns and widths[0] == width else raw) + rng.integers(
            0, 3, MIXED, np.uint64
        )
        near ^= rng.integers(0, 2, MIXED, np.uint64) << np.uint64(width - 1)
        sorts = np.stack([raw, moderate, near & _ones(width), rng.choice(pool, MIXED)])
        columns.append(sorts[rng.choice(4, MIXED, p=[0.35, 0.35, 0.1, 0.2]), np.arange(MIXED)])
    return columns


def _kind(key: Opcode, place: int, width: int) -> str:
    """Return the type by which an operand is drawn."""
    name, *types = key
    if width == 1 or place >= _COUNTED.get(name, 9):
        return "count"
    return types[0 if name == "slct" and place < 2 else -1]


def _moderate(kind: str, width: int, rng: np.random.Generator, amount: int) -> Array:
    """Draw numbers near one, which add up to something, small integers, or counts up to 40."""
    if kind == "count":
        return rng.integers(0, 2 if width == 1 else 41, amount, np.uint64)
    lane = kind.removesuffix("x2")
    if lane not in oracle.FORMATS:
        raw = rng.integers(0, 1 << 64, amount, np.uint64) & _ones(width)
        return raw >> rng.integers(0, width, amount, np.uint64)
    halves = [_near_one(lane, rng, amount) for _ in range(2 if "x2" in kind else 1)]
    return halves[0] if len(halves) == 1 else halves[0] | halves[1] << np.uint64(16)


def _near_one(kind: str, rng: np.random.Generator, amount: int) -> Array:
    exponent_bits, fraction_bits = oracle.FORMATS[kind]
    bias, reach = (1 << exponent_bits - 1) - 1, min(12, (1 << exponent_bits - 1) - 2)
    exponent = rng.integers(bias - reach, bias + reach + 1, amount, np.uint64)
    fraction = rng.integers(0, 1 << fraction_bits, amount, np.uint64)
    # Half of them with few bits, so that sums and products are often exact or ties.
    short = fraction >> np.uint64(fraction_bits // 2) << np.uint64(fraction_bits // 2)
    fraction = np.where(rng.random(amount) < 0.5, fraction, short)
    sign = rng.integers(0, 2, amount, np.uint64)
    return (sign << np.uint64(exponent_bits) | exponent) << np.uint64(fraction_bits) | fraction


def _angles(rng: np.random.Generator) -> Array:
    """Draw arguments of sin and cos, in both of the ranges that have a bound."""
    turns = np.concatenate([np.full(_APPROXIMATED, 2.0), np.full(_APPROXIMATED, 100.0)])
    values = turns * np.pi * rng.uniform(-1, 1, len(turns))
    return values.astype(np.float32).view(np.uint32).astype(np.uint64)


@lru_cache(maxsize=4)
def _approximated(key: Opcode, width: int) -> list[Array]:
    rng = np.random.default_rng(zlib.crc32(repr(key).encode()))
    kind = key[-1]
    pool = np.array(ptxsim_cases.edges(key, 0, width), np.uint64)
    if "x2" in kind:
        every = np.arange(1 << 16, dtype=np.uint64)
        return [_whole_blocks(every | rng.permutation(every) << np.uint64(16)).astype(np.uint32)]
    drawn: list[Callable[[], Array]] = [
        lambda: rng.integers(0, 1 << 64, _APPROXIMATED, np.uint64) & _ones(width),
        lambda: _moderate(kind, width, rng, _APPROXIMATED),
    ]
    if key[0] in ("sin", "cos"):
        drawn.append(lambda: _angles(rng))
    values = np.concatenate([pool, *(draw() for draw in drawn)])
    return [_whole_blocks(values).astype(_memory(width))]
