"""Barriers, and the races that they prevent: in shared memory and between blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ptx_kernels import Tensor, faults, refuses, run_ptx

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


# Races in shared memory


@pytest.mark.parametrize(
    ("first", "second", "essential"),
    [
        ("st.shared.u32 [%r9], %t;", "ld.shared.u32 %r3, [%r8];",
         "race: reads what another thread wrote"),
        ("ld.shared.u32 %r3, [%r8];", "st.shared.u32 [%r9], %t;",
         "race: writes what another thread reads"),
        ("st.shared.u32 [%r9], %t;", "st.shared.u32 [%r8], %t;",
         "race: writes over what another thread wrote"),
    ],
    ids=["read after write", "write after read", "write after write"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("where", "other", "barriers"),
    [
        (OTHER_WARP, r"warp [01], lane 0\)", ["bar.sync 0;"]),
        (NEIGHBOUR, r"warp 0, lane 1\)", ["bar.sync 0;", "bar.warp.sync -1;"]),
    ],
    ids=["other warp", "other lane"],
)
def test_two_accesses_race_unless_a_barrier_is_between(
    where: str, other: str, barriers: list[str], first: str, second: str, essential: str
) -> None:
    prepare = f"{where} {WRITE} bar.sync 0; bar.warp.sync -1;"
    with faults(
        essential,
        other,
        "by block \\(0, 0, 0\\), warp [01], lane 0",
        f"`{second[:13]}`",
        "address 0x4",
    ):
        run(f"{prepare} {first} {second}")
    for barrier in barriers:
        run(f"{prepare} {first} {barrier} {second}")


def test_a_barrier_of_the_warp_does_not_order_warps() -> None:
    with faults("race: reads what another thread wrote", "warp 1"):
        run(f"{OTHER_WARP} {WRITE} bar.warp.sync -1; {READ}")


@pytest.mark.parametrize("lanes", ["of one warp", "of two warps"])
def test_two_threads_that_write_the_same_word_at_once_race(lanes: str) -> None:
    guard = "@%p1" if lanes == "of two warps" else ""
    with faults("race: writes with another thread|race: writes over what another thread wrote"):
        run(f"setp.eq.u32 %p1, %lane, 0; {guard} st.shared.u32 [tile], 1;")


def test_a_shuffle_does_not_order_shared_memory() -> None:
    with faults("race: reads what another thread wrote"):
        run(f"{NEIGHBOUR} {WRITE} shfl.sync.idx.b32 %r4, %t, 0, 31, -1; {READ}")


def test_without_the_check_races_pass() -> None:
    run(f"{OTHER_WARP} {WRITE} {READ}", races=False)


def test_a_thread_may_use_its_own_memory_again_and_again() -> None:
    body = f"{OWN} {WRITE} ld.shared.u32 %r3, [%r9]; add.u32 %r3, %r3, 1; st.shared.u32 [%r9], %r3;"
    found = run(f"{body} {body} ld.shared.u32 %r3, [%r9]; st.global.u32 [%out_g], %r3;")
    assert found == [t + 1 for t in range(64)]


def test_all_threads_may_read_the_same_word() -> None:
    body = f"{LEADER.format('OVER')} st.shared.u32 [tile], 7; OVER: bar.sync 0;"
    reads = "ld.shared.u32 %r3, [tile];" * 3
    assert run(f"{body} {reads} st.global.u32 [%out_g], %r3;") == [7] * 64


def test_readers_of_several_warps_and_epochs_are_all_remembered() -> None:
    """The word is read by both warps and, after a barrier of the warp, by one again."""
    with faults("race: writes what another thread reads", "warp 1, lane"):
        run(
            f"""{LEADER.format("OVER")} st.shared.u32 [tile], 7; OVER: bar.sync 0;
            ld.shared.u32 %r3, [tile]; bar.warp.sync -1; setp.eq.u32 %p2, %warp, 0;
            @%p2 ld.shared.u32 %r3, [tile]; bar.warp.sync -1; setp.eq.u32 %p3, %t, 0;
            @%p3 st.shared.u32 [tile], 8;"""
        )


@pytest.mark.parametrize("width", ["u8", "u16", "u32", "u64"])
def test_neighbouring_pieces_of_a_word_do_not_race(width: str) -> None:
    """Each warp has pieces of its own, and lane 0 of warp 0 also stores 16 bytes elsewhere."""
    size = int(width[1:]) // 8
    register = {1: "%h1", 2: "%h1", 4: "%r4", 8: "%rd4"}[size]
    run(
        f"""mov.u32 %r9, tile; mad.lo.u32 %r9, %t, {size}, %r9; mov.u32 %r4, 1; mov.u64 %rd4, 1;
        mov.u16 %h1, 1; st.shared.{width} [%r9], {register}; ld.shared.{width} {register}, [%r9];
        setp.eq.u32 %p1, %t, 0; @%p1 st.shared.v4.u32 [tile+1008], {{1, 2, 3, 4}};"""
    )


def test_the_halves_of_a_word_are_told_apart_by_the_narrowest_access() -> None:
    """Warp 0 writes the low halves 16 bits at a time, warp 1 reads the high ones."""
    run(
        """setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [tile], 0; bar.sync 0; mov.u16 %h1, 5;
        @%p1 st.shared.u16 [tile], %h1;
        setp.eq.u32 %p2, %t, 32; @%p2 ld.shared.u16 %h2, [tile+2];"""
    )


def test_a_wide_read_races_with_a_write_of_its_last_byte() -> None:
    with faults("race: reads what another thread wrote", "address 0x40f", "warp 1, lane 0"):
        run(
            """setp.eq.u32 %p1, %t, 0; @%p1 st.shared.v4.u32 [tile], {1, 2, 3, 4}; bar.sync 0;
            mov.u16 %h1, 5; setp.eq.u32 %p2, %t, 32; @%p1 st.shared.u8 [tile+15], %h1;
            @%p2 ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [tile];"""
        )


# Atomics and strong accesses in shared memory

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


@pytest.mark.parametrize("how", ORDERED)
def test_a_flag_orders_what_was_written_before(how: str) -> None:
    send, receive, after = ORDERED[how]
    assert run(FLAG.format(send=send, receive=receive, after=after))[0] == 7


@pytest.mark.parametrize("how", NOT_ORDERED)
def test_a_flag_does_not_order_what_was_written_before(how: str) -> None:
    send, receive, after = NOT_ORDERED[how]
    with faults(
        "race: reads what another thread wrote", "address 0x404", "warp 0, lane 0", "warp 1, lane 0"
    ):
        run(FLAG.format(send=send, receive=receive, after=after))


def test_a_plain_flag_is_itself_a_race() -> None:
    with faults(
        "race: reads what another thread wrote|race: writes what another thread reads",
        "address 0x400",
    ):
        run(
            FLAG.format(
                send="st.shared.u32 [tile], 1;", receive="ld.shared.u32 %r4, [tile];", after=""
            )
        )


def test_atomics_on_the_same_cell_do_not_race() -> None:
    body = """
        setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [tile], 0; bar.sync 0;
        red.shared.add.u32 [tile], 1; atom.shared.add.u32 %r3, [tile], 2; bar.sync 0;
        ld.shared.u32 %r3, [tile]; st.global.u32 [%out_g], %r3;
    """
    assert run(body) == [3 * 64] * 64


def test_an_atomic_races_with_the_write_that_began_its_cell() -> None:
    with faults("race: atomic on what another thread wrote", "warp 1, lane 0", "warp 0, lane 0"):
        run(
            """setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [tile], 0; setp.eq.u32 %p2, %t, 32;
            @%p2 atom.shared.add.u32 %r3, [tile], 2;"""
        )


def test_an_atomic_races_with_a_plain_read() -> None:
    with faults("race", "address 0x400", "warp"):
        run(
            """setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [tile], 0; bar.sync 0;
            setp.eq.u32 %p2, %t, 32; @%p1 red.shared.add.u32 [tile], 1;
            @%p2 ld.shared.u32 %r3, [tile];"""
        )


@pytest.mark.usefixtures("impatient")
def test_each_lane_may_wait_for_a_flag_of_its_own() -> None:
    """Lane i learns of warp 1's lane i at another time than the other lanes; then they meet."""
    body = f"""
        {OWN} mov.u32 %r4, 0; st.shared.u32 [%r9], 0; st.shared.u32 [%r9+256], %t; bar.sync 0;
        setp.eq.u32 %p1, %warp, 1; @%p1 bra SEND;
        WAIT: ld.acquire.cta.shared.u32 %r5, [%r9+128]; setp.eq.u32 %p2, %r5, 0; @%p2 bra WAIT;
        {{more}} xor.b32 %r6, %t, {{other}}; shl.b32 %r6, %r6, 2; mov.u32 %r7, tile;
        add.u32 %r7, %r7, %r6; ld.shared.u32 %r3, [%r7+384]; st.global.u32 [%out_g], %r3; bra END;
        SEND: st.shared.u32 [%r9+256], 5;
        and.b32 %r6, %lane, 3;
        L: add.u32 %r4, %r4, 1; setp.le.u32 %p2, %r4, %r6; @%p2 bra L;
        st.release.cta.shared.u32 [%r9], 1; END:
    """
    assert run(body.format(more="", other=0))[:32] == [5] * 32
    assert run(body.format(more="bar.warp.sync -1;", other=1))[:32] == [5] * 32
    with faults("race: reads what another thread wrote", "warp 1, lane 1"):
        run(body.format(more="", other=1))


# Races in global memory

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
