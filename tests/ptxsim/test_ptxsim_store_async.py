"""st.async: stores that complete on an mbarrier, and how blocks of a cluster use them."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from ptx_kernels import Tensor, faults, refuses, run_ptx

from gqa_cutlass.codegen.compile import compile_source
from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.simulate import simulate
from gqa_cutlass.ptxsim.text.ptx import parse

BLOCK = 64
TILE = ".shared .align 16 .b8 tile[2048]; .shared .align 8 .b64 bars[2];"
SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
# Thread 0 initialises; nobody else is told but by the barrier of the cluster.
INIT = """
    setp.eq.u32 %p9, %t, 0; @%p9 mbarrier.init.shared.b64 [bars], 1;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;
"""
# %r9: 16 bytes of the thread in its own block. %r8 and %r7: in the next block of the cluster, its
# 16 bytes of this thread's and its mbarrier.
PLACES = """
    mov.u32 %r9, tile; shl.b32 %r6, %t, 4; add.u32 %r9, %r9, %r6; mov.u32 %r20, %cluster_ctarank;
    mov.u32 %r21, %cluster_nctarank; add.u32 %r22, %r20, 1; rem.u32 %r22, %r22, %r21;
    mov.u32 %r5, bars; mapa.shared::cluster.u32 %r8, %r9, %r22;
    mapa.shared::cluster.u32 %r7, %r5, %r22; setp.eq.u32 %p8, %r20, 0;
"""
ST = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
STORE = f"{ST}.u32 [%r8], %g, [%r7];"
EXPECT = "@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [bars], {};"
SIZE = 4 * BLOCK
WAIT = """
    W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [bars], 0; @!%p1 bra W;
"""
READ = "ld.shared.u32 %r1, [%r9]; st.global.u32 [%out_g], %r1;"


def run(body: str, *, blocks: int = 4, cluster: int = 2, **more: Any) -> list[int]:
    """What every thread stores into `out`."""
    out = np.zeros(blocks * BLOCK, np.uint32)
    run_ptx(PLACES + body, grid=blocks, cluster=cluster, block=BLOCK, declare=TILE, out=out, **more)
    values: list[int] = out.tolist()
    return values


def of_block_before(blocks: int = 4, cluster: int = 2) -> list[int]:
    """The number of the thread in the same place of the block before in the cluster."""
    return [
        (b // cluster * cluster + (b - 1) % cluster) * BLOCK + t
        for b, t in product(range(blocks), range(BLOCK))
    ]


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_blocks_hand_on_their_numbers(cluster: int) -> None:
    """A cluster of one block stores into its own memory."""
    body = f"{INIT} {EXPECT.format(SIZE)} {STORE} {WAIT} {READ}"
    assert run(body, cluster=cluster) == of_block_before(cluster=cluster)


def test_no_barrier_is_needed_before_the_exit() -> None:
    """Who has waited for all that comes may go: nobody touches its memory any more."""
    late = """
        @!%p8 bra GO; mov.u32 %r2, 0; L: add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 50;
        @%p2 bra L; GO:
    """
    body = f"{INIT} {EXPECT.format(SIZE)} {STORE} {WAIT} {late} {READ}"
    assert run(body) == of_block_before()


@pytest.mark.parametrize(
    ("form", "values", "size"),
    [
        ("b32", "%g", 4), ("u32", "%g", 4), ("s32", "%g", 4), ("f32", "%f1", 4),
        ("b64", "%rd1", 8), ("u64", "%rd1", 8), ("s64", "%rd1", 8), ("f64", "%fd1", 8),
        ("v2.b32", "{%g, %r10}", 8), ("v2.f32", "{%f1, %f2}", 8), ("v2.b64", "{%rd1, %rd2}", 16),
        ("v2.f64", "{%fd1, %fd2}", 16), ("v4.u32", "{%g, %r10, %r11, %r12}", 16),
        ("v4.f32", "{%f1, %f2, %f3, %f4}", 16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("there", ["own", "next"])
def test_types_and_vectors(form: str, values: str, size: int, there: str) -> None:
    """Every thread sends the words g, g + 1000, g + 2000, g + 3000, as many as fit."""
    target, barrier = ("%r8", "%r7") if there == "next" else ("%r9", "%r5")
    out = np.zeros((4 * BLOCK, 4), np.uint32)
    body = f"""
        add.u32 %r10, %g, 1000; add.u32 %r11, %g, 2000; add.u32 %r12, %g, 3000;
        mov.b64 %rd1, {{%g, %r10}}; mov.b64 %rd2, {{%r11, %r12}}; mov.b32 %f1, %g;
        mov.b32 %f2, %r10; mov.b32 %f3, %r11; mov.b32 %f4, %r12; mov.b64 %fd1, %rd1;
        mov.b64 %fd2, %rd2; mov.u32 %r13, 0; st.shared.v4.u32 [%r9], {{%r13, %r13, %r13, %r13}};
        {INIT.replace(".relaxed", "")} {EXPECT.format(size * BLOCK)}
        {ST}.{form} [{target}], {values}, [{barrier}]; {WAIT}
        ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r9]; mul.wide.u32 %rd3, %g, 16;
        add.u64 %rd3, %out, %rd3; st.global.v4.u32 [%rd3], {{%r1, %r2, %r3, %r4}};
    """
    run_ptx(PLACES + body, grid=4, cluster=2, block=BLOCK, declare=TILE, out=out)
    source = np.array(of_block_before() if there == "next" else range(4 * BLOCK))
    want = source[:, None] + 1000 * np.arange(4)
    want[:, size // 4 :] = 0
    assert (out == want).all()


@pytest.mark.parametrize(
    "form",
    [
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r8], %g, [%r7];",
        "cvt.u64.u32 %rd1, %r9; cvta.shared.u64 %rd1, %rd1; mapa.u64 %rd1, %rd1, %r22; "
        "cvt.u64.u32 %rd2, %r5; cvta.shared.u64 %rd2, %rd2; mapa.u64 %rd2, %rd2, %r22; "
        "st.async.weak.mbarrier::complete_tx::bytes.u32 [%rd1], %g, [%rd2];",
    ],
    ids=["not weak", "generic"],
)
def test_forms(form: str) -> None:
    assert run(f"{INIT} {EXPECT.format(SIZE)} {form} {WAIT} {READ}") == of_block_before()


@pytest.mark.parametrize("wait", ["", "relaxed.cluster."])
def test_who_waits_acquires_what_was_stored(wait: str) -> None:
    waiting = WAIT.replace("acquire.cluster.", wait)
    body = f"{INIT} {EXPECT.format(SIZE)} {STORE} {waiting} {READ} {SYNC}"
    if wait:
        with faults("race: reads what an asynchronous copy wrote"):
            run(body)
    else:
        assert run(body) == of_block_before()


def test_bytes_may_come_before_they_are_expected() -> None:
    """All of them before the first is: the phase ends with the arrival, not before."""
    early = f"""
        {INIT} {STORE} {SYNC}
        mbarrier.test_wait.parity.shared.b64 %p2, [bars], 0; @%p2 trap; bar.sync 0;
        @%p9 mbarrier.expect_tx.relaxed.cta.shared.b64 [bars], {SIZE}; bar.sync 0;
        mbarrier.test_wait.parity.shared.b64 %p2, [bars], 0; @%p2 trap; bar.sync 0;
        @%p9 mbarrier.arrive.shared.b64 _, [bars]; {WAIT} {READ}
    """
    assert run(early) == of_block_before()


@pytest.mark.parametrize("expected", [SIZE - 4, SIZE + 4, 0])
def test_a_phase_that_never_ends(expected: int) -> None:
    """Of four blocks, none may go on when the counts differ."""
    with faults("deadlock", f"0 arrivals and {expected - SIZE} bytes from the end of phase 0"):
        run(f"{INIT} {STORE} {SYNC} {EXPECT.format(expected)} {WAIT} {READ}")


def test_an_arrival_without_bytes_ends_no_phase_that_is_ahead() -> None:
    """The bytes came, and are not expected: minus so many are left."""
    with faults("deadlock", f"0 arrivals and {-SIZE} bytes"):
        run(f"{INIT} {STORE} {SYNC} @%p9 mbarrier.arrive.shared.b64 _, [bars]; {WAIT} {READ}")


RELEASE = """
    add.u32 %r3, %r20, %r21; sub.u32 %r3, %r3, 1; rem.u32 %r3, %r3, %r21; add.u32 %r2, %r5, 8;
    mapa.shared::cluster.u32 %r2, %r2, %r3;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];
"""
HOLD = """
    E: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [bars+8], 0; @!%p3 bra E;
"""


@pytest.mark.parametrize(
    ("release", "hold", "essential"),
    [
        (RELEASE, HOLD, ""),
        (RELEASE, "", "race: writes .*`st.async"),
        ("", HOLD, "deadlock.*wait for mbarrier 0xc08, 64 arrivals"),
        (RELEASE, HOLD.replace("acquire", "relaxed"), "race: writes .*`st.async"),
    ],
    ids=["fine", "too early", "never", "relaxed"],
)
def test_the_memory_is_filled_again_when_its_reader_says_so(
    release: str, hold: str, essential: str
) -> None:
    """By an arrival across the cluster, at the second mbarrier of the block that stores."""
    body = f"""
        setp.eq.u32 %p9, %t, 0; @%p9 mbarrier.init.shared.b64 [bars+8], {BLOCK}; {INIT}
        {EXPECT.format(SIZE)} {STORE} {WAIT} ld.shared.u32 %r1, [%r9]; {release}
        {EXPECT.format(SIZE)} {hold} add.u32 %g, %g, 5; {STORE}
        {WAIT.replace("0;", "1;").replace("W", "V")} {READ}
    """
    if essential:
        with faults(essential):
            run(body)
    else:
        assert run(body) == [value + 5 for value in of_block_before()]


# What is published, and what is not


def test_fence_mbarrier_init_publishes_the_mbarriers() -> None:
    body = f"{INIT} {EXPECT.format(SIZE)} {STORE} {WAIT} {READ}"
    with faults("race: uses what another thread wrote", "`st.async"):
        run(body.replace("fence.mbarrier_init.release.cluster;", ""))
    run(body.replace("arrive.relaxed", "arrive"))


def test_fence_mbarrier_init_publishes_nothing_else() -> None:
    read = "@%p9 ld.shared::cluster.u32 %r1, [%r8];"
    store = "@%p9 st.shared.u32 [%r9], 1;"
    behind = INIT.replace("fence", f"{store} fence")
    with faults("race: reads what another thread wrote", "`ld.shared::cluster"):
        run(f"{behind} {read} {SYNC}")
    run(f"{behind.replace('.relaxed', '')} {read} {SYNC}")


def test_a_store_publishes_nothing_but_itself() -> None:
    """What the storing thread did before may not be seen yet when the store is."""
    body = f"""
        {INIT} st.shared::cluster.u32 [%r8+1024], %g; {EXPECT.format(SIZE)} {STORE} {WAIT}
        {READ} ld.shared.u32 %r1, [%r9+1024]; {SYNC}
    """
    with faults("race: reads what another thread wrote", r"address 0x8"):
        run(body)


@pytest.mark.parametrize(
    ("body", "essential"),
    [
        (f"{STORE} {READ}", "reads what an asynchronous copy has not finished writing"),
        (f"{EXPECT.format(SIZE)} {STORE} {READ}",
         "reads what an asynchronous copy (wrote|has not finished)|never written"),
        (f"{EXPECT.format(SIZE)} {STORE} bar.sync 0; {SYNC} {READ}",
         "race: reads what an asynchronous copy wrote.*one that completes on mbarrier 0xc00 of "
         "block .0, 0, 0"),
        (f"{EXPECT.format(SIZE)} {STORE} {SYNC} st.shared.u32 [%r9], 1;",
         "race: writes over what an asynchronous copy wrote"),
        (f"{EXPECT.format(SIZE)} {STORE} {SYNC} ld.shared::cluster.u32 %r1, [%r8];",
         "race: reads what an asynchronous copy wrote"),
        (f"{STORE} {STORE}", "writes where an asynchronous copy is under way"),
        (f"{STORE.replace('[%r8]', '[%r7+-1024]')}", "race: writes with another thread"),
        (f"st.shared.u32 [%r9], 1; {STORE}", "race: writes over what another thread wrote"),
        (STORE.replace("[%r7]", "[%r5]"), "the mbarrier lies in another block"),
        (STORE.replace("[%r7]", "[%r7+8]"), "mbarrier that was not initialised"),
        (STORE.replace("[%r7]", "[%r7+4]"), "mbarrier not at a multiple of 8 bytes"),
        (STORE.replace("[%r8]", "[%r8+2]"), "not a multiple of 4 bytes"),
        (f"{ST}.v2.u32 [%r8+4], {{%g, %g}}, [%r7];", "not a multiple of 8 bytes"),
        (STORE.replace("[%r8]", "[%r8+4096]"), "outside the block's 2064 bytes"),
        (STORE.replace("[%r8]", f"[{3 << 24}]"), "outside the cluster"),
        (STORE.replace("[%r7]", f"[{3 << 24}]"), "outside the cluster"),
        (STORE.replace("[%r8]", "[%out]"), "address outside shared memory"),
        ("st.async.weak.mbarrier::complete_tx::bytes.u32 [%r8], %g, [%r7];",
         "address outside shared memory"),
    ],
    ids=["not expected", "no wait", "a barrier alone", "store over", "read by who stored",
         "store over a store", "all to one place", "store over unread store", "barrier elsewhere",
         "no barrier", "barrier alignment", "alignment", "vector alignment", "bounds", "no block",
         "no block of the barrier", "target in global memory", "generic"],
)  # fmt: skip
def test_faults(body: str, essential: str) -> None:
    with faults(essential, "block"):
        run(f"{INIT} {body} {SYNC}")


@pytest.mark.parametrize(
    "statement",
    [
        STORE.replace(".u32", ".u16"), STORE.replace(".u32", ".v3.u32"), STORE.replace(".u32", ""),
        STORE.replace(".u32", ".b128"), STORE.replace(".u32", ".v2.u32"),
        f"{ST}.v4.b64 [%r8], {{%rd1, %rd2, %rd3, %rd4}}, [%r7];",
        f"{ST}.u32 [%r8], {{%g, %g}}, [%r7];", STORE.replace(".mbarrier::complete_tx::bytes", ""),
        STORE.replace(", [%r7]", ""), STORE.replace("[%r7]", "[%r7], %rd1"),
        STORE.replace("shared::cluster", "global"), STORE.replace("shared::cluster", "shared::cta"),
        "st.async.release.gpu.global.u32 [%out], %g;",
        "red.async.relaxed.cluster.add.u32 [%r8], 1;",
        STORE.replace("%g", "%h1"),
    ],
)  # fmt: skip
def test_refuses_unknown_forms(statement: str) -> None:
    with refuses("unknown .* in `"):
        run(statement)


# Blocks that exit

LATE = """
    mov.u32 %r2, 0; L: add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 50; @%p2 bra L;
"""


@pytest.mark.parametrize(
    "access",
    [
        STORE, "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7];",
        "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%r7], 4;",
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r8], [%r9], 16, "
        "[%r7];",
    ],
)  # fmt: skip
@pytest.mark.parametrize("races", [True, False])
def test_the_memory_of_a_block_that_has_exited(access: str, races: bool) -> None:
    name = access.split()[0]
    with faults("to a block that has exited", r"by block \(0, 0, 0\)", f"`{name}`"):
        run(f"{INIT} @%p8 bra LATE; ret; LATE: {LATE} {access}", races=races)


@pytest.mark.parametrize(
    ("rest", "essential"),
    [
        (f"{EXPECT.format(SIZE)} {SYNC}", "race: exits while an asynchronous copy writes"),
        (SYNC, "exits where an asynchronous copy is under way"),
    ],
    ids=["not waited for", "not expected"],
)
def test_a_block_may_not_exit_before_what_is_stored_to_it_is_waited_for(
    rest: str, essential: str
) -> None:
    with faults(essential, "`ret`"):
        run(f"{INIT} {STORE} {rest}")


def test_who_stores_may_exit_at_once() -> None:
    """Block 0 sends and is gone; block 1 waits."""
    body = f"{INIT} @!%p8 bra STAY; {STORE} ret; STAY: {EXPECT.format(SIZE)} {WAIT} {READ}"
    want = [v if i // BLOCK % 2 else 0 for i, v in enumerate(of_block_before())]
    assert run(body) == want


def test_a_block_that_has_exited_is_not_waited_for_at_later_barriers() -> None:
    """Block 0 exits behind the first barrier; the others meet twice more."""
    body = f"{INIT} @%p8 ret; {SYNC} {SYNC} st.global.u32 [%out_g], %g;"
    want = [i if i // BLOCK % 4 else 0 for i in range(4 * BLOCK)]
    assert run(body, cluster=4) == want


@pytest.mark.parametrize("form", ["", ".release"])
def test_barriers_that_are_not_aligned_take_threads_one_by_one(form: str) -> None:
    """Half of a warp arrives, and stores to the other half what that waits for before it does."""
    body = f"""
        {INIT} {EXPECT.format(SIZE // 2)} setp.lt.u32 %p3, %lane, 16; @!%p3 bra OTHER;
        {STORE} barrier.cluster.arrive{form}; barrier.cluster.wait.acquire; bra END;
        OTHER: {WAIT} barrier.cluster.arrive{form}; barrier.cluster.wait; END:
        st.global.u32 [%out_g], %g;
    """
    assert run(body) == list(range(4 * BLOCK))


# From CUDA C++

SOURCE = r"""
extern "C" __global__ void __cluster_dims__(2) k(unsigned* out) {
  __shared__ __align__(16) uint4 tile[64];
  __shared__ unsigned long long bar;
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(&bar));
  const unsigned mine = static_cast<unsigned>(__cvta_generic_to_shared(&tile[threadIdx.x]));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
                 ::"r"(at), "r"(unsigned(sizeof tile)) : "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  unsigned rank, there, its_bar;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mine), "r"(rank ^ 1));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(its_bar) : "r"(at), "r"(rank ^ 1));
  const unsigned g = blockIdx.x * blockDim.x + threadIdx.x;
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], "
               "{%1, %2, %3, %4}, [%5];"
               ::"r"(there), "r"(g), "r"(g + 1), "r"(g + 2), "r"(g + 3), "r"(its_bar) : "memory");
  WAIT
  const uint4 got = tile[threadIdx.x ^ 1];
  out[g] = got.x + got.y + got.z + got.w;
}
"""
CUDA_WAIT = r"""
  unsigned done = 0;
  while (!done) {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], "
                 "0; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(at) : "memory");
  }
"""


@pytest.mark.parametrize("waits", [True, False])
def test_a_kernel_in_cuda(waits: bool) -> None:
    source = SOURCE.replace("WAIT", CUDA_WAIT if waits else "")
    program = Program(parse(compile_source(source, "k", "compute_90").code.decode(), "k"))
    out = np.zeros(2 * BLOCK, np.uint32)
    params = np.array([out.ctypes.data], np.uint64).tobytes()
    launch = Launch(grid=(2, 1, 1), block=BLOCK, cluster=(2, 1, 1))
    regions = [Tensor(out, readable=False).region("out")]
    if not waits:
        with faults("asynchronous copy|never written", r"k\.cu:\d+"):
            simulate(program, launch, params, regions)
        return
    simulate(program, launch, params, regions)
    assert out.tolist() == [4 * (g ^ 1 ^ BLOCK) + 6 for g in range(2 * BLOCK)]
