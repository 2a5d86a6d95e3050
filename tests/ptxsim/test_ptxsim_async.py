"""Copies that finish later, and the mbarriers that tell when: cp.async, mbarrier, cp.async.bulk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ptx_kernels import Tensor, faults, refuses, run_ptx

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


# cp.async


@pytest.mark.parametrize(
    ("copy", "size"),
    [
        ("cp.async.ca.shared.global", 4), ("cp.async.ca.shared.global", 8),
        ("cp.async.ca.shared.global", 16), ("cp.async.cg.shared.global", 16),
        ("cp.async.cg.shared::cta.global", 16), ("cp.async.cg.shared.global.L2::128B", 16),
        ("cp.async.ca.shared.global.L2::64B", 4),
    ],
)  # fmt: skip
def test_a_copy_brings_its_bytes(copy: str, size: int) -> None:
    word = {4: "b32 %r1", 8: "b64 %rd1", 16: "v4.b32 {%r1, %r2, %r3, %r4}"}[size]
    kind, registers = word.split(" ", 1)
    out = run(
        f"""{copy} [%r9], [%rd9], {size}; {DONE}
        ld.shared.{kind} {registers}, [%r9]; st.global.{kind} [%rd10], {registers};"""
    )
    assert (out.reshape(32, 16)[:, :size] == numbers().reshape(32, 16)[:, :size]).all()


@pytest.mark.parametrize("cache", ["ca", "cg"])
def test_a_cache_policy_is_taken(cache: str) -> None:
    out = run(
        f"""createpolicy.fractional.L2::evict_first.b64 %rd1, 1.0;
        cp.async.{cache}.shared.global.L2::cache_hint [%r9], [%rd9], 16, %rd1;
        cp.async.{cache}.shared.global.L2::cache_hint.L2::128B [%r9+512], [%rd9], 16, 16, %rd1;
        {DONE} {STORE}"""
    )
    assert (out == numbers()).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_bytes_past_the_source_size_are_zero(size: int) -> None:
    """Lane i copies i % (size + 1) bytes; the rest of the source need not be there."""
    x = np.full(512, 255, np.uint8)
    out = np.full(512, 9, np.uint8)
    run_ptx(
        f"""{PLACES} rem.u32 %r7, %t, {size + 1};
        cp.async.ca.shared.global [%r9], [%rd9], {size}, %r7; {DONE}
        mov.u32 %r6, 0; LOOP: add.u32 %r5, %r9, %r6; ld.shared.u8 %h1, [%r5];
        cvt.u64.u32 %rd1, %r6; add.u64 %rd1, %rd10, %rd1; st.global.u8 [%rd1], %h1;
        add.u32 %r6, %r6, 1; setp.lt.u32 %p1, %r6, {size}; @%p1 bra LOOP;""",
        declare=TILE, x=x, out=out,
    )  # fmt: skip
    for lane in range(32):
        length = lane % (size + 1)
        assert out[16 * lane : 16 * lane + size].tolist() == [255] * length + [0] * (size - length)


def test_a_copy_reads_no_more_than_its_source_size() -> None:
    """The last lane's source is 6 bytes long."""
    room = numbers()
    out = np.zeros(512, np.uint8)
    body = f"""{PLACES} setp.eq.u32 %p1, %t, 31; selp.u32 %r7, LENGTH, 16, %p1;
        cp.async.cg.shared.global [%r9], [%rd9], 16, %r7; {DONE} {STORE}"""
    run_ptx(body.replace("LENGTH", "6"), declare=TILE, x=room[:502], out=out)
    assert (out[:502] == room[:502]).all()
    assert not out[502:].any()
    with faults(
        "global access outside all tensors", "past the end of x|of x", "lane 31", "cp.async.cg"
    ):
        run_ptx(body.replace("LENGTH", "7"), declare=TILE, x=room[:502], out=out)


def test_a_copy_of_no_bytes_may_have_any_source() -> None:
    out = run(f"mov.u64 %rd9, 7; cp.async.cg.shared.global [%r9], [%rd9], 16, 0; {DONE} {STORE}")
    assert not out.any()


def test_a_source_may_be_ignored_by_a_predicate() -> None:
    out = run(
        f"""setp.lt.u32 %p1, %t, 16; @%p1 mov.u64 %rd9, 7;
        cp.async.cg.shared.global [%r9], [%rd9], 16, %p1; {DONE} {STORE}"""
    )
    assert not out[:256].any()
    assert (out[256:] == numbers()[256:]).all()


def test_only_guarded_lanes_copy() -> None:
    out = run(
        f"""mov.u32 %r7, 0; st.shared.v4.u32 [%r9], {{%r7, %r7, %r7, %r7}};
        setp.lt.u32 %p1, %t, 4; @%p1 {COPY} {DONE} {STORE}"""
    )
    assert (out[:64] == numbers()[:64]).all()
    assert not out[64:].any()


@pytest.mark.parametrize(
    "wait", ["cp.async.wait_all;", DONE, "cp.async.commit_group; cp.async.wait_all;"]
)
def test_ways_to_wait(wait: str) -> None:
    assert (run(f"{COPY} {wait} {STORE}") == numbers()).all()


def test_the_newest_groups_may_stay_under_way() -> None:
    """Three groups; each wait lets one less stay."""
    copies = "".join(
        f"cp.async.cg.shared.global [%r9+{512 * i}], [%rd9], 16; cp.async.commit_group;"
        for i in range(3)
    )
    read = "ld.shared.u32 %r1, [%r9+{}];"
    run(f"{copies} cp.async.wait_group 3; cp.async.wait_group 2; {read.format(0)}")
    run(f"{copies} cp.async.wait_group 1; {read.format(0)} {read.format(512)}")
    run(f"{copies} cp.async.wait_group 0; {read.format(1024)}")
    for newest, place in ((3, 0), (2, 512), (1, 1024)):
        with faults(
            "reads what an asynchronous copy has not finished writing",
            f"address {1024 + place:#x}",
            "lane 0", "`ld.shared.u32`",
        ):  # fmt: skip
            run(f"{copies} cp.async.wait_group {newest}; {read.format(place)}")


def test_empty_groups_count() -> None:
    empty = "cp.async.commit_group;"
    run(f"{COPY} {empty * 3} cp.async.wait_group 2; {STORE}")
    with faults("asynchronous copy has not finished"):
        run(f"{COPY} {empty * 2} cp.async.wait_group 2; {STORE}")


def test_each_thread_waits_for_its_own_copies() -> None:
    with faults("asynchronous copy has not finished", "lane 0", "address 0x500"):
        run(
            f"""{COPY} cp.async.commit_group; setp.lt.u32 %p1, %t, 16; @%p1 cp.async.wait_group 0;
            xor.b32 %r7, %r8, 256; mov.u32 %r6, tile; add.u32 %r7, %r7, %r6;
            ld.shared.u32 %r1, [%r7];"""
        )


def test_each_thread_commits_its_own_copies() -> None:
    with faults("asynchronous copy has not finished", "lane 16", "address 0x500"):
        run(
            f"""{COPY} setp.lt.u32 %p1, %t, 16; @%p1 cp.async.commit_group;
            cp.async.wait_group 0; {STORE}"""
        )


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync -1;"])
def test_what_another_thread_copied_needs_its_wait_and_a_barrier(barrier: str) -> None:
    body = f"""
        {COPY} {DONE} {barrier} xor.b32 %r7, %r8, 16; mov.u32 %r6, tile; add.u32 %r7, %r7, %r6;
        ld.shared.u32 %r1, [%r7];
    """
    if barrier:
        run(body)
    else:
        with faults("race: reads what another thread wrote", "warp 0, lane 0", "warp 0, lane 1"):
            run(body)


@pytest.mark.parametrize(
    ("body", "essential"),
    [
        (f"{COPY} {STORE}", "reads what an asynchronous copy has not finished writing"),
        (f"{COPY} cp.async.commit_group; {STORE}", "has not finished writing"),
        (f"{COPY} cp.async.wait_group 0; {STORE}", "has not finished writing"),
        (f"{COPY} st.shared.u32 [%r9+4], 1;", "writes where an asynchronous copy is under way"),
        (f"{COPY} {COPY}", "writes where an asynchronous copy is under way"),
        (f"{COPY} atom.shared.add.u32 %r1, [%r9], 1;", "has not finished writing"),
        (f"{COPY} ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r9];",
         "has not finished writing"),
    ],
    ids=["no wait", "no wait but a commit", "no commit", "store over", "copy over", "atomic",
         "ldmatrix"],
)  # fmt: skip
@pytest.mark.parametrize("races", [True, False])
def test_faults_on_what_is_under_way(body: str, essential: str, races: bool) -> None:
    with faults(essential, "warp 0, lane 0", r"address 0x40\d"):
        run(body, races=races)


def test_the_memory_can_be_used_again_when_the_copy_is_done() -> None:
    out = run(f"{COPY} {DONE} {STORE} st.shared.u32 [%r9], 5; {COPY} {DONE} {STORE}")
    assert (out == numbers()).all()


def test_a_ring_of_two_stages() -> None:
    """Each turn copies into one stage and adds up the other one."""
    x, out = np.arange(32 * 8, dtype=np.uint32), np.zeros(32, np.uint32)
    body = """
        mov.u32 %r9, tile; shl.b32 %r8, %t, 2; add.u32 %r9, %r9, %r8; mov.u64 %rd9, %x_g;
        cp.async.ca.shared.global [%r9], [%rd9], 4; cp.async.commit_group;
        mov.u32 %r1, 0; mov.u32 %r2, 0;
        LOOP: add.u64 %rd9, %rd9, 128; xor.b32 %r9, %r9, 128; setp.lt.u32 %p1, %r1, 7;
        @%p1 cp.async.ca.shared.global [%r9], [%rd9], 4; cp.async.commit_group;
        cp.async.wait_group {newest}; xor.b32 %r7, %r9, 128; ld.shared.u32 %r3, [%r7];
        add.u32 %r2, %r2, %r3; add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 8; @%p2 bra LOOP;
        st.global.u32 [%out_g], %r2;
    """
    run_ptx(body.format(newest=1), declare=TILE, x=x, out=out)
    assert out.tolist() == x.reshape(8, 32).sum(axis=0).tolist()
    with faults("asynchronous copy has not finished"):
        run_ptx(body.format(newest=2), declare=TILE, x=x, out=out)


@pytest.mark.parametrize(
    ("copy", "essential"),
    [
        ("cp.async.cg.shared.global [%r9+8], [%rd9], 16;", "shared access not a multiple of 16"),
        ("cp.async.cg.shared.global [%r9], [%rd9+8], 16;", "global access not a multiple of 16"),
        ("cp.async.ca.shared.global [%r9], [%rd9+2], 4;", "global access not a multiple of 4"),
        ("cp.async.cg.shared.global [%r9], [%rd9+8], 16, 4;", "global access not a multiple of 16"),
        ("cp.async.cg.shared.global [%r9], [%rd9+512], 16;", "0 bytes past the end of x"),
        ("cp.async.cg.shared.global [%r9], [%rd9+-16], 16;", "16 bytes before x"),
        ("cp.async.cg.shared.global [%r9+-16], [%rd9], 16;", "outside the block's 4128 bytes"),
        ("cp.async.cg.shared.global [%r9+4128], [%rd9], 16;", "outside the block's 4128 bytes"),
        ("cp.async.cg.shared.global [%r9], [%rd9], 16, 17;", "source size 17; allowed: 0 to 16"),
        ("cp.async.cg.shared.global [%r9], [%rd9], 16, -1;", "source size -1; allowed: 0 to 16"),
        ("cp.async.cg.shared.global [tile], [%rd9], 16;", "race: writes with another thread"),
    ],
)  # fmt: skip
def test_faults_of_copies(copy: str, essential: str) -> None:
    name = copy.split()[0].replace(".", r"\.")
    with faults(essential, "block \\(0, 0, 0\\), warp 0", f"`{name}` at PTX line"):
        run(copy)


@pytest.mark.parametrize(
    "statement",
    [
        "cp.async.cg.shared.global [%r9], [%rd9], 8;",
        "cp.async.ca.shared.global [%r9], [%rd9], 12;",
        "cp.async.ca.shared.global [%r9], [%rd9], %r1;", "cp.async.ca.shared.global [%r9], [%rd9];",
        "cp.async.cx.shared.global [%r9], [%rd9], 16;",
        "cp.async.ca.global.shared [%rd9], [%r9], 16;",
        "cp.async.ca.shared.global.L3::128B [%r9], [%rd9], 16;", "cp.async.wait_group %r1;",
        "cp.async.bogus;", "cp.reduce.async.bulk [%r9], [%rd9], 16;",
        "mbarrier.bogus.b64 [%r9];", "mbarrier.arrive.bogus.shared.b64 %rd1, [%r9];",
        "mbarrier.init.shared.b64 [%r9];", "mbarrier.try_wait.bogus.shared.b64 %p1, [%r9], %r1;",
        "cp.async.bulk.shared::cluster.global.bulk_group [%r9], [%rd9], 16;",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%rd9], 16;",
        "cp.async.bulk.prefetch.L1.global [%rd9], 16;", "cp.async.bulk.prefetch.L2 [%rd9], 16;",
        "cp.async.bulk.prefetch.L2.shared [%rd9], 16;", "cp.async.bulk.prefetch.L2.global [%rd9];",
        "cp.async.bulk.prefetch.L2.global.L2::cache_hint [%rd9], 16;",
        "cp.async.bulk.prefetch.L2.global [%rd9], 16, %rd1;",
    ],
)  # fmt: skip
def test_refuses_unknown_forms(statement: str) -> None:
    name = statement.split()[0].rstrip(";")
    with refuses(rf"unknown .* in `{name}`|got ','"):
        run(statement)


# mbarrier

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


# cp.async.bulk

BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bars], {};"


@pytest.mark.parametrize(
    "copy",
    [
        f"@%p1 {BULK} [tile], [%x], 512, [bars];",
        f"@%p1 {BULK.replace('cluster', 'cta')} [tile], [%x], 512, [bars];",
        f"mov.u64 %rd7, 0; @%p1 {BULK}.L2::cache_hint [tile], [%x], 512, [bars], %rd7;",
        f"@%p1 {BULK} [tile], [%x], 256, [bars]; @%p1 {BULK} [tile+256], [%x+256], 256, [bars];",
        f"mov.u32 %r5, 16; setp.lt.u32 %p6, %t, 32; @%p6 {BULK} [%r9], [%rd9], %r5, [bars];",
    ],
    ids=["cluster", "cta", "policy", "two copies", "each lane"],
)
@pytest.mark.parametrize("when", ["expected before", "expected after"])
def test_a_bulk_copy_brings_its_bytes(copy: str, when: str) -> None:
    """Bytes may come before they are expected, as long as the phase cannot end."""
    expect = EXPECT.format(512)
    steps = f"{expect} {copy}" if when == "expected before" else f"{copy} {expect}"
    assert (run(f"{init(1)} {steps} {wait()} {STORE}", block=32) == numbers()).all()


def test_expecting_and_arriving_may_be_separate() -> None:
    body = f"""
        {init(1)} @%p1 mbarrier.expect_tx.relaxed.cta.shared.b64 [bars], 512;
        @%p1 {BULK} [tile], [%x], 512, [bars]; @%p1 mbarrier.arrive.shared.b64 _, [bars];
        {wait()} {STORE}
    """
    assert (run(body) == numbers()).all()


def test_bytes_may_be_completed_by_hand() -> None:
    run(
        f"""{init(1)} {EXPECT.format(64)}
        @%p1 mbarrier.complete_tx.relaxed.cta.shared.b64 [bars], 64; {wait()}"""
    )


@pytest.mark.parametrize(
    ("body", "essential"),
    [
        (f"{EXPECT.format(512)} @%p1 {BULK} [tile], [%x], 256, [bars]; {wait()}",
         "deadlock.*0 arrivals and 256 bytes from the end of phase 0"),
        (f"{EXPECT.format(0)} {wait()} @%p1 {BULK} [tile], [%x], 512, [bars]; {STORE}",
         "reads what an asynchronous copy has not finished writing"),
        (f"{EXPECT.format(1024)} @%p1 {BULK} [tile], [%x], 512, [bars]; {STORE}",
         "reads what an asynchronous copy has not finished writing"),
        (f"{EXPECT.format(1024)} @%p1 {BULK} [tile], [%x], 512, [bars]; st.shared.u32 [%r9], 1;",
         "writes where an asynchronous copy is under way"),
        (f"st.shared.u32 [%r9], 1; {EXPECT.format(512)} @%p1 {BULK} [tile], [%x], 512, [bars];",
         "race: writes over what another thread wrote"),
        (f"@%p1 {BULK} [tile], [%x], 8, [bars];", "8 bytes; allowed: positive multiples of 16"),
        (f"@%p1 {BULK} [tile], [%x], 0, [bars];", "0 bytes; allowed: positive multiples of 16"),
        (f"@%p1 {BULK} [tile+8], [%x], 16, [bars];", "shared access not a multiple of 16"),
        (f"@%p1 {BULK} [tile], [%x+8], 16, [bars];", "global access not a multiple of 16"),
        (f"@%p1 {BULK} [tile+4080], [%x], 512, [bars];", "outside the block's 4128 bytes"),
        (f"@%p1 {BULK} [tile], [%x+16], 512, [bars];", "0 bytes past the end of x"),
        (f"@%p1 {BULK} [tile], [%x], 512, [bars+8];", "mbarrier that was not initialised"),
        (f"{EXPECT.format(512)} @%p1 {BULK} [tile], [%x], 512, [bars]; setp.eq.u32 %p3, %t, 1; "
         "@%p3 ld.shared.u32 %r1, [tile];",
         "race: reads what an asynchronous copy wrote.*finished .one that completes on mbarrier "
         "0x1400 of block .0, 0, 0.*lane 1"),
        (f"{EXPECT.format(512)} @%p1 {BULK} [tile], [%x], 512, [bars]; "
         "@%p1 ld.shared.u32 %r1, [tile];",
         "race: reads what an asynchronous copy wrote.*lane 0"),
        (f"{EXPECT.format(512)} @%p1 {BULK} [tile], [%x], 512, [bars]; bar.sync 0; "
         "ld.shared.u32 %r1, [%r9];", "race: reads what an asynchronous copy wrote"),
        (f"{wait(1)} {EXPECT.format(512)} @%p1 {BULK} [tile], [%x], 512, [bars]; bar.sync 0; "
         "ld.shared.u32 %r1, [%r9];", "race: reads what an asynchronous copy wrote"),
        (f"{EXPECT.format(512)} @%p1 {BULK} [tile], [%x], 512, [bars]; bar.sync 0; "
         "st.shared.u32 [%r9], 1;", "race: writes over what an asynchronous copy wrote"),
        (f"@%p1 {BULK} [tile], [%x], 512, [bars+4];", "mbarrier not at a multiple of 8 bytes"),
    ],
    ids=["too few bytes", "phase already over", "read too early", "store over",
         "copy over unread store", "odd size", "no size", "target alignment", "source alignment",
         "target bounds", "source bounds", "no mbarrier", "no wait", "no wait by who copies",
         "a barrier alone", "wait for the phase before", "no wait before a store",
         "mbarrier alignment"],
)  # fmt: skip
def test_faults_of_bulk_copies(body: str, essential: str) -> None:
    with faults(essential, "block \\(0, 0, 0\\), warp 0"):
        run(f"{init(1)} {body}")


def test_lane_0_copies_for_its_own_warp_and_for_others() -> None:
    """In several phases, into the same memory, with a barrier before it is filled again."""
    x, out = np.arange(64 * 3, dtype=np.uint32), np.zeros(64, np.uint32)
    run_ptx(
        f"""{init(1)} mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u64 %rd1, %x; mov.u32 %r9, tile;
        mad.lo.u32 %r9, %t, 4, %r9;
        LOOP: {EXPECT.format(256)} @%p1 {BULK} [tile], [%rd1], 256, [bars]; and.b32 %r3, %r1, 1;
        {wait("%r3")} ld.shared.u32 %r4, [%r9]; add.u32 %r2, %r2, %r4; bar.sync 0;
        add.u64 %rd1, %rd1, 256; add.u32 %r1, %r1, 1; setp.lt.u32 %p3, %r1, 3; @%p3 bra LOOP;
        st.global.u32 [%out_g], %r2;""",
        block=64, declare=TILE, x=x, out=out,
    )  # fmt: skip
    assert out.tolist() == x.reshape(3, 64).sum(axis=0).tolist()


OUT = "cp.async.bulk.global.shared::cta.bulk_group"


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_bulk_copy_out_takes_what_the_block_wrote(barrier: str) -> None:
    body = f"""
        ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd9];
        st.shared.v4.u32 [%r9], {{%r1, %r2, %r3, %r4}};
        fence.proxy.async.shared::cta; {barrier} setp.eq.u32 %p1, %t, 0;
        @%p1 {OUT} [%out], [tile], 512; cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
    """
    if barrier:
        assert (run(body) == numbers()).all()
    else:
        with faults("race: reads what another thread wrote", "lane 0", "lane 1", "cp.async.bulk"):
            run(body)


@pytest.mark.parametrize(
    ("copy", "essential"),
    [
        (f"{OUT} [%out], [tile], 512;", "never written"),
        (f"{OUT} [%out], [tile+8], 16;", "shared access not a multiple of 16"),
        (f"{OUT} [%out+8], [tile+1024], 16;", "global access not a multiple of 16"),
        (f"{OUT} [%out+512], [tile+1024], 16;", "0 bytes past the end of out"),
        (f"{OUT} [%out], [tile+1024], 24;", "24 bytes; allowed: positive multiples of 16"),
    ],
)
def test_faults_of_bulk_copies_out(copy: str, essential: str) -> None:
    with faults(essential, "lane 0", "cp.async.bulk.global"):
        run(
            f"""setp.eq.u32 %p1, %t, 0; mov.u32 %r1, 1;
            @%p1 st.shared.v4.u32 [tile+1024], {{%r1, %r1, %r1, %r1}}; @%p1 {copy}"""
        )


# cp.async.bulk.prefetch

PREFETCH = "cp.async.bulk.prefetch.L2.global"


@pytest.mark.parametrize(
    "prefetch",
    [
        f"{PREFETCH} [%x], 512;",
        f"{PREFETCH} [%x+496], 16;",
        f"mov.u64 %rd7, 0; {PREFETCH}.L2::cache_hint [%x], 512, %rd7;",
        f"mov.u32 %r5, 16; setp.lt.u32 %p6, %t, 32; @%p6 {PREFETCH} [%rd9], %r5;",
    ],
    ids=["whole", "end", "policy", "each lane"],
)
def test_a_prefetch_leaves_everything_as_it_is(prefetch: str) -> None:
    """What a copy brings meanwhile, too."""
    assert (run(f"{COPY} {prefetch} {DONE} {STORE}") == numbers()).all()


@pytest.mark.parametrize(
    ("read", "races"),
    [(f"{PREFETCH} [%x], 128;", False), ("ld.global.u32 %r1, [%x];", True)],
    ids=["prefetch", "load"],
)
def test_what_is_prefetched_may_be_written_meanwhile(read: str, races: bool) -> None:
    body = f"""
        setp.eq.u32 %p1, %b, 1; @%p1 bra OTHER; {read} ret; OTHER: st.global.u32 [%x_g+-128], 7;
    """
    x = np.zeros(32, np.uint32)
    if races:
        with faults("race in global memory"):
            run_ptx(body, grid=2, x=x)
    else:
        run_ptx(body, grid=2, x=x)
        assert (x == 7).all()


@pytest.mark.parametrize(
    ("prefetch", "essential"),
    [
        ("[%x], 8;", "8 bytes; allowed: positive multiples of 16"),
        ("[%x], 0;", "0 bytes; allowed: positive multiples of 16"),
        ("[%x+8], 16;", "global access not a multiple of 16 bytes; at byte 8 of x"),
        ("[%x+16], 512;", "global access outside all tensors; 0 bytes past the end of x"),
        ("[%x+-16], 32;", "global access outside all tensors; 16 bytes before x"),
        ("[%rd5], 16;", "global access outside all tensors"),
    ],
    ids=["odd size", "no size", "alignment", "end", "start", "shared memory"],
)
def test_faults_of_prefetches(prefetch: str, essential: str) -> None:
    with faults(essential, "block \\(0, 0, 0\\), warp 0, lane 9", f"`{PREFETCH}` at PTX line"):
        run(
            f"""mov.u64 %rd5, tile; cvta.shared.u64 %rd5, %rd5; setp.eq.u32 %p1, %t, 9;
            @%p1 {PREFETCH} {prefetch}"""
        )


@pytest.mark.parametrize(
    ("x", "essential"),
    [
        (np.zeros((4, 64), np.uint8)[:, :48], "outside all tensors; at byte 48 of x"),
        (Tensor(np.zeros(64, np.uint8), readable=False), "not to be read; at byte 0 of x"),
        (Tensor(np.zeros(64, np.uint8), fresh=True), "never written before; at byte 0 of x"),
    ],
    ids=["gap between rows", "not readable", "never written"],
)
def test_only_what_may_be_read_may_be_prefetched(x: Any, essential: str) -> None:
    with faults(essential, PREFETCH):
        run_ptx(f"{PREFETCH} [%x], 64;", x=x)
