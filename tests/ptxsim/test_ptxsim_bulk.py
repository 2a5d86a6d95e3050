"""Bulk copies that finish later, and bulk prefetches: cp.async.bulk, cp.async.bulk.prefetch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from async_copies import COPY, DONE, STORE, TILE, init, numbers, run, wait
from ptx_kernels import Tensor, faults, run_ptx

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
