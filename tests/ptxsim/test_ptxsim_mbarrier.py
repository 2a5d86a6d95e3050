"""mbarriers: who arrives, who waits, what that orders, and what is a fault."""

from __future__ import annotations

import numpy as np
import pytest
from async_copies import TILE, init, wait
from ptx_kernels import faults, run_ptx

CROSS = "xor.b32 %r8, %t, 33; shl.b32 %r8, %r8, 4; mov.u32 %r7, tile; add.u32 %r8, %r8, %r7;"


@pytest.mark.parametrize(
    "arrive",
    [
        "mbarrier.arrive.shared.b64 %rd1, [bars];", "mbarrier.arrive.shared.b64 _, [bars];",
        "mbarrier.arrive.shared::cta.b64 %rd1, [bars], 1;",
        "mbarrier.arrive.release.cta.shared::cta.b64 _, [bars];",
        "mov.u64 %rd2, bars; cvta.shared.u64 %rd2, %rd2; mbarrier.arrive.b64 %rd1, [%rd2];",
        "mov.u32 %r6, bars; mbarrier.arrive.shared.b64 %rd1, [%r6];",
    ],
)  # fmt: skip
def test_after_all_have_arrived_what_they_wrote_can_be_read(arrive: str) -> None:
    out = np.zeros(64, np.uint32)
    run_ptx(
        f"""mov.u32 %r9, tile; shl.b32 %r6, %t, 4; add.u32 %r9, %r9, %r6; {CROSS} {init(64)}
        st.shared.u32 [%r9], %t; {arrive} {wait()} ld.shared.u32 %r1, [%r8];
        st.global.u32 [%out_g], %r1;""",
        block=64, declare=TILE, out=out,
    )  # fmt: skip
    assert out.tolist() == [t ^ 33 for t in range(64)]


def test_an_mbarrier_may_be_named_by_a_register() -> None:
    """A register that each instruction is the last one to read."""
    place = "mov.u32 %r6, bars; add.u32 %r6, %r6, 8;"
    run_ptx(
        f"""setp.eq.u32 %p1, %t, 0; {place} @%p1 mbarrier.init.shared.b64 [%r6], 1; bar.sync 0;
        {place} @%p1 mbarrier.expect_tx.relaxed.cta.shared.b64 [%r6], 16;
        {place} @%p1 mbarrier.complete_tx.relaxed.cta.shared.b64 [%r6], 16;
        {place} @%p1 mbarrier.arrive.shared.b64 _, [%r6];
        {place} mbarrier.test_wait.parity.shared.b64 %p2, [%r6], 0; @!%p2 trap;
        bar.sync 0; {place} @%p1 mbarrier.inval.shared.b64 [%r6];""",
        declare=TILE,
    )  # fmt: skip


@pytest.mark.parametrize("lanes", ["whole warps", "parts of warps"])
def test_waiting_orders_the_lanes_of_a_warp_too(lanes: str) -> None:
    """Lane 0 writes, arrives alone and waits with the others."""
    part = "setp.ge.u32 %p3, %lane, 20; @%p3 bra END;" if lanes == "parts of warps" else ""
    out = np.zeros(64, np.uint32)
    run_ptx(
        f"""{init(1)} @%p1 st.shared.u32 [tile], 7; @%p1 mbarrier.arrive.shared.b64 _, [bars];
        {part} {wait()} ld.shared.u32 %r1, [tile]; st.global.u32 [%out_g], %r1; END:""",
        block=64, declare=TILE, out=out,
    )  # fmt: skip
    assert out.reshape(2, 32)[:, :20].tolist() == [[7] * 20] * 2


@pytest.mark.parametrize(
    ("arrive", "waiting"),
    [
        ("mbarrier.arrive.relaxed.cta.shared.b64 _, [bars];", wait()),
        ("mbarrier.arrive.shared.b64 _, [bars];",
         wait().replace("parity.shared", "parity.relaxed.cta.shared")),
    ],
    ids=["arrival", "wait"],
)  # fmt: skip
def test_relaxed_mbarriers_order_nothing(arrive: str, waiting: str) -> None:
    with faults("race: reads what another thread wrote", "warp 1, lane", "`ld.shared.u32`"):
        run_ptx(
            f"""{init(1)} @%p1 st.shared.u32 [tile], 7; @%p1 {arrive} setp.eq.u32 %p3, %warp, 0;
            @%p3 ret; {waiting} ld.shared.u32 %r1, [tile];""",
            block=64, declare=TILE,
        )  # fmt: skip


def test_fences_make_relaxed_mbarriers_order() -> None:
    waiting = wait().replace("parity.shared", "parity.relaxed.cta.shared")
    run_ptx(
        f"""{init(1)} @%p1 st.shared.u32 [tile], 7; fence.acq_rel.cta;
        @%p1 mbarrier.arrive.relaxed.cta.shared.b64 _, [bars]; {waiting} fence.acq_rel.cta;
        ld.shared.u32 %r1, [tile];""",
        block=64, declare=TILE,
    )  # fmt: skip


def test_an_arrival_orders_only_what_came_before_it() -> None:
    with faults("race: reads what another thread wrote", "warp 0, lane 0"):
        run_ptx(
            f"""{init(1)} @%p1 mbarrier.arrive.shared.b64 _, [bars]; @%p1 st.shared.u32 [tile], 7;
            setp.eq.u32 %p3, %t, 40; @!%p3 ret; {wait()} ld.shared.u32 %r1, [tile];""",
            block=64, declare=TILE,
        )  # fmt: skip


def test_test_wait_tells_whether_the_phase_is_over() -> None:
    """By the token of an arrival and by parity; warp 0 asks before and after the last arrival."""
    out = np.zeros(32, np.uint32)
    ask = """
        mbarrier.test_wait.shared.b64 %p2, [bars], %rd1; selp.u32 %r2, {0}, 0, %p2;
        or.b32 %r1, %r1, %r2;
        mbarrier.test_wait.parity.shared.b64 %p2, [bars], {1}; selp.u32 %r2, {2}, 0, %p2;
        or.b32 %r1, %r1, %r2;
    """
    run_ptx(
        f"""{init(33)} mov.u32 %r1, 0; mbarrier.arrive.shared.b64 %rd1, [bars];
        {ask.format(1, 0, 2)} {ask.format(4, 1, 8)}
        @%p1 mbarrier.arrive.shared.b64 _, [bars]; {ask.format(16, 0, 32)} {ask.format(64, 1, 128)}
        st.global.u32 [%out_g], %r1;""",
        declare=TILE, out=out,
    )  # fmt: skip
    assert (out == 8 + 16 + 32 + 64).all()


def test_an_arrival_may_count_for_several() -> None:
    run_ptx(f"{init(32)} @%p1 mbarrier.arrive.shared.b64 _, [bars], 32; {wait()}", declare=TILE)


def test_who_drops_out_is_not_expected_again() -> None:
    """Phase 0 needs both arrivals, phase 1 that of thread 0 alone."""
    run_ptx(
        f"""{init(2)} setp.eq.u32 %p3, %t, 1; @%p3 mbarrier.arrive_drop.shared.b64 _, [bars];
        @%p1 mbarrier.arrive.shared.b64 _, [bars]; {wait(0, 0)}
        @%p1 mbarrier.arrive.shared.b64 _, [bars]; {wait(1, 1)}""",
        declare=TILE,
    )  # fmt: skip


def test_a_ring_of_two_stages_between_two_warps() -> None:
    """Warp 0 fills stages for warp 1: bars 0 and 1 are full, 2 and 3 are empty."""
    out = np.zeros(64, np.uint32)
    body = f"""
        @%p1 mbarrier.init.shared.b64 [bars+8], 32; {init(32)}
        @%p1 mbarrier.init.shared.b64 [bars+16], 32; @%p1 mbarrier.init.shared.b64 [bars+24], 32;
        bar.sync 0; mov.u32 %r1, 0; mov.u32 %r2, 0; setp.eq.u32 %p3, %warp, 0;
        LOOP: and.b32 %r3, %r1, 1; shl.b32 %r4, %r3, 3; mov.u32 %r5, bars; add.u32 %r4, %r4, %r5;
        shr.u32 %r6, %r1, 1; and.b32 %r6, %r6, 1; shl.b32 %r7, %r3, 7; mov.u32 %r8, tile;
        add.u32 %r7, %r7, %r8; mad.lo.u32 %r7, %lane, 4, %r7; @!%p3 bra CONSUME;
        xor.b32 %r9, %r6, 1;
        EMPTY: mbarrier.try_wait.parity.shared.b64 %p2, [%r4+16], %r9; @!%p2 bra EMPTY;
        mad.lo.u32 %r10, %r1, 100, %t; st.shared.u32 [%r7], %r10;
        mbarrier.arrive.shared.b64 _, [%r4]; bra NEXT;
        CONSUME:
        FULL: mbarrier.try_wait.parity.shared.b64 %p2, [%r4], %r6; @!%p2 bra FULL;
        xor.b32 %r11, %r7, 4; ld.shared.u32 %r10, [%r11]; add.u32 %r2, %r2, %r10;
        {{empty}}
        NEXT: add.u32 %r1, %r1, 1; setp.lt.u32 %p4, %r1, 7; @%p4 bra LOOP;
        st.global.u32 [%out_g], %r2;
    """.replace(f"@%p1 mbarrier.init.shared.b64 [bars+8], 32; {init(32)}",
                f"{init(32)} @%p1 mbarrier.init.shared.b64 [bars+8], 32;")  # fmt: skip
    empty = "mbarrier.arrive.shared.b64 _, [%r4+16];"
    run_ptx(body.format(empty=empty), block=64, declare=TILE, out=out)
    assert out[32:].tolist() == [sum(100 * i + (lane ^ 1) for i in range(7)) for lane in range(32)]
    with faults(
        "deadlock", "wait for mbarrier 0x1410, 32 arrivals and 0 bytes from the end of phase 0"
    ):
        run_ptx(body.format(empty=""), block=64, declare=TILE, out=out)
    with faults("race: writes what another thread reads"):
        ignore = body.format(empty=empty).replace("[%r4+16], %r9", "[%r4], %r9")
        run_ptx(ignore.replace("@!%p2 bra EMPTY;", ""), block=64, declare=TILE, out=out)


@pytest.mark.parametrize(
    ("body", "essential"),
    [
        ("mbarrier.arrive.shared.b64 _, [bars];", "mbarrier that was not initialised"),
        ("mbarrier.try_wait.parity.shared.b64 %p1, [bars], 0;", "was not initialised"),
        ("setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [bars], 0;",
         "count 0; allowed: 1 to 1048575"),
        ("setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [bars], 1048576;", "count 1048576"),
        ("mbarrier.init.shared.b64 [bars], 1;", "mbarrier.init by several threads"),
        (init(1) + "@%p1 mbarrier.init.shared.b64 [bars], 1;",
         "that is in use, without mbarrier.inval"),
        (init(1) + "@%p1 mbarrier.inval.shared.b64 [bars]; @%p1 mbarrier.arrive.shared.b64 _, "
                   "[bars];",
         "was not initialised"),
        (init(2) + "@%p1 mbarrier.arrive.shared.b64 _, [bars], 3;",
         "1 arrivals too many; 2 were expected"),
        (init(1) + "@%p1 mbarrier.arrive.shared.b64 _, [bars], 0;", "0 arrivals; allowed: 1 to"),
        (init(1) + "@%p1 mbarrier.expect_tx.relaxed.cta.shared.b64 [bars], 1048576;",
         "1048576 bytes to come"),
        (init(1).replace("bar.sync 0;", "") + "mbarrier.arrive.shared.b64 _, [bars];",
         "race: reads what another thread wrote"),
        ("mbarrier.arrive.shared.b64 _, [bars+4];", "not a multiple of 8 bytes"),
        ("mbarrier.arrive.shared.b64 _, [bars+32];", "outside the block's 4128 bytes"),
        ("mbarrier.arrive.b64 _, [%out];", "mbarrier outside shared memory"),
    ],
)  # fmt: skip
def test_faults_of_mbarriers(body: str, essential: str) -> None:
    with faults(essential, "block \\(0, 0, 0\\), warp 0", "`mbarrier"):
        run_ptx(body, declare=TILE, out=np.zeros(32, np.uint32))


def test_an_mbarrier_may_be_made_anew_after_inval() -> None:
    run_ptx(
        f"""{init(1)} @%p1 mbarrier.inval.shared.b64 [bars]; bar.sync 0; {init(2)}
        @%p1 mbarrier.arrive.shared.b64 _, [bars], 2; {wait()}""",
        declare=TILE,
    )  # fmt: skip


def test_a_missing_arrival_is_a_deadlock() -> None:
    with faults(
        "deadlock: nobody can go on", "32 threads, first block \\(1, 0, 0\\), warp 0, lane 0",
        "wait for mbarrier 0x1400, 1 arrivals and 0 bytes from the end of phase 0 in "
        "`mbarrier.try_wait",
    ):  # fmt: skip
        run_ptx(
            f"""{init(32)} setp.eq.u32 %p3, %b, 0; setp.gt.u32 %p4, %t, 0; or.pred %p3, %p3, %p4;
            @%p3 mbarrier.arrive.shared.b64 _, [bars]; {wait()}""",
            grid=2, declare=TILE,
        )  # fmt: skip


def test_a_missing_arrival_before_a_test_wait_ends_the_run() -> None:
    with faults("no end after .* memory has not changed", "mbarrier.test_wait|bra"):
        run_ptx(f"{init(32)} {wait().replace('try_wait', 'test_wait')}", declare=TILE)
