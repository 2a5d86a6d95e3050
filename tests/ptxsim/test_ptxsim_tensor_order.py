"""When a copy that goes by a tensor map is there, for whom, and what races with it."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_kernels import faults
from tensor_copies import COPY, DUMP, EXPECT, MAP, SIZE, TILE, WAIT, X, expected, load, map_of, run


@pytest.mark.parametrize("steps", [[EXPECT.format(SIZE), COPY], [COPY, EXPECT.format(SIZE)]])
def test_bytes_may_come_before_they_are_expected(steps: list[str]) -> None:
    assert (run(X, MAP, f"{' '.join(steps)} {WAIT} {DUMP}") == expected(X, MAP, [16, 2])).all()


def test_two_copies_may_complete_one_phase() -> None:
    body = f"{EXPECT.format(2 * SIZE)} {COPY} {load([-8, 17], 'tile+1024')} {WAIT} {DUMP}"
    want = expected(X, MAP, [16, 2])
    second = expected(X, MAP, [-8, 17], 1024)
    want[1024:] = second[1024:]
    assert (run(X, MAP, body) == want).all()


@pytest.mark.parametrize(
    ("body", "essential"),
    [
        (f"{EXPECT.format(SIZE + 16)} {COPY} {WAIT}",
         "deadlock.*0 arrivals and 16 bytes from the end of phase 0"),
        (f"{EXPECT.format(SIZE - 16)} {COPY} {WAIT}", "deadlock.*0 arrivals and -16 bytes"),
        (f"{EXPECT.format(SIZE)} {COPY} {DUMP}", "race: reads what an asynchronous copy wrote"),
        (f"{EXPECT.format(SIZE)} {COPY} @%p1 ld.shared.u32 %r1, [tile];",
         "race: reads what an asynchronous copy wrote.*lane 0; in"),
        (f"{EXPECT.format(SIZE)} {COPY} bar.sync 0; {DUMP}",
         "race: reads what an asynchronous copy wrote"),
        (f"{WAIT.replace('0;', '1;')} {EXPECT.format(SIZE)} {COPY} bar.sync 0; {DUMP}",
         "race: reads what an asynchronous copy wrote"),
        (f"{COPY} {DUMP}", "reads what an asynchronous copy has not finished writing"),
        (f"{COPY} st.shared.u32 [%r9], 1;", "writes where an asynchronous copy is under way"),
        (f"{EXPECT.format(2 * SIZE)} {COPY} {COPY}", "writes where an asynchronous copy is under"),
        (f"{EXPECT.format(SIZE)} {COPY} bar.sync 0; st.shared.u32 [%r9], 1;",
         "race: writes over what an asynchronous copy wrote"),
        (f"st.shared.u32 [%r9], 1; {EXPECT.format(SIZE)} {COPY}",
         "race: writes over what another thread wrote"),
        (f"@%p1 mbarrier.init.shared.b64 [bars+8], 1; @%p1 mbarrier.arrive.expect_tx.shared.b64 _, "
         f"[bars+8], {SIZE}; {COPY.replace('[bars]', '[bars+8]')} bar.sync 0; {EXPECT.format(0)} "
         f"{WAIT} {DUMP}",
         "race: reads what an asynchronous copy wrote.*mbarrier 0x2408"),
    ],
    ids=["too few bytes", "too many bytes", "no wait", "no wait by who copies", "a barrier alone",
         "wait for the phase before", "phase not over", "store over", "copy over",
         "store without a wait", "copy over unread store", "wait for another mbarrier"],
)  # fmt: skip
def test_faults_of_time(body: str, essential: str) -> None:
    with faults(essential, r"block \(0, 0, 0\)"):
        run(X, MAP, body)


@pytest.mark.parametrize("waited", [99, 98])
def test_copies_of_many_mbarriers_are_told_apart(waited: int) -> None:
    """100 mbarriers, one copy each; the last copy is read."""
    body = f"""
        setp.lt.u32 %p1, %t, 100; shl.b32 %r5, %t, 3; mov.u32 %r6, more; add.u32 %r5, %r5, %r6;
        @%p1 mbarrier.init.shared.b64 [%r5], 1; bar.sync 0; mov.u32 %r11, 0; shl.b32 %r12, %t, 7;
        mov.u32 %r13, big; add.u32 %r12, %r12, %r13;
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 16;
        {load(["%r11", "%r11"], "%r12").replace("bars", "%r5")} bar.sync 0;
        {WAIT.replace("bars", f"more+{8 * waited}")} ld.shared.u32 %r1, [big+{99 * 128}]; EXITS
    """
    extra = ".shared .align 128 .b8 big[12800]; .shared .align 8 .b64 more[100];"
    ends = "".join(WAIT.replace("bars", f"more+{8 * i}").replace("W", f"W{i}") for i in range(100))
    body, made = body.replace("EXITS", ends), map_of(X, [8, 1])
    if waited == 99:
        run(X, made, body, declare=TILE + extra)
    else:
        with faults("race: reads what an asynchronous copy wrote"):
            run(X, made, body, declare=TILE + extra)


def test_who_learns_of_it_from_who_waited_may_read() -> None:
    """One warp waits, and a barrier tells the others."""
    alone = "setp.ge.u32 %p3, %t, 32; @%p3 bra ON;"
    body = f"{EXPECT.format(SIZE)} {COPY} {alone} {WAIT} ON: bar.sync 0; {DUMP}"
    assert (run(X, MAP, body) == expected(X, MAP, [16, 2])).all()


@pytest.mark.parametrize("fine", [True, False])
def test_a_ring_of_one_stage(fine: bool) -> None:
    """The next box may come when all have read the one before."""
    barrier = "bar.sync 0;" if fine else ""
    body = f"""
        mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r11, 0;
        L: {EXPECT.format(SIZE)} {load(["%r6", "%r5"])}
        W: mbarrier.try_wait.parity.shared.b64 %p2, [bars], %r11; @!%p2 bra W;
        xor.b32 %r11, %r11, 1; ld.shared.u32 %r1, [%r9]; {barrier}
        add.u32 %r5, %r5, 1; setp.lt.u32 %p3, %r5, 4; @%p3 bra L; bar.sync 0; {DUMP}
    """
    if fine:
        assert (run(X, MAP, body) == expected(X, MAP, [0, 3])).all()
    else:
        with faults("race: writes what another thread reads", "cp.async.bulk.tensor"):
            run(X, MAP, body)


@pytest.mark.parametrize("order", ["waits", "does not wait"])
def test_the_source_may_be_written_when_the_copy_has_been_waited_for(order: str) -> None:
    x = X.copy()
    store = "setp.eq.u32 %p4, %t, 40; @%p4 st.global.u32 [%x+288], 7;"
    steps = f"{WAIT} {store}" if order == "waits" else f"{store} {WAIT}"
    body = f"{EXPECT.format(SIZE)} {COPY} {steps}"
    if order == "waits":
        run(x, map_of(x, [32, 5], 64), body)
    else:
        with faults("race in global memory", "`st.global.u32`", "`cp.async.bulk.tensor.2d"):
            run(x, map_of(x, [32, 5], 64), body)


def test_what_another_block_writes_is_a_race() -> None:
    x = X.copy()
    body = f"""
        setp.eq.u32 %p4, %b, 1; @%p4 bra OTHER; {EXPECT.format(SIZE)} {COPY} {WAIT} ret;
        OTHER: @%p1 st.global.u32 [%x+288], 7;
    """
    with faults("race in global memory", "`cp.async.bulk.tensor.2d"):
        run(x, map_of(x, [32, 5], 64), body, grid=2)


@pytest.mark.parametrize("order", ["release", "relaxed"])
def test_a_block_tells_another_that_it_has_its_copy(order: str) -> None:
    """By a flag in global memory, upon which the other writes to the source."""
    x = X.copy()
    flag = np.zeros(1, np.uint32)
    body = f"""
        setp.eq.u32 %p4, %b, 1; @%p4 bra OTHER; {EXPECT.format(SIZE)} {COPY} {WAIT} bar.sync 0;
        @%p1 st.{order}.gpu.global.u32 [%flag], 1; ret;
        OTHER: @!%p1 ret; L: ld.acquire.gpu.global.u32 %r1, [%flag]; setp.eq.u32 %p3, %r1, 0;
        @%p3 bra L; st.global.u32 [%x+288], 7;
    """
    made = map_of(x, [32, 5], 64)
    if order == "release":
        run(x, made, body, grid=2, flag=flag)
    else:
        with faults("race in global memory", "`cp.async.bulk.tensor.2d"):
            run(x, made, body, grid=2, flag=flag)


@pytest.mark.parametrize("races", [True, False])
@pytest.mark.parametrize(
    ("body", "essential"),
    [
        (f"{EXPECT.format(SIZE)} {COPY}", "race: exits while an asynchronous copy writes, which"),
        (f"{EXPECT.format(SIZE + 16)} {COPY}", "exits where an asynchronous copy is under way"),
        (f"{COPY}", "exits where an asynchronous copy is under way"),
    ],
    ids=["phase over", "bytes missing", "not expected"],
)
def test_a_block_may_not_exit_before_its_copies_are_waited_for(
    body: str, essential: str, races: bool
) -> None:
    if essential.startswith("race") and not races:
        run(X, MAP, body, races=False)  # who knows of what is not looked at
        return
    with faults(essential, "`ret`"):
        run(X, MAP, body, races=races)
    run(X, MAP, f"{EXPECT.format(SIZE)} {COPY} {WAIT}", races=races)


def test_an_mbarrier_with_copies_under_way_stays() -> None:
    with faults("mbarrier.inval while asynchronous copies are under way"):
        run(X, MAP, f"{COPY} @%p1 mbarrier.inval.shared.b64 [bars];")
