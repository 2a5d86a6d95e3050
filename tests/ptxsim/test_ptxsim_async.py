"""Copies that finish later: cp.async, its groups, and what waits for them."""

from __future__ import annotations

import numpy as np
import pytest
from async_copies import COPY, DONE, PLACES, STORE, TILE, numbers, run
from ptx_kernels import faults, refuses, run_ptx


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
