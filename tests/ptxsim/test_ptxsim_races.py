"""Races in shared memory, and the atomics and strong accesses that prevent them."""

from __future__ import annotations

import pytest
from ordering import LEADER, NEIGHBOUR, OTHER_WARP, OWN, READ, WRITE, run
from ptx_kernels import faults

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
