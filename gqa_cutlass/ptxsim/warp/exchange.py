"""Warp-level exchange of PTX: shfl, vote, match, redux and elect on arrays of (warps, 32 lanes).

Operands that are the same for all threads may have the shape (1, 1). A source counts when its lane
is active and in the membermask of the lane that reads; lanes of a warp may have different masks.
Results of inactive lanes mean nothing, and no result shares memory with an operand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bool: TypeAlias = NDArray[np.bool_]
Lane: TypeAlias = NDArray[np.int8]
Index: TypeAlias = NDArray[np.int64]
U32: TypeAlias = NDArray[np.uint32]

_LANES = 32
_LANE: Lane = np.arange(_LANES, dtype=np.int8)[None, :]
_LANE_U32: U32 = np.arange(_LANES, dtype=np.uint32)

# Source lane from (offset, segment mask); PTX ISA, "shfl.sync", Semantics.
_SOURCES: dict[str, Callable[[Lane, Lane], Lane]] = {
    "up": lambda offset, segment: _LANE - offset,
    "down": lambda offset, segment: _LANE + offset,
    "bfly": lambda offset, segment: _LANE ^ offset,
    "idx": lambda offset, segment: (_LANE & segment) | (offset & ~segment),
}

# Result from (the members that vote true, the members), both as lane masks.
_VOTES: dict[str, Callable[[U32, U32], NDArray[Any]]] = {
    "all": lambda votes, members: votes == members,
    "any": lambda votes, members: votes != 0,
    "uni": lambda votes, members: (votes == members) | (votes == 0),
    "ballot": lambda votes, members: votes,
}

# Reduction, type in which it is done, and the value that changes nothing.
REDUCTIONS: dict[tuple[str, str], tuple[np.ufunc, type[np.generic], int]] = {
    ("add", "u32"): (np.add, np.uint32, 0),
    ("add", "s32"): (np.add, np.uint32, 0),
    ("min", "u32"): (np.minimum, np.uint32, 2**32 - 1),
    ("min", "s32"): (np.minimum, np.int32, 2**31 - 1),
    ("max", "u32"): (np.maximum, np.uint32, 0),
    ("max", "s32"): (np.maximum, np.int32, -(2**31)),
    ("and", "b32"): (np.bitwise_and, np.uint32, 2**32 - 1),
    ("or", "b32"): (np.bitwise_or, np.uint32, 0),
    ("xor", "b32"): (np.bitwise_xor, np.uint32, 0),
}


def shfl(mode: str, value: U32, lane: U32, clamp: U32, active: Bool) -> tuple[U32, Bool, Bool]:
    """Read another lane's register: `shfl.sync.mode.b32` (PTX ISA, "shfl.sync").

    Args:
        mode: "up", "down", "bfly" or "idx".
        value: Operand a, (w, 32).
        lane: Operand b, source lane or offset, of which the low five bits count, (w, 32) or (1, 1).
        clamp: Operand c, clamp in bits 0-4 and segment mask in bits 8-12, (w, 32) or (1, 1).
        active: Lanes that execute, (w, 32).

    Returns:
        The values read (the lane's own where the source is out of range), whether the source was
        in range, and which active lanes read from an inactive one, each (w, 32).

    Raises:
        KeyError: The mode is not one of the four.
    """
    if lane.size == 1 and clamp.size == 1:
        # Immediates in nearly all compiled code: one row of lanes serves every warp.
        source, in_range = _uniform_sources(mode, lane.item() & 0x1F, clamp.item() & 0x1F1F)
        result, present = value.take(source, axis=1), active.take(source, axis=1)
    else:
        sources, in_range = _sources(mode, lane, clamp)
        flat = sources + np.arange(0, value.size, _LANES)[:, None]
        result, present = value.take(flat), active.take(flat)
    return result, _spread(in_range, active), active & ~present


def vote(mode: str, predicate: Bool, membermask: U32, active: Bool) -> Bool | U32:
    """Combine a predicate over the members: `vote.sync` (PTX ISA, "vote.sync").

    Args:
        mode: "all", "any", "uni" or "ballot".
        predicate: Operand a, (w, 32) or (1, 1).
        membermask: Participating lanes, (w, 32) or (1, 1).
        active: Lanes that execute, (w, 32).

    Returns:
        (w, 32): bool, or for "ballot" the uint32 mask of the members whose predicate is true.

    Raises:
        KeyError: The mode is not one of the four.
    """
    members = _lane_mask(active) & membermask
    return _spread(_VOTES[mode](_lane_mask(predicate & active) & members, members), active)


def match(mode: str, value: NDArray[Any], membermask: U32, active: Bool) -> tuple[U32, Bool]:
    """Find the members that hold the same value: `match.sync` (PTX ISA, "match.sync").

    Args:
        mode: "any" or "all".
        value: Operand a, uint32 or uint64, (w, 32).
        membermask: Participating lanes, (w, 32) or (1, 1).
        active: Lanes that execute, (w, 32).

    Returns:
        For "any" the mask of the members with the lane's value; for "all" the mask of the members
        if all are equal, else 0. Then, for both, whether all are equal. Each (w, 32).

    Raises:
        KeyError: The mode is neither of the two.
    """
    equal = (value[:, :, None] == value[:, None, :]) & active[:, None, :]
    members = _lane_mask(active) & membermask
    same = _lane_mask(equal)[..., 0] & members
    unanimous = same == members
    masks = {"any": same, "all": np.where(unanimous, members, np.uint32(0))}
    return masks[mode], unanimous


def redux(op: str, dtype: str, value: U32, membermask: U32, active: Bool) -> U32:
    """Reduce a register over the members: `redux.sync.op.dtype` (PTX ISA, "redux.sync").

    Args:
        op: "add", "min" or "max" (u32, s32), or "and", "or", "xor" (b32).
        dtype: "u32", "s32" or "b32".
        value: Operand src, (w, 32).
        membermask: Participating lanes, (w, 32) or (1, 1).
        active: Lanes that execute, (w, 32).

    Returns:
        The reduction, modulo 2**32, (w, 32).

    Raises:
        KeyError: The instruction set has no such operation on the type.
    """
    ufunc, kind, identity = REDUCTIONS[op, dtype]
    # (reading warp, reading lane, source lane); a common mask keeps the middle axis at one.
    members = ((membermask[:, :, None] >> _LANE_U32) & 1).astype(np.bool_) & active[:, None, :]
    terms = np.where(members, value.view(kind)[:, None, :], np.array(identity, kind))
    return _spread(ufunc.reduce(terms, axis=2, dtype=kind).view(np.uint32), active)


def elect(membermask: U32, active: Bool) -> tuple[U32, Bool]:
    """Elect one lane among the members: `elect.sync` (PTX ISA, "elect.sync").

    The ISA asks only that a membermask always elects the same lane; this is the lowest.

    Args:
        membermask: Lanes from which to elect, (w, 32) or (1, 1).
        active: Lanes that execute, (w, 32).

    Returns:
        The leader's lane and whether the lane is the leader, each (w, 32).
    """
    members = _lane_mask(active) & membermask
    below_lowest = ~members & (members - np.uint32(1))
    leader = _spread(np.bitwise_count(below_lowest).astype(np.uint32), active)
    return leader, (leader == _LANE_U32) & active


def _sources(mode: str, lane: U32, clamp: U32) -> tuple[Lane, Bool]:
    """Source lane and range check of each lane, from operands b and c of shfl."""
    # Of operands of the narrowest type, which the whole (w, 32) computation then stays in.
    offset = lane.astype(np.int8) & 0x1F
    bound = clamp.astype(np.int8) & 0x1F
    segment = (clamp >> 8).astype(np.int8) & 0x1F
    limit = (_LANE & segment) | (bound & ~segment)
    source = _SOURCES[mode](offset, segment)
    in_range = source >= limit if mode == "up" else source <= limit
    return np.where(in_range, source, _LANE), in_range


@lru_cache(maxsize=4096)
def _uniform_sources(mode: str, lane: int, clamp: int) -> tuple[Index, Bool]:
    """Source lanes, (32,), and range check, (1, 32), of operands common to all lanes."""
    source, in_range = _sources(mode, np.array([[lane]], np.uint32), np.array([[clamp]], np.uint32))
    return source[0].astype(np.int64), in_range


def _lane_mask(flags: Bool) -> U32:
    """Pack the last axis, of 32 lanes, into one lane mask: (..., 32) to (..., 1)."""
    return np.packbits(flags, axis=-1, bitorder="little").view(np.uint32)


def _spread(values: NDArray[Any], active: Bool) -> NDArray[Any]:
    """Give every lane its own copy of values that lanes or warps share."""
    return np.broadcast_to(values, active.shape).copy()
