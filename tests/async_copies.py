"""Copies that finish later, in tests: the tile that they fill, and the mbarriers that they tell."""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx_kernels import run_ptx

TILE = ".shared .align 128 .b8 tile[4096]; .shared .align 8 .b64 bars[4];"
# %r9 and %rd9: 16 bytes per thread of the tile and of x.
PLACES = """
    mov.u32 %r9, tile; shl.b32 %r8, %t, 4; add.u32 %r9, %r9, %r8;
    cvt.u64.u32 %rd8, %r8; add.u64 %rd9, %x, %rd8; add.u64 %rd10, %out, %rd8;
"""
COPY = "cp.async.cg.shared.global [%r9], [%rd9], 16;"
STORE = """
    ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r9]; st.global.v4.u32 [%rd10], {%r1, %r2, %r3, %r4};
"""
DONE = "cp.async.commit_group; cp.async.wait_group 0;"


def numbers(n: int = 512) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(1, 256, n, dtype=np.uint8)


def run(body: str, *, block: int = 32, **more: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What the threads store into `out`."""
    out = np.zeros(512, np.uint8)
    room = np.zeros(4096, np.uint8)  # so that no other tensor is near
    x = room[2048:2560]
    x[:] = numbers()
    run_ptx(f"{PLACES} {body}", block=block, declare=TILE, x=x, out=out, **more)
    return out


INIT = """
    setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [bars], {count}; bar.sync 0;
"""
WAIT = """
    WAIT{n}: mbarrier.try_wait.parity.shared.b64 %p2, [bars], {parity}; @!%p2 bra WAIT{n};
"""


def wait(parity: int | str = 0, n: int | str = 0) -> str:
    return WAIT.format(parity=parity, n=n)


def init(count: int) -> str:
    return INIT.format(count=count)
