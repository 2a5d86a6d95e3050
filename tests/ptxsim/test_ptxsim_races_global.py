"""Races in global memory, between blocks and within one."""

from __future__ import annotations

import numpy as np
import pytest
from ordering import FLAG, NOT_ORDERED, ORDERED, run
from ptx_kernels import Tensor, faults, run_ptx

MEET = """
    setp.ne.u32 %p1, %t, 0; @%p1 ret; setp.ne.u32 %p2, %b, 0; @%p2 bra RECEIVE;
    st.global.u32 [%x+16], 7; {send} ret;
    RECEIVE: {receive} setp.eq.u32 %p3, %r4, 0; @%p3 bra RECEIVE; {after}
    ld.global.u32 %r3, [%x+16]; st.global.u32 [%out], %r3;
"""


def to_global(order: tuple[str, str, str], scope: str = "gpu") -> dict[str, str]:
    send, receive, after = (
        text.replace("shared", "global").replace("[tile", "[%x").replace("cta", scope)
        for text in order
    )
    return {"send": send, "receive": receive, "after": after}


def meet(order: dict[str, str]) -> int:
    x, out = np.zeros(8, np.uint32), np.zeros(1, np.uint32)
    run_ptx(MEET.format(**order), grid=2, x=x, out=out)
    return int(out[0])


@pytest.mark.parametrize("how", ORDERED)
def test_blocks_are_ordered_by_a_flag(how: str) -> None:
    assert meet(to_global(ORDERED[how])) == 7


@pytest.mark.parametrize("how", NOT_ORDERED)
def test_blocks_are_not_ordered_by_a_flag(how: str) -> None:
    with faults(
        r"race in global memory: reads what block \(0, 0, 0\), warp 0, lane 0 writes in "
        r"`st.global.u32` at PTX line \d+, and nothing orders the two", "at byte 16 of x",
        r"by block \(1, 0, 0\), warp 0, lane 0; in `ld.global.u32` at PTX line",
    ):  # fmt: skip
        meet(to_global(NOT_ORDERED[how]))


@pytest.mark.parametrize("how", ["release, acquire", "atomics", "fences", "fence and acquire"])
@pytest.mark.parametrize("scope", ["cta", "cluster", "gpu", "sys"])
@pytest.mark.parametrize("cluster", [1, 2])
def test_a_scope_must_include_the_other_block(how: str, scope: str, cluster: int) -> None:
    """Blocks of one cluster or of two."""
    x, out = np.zeros(8, np.uint32), np.zeros(1, np.uint32)
    body = MEET.format(**to_global(ORDERED[how], scope)).replace(".gpu", f".{scope}")
    if scope in ("gpu", "sys") or (scope == "cluster" and cluster == 2):
        run_ptx(body, grid=2, cluster=cluster, x=x, out=out)
        assert out[0] == 7
    else:
        with faults("race in global memory: reads what block", "at byte 16 of x"):
            run_ptx(body, grid=2, cluster=cluster, x=x, out=out)


@pytest.mark.parametrize(
    ("send", "receive"),
    [
        ("release.gpu", "acquire.cta"),
        ("release.cta", "acquire.gpu"),
        ("release.cta", "acquire.cta"),
    ],
)
def test_in_a_block_every_scope_orders(send: str, receive: str) -> None:
    words = (f"st.{send}.shared.u32 [tile], 1;", f"ld.{receive}.shared.u32 %r4, [tile];")
    assert run(FLAG.format(send=words[0], receive=words[1], after=""))[0] == 7


def test_blocks_in_several_batches_are_ordered_by_a_ticket() -> None:
    """The block that takes the last ticket adds up what all blocks wrote."""
    grid = 40
    parts, tickets, out = np.zeros(grid, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    body = """
        setp.ne.u32 %p1, %t, 0; @%p1 ret; mul.wide.u32 %rd1, %b, 4; add.u64 %rd2, %parts, %rd1;
        st.global.u32 [%rd2], %b; atom.{order}gpu.global.inc.u32 %r1, [%tickets], {last};
        setp.ne.u32 %p2, %r1, {last}; @%p2 ret; mov.u32 %r2, 0; mov.u32 %r3, 0;
        LOOP: mul.wide.u32 %rd1, %r2, 4; add.u64 %rd2, %parts, %rd1; ld.global.u32 %r4, [%rd2];
        add.u32 %r3, %r3, %r4; add.u32 %r2, %r2, 1; setp.le.u32 %p3, %r2, {last}; @%p3 bra LOOP;
        st.global.u32 [%out], %r3;
    """
    tensors = {"parts": Tensor(parts, fresh=True), "tickets": tickets, "out": out}
    run_ptx(body.format(order="acq_rel.", last=grid - 1), grid=grid, block=1024, **tensors)
    assert out[0] == sum(range(grid))
    assert tickets[0] == 0
    with faults("race in global memory: reads what block", "of parts"):
        run_ptx(body.format(order="relaxed.", last=grid - 1), grid=grid, block=1024, **tensors)


@pytest.mark.parametrize(
    ("words", "essential"),
    [
        ("st.global.u32 [%x], %b;", "writes what block .* writes"),
        ("ld.global.u32 %r1, [%x]; setp.eq.u32 %p1, %b, 1; @%p1 st.global.u32 [%x], 1;",
         "(reads what block .* writes|writes what block .* reads)"),
        ("setp.eq.u32 %p1, %b, 1; @%p1 st.global.u32 [%x], 1; @!%p1 red.global.add.u32 [%x], 1;",
         "writes what block .* writes"),
    ],
)  # fmt: skip
def test_blocks_race_on_a_word(words: str, essential: str) -> None:
    with faults("race in global memory", essential, "nothing orders the two", "at byte 0 of x"):
        run_ptx(f"setp.ne.u32 %p2, %t, 0; @%p2 ret; {words}", grid=3, x=np.zeros(4, np.uint32))


def test_a_narrow_write_races_with_a_wide_read() -> None:
    with faults("race in global memory", "at byte 6 of x"):
        run_ptx(
            """setp.ne.u32 %p2, %t, 0; @%p2 ret; setp.eq.u32 %p1, %b, 0; mov.u16 %h1, 3;
            @%p1 st.global.u16 [%x+6], %h1; @!%p1 ld.global.u64 %rd1, [%x];""",
            grid=2, x=np.zeros(2, np.uint64),
        )  # fmt: skip


def test_threads_of_a_block_race_on_global_memory_without_a_barrier() -> None:
    body = """
        xor.b32 %r1, %t, {other}; mul.wide.u32 %rd1, %r1, 4; add.u64 %rd1, %x, %rd1;
        st.global.u32 [%x_g], %t; {barrier} ld.global.u32 %r2, [%rd1];
    """
    x = np.zeros(64, np.uint32)
    run_ptx(body.format(other=32, barrier="bar.sync 0;"), block=64, x=x)
    run_ptx(body.format(other=1, barrier="bar.warp.sync -1;"), block=64, x=x)
    for other, barrier in ((32, ""), (32, "bar.warp.sync -1;"), (1, "")):
        with faults("race in global memory: reads what block", "`st.global.u32`"):
            run_ptx(body.format(other=other, barrier=barrier), block=64, x=x)


@pytest.mark.parametrize(
    "words",
    [
        "ld.global.u32 %r1, [%x];", "red.global.add.u32 [%x], 1;", "st.global.u32 [%x_g], 1;",
        "atom.global.add.u32 %r1, [%x], 1;", "st.relaxed.gpu.global.u32 [%x], 1;",
        "ld.relaxed.gpu.global.u32 %r1, [%x]; st.relaxed.gpu.global.u32 [%x], 1;",
        "st.global.u32 [%x_g], 1; ld.global.u32 %r1, [%x_g]; st.global.u32 [%x_g], %r1;",
        "mov.u16 %h1, 1; shl.b32 %r1, %g, 1; cvt.u64.u32 %rd1, %r1; add.u64 %rd1, %x, %rd1; "
        "st.global.u16 [%rd1], %h1; setp.eq.u32 %p1, %g, 0; @%p1 ld.global.v4.u32 {%r1, %r2, "
        "%r3, %r4}, [%x+1024];",
    ],
    ids=["reads", "reductions", "own words", "atomics", "strong stores", "strong accesses",
    "own reuse",
         "halves of words"],
)  # fmt: skip
def test_no_race_in_global_memory(words: str) -> None:
    run_ptx(words, grid=3, block=64, x=np.zeros(512, np.uint32))


def test_an_atomic_of_the_same_warp_orders_its_lanes() -> None:
    """Lane 1 takes what lane 0 released; no barrier of the warp."""
    x, out = np.zeros(8, np.uint32), np.zeros(1, np.uint32)
    run_ptx(
        """setp.eq.u32 %p1, %t, 0; setp.eq.u32 %p2, %t, 1;
        @%p1 st.global.u32 [%x+16], 7; @%p1 st.release.gpu.global.u32 [%x], 1;
        @%p2 ld.acquire.gpu.global.u32 %r1, [%x]; @%p2 ld.global.u32 %r3, [%x+16];
        @%p2 st.global.u32 [%out], %r3;""",
        x=x, out=out,
    )  # fmt: skip
    assert out[0] == 7
