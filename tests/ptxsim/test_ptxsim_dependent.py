"""Programmatic dependent launch: what a kernel may do before it waits for the one before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ptx_kernels import faults, refuses, run_ptx

from gqa_cutlass.tensormap import TensorMap

WAIT = "griddepcontrol.wait;"
RULE = "before griddepcontrol.wait: the kernel before this one may not be done"
MEMORY = """
    .shared .align 128 .b8 tile[4096]; .shared .align 8 .b64 bar; .local .align 8 .b8 own[8];
"""
# %p1: the thread that starts copies. %r9: 4 bytes of the tile for each thread.
READY = """
    setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [bar], 1; mov.u32 %r9, tile;
    mad.lo.u32 %r9, %t, 4, %r9; st.shared.u32 [%r9], %t; bar.sync 0;
"""
LANDED = """
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 16;
    L: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0; @!%p2 bra L;
"""
BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
TENSOR = "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes"
ACCESSES = {  # to x, the first by lane 0
    "load": "ld.global.u32 %r1, [%x_g];",
    "generic load": "ld.v2.u32 {%r1, %r2}, [%x];",
    "cached load": "ld.global.nc.L1::no_allocate.u32 %r1, [%x_g];",
    "load through L2": "ld.global.cg.u32 %r1, [%x_g];",
    "volatile load": "ld.volatile.global.u32 %r1, [%x_g];",
    "acquire": "ld.acquire.gpu.global.u32 %r1, [%x_g];",
    "store": "st.global.u32 [%x_g], %t;",
    "generic store": "st.u32 [%x_g], %t;",
    "volatile store": "st.volatile.global.u32 [%x_g], %t;",
    "atomic": "atom.acq_rel.gpu.global.inc.u32 %r1, [%x], 31;",
    "reduction": "red.global.add.u32 [%x], 1;",
    "copy": "cp.async.ca.shared.global [%r9], [%x_g], 4; cp.async.wait_all;",
    "bulk copy": f"@%p1 {BULK} [tile+256], [%x], 16, [bar]; {LANDED}",
    "bulk copy out": "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%x], [tile], 16;",
    "tensor copy": f"@%p1 {TENSOR} [tile+256], [%map, {{0}}], [bar]; {LANDED}",
    "tensor map": "@%p1 cp.async.bulk.prefetch.tensor.1d.L2.global [%table, {0}];",
}
WRITES = {"store", "generic store", "volatile store", "atomic", "reduction", "bulk copy out"}


def aligned(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes at a multiple of 64."""
    room = np.zeros(len(data) + 64, np.uint8)
    found = room[-room.ctypes.data % 64 :][: len(data)]
    found[:] = np.frombuffer(data, np.uint8)
    return found


def run(body: str, **more: Any) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """What a body leaves in `x`, which holds a number per thread."""
    x = aligned(np.arange(more.get("block", 32) * more.get("grid", 1), dtype=np.uint32).tobytes())
    table = TensorMap(
        address=x.ctypes.data, element_bytes=4, sizes=(32,), strides=(), box=(4,), swizzle=0
    ).to_bytes()
    numbers = x.view(np.uint32)
    run_ptx(f"{READY} {body}", declare=MEMORY, x=numbers, table=aligned(table), map=table, **more)
    return numbers


@pytest.mark.parametrize("kind", ACCESSES)
@pytest.mark.parametrize("races", [True, False])
def test_global_memory_is_for_those_who_have_waited(kind: str, races: bool) -> None:
    access = ACCESSES[kind]
    run(f"{WAIT} {access}", races=races)
    name = access.removeprefix("@%p1 ").split()[0]
    which = "table" if kind == "tensor map" else "x"
    with faults(
        f"k: global memory is {'written' if kind in WRITES else 'read'} {RULE}; "
        f"at byte 0 of {which} ",
        "block \\(0, 0, 0\\), warp 0, lane 0", f"in `{name}` at PTX line",
    ):  # fmt: skip
        run(f"{access} {WAIT}", races=races)


@pytest.mark.parametrize("kind", ACCESSES)
def test_a_kernel_that_never_waits_starts_when_the_one_before_is_done(kind: str) -> None:
    run(f"{ACCESSES[kind]} griddepcontrol.launch_dependents;")


@pytest.mark.parametrize(
    "statement",
    [
        "ld.param.u32 %r1, [x];", "ld.u32 %r1, [%map];", "ld.shared.u32 %r1, [%r9];",
        "st.shared.u32 [%r9], 1;", "atom.shared.add.u32 %r1, [tile], 0;",
        "cvta.shared.u64 %rd1, tile; @%p1 st.u32 [%rd1], 1;", "st.local.u32 [own], %t;",
        "cp.async.ca.shared.global [%r9], [%x_g], 4, 0; cp.async.wait_all;",
        "prefetch.global.L2 [%x_g];", "cp.async.bulk.prefetch.L2.global [%x], 128;",
        "cp.async.bulk.prefetch.tensor.1d.L2.global [%map, {0}];",
        "griddepcontrol.launch_dependents;", WAIT,
    ],
)  # fmt: skip
def test_what_needs_no_wait(statement: str) -> None:
    run(f"{statement} {WAIT} ld.global.u32 %r1, [%x_g];")


STORE = "st.global.u32 [%x_g], 7;"


def test_each_thread_waits_for_itself() -> None:
    half = "setp.lt.u32 %p3, %lane, 16;"
    assert (run(f"{half} @%p3 {WAIT} @%p3 {STORE}")[:16] == 7).all()
    with faults(RULE, "at byte 64 of x", "warp 0, lane 16"):
        run(f"{half} @%p3 {WAIT} {STORE}")
    with faults(RULE, "warp 0, lane 1;"):
        run(f"@%p1 {WAIT} bar.sync 0; {STORE}")


def test_each_block_waits_for_itself() -> None:
    """In the same batch, and in another: 16 blocks of 1024 threads run together."""
    for grid, block in ((2, 32), (17, 1024)):
        with faults(RULE, f"block \\({grid - 1}, 0, 0\\), warp 0, lane 0"):
            run(
                f"setp.ne.u32 %p3, %b, {grid - 1}; @%p3 {WAIT} {STORE} {WAIT}",
                grid=grid, block=block,
            )  # fmt: skip
        assert (run(f"{WAIT} {STORE}", grid=grid, block=block) == 7).all()


def test_threads_may_come_to_the_wait_one_after_another() -> None:
    """Warp 0 stores while warp 1, whose wait is another one, has not waited."""
    out = run(
        f"""setp.eq.u32 %p3, %warp, 1; @%p3 bra LATE; {WAIT} {STORE} bar.sync 1; bra END;
        LATE: bar.sync 1; {WAIT} {STORE} END:""",
        block=64,
    )  # fmt: skip
    assert (out == 7).all()
    with faults(RULE, "warp 1, lane 0"):
        run(
            f"""setp.eq.u32 %p3, %warp, 1; @%p3 bra LATE; {WAIT} {STORE} bar.sync 1; bra END;
            LATE: bar.sync 1; {STORE} {WAIT} END:""",
            block=64,
        )  # fmt: skip


def test_threads_that_exit_need_not_wait() -> None:
    out = run(f"setp.lt.u32 %p3, %lane, 16; @%p3 ret; {WAIT} {STORE}")
    assert out.tolist() == [*range(16), *[7] * 16]


@pytest.mark.parametrize("statement", ["griddepcontrol.bogus;", "griddepcontrol.wait.all;"])
def test_refuses_unknown_forms(statement: str) -> None:
    with refuses(f"unknown instruction in `{statement[:-1]}`"):
        run(statement)
