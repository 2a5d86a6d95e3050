"""Threads that write a word and read another's, and the ways to order the two with a flag."""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx_kernels import run_ptx

TILE = ".shared .align 16 .b8 tile[1024];"
# Every thread writes its number into the word %r9 of its own and reads the word %r8 of another.
OWN = "mov.u32 %r9, tile; shl.b32 %r1, %t, 2; add.u32 %r9, %r9, %r1;"
OTHER = "xor.b32 %r8, %t, {}; shl.b32 %r8, %r8, 2; mov.u32 %r2, tile; add.u32 %r8, %r8, %r2;"
WRITE, READ = "st.shared.u32 [%r9], %t;", "ld.shared.u32 %r3, [%r8]; st.global.u32 [%out_g], %r3;"
NEIGHBOUR, OTHER_WARP = OWN + OTHER.format(1), OWN + OTHER.format(32)
LEADER = "setp.ne.u32 %p1, %t, 0; @%p1 bra {0};"


def run(body: str, block: int = 64, **more: Any) -> list[int]:
    """What every thread stores into `out`."""
    out = np.zeros(1024, np.uint32)
    run_ptx(body, block=block, declare=TILE, out=out, **more)
    values: list[int] = out[:block].tolist()
    return values


FLAG = """
    setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [tile], 0; @%p1 st.shared.u32 [tile+4], 0;
    bar.sync 0;
    setp.eq.u32 %p2, %t, 32; @%p1 bra SEND; @%p2 bra RECEIVE; bra END;
    SEND: st.shared.u32 [tile+4], 7; {send} bra END;
    RECEIVE: {receive} setp.eq.u32 %p3, %r4, 0; @%p3 bra RECEIVE; {after}
    ld.shared.u32 %r3, [tile+4]; st.global.u32 [%out], %r3; END:
"""
ORDERED = {
    "release, acquire": (
        "st.release.cta.shared.u32 [tile], 1;",
        "ld.acquire.cta.shared.u32 %r4, [tile];",
        "",
    ),
    "atomics": (
        "atom.release.cta.shared.exch.b32 %r5, [tile], 1;",
        "atom.acquire.cta.shared.or.b32 %r4, [tile], 0;",
        "",
    ),
    "acq_rel atomics": (
        "red.release.cta.shared.add.u32 [tile], 1;",
        "atom.acq_rel.cta.shared.cas.b32 %r4, [tile], 1, 1;",
        "",
    ),
    "fences": (
        "fence.acq_rel.cta; st.relaxed.cta.shared.u32 [tile], 1;",
        "ld.relaxed.cta.shared.u32 %r4, [tile];",
        "fence.acq_rel.cta;",
    ),
    "membar and volatile": (
        "membar.cta; st.volatile.shared.u32 [tile], 1;",
        "ld.volatile.shared.u32 %r4, [tile];",
        "membar.cta;",
    ),
    "a comparison that holds": (
        "atom.release.cta.shared.cas.b32 %r5, [tile], 0, 1;",
        "ld.acquire.cta.shared.u32 %r4, [tile];",
        "",
    ),
    "fence and acquire": (
        "fence.sc.gpu; red.relaxed.cta.shared.add.u32 [tile], 1;",
        "ld.acquire.cta.shared.u32 %r4, [tile];",
        "",
    ),
}
NOT_ORDERED = {
    "a comparison that fails": (
        "st.relaxed.cta.shared.u32 [tile], 1; atom.release.cta.shared.cas.b32 %r5, [tile], 9, 2;",
        "ld.acquire.cta.shared.u32 %r4, [tile];",
        "",
    ),
    "atomic without acquire": (
        "atom.release.cta.shared.exch.b32 %r5, [tile], 1;",
        "atom.relaxed.cta.shared.or.b32 %r4, [tile], 0;",
        "",
    ),
    "atomic without release": (
        "atom.acquire.cta.shared.exch.b32 %r5, [tile], 1;",
        "atom.acq_rel.cta.shared.or.b32 %r4, [tile], 0;",
        "",
    ),
    "relaxed": (
        "st.relaxed.cta.shared.u32 [tile], 1;",
        "ld.relaxed.cta.shared.u32 %r4, [tile];",
        "",
    ),
    "relaxed atomics": (
        "atom.shared.exch.b32 %r5, [tile], 1;",
        "atom.shared.or.b32 %r4, [tile], 0;",
        "",
    ),
    "no acquire": (
        "st.release.cta.shared.u32 [tile], 1;",
        "ld.relaxed.cta.shared.u32 %r4, [tile];",
        "",
    ),
    "no release": (
        "st.relaxed.cta.shared.u32 [tile], 1;",
        "ld.acquire.cta.shared.u32 %r4, [tile];",
        "",
    ),
    "no second fence": (
        "fence.acq_rel.cta; st.relaxed.cta.shared.u32 [tile], 1;",
        "ld.relaxed.cta.shared.u32 %r4, [tile];",
        "",
    ),
    "fence too late": (
        "st.relaxed.cta.shared.u32 [tile], 1; fence.acq_rel.cta;",
        "ld.acquire.cta.shared.u32 %r4, [tile];",
        "",
    ),
}
