"""Clusters: who is who, one another's shared memory, and the barrier of the cluster."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from ptx_kernels import faults, run_ptx

TILE = ".shared .align 16 .b8 tile[1024]; .shared .align 8 .b64 bar;"
SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
# %r9: the thread's word in its own block; %r8: the same word in the next block of the cluster.
PLACES = """
    mov.u32 %r9, tile; mad.lo.u32 %r9, %t, 4, %r9; mov.u32 %r20, %cluster_ctarank;
    mov.u32 %r21, %cluster_nctarank; add.u32 %r22, %r20, 1; rem.u32 %r22, %r22, %r21;
    mapa.shared::cluster.u32 %r8, %r9, %r22; setp.eq.u32 %p8, %r20, 0; setp.eq.u32 %p9, %t, 0;
"""
WRITE = "st.shared.u32 [%r9], %g;"
READ = "ld.shared::cluster.u32 %r1, [%r8]; st.global.u32 [%out_g], %r1;"


def run(body: str, *, blocks: int = 4, cluster: int = 2, block: int = 64, **more: Any) -> list[int]:
    """What every thread stores into `out`."""
    out = np.zeros(blocks * block, np.uint32)
    run_ptx(PLACES + body, grid=blocks, cluster=cluster, block=block, declare=TILE, out=out, **more)
    values: list[int] = out.tolist()
    return values


def of_next_block(blocks: int = 4, cluster: int = 2, block: int = 64) -> list[int]:
    """The number of the thread in the same place of the next block of the cluster."""
    return [
        (b // cluster * cluster + (b + 1) % cluster) * block + t
        for b, t in product(range(blocks), range(block))
    ]


SPECIALS = [
    *(f"%{name}.{axis}" for axis in "xyz" for name in
      ("clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid", "ctaid")),
    "%cluster_ctarank", "%cluster_nctarank",
]  # fmt: skip


@pytest.mark.parametrize("name", SPECIALS)
def test_special_registers(name: str) -> None:
    grid, cluster = (4, 6, 2), (2, 3, 1)
    out = np.zeros(48 * 32, np.uint32)
    run_ptx(
        f"""mov.u32 %r2, %ctaid.z; mov.u32 %r3, %ctaid.y; mad.lo.u32 %r2, %r2, 6, %r3;
        mad.lo.u32 %r2, %r2, 4, %b; mad.lo.u32 %r2, %r2, 32, %t; mul.wide.u32 %rd1, %r2, 4;
        add.u64 %rd1, %out, %rd1; mov.u32 %r1, {name}; st.global.u32 [%rd1], %r1;""",
        grid=grid, cluster=cluster, out=out,
    )  # fmt: skip
    expected = []
    for z, y, x in product(range(2), range(6), range(4)):
        value = {
            "%clusterid.x": x // 2, "%clusterid.y": y // 3, "%clusterid.z": z,
            "%nclusterid.x": 2, "%nclusterid.y": 2, "%nclusterid.z": 2,
            "%cluster_ctaid.x": x % 2, "%cluster_ctaid.y": y % 3, "%cluster_ctaid.z": 0,
            "%cluster_nctaid.x": 2, "%cluster_nctaid.y": 3, "%cluster_nctaid.z": 1,
            "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z,
            "%cluster_ctarank": x % 2 + 2 * (y % 3), "%cluster_nctarank": 6,
        }[name]  # fmt: skip
        expected += [value] * 32
    assert out.tolist() == expected


@pytest.mark.parametrize("cluster", [1, 2])
def test_a_kernel_knows_whether_it_runs_in_clusters(cluster: int) -> None:
    out = np.zeros(64, np.uint32)
    run_ptx(
        "mov.pred %p1, %is_explicit_cluster; selp.u32 %r1, 1, 0, %p1; st.global.u32 [%out_g], %r1;",
        grid=2, cluster=cluster, out=out,
    )  # fmt: skip
    assert (out == (cluster > 1)).all()


# One another's memory


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_blocks_read_one_anothers_memory(cluster: int) -> None:
    assert run(f"{WRITE} {SYNC} {READ} {SYNC}", cluster=cluster) == of_next_block(cluster=cluster)


def test_blocks_write_into_one_anothers_memory() -> None:
    body = f"""
        st.shared::cluster.u32 [%r8], %g; {SYNC} ld.shared.u32 %r1, [%r9];
        st.global.u32 [%out_g], %r1;
    """
    assert run(body) == of_next_block()


def test_a_generic_address_reaches_another_block() -> None:
    body = f"""
        {WRITE} {SYNC} cvt.u64.u32 %rd1, %r9; cvta.shared.u64 %rd1, %rd1; mapa.u64 %rd2, %rd1, %r22;
        ld.u32 %r1, [%rd2]; getctarank.u64 %r2, %rd2; getctarank.u64 %r3, %rd1;
        mad.lo.u32 %r1, %r2, 1000, %r1; mad.lo.u32 %r1, %r3, 10000, %r1;
        st.global.u32 [%out_g], %r1; {SYNC}
    """
    ranks = [1000 * ((b + 1) % 2) + 10000 * (b % 2) for b in range(4) for _ in range(64)]
    assert run(body) == [v + r for v, r in zip(of_next_block(), ranks, strict=True)]


def test_getctarank_of_a_shared_address() -> None:
    body = """
        getctarank.shared::cluster.u32 %r1, %r8; getctarank.shared::cluster.u32 %r2, %r9;
        mad.lo.u32 %r1, %r2, 10, %r1; st.global.u32 [%out_g], %r1;
    """
    assert run(body, races=False) == ([1] * 64 + [10] * 64) * 2


def test_a_plain_shared_address_is_the_blocks_own() -> None:
    body = f"{WRITE} ld.shared::cluster.u32 %r1, [%r9]; st.global.u32 [%out_g], %r1;"
    assert run(body) == list(range(256))


@pytest.mark.parametrize("scope", ["cluster", "gpu"], ids=["of the cluster", "of the device"])
def test_atomics_on_the_memory_of_another_block(scope: str) -> None:
    """All threads of the cluster count in block 0."""
    body = f"""
        setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [tile], 0; {SYNC} mov.u32 %r2, tile;
        mapa.shared::cluster.u32 %r2, %r2, 0;
        atom.relaxed.{scope}.shared::cluster.add.u32 %r3, [%r2], 1; {SYNC}
        ld.shared::cluster.u32 %r1, [%r2]; st.global.u32 [%out_g], %r1; {SYNC}
    """
    assert run(body, blocks=8, cluster=4) == [256] * 512


# What is a fault


@pytest.mark.parametrize(
    ("body", "essential"),
    [
        ("mapa.shared::cluster.u32 %r1, %r9, 2;", "mapa: block 2 of a cluster of 2"),
        ("mov.u64 %rd1, 0; mapa.u64 %rd1, %rd1, %r21;", "mapa: block 2 of a cluster of 2"),
        (f"ld.shared::cluster.u32 %r1, [{3 << 24}];", "outside the cluster"),
        ("ld.shared::cluster.u32 %r1, [%r8+2048];", "outside the block's 1032 bytes"),
        ("atom.shared::cluster.add.u32 %r1, [%r8+2048], 1;", "outside the block's 1032 bytes"),
        (f"atom.shared::cluster.add.u32 %r1, [{3 << 24}], 1;", "outside the cluster"),
        (f"st.release.cluster.shared::cluster.u32 [{3 << 24}], 1;", "outside the cluster"),
        ("ld.shared.u32 %r1, [%r8];", "outside the block's 1032 bytes"),
        ("ld.shared::cluster.u32 %r1, [%r8+2];", "not a multiple of 4"),
        ("ld.shared::cluster.u32 %r1, [%r8];", "never written"),
        ("mov.u32 %r2, tile; mapa.shared::cluster.u32 %r2, %r2, %r22; "
         "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];", "was not initialised"),
    ],
)  # fmt: skip
def test_faults(body: str, essential: str) -> None:
    name = body.split(";")[-2].split()[0]
    with faults(essential, r"block \(0, 0, 0\), warp 0, lane 0", f"`{name}` at PTX line"):
        run(body)


@pytest.mark.parametrize(
    ("body", "essential"),
    [
        (f"{WRITE} {READ}", "race: reads what another thread wrote"),
        (f"{WRITE} bar.sync 0; {READ}", "race: reads what another thread wrote"),
        (f"{WRITE} st.shared::cluster.u32 [%r8], %g;",
         "race: writes over what another thread wrote"),
        (f"{WRITE} {SYNC} {READ} {WRITE}", "race: writes what another thread reads"),
        (f"{WRITE} barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned; "
         f"{READ}",
         "race: reads what another thread wrote"),
        (f"{WRITE} barrier.cluster.arrive.release.aligned; barrier.cluster.wait.relaxed.aligned; "
         f"{READ}",
         "race: reads what another thread wrote"),
        (f"barrier.cluster.arrive.release.aligned; {WRITE} barrier.cluster.wait.acquire.aligned; "
         f"{READ}",
         "race: reads what another thread wrote"),
    ],
    ids=["no barrier", "barrier of the block", "both write", "write after read", "relaxed arrival",
         "relaxed wait", "write after the arrival"],
)  # fmt: skip
def test_blocks_of_a_cluster_race(body: str, essential: str) -> None:
    with faults(essential, r"block \(0, 0, 0\)", r"block \(1, 0, 0\)"):
        run(body + SYNC)


@pytest.mark.parametrize(
    "fine",
    [
        SYNC,
        "barrier.cluster.arrive; barrier.cluster.wait;",
        "barrier.cluster.arrive.aligned; barrier.cluster.wait.acquire.aligned;",
    ],
)
def test_the_barrier_of_the_cluster_orders_them(fine: str) -> None:
    body = f"{WRITE} {fine} {READ} {fine} {WRITE} {fine} {READ} {fine}"
    assert run(body) == of_next_block()


def test_the_barrier_of_the_cluster_orders_the_lanes_of_a_warp_too() -> None:
    body = f"""
        {WRITE} {SYNC} xor.b32 %r1, %t, 1; mov.u32 %r2, tile; mad.lo.u32 %r2, %r1, 4, %r2;
        ld.shared.u32 %r1, [%r2]; st.global.u32 [%out_g], %r1;
    """
    assert run(body) == [g ^ 1 for g in range(256)]


@pytest.mark.parametrize(
    ("before", "after", "fine"),
    [
        ("cluster", "cluster", True),
        ("gpu", "sys", True),
        ("cta", "cluster", False),
        ("cluster", "cta", False),
    ],
)
def test_fences_make_a_relaxed_barrier_order(before: str, after: str, fine: bool) -> None:
    body = f"""
        {WRITE} fence.acq_rel.{before}; barrier.cluster.arrive.relaxed.aligned;
        barrier.cluster.wait.relaxed.aligned; fence.acq_rel.{after}; {READ} {SYNC}
    """
    if fine:
        assert run(body) == of_next_block()
    else:
        with faults("race: reads what another thread wrote"):
            run(body)


def test_work_between_arrival_and_wait_goes_on() -> None:
    body = f"""
        {WRITE} barrier.cluster.arrive.release.aligned; add.u32 %r2, %t, 1; mul.lo.u32 %r2, %r2, 3;
        barrier.cluster.wait.acquire.aligned; {READ} {SYNC}
    """
    assert run(body) == of_next_block()


def test_blocks_that_come_late_to_the_barrier_are_waited_for() -> None:
    body = f"""
        {WRITE} mov.u32 %r2, 0; @%p8 bra MEET; LATE: add.u32 %r2, %r2, 1;
        setp.lt.u32 %p2, %r2, 20; @%p2 bra LATE; MEET: {SYNC} {READ} {SYNC}
    """
    assert run(body) == of_next_block()


def test_threads_that_have_exited_count_as_arrived() -> None:
    """Also those that exit while the others wait."""
    late = """
        @!%p1 bra GO; mov.u32 %r2, 0; L: add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 9; @%p2 bra L;
        ret; GO:
    """
    for guard in ("@%p1 ret;", late):
        body = f"{WRITE} setp.ge.u32 %p1, %t, 40; {guard} {SYNC} {READ} {SYNC}"
        found = run(body)
        assert found == [v if i % 64 < 40 else 0 for i, v in enumerate(of_next_block())]


@pytest.mark.parametrize(
    ("body", "essential"),
    [
        ("barrier.cluster.wait;", "barrier.cluster.wait without an arrival"),
        (f"{SYNC} barrier.cluster.wait;", "barrier.cluster.wait without an arrival"),
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "arrives twice without having waited"),
        ("@%p8 barrier.cluster.arrive; @%p8 barrier.cluster.wait; bar.sync 0, 64; @!%p8 bra L; "
         "bra E; L: bra L; E:",
         "no end after"),
        ("@%p8 bra A; bar.sync 3; bra B; A: barrier.cluster.arrive; barrier.cluster.wait; B:",
         "unbalanced|deadlock|^"),
    ],
)  # fmt: skip
def test_faults_at_the_barrier_of_the_cluster(body: str, essential: str) -> None:
    if essential.endswith("^"):
        run(body)  # the blocks of odd rank exit, and with that they arrive
        return
    with faults(essential, "block"):
        run(body, max_steps=5000)


def test_a_block_that_waits_elsewhere_is_a_deadlock() -> None:
    with faults(
        "deadlock", r"96 threads, first block \(0, 0, 0\), warp 0, lane 0, wait for the barrier "
                    r"of the",
        "32 threads, first block \\(1, 0, 0\\), warp 0, lane 0, wait for barrier 1",
    ):  # fmt: skip
        run(
            """@%p8 bra A; setp.eq.u32 %p1, %warp, 1; @%p1 bra A; bar.sync 1, 64; bra B;
            A: barrier.cluster.arrive; barrier.cluster.wait; B:""",
            blocks=2,
        )


# Leaving


@pytest.mark.parametrize(
    ("access", "verb"),
    [
        ("ld.shared::cluster.u32 %r1, [%r8];", "reads"),
        ("st.shared::cluster.u32 [%r8+256], %g;", "(writes|wrote)"),
        ("atom.shared::cluster.add.u32 %r1, [%r8], 1;", "(writes|updates)"),
    ],
)
def test_a_block_may_not_exit_before_others_are_done_with_its_memory(
    access: str, verb: str
) -> None:
    body = f"{WRITE} {SYNC} {access}"
    run(f"{body} {SYNC}")
    with faults(
        f"race: exits while another thread {verb}",
        r"block \(0, 0, 0\)",
        r"block \(1, 0, 0\)",
        "`ret`",
    ):
        run(body)


def test_faults_on_the_memory_of_a_block_that_has_exited() -> None:
    body = f"""
        {WRITE} {SYNC} @%p8 bra LATE; ret; LATE: mov.u32 %r2, 0; L: add.u32 %r2, %r2, 1;
        setp.lt.u32 %p2, %r2, 9; @%p2 bra L; {READ}
    """
    with faults("to a block that has exited", r"by block \(0, 0, 0\)", "`ld.shared::cluster.u32`"):
        run(body, races=False)


def test_one_thread_may_learn_that_the_others_are_done() -> None:
    """Block 1 tells block 0 through an mbarrier; thread 0 of it waits, the others exit."""
    body = f"""
        @%p9 mbarrier.init.shared.b64 [bar], 64; {WRITE} {SYNC} @%p8 bra WAITS;
        ld.shared::cluster.u32 %r1, [%r8]; st.global.u32 [%out_g], %r1; mov.u32 %r2, bar;
        mapa.shared::cluster.u32 %r2, %r2, 0;
        mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2]; ret;
        WAITS: @!%p9 ret;
        W: mbarrier.try_wait.parity.acquire.cluster.shared.b64 %p1, [bar], 0; @!%p1 bra W;
    """
    found = run(body, blocks=2)
    assert found[64:] == list(range(64))


# mbarriers and bulk copies across the cluster


@pytest.mark.parametrize("wait", ["acquire.cluster.", "", "relaxed.cluster."])
def test_a_block_tells_another_that_its_data_is_there(wait: str) -> None:
    body = f"""
        @%p9 mbarrier.init.shared.b64 [bar], 64; {SYNC} st.shared::cluster.u32 [%r8], %g;
        mov.u32 %r2, bar; mapa.shared::cluster.u32 %r2, %r2, %r22;
        mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];
        W: mbarrier.try_wait.parity.{wait}shared.b64 %p1, [bar], 0; @!%p1 bra W;
        ld.shared.u32 %r1, [%r9]; st.global.u32 [%out_g], %r1; {SYNC}
    """
    if wait.startswith("relaxed"):
        with faults("race: reads what another thread wrote", "block"):
            run(body)
    else:
        assert run(body) == of_next_block()


ACROSS = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"


def across(copy: str, expect: int = 256, barrier: str = "bar.sync 0;") -> str:
    """Each block sends 256 bytes to the next one."""
    return f"""
        @%p9 mbarrier.init.shared.b64 [bar], 1; {WRITE} {SYNC}
        @%p9 mbarrier.arrive.expect_tx.shared.b64 _, [bar], {expect};
        mov.u32 %r2, bar; mapa.shared::cluster.u32 %r3, %r2, %r22; mov.u32 %r5, tile;
        mapa.shared::cluster.u32 %r4, %r5, %r22; {barrier} @%p9 {copy}
        W: mbarrier.try_wait.parity.acquire.cluster.shared.b64 %p1, [bar], 0; @!%p1 bra W;
        ld.shared.u32 %r1, [%r9+512]; st.global.u32 [%out_g], %r1; {SYNC}
    """


def test_a_bulk_copy_to_another_block() -> None:
    assert run(across(f"{ACROSS} [%r4+512], [%r5], 256, [%r3];")) == of_next_block()


@pytest.mark.parametrize(
    ("copy", "expect", "essential"),
    [
        (f"{ACROSS} [%r4+512], [%r5], 128, [%r3];", 256,
         "deadlock.*128 bytes from the end of phase 0"),
        (f"{ACROSS} [%r4+512], [%r5], 128, [%r3];", 128, "never written"),
        (f"{ACROSS} [%r4+512], [%r5+256], 256, [%r3];", 256, "never written"),
        (f"{ACROSS} [%r4+1024], [%r5], 256, [%r3];", 256, "outside the block's 1032 bytes"),
        (f"{ACROSS} [%r4+520], [%r5], 256, [%r3];", 256, "not a multiple of 16"),
        (f"{ACROSS} [%r4], [%r5], 256, [%r3];", 256, "under way|race"),
    ],
    ids=["too few bytes", "fewer bytes than read", "unwritten source", "bounds", "alignment",
         "over what is read"],
)  # fmt: skip
def test_faults_of_bulk_copies_to_another_block(copy: str, expect: int, essential: str) -> None:
    with faults(essential, "block"):
        run(across(copy, expect))


def test_a_bulk_copy_from_global_memory_to_another_block() -> None:
    x = np.arange(64, dtype=np.uint32)
    body = across(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4+512], [%x], 256, "
        "[%r3];"
    )
    assert run(body, x=x) == list(range(64)) * 4
