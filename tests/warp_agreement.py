"""As `agreement`, for the instructions of a warp."""

from __future__ import annotations

import numpy as np
from agreement import Verdict
from instructions import Array, Form
from warp_instructions import WARP, executing, mma_of, split
from warp_operands import MMA_SORTS, MMA_WARPS, shfl_source_takes_part

from gqa_cutlass.ptxsim.warp.matrix import mma_bound

_TYPES = {"f32": np.float32, "f16": np.float16}


def defined(form: Form, sources: list[Array]) -> Array:
    """Tell for which threads PTX defines the results to the bit, (n,).

    Lanes that do not execute have no result. shfl gives an undefined value to a lane that reads one
    that does not take part. elect may choose any member.
    """
    head = form.opcode[0]
    if head == "shfl":
        return shfl_source_takes_part(form, sources).reshape(-1)
    if head == "elect":
        return np.zeros(len(sources[0]), np.bool_)
    if head in ("vote", "match", "redux"):
        return executing(sources[-1]).reshape(-1)
    return np.ones(len(sources[0]), np.bool_)


def judge_exact(got: Array, expected: Array, where: Array) -> Verdict:
    """Demand equal bits for the threads where results are defined."""
    equal, nothing = got == expected, np.zeros(got.shape)
    binding = np.broadcast_to(where.reshape(-1, *[1] * (got.ndim - 1)), got.shape)
    return Verdict(equal=equal, open=~binding, wrong=~equal & binding, steps=nothing, share=nothing)


def election_is_wrong(mask: Array, leader: Array, elected: Array) -> Array:
    """Tell for which threads there is not one leader, a member, that all members agree on, (n,)."""
    active, leader = executing(mask), leader.reshape(-1, WARP)
    first = active.argmax(axis=1)[:, None]
    common = np.take_along_axis(leader, first, axis=1)
    is_leader = np.arange(WARP) == common
    member = np.take_along_axis(active, common.astype(np.int64) % WARP, axis=1)
    alike = (leader == common) & (elected.reshape(-1, WARP) == is_leader)
    return (active & ~(alike & member)).reshape(-1)


def judge_mma(form: Form, sources: list[Array], got: list[Array], expected: list[Array]) -> Verdict:
    """Compare the elements of D, each (w, 16, 8).

    Open is what may overflow on the way. Where an operand is infinite or no number, so must be the
    result; the payload of a NaN is open.
    """
    mma, (a, b, c) = mma_of(form.opcode), split(form.opcode, sources)
    dtype = _TYPES[mma.accumulator]
    with np.errstate(all="ignore"):
        left, right, addend = mma.matrices(a, b, c)
        whole = [[register.reshape(-1, WARP) for register in d] for d in (got, expected)]
        ours, theirs = (mma.matrices(a, b, d)[2] for d in whole)
        finite = np.isfinite(np.abs(left) @ np.abs(right) + np.abs(addend))
        tamed = [np.where(np.isfinite(part), part, 0.0) for part in (left, right, addend)]
        bound = mma_bound(*tamed, operand=mma.operand, accumulator=mma.accumulator)
        spacing = np.spacing(np.abs(theirs).astype(dtype)).astype(np.float64)
        allowed = bound + spacing / 2
        difference = np.abs(ours - theirs)
    nan = np.isnan(ours) & np.isnan(theirs)
    same = nan | (ours == theirs)
    overflows = np.isinf(bound)
    integers = _sort_of("integers", len(ours))
    fits = finite & (difference <= allowed) & ~integers
    equal = same & (nan | (np.signbit(ours) == np.signbit(theirs)))
    compared = finite & ~overflows
    return Verdict(
        equal=equal,
        open=overflows | nan,
        wrong=~(same | fits | overflows),
        steps=np.where(compared, difference / spacing, 0.0),
        share=np.where(compared, difference / allowed, 0.0),
    )


def _sort_of(name: str, warps: int) -> Array:
    """Tell which warps hold a sort of operands, to broadcast over (w, 16, 8)."""
    first = list(MMA_SORTS).index(name) * MMA_WARPS
    places = np.arange(warps)
    return ((places >= first) & (places < first + MMA_WARPS))[:, None, None]
