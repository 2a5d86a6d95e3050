"""Barriers of a block and of a warp: who waits for whom, and what that orders."""

from __future__ import annotations

import numpy as np
import pytest
from ordering import NEIGHBOUR, OTHER, OTHER_WARP, OWN, READ, TILE, WRITE, run
from ptx_kernels import faults, refuses, run_ptx

# Barriers of a block


def test_after_a_barrier_other_warps_can_be_read() -> None:
    assert run(f"{OTHER_WARP} {WRITE} bar.sync 0; {READ}") == [t ^ 32 for t in range(64)]


@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0;", "bar.cta.sync 3;", "barrier.sync 1;", "barrier.cta.sync.aligned 15;",
        "bar.sync 2, 64;", "mov.u32 %r10, 4; bar.sync %r10;", "mov.u32 %r10, 64; bar.sync 5, %r10;",
    ],
)  # fmt: skip
def test_forms_of_a_barrier(barrier: str) -> None:
    assert run(f"{OTHER_WARP} {WRITE} {barrier} {READ}") == [t ^ 32 for t in range(64)]


def test_a_barrier_in_a_loop() -> None:
    """Each warp reads in turn i what the other one wrote in it; two barriers per turn."""
    body = f"""
        {OTHER_WARP} mov.u32 %r4, 0; mov.u32 %r5, 0;
        LOOP: mad.lo.u32 %r6, %r4, 100, %t; st.shared.u32 [%r9], %r6; bar.sync 0;
        ld.shared.u32 %r7, [%r8]; add.u32 %r5, %r5, %r7; bar.sync 0;
        add.u32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 3; @%p1 bra LOOP; st.global.u32 [%out_g], %r5;
    """
    assert run(body) == [300 + 3 * (t ^ 32) for t in range(64)]


def test_one_barrier_per_turn_is_a_race() -> None:
    """The writes of the second turn and the reads of the first."""
    with faults("race: writes what another thread reads", "`st.shared.u32`"):
        run(
            f"""{OTHER_WARP} mov.u32 %r4, 0;
            LOOP: st.shared.u32 [%r9], %r4; bar.sync 0; ld.shared.u32 %r7, [%r8];
            add.u32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 3; @%p1 bra LOOP;"""
        )


def test_warps_may_come_to_a_barrier_from_different_places() -> None:
    body = f"""
        {OTHER_WARP} {WRITE} setp.eq.u32 %p1, %warp, 0; @%p1 bra A; bar.sync 0; bra B;
        A: bar.sync 0; B: {READ}
    """
    assert run(body) == [t ^ 32 for t in range(64)]


def test_blocks_have_barriers_of_their_own() -> None:
    out = np.zeros(128, np.uint32)
    run_ptx(
        f"""{OTHER_WARP} setp.eq.u32 %p1, %b, 1; @%p1 bra LATE; bra GO;
        LATE: mov.u32 %r4, 0; L: add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 9; @%p2 bra L;
        GO: {WRITE} bar.sync 0; {READ}""",
        grid=2, block=64, declare=TILE, out=out,
    )  # fmt: skip
    assert out.tolist() == [t ^ 32 for t in range(64)] * 2


def test_a_named_barrier_of_two_warps_out_of_four() -> None:
    body = f"""
        {OTHER_WARP} {WRITE} setp.ge.u32 %p1, %warp, 2; @%p1 bra HIGH;
        bar.sync 1, 64; bra JOIN; HIGH: bar.sync 2, 64; JOIN: {READ}
    """
    assert run(body, block=128) == [t ^ 32 for t in range(128)]


def test_a_named_barrier_orders_only_who_comes_to_it() -> None:
    with faults("race: reads what another thread wrote", "warp 2, lane 0", "warp 0, lane 0"):
        run(
            f"""{OWN + OTHER.format(64)} {WRITE} setp.ge.u32 %p1, %warp, 2; @%p1 bra HIGH;
            bar.sync 1, 64; bra END; HIGH: bar.sync 2, 64; {READ} END:""",
            block=128,
        )


PIPE = """
    setp.eq.u32 %p1, %warp, 0; @%p1 bra PRODUCER;
    mov.u32 %r4, 0; mov.u32 %r5, 0;
    CONSUME: bar.sync 1, 64; ld.shared.u32 %r6, [%r8]; add.u32 %r5, %r5, %r6; {empty}
    add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 3; @%p2 bra CONSUME;
    st.global.u32 [%out_g], %r5; bra END;
    PRODUCER: mov.u32 %r4, 0;
    PRODUCE: {wait} mad.lo.u32 %r6, %r4, 100, %t; st.shared.u32 [%r9], %r6; {full}
    add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 3; @%p2 bra PRODUCE; END:
"""


def test_a_producer_arrives_and_a_consumer_waits() -> None:
    """Barrier 1: full; barrier 2: empty, at which the consumer arrives in advance."""
    pipe = PIPE.format(wait="bar.sync 2, 64;", full="bar.arrive 1, 64;", empty="bar.arrive 2, 64;")
    pipe = pipe.replace("mov.u32 %r5, 0;", "mov.u32 %r5, 0; bar.arrive 2, 64;", 1)
    found = run(f"{OTHER_WARP} {pipe}")
    assert found == [0] * 32 + [300 + 3 * (t ^ 32) for t in range(32, 64)]


@pytest.mark.parametrize(
    ("wait", "full", "empty", "essential"),
    [
        ("", "bar.arrive 1, 64;", "", "race: writes what another thread reads"),
        ("bar.sync 2, 64;", "bar.arrive 1, 64;", "", "deadlock.*wait for barrier 2"),
        ("", "", "", "deadlock.*wait for barrier 1"),
    ],
    ids=["does not wait", "is never told", "does not arrive"],
)
def test_a_producer_that_does_wrong(wait: str, full: str, empty: str, essential: str) -> None:
    with faults(essential):
        run(f"{OTHER_WARP} {PIPE.format(wait=wait, full=full, empty=empty)}")


def test_arriving_teaches_nothing() -> None:
    """The producer reads what the consumer wrote before its wait."""
    with faults("race: reads what another thread wrote", "warp 0, lane 0"):
        run(
            f"""{OTHER_WARP} {WRITE} setp.eq.u32 %p1, %warp, 0; @%p1 bra A; bar.sync 1, 64; bra END;
            A: bar.arrive 1, 64; {READ} END:"""
        )


def test_half_a_warp_at_a_barrier_is_a_deadlock() -> None:
    with faults(
        "deadlock", "16 threads, first block \\(0, 0, 0\\), warp 0, lane 0, wait for the rest of "
                    "its warp in `bar.sync`",
        "16 threads, first block \\(0, 0, 0\\), warp 0, lane 16, wait for the rest of its warp "
        "in `bar.sync`",
    ):  # fmt: skip
        run(
            """setp.lt.u32 %p1, %lane, 16; setp.eq.u32 %p2, %warp, 1; @%p2 bra A; @%p1 bra A;
            bar.sync 0; bra END; A: bar.sync 0; END:"""
        )


def test_a_warp_that_waits_elsewhere_is_a_deadlock() -> None:
    with faults(
        "deadlock", "32 threads, first block \\(0, 0, 0\\), warp 0, lane 0, wait for barrier 1 "
                    "in `bar.sync` at PTX line",
        "32 threads, first block \\(0, 0, 0\\), warp 1, lane 0, wait for barrier 2",
    ):  # fmt: skip
        run("setp.eq.u32 %p1, %warp, 0; @%p1 bra A; bar.sync 2; bra END; A: bar.sync 1; END:")


@pytest.mark.parametrize("when", ["before", "after"])
def test_by_design_threads_may_not_exit_without_coming_to_a_barrier(when: str) -> None:
    """The ISA waits for those alone that have not exited."""
    wait = (
        ""
        if when == "before"
        else "mov.u32 %r4, 0; L: add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 9; @%p2 bra L;"
    )
    with faults(
        "unbalanced barrier 0: 32 threads of the block have exited without coming to it",
        r"block \(1, 0, 0\), warp 0, lane 0", "`bar.sync`",
    ):  # fmt: skip
        run(
            f"""mad.lo.u32 %r5, %b, 2, %warp; setp.eq.u32 %p1, %r5, 3; @!%p1 bra GO; {wait} ret;
            GO: bar.sync 0;""",
            grid=2,
        )  # fmt: skip


def test_by_design_a_part_of_a_warp_may_not_exit_without_coming_to_a_barrier() -> None:
    with faults("unbalanced barrier 0: 16 threads of the block have exited", "warp 0, lane 0"):
        run("setp.ge.u32 %p1, %t, 48; @%p1 bra OUT; bar.sync 0; bra END; OUT: ret; END:")


def test_a_barrier_with_a_count_waits_for_exited_threads_for_ever() -> None:
    with faults("deadlock", "32 threads.*wait for barrier 0"):
        run("setp.eq.u32 %p1, %warp, 1; @%p1 ret; bar.sync 0, 64;")


@pytest.mark.parametrize(
    ("barrier", "essential"),
    [
        ("bar.sync 16;", "barrier 16 for 0 threads; allowed: barriers 0 to 15"),
        ("bar.sync 1, 48;", "barrier 1 for 48 threads; .* multiples of 32 threads up to 64"),
        ("bar.sync 1, 96;", "barrier 1 for 96 threads; .* multiples of 32 threads up to 64"),
        ("bar.sync 1, 32; bar.sync 1, 64;", ""),
        ("setp.eq.u32 %p1, %warp, 0; selp.u32 %r4, 64, 32, %p1; bar.sync 1, %r4;",
         "barrier 1: arrivals for 64 and for 32 threads"),
    ],
)  # fmt: skip
def test_wrong_numbers_at_a_barrier(barrier: str, essential: str) -> None:
    if essential:
        with faults(essential):
            run(barrier)
    else:
        run(barrier)


def test_a_third_warp_at_a_barrier_of_two_waits_for_a_fourth() -> None:
    with faults(
        "deadlock", "32 threads, first block \\(0, 0, 0\\), warp 2, lane 0, wait for barrier 1"
    ):
        run("bar.sync 1, 64;", block=96)
    run("bar.sync 1, 64;", block=128)


def test_no_count_means_the_whole_block() -> None:
    body = f"""
        {OTHER_WARP} {WRITE} setp.eq.u32 %p1, %warp, 0; @%p1 bra A; bar.sync 0; bra B;
        A: bar.sync 0, 64; B: {READ}
    """
    assert run(body) == [t ^ 32 for t in range(64)]


@pytest.mark.parametrize(
    "statement",
    ["bar.arrive 1;", "bar.red.popc.u32 %r1, 0, %p1;", "bar.wait 0;", "bar.sync;", "fence.bogus;",
                  "barrier.cluster.arrive.bogus;", "barrier.cluster.sync;"]
)  # fmt: skip
def test_refuses_unknown_forms(statement: str) -> None:
    name = statement.split()[0].rstrip(";").replace(".", r"\.")
    with refuses(f"unknown .* in `{name}`"):
        run(statement)


# Within a warp


def test_after_a_barrier_of_the_warp_other_lanes_can_be_read() -> None:
    assert run(f"{NEIGHBOUR} {WRITE} bar.warp.sync 0xffffffff; {READ}") == [
        t ^ 1 for t in range(64)
    ]


@pytest.mark.parametrize("half", ["low", "high"])
def test_a_barrier_of_half_a_warp_waits_for_it_alone(half: str) -> None:
    mask, guard = ("0xffff", "@%p1") if half == "low" else ("0xffff0000", "@!%p1")
    run(f"setp.lt.u32 %p1, %lane, 16; {guard} bra PART; bra END; PART: bar.warp.sync {mask}; END:")


def test_the_barrier_of_a_warp_waits_for_lanes_that_come_late() -> None:
    body = f"""
        {NEIGHBOUR} {WRITE} mov.u32 %r4, 0; setp.lt.u32 %p1, %lane, 16; @%p1 bra MEET; bra LATE;
        MEET: bar.warp.sync -1; {READ} bra END;
        LATE: add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 9; @%p2 bra LATE; bra MEET; END:
    """
    assert run(body) == [t ^ 1 for t in range(64)]
