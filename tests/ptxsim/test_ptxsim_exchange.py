"""Exchange between the lanes of a warp, against the PTX ISA's text executed lane by lane."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.warp.exchange import elect, match, redux, shfl, vote

WARPS = 5
FULL = np.array([[0xFFFFFFFF]], np.uint32)
# Segments of 32, 16, 8 and 2 lanes as a C compiler packs them (clamp to the last lane, and for up
# to the first), a clamp inside the segment, and bits set that the instruction ignores.
CLAMPS = [0x1F, 0x00, 0x101F, 0x1000, 0x181F, 0x1800, 0x1E1F, 0x1805, 0x0A13, 0xFFFFE0E0]
OFFSETS = [0, 1, 4, 7, 8, 16, 31, 32, 33, 0xFFFFFFFF]
MASKS = ["full", "sparse", "halves"]


def words(rng: np.random.Generator, high: int = 2**32) -> NDArray[np.uint32]:
    return rng.integers(0, high, (WARPS, 32), dtype=np.uint32)


def flags(rng: np.random.Generator, share: float) -> NDArray[np.bool_]:
    return rng.random((WARPS, 32)) < share


def bit(mask: int, lane: int) -> bool:
    return bool(mask >> lane & 1)


def membership(name: str, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """A membermask and the lanes that execute with it, some of them named by no mask."""
    if name == "full":
        return FULL, np.ones((WARPS, 32), bool)
    if name == "sparse":
        active = flags(rng, 0.6)
        mask = [sum(1 << lane for lane in np.flatnonzero(row)) for row in active]
        return np.array(mask, np.uint32)[:, None].repeat(32, 1), active
    lanes = np.arange(32) >= 16
    return np.where(lanes, 0xFFFF0000, 0xFFFF).astype(np.uint32)[None].repeat(WARPS, 0), np.ones(
        (WARPS, 32), bool
    )


def members(membermask: NDArray[Any], active: NDArray[Any], warp: int, lane: int) -> list[int]:
    mask = int(np.broadcast_to(membermask, active.shape)[warp, lane])
    return [other for other in range(32) if bit(mask, other) and active[warp, other]]


def scalar_shfl(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and predicate of one lane: the pseudocode of the PTX ISA, "shfl.sync"."""
    bval, cval, mask = b & 0x1F, c & 0x1F, c >> 8 & 0x1F
    max_lane = (lane & mask) | (cval & ~mask & 0x1F)
    min_lane = lane & mask
    if mode == "up":
        source = lane - bval
        in_range = source >= max_lane
    elif mode == "down":
        source = lane + bval
        in_range = source <= max_lane
    elif mode == "bfly":
        source = lane ^ bval
        in_range = source <= max_lane
    else:
        source = min_lane | (bval & ~mask & 0x1F)
        in_range = source <= max_lane
    return (source if in_range else lane), in_range


def check_shfl(mode: str, b: NDArray[Any], c: NDArray[Any], active: NDArray[Any]) -> None:
    value = words(np.random.default_rng(1))
    before = value.copy(), b.copy(), c.copy(), active.copy()
    result, in_range, from_inactive = shfl(mode, value, b, c, active)
    for old, new in zip(before, (value, b, c, active), strict=True):
        assert np.array_equal(old, new)
    assert result.dtype == np.uint32
    b, c = np.broadcast_to(b, active.shape), np.broadcast_to(c, active.shape)
    for warp, lane in np.ndindex(active.shape):
        source, valid = scalar_shfl(mode, lane, int(b[warp, lane]), int(c[warp, lane]))
        assert result[warp, lane] == value[warp, source]
        assert in_range[warp, lane] == valid
        assert from_inactive[warp, lane] == (active[warp, lane] and not active[warp, source])


@pytest.mark.parametrize("clamp", CLAMPS, ids=hex)
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl_with_common_operands(mode: str, clamp: int) -> None:
    active = flags(np.random.default_rng(2), 0.8)
    for offset in OFFSETS:
        check_shfl(mode, np.array([[offset]], np.uint32), np.array([[clamp]], np.uint32), active)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl_with_operands_of_each_lane(mode: str) -> None:
    rng = np.random.default_rng(3)
    everyone = np.ones((WARPS, 32), bool)
    check_shfl(mode, words(rng), words(rng), everyone)
    check_shfl(mode, words(rng, 32), np.array([[0x181F]], np.uint32), flags(rng, 0.5))
    check_shfl(mode, np.array([[3]], np.uint32), words(rng, 0x2000), everyone)
    check_shfl(mode, words(rng, 40)[:, :1], np.array([[0x101F]], np.uint32), everyone)


def test_shfl_results_are_the_callers_own() -> None:
    """What the caller writes into a result reaches neither the operands nor a later call."""
    value, active = words(np.random.default_rng(4)), np.ones((WARPS, 32), bool)
    operands = value, np.array([[1]], np.uint32), np.array([[0x1F]], np.uint32), active
    first = shfl("bfly", *operands)
    expected = [array.copy() for array in first]
    for array in first:
        array[...] = 0
    for array, wanted in zip(shfl("bfly", *operands), expected, strict=True):
        assert np.array_equal(array, wanted)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_vote(mask: str, share: float) -> None:
    rng = np.random.default_rng(5)
    membermask, active = membership(mask, rng)
    predicate = flags(rng, share)
    results = {
        mode: vote(mode, predicate, membermask, active) for mode in ("all", "any", "uni", "ballot")
    }
    assert results["ballot"].dtype == np.uint32
    assert results["all"].dtype == np.bool_
    for warp, lane in zip(*np.nonzero(active), strict=True):
        votes = {n: bool(predicate[warp, n]) for n in members(membermask, active, warp, lane)}
        assert results["all"][warp, lane] == all(votes.values())
        assert results["any"][warp, lane] == any(votes.values())
        assert results["uni"][warp, lane] == (len(set(votes.values())) == 1)
        assert results["ballot"][warp, lane] == sum(1 << n for n, true in votes.items() if true)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("distinct", [1, 2, 20])
def test_match(mask: str, dtype: type[Any], distinct: int) -> None:
    rng = np.random.default_rng(6)
    membermask, active = membership(mask, rng)
    value = rng.integers(0, distinct, (WARPS, 32)).astype(dtype)
    value <<= dtype(np.dtype(dtype).itemsize * 8 - 5)  # differ in the highest bits only
    same, unanimous = match("any", value, membermask, active)
    every, predicate = match("all", value, membermask, active)
    assert same.dtype == every.dtype == np.uint32
    for warp, lane in zip(*np.nonzero(active), strict=True):
        group = members(membermask, active, warp, lane)
        equal = [n for n in group if value[warp, n] == value[warp, lane]]
        assert same[warp, lane] == sum(1 << n for n in equal)
        assert predicate[warp, lane] == unanimous[warp, lane] == (equal == group)
        assert every[warp, lane] == (sum(1 << n for n in group) if equal == group else 0)


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


REDUCTIONS: dict[tuple[str, str], Callable[[int, int], int]] = {
    ("add", "u32"): lambda x, y: x + y,
    ("add", "s32"): lambda x, y: x + y,
    ("min", "u32"): min,
    ("max", "u32"): max,
    ("min", "s32"): lambda x, y: min(x, y, key=signed),
    ("max", "s32"): lambda x, y: max(x, y, key=signed),
    ("and", "b32"): lambda x, y: x & y,
    ("or", "b32"): lambda x, y: x | y,
    ("xor", "b32"): lambda x, y: x ^ y,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("op", "dtype"), REDUCTIONS)
def test_redux(op: str, dtype: str, mask: str) -> None:
    rng = np.random.default_rng(7)
    membermask, active = membership(mask, rng)
    value = words(rng)
    value[0] = 0xFFFFFFFF
    value[1] = rng.choice(np.array([0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32), 32)
    result = redux(op, dtype, value, membermask, active)
    assert result.dtype == np.uint32
    for warp, lane in zip(*np.nonzero(active), strict=True):
        terms = [int(value[warp, n]) for n in members(membermask, active, warp, lane)]
        assert result[warp, lane] == reduce(REDUCTIONS[op, dtype], terms) % 2**32


@pytest.mark.parametrize(("op", "dtype"), [("add", "b32"), ("min", "f32"), ("and", "u32")])
def test_redux_knows_only_the_operations_of_the_isa(op: str, dtype: str) -> None:
    with pytest.raises(KeyError):
        redux(op, dtype, np.zeros((1, 32), np.uint32), FULL, np.ones((1, 32), bool))


@pytest.mark.parametrize("mask", MASKS)
def test_elect_chooses_the_lowest_member(mask: str) -> None:
    membermask, active = membership(mask, np.random.default_rng(8))
    leader, is_leader = elect(membermask, active)
    assert leader.dtype == np.uint32
    assert not is_leader[~active].any()
    for warp, lane in zip(*np.nonzero(active), strict=True):
        lowest = min(members(membermask, active, warp, lane))
        assert leader[warp, lane] == lowest
        assert is_leader[warp, lane] == (lane == lowest)


@pytest.mark.parametrize("lane", [0, 15, 31])
def test_elect_among_one(lane: int) -> None:
    active = np.arange(32)[None] == lane
    leader, is_leader = elect(FULL, active)
    assert leader[0, lane] == lane
    assert np.array_equal(is_leader, active)
