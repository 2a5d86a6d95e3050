"""What cannot be run, what does not end, and what messages say."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from ptx_kernels import Tensor, faults, module, refuses, run_ptx, simulate_text

from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.simulate import Checks, simulate
from gqa_cutlass.ptxsim.text.ptx import parse

LOCATED = '\n.file 1 "/src/load.cuh"\n'


@pytest.mark.parametrize(
    ("statement", "essential"),
    [
        ("bogus.u32 %r1, %r2;", "unknown instruction in `bogus.u32`"),
        ("add.bogus.u32 %r1, %r2, %r3;", "unknown instruction in `add.bogus.u32`"),
        ("add.u24 %r1, %r2, %r3;", "unknown instruction in `add.u24`"),
        ("add.u32 %r1, %r2;", "unknown number of operands, 2,|unknown number of operands, 1,"),
        ("add.u32 %r1, %r2, %r99;", "unknown operand .*%r99.* in `add.u32`"),
        ("add.u32 %r1, %r2, %h1;", "unknown operand .*%h1.*of 16 bits, in `add.u32`"),
        ("add.u32 %r1, %r2, 0d3FF0000000000000;", "unknown operand"),
        ("add.u32 %r1|%p1, %r2, %r3;", "unknown 2 destinations"),
        ("add.u32 [%rd1], %r2, %r3;", "unknown operand"),
        ("mov.u32 %r1, %clock;", "unknown operand .*%clock"),
        ("mov.u64 %rd1, nothing;", "unknown operand .*nothing"),
        ("mov.f64 %fd1, 1.5;", "unknown operand"),
        ("@%p99 ret;", "unknown operand .*%p99.* in `ret`"),
        ("bra;", "unknown (form|label)"),
        ("mov.u32;", "unknown form in `mov.u32`"), ("mbarrier %r1;", "unknown form in `mbarrier`"),
        ("wgmma.fence.sync.aligned;", "unknown instruction in `wgmma.fence.sync.aligned`"),
        ("tex.2d.v4.f32.f32 {%f1, %f2, %f3, %f4}, [t, {%f1, %f2}];", "unknown|got ','"),
    ],
)  # fmt: skip
def test_refuses_what_it_does_not_know(statement: str, essential: str) -> None:
    """By name and by line of the text, before anything is run."""
    out = np.zeros(32, np.uint32)
    with refuses(essential, r"PTX line \d+"):
        run_ptx(f"st.global.u32 [%out_g], 1; {statement}", out=out)
    assert not out.any()


def test_refuses_by_source_and_line() -> None:
    text = module("\n.loc 1 88 3\nbogus.u32 %r1;")
    line = text.splitlines().index("bogus.u32 %r1;") + 1
    with refuses(rf"unknown instruction in `bogus.u32` at load.cuh:88 \(PTX line {line}\)"):
        simulate_text(text + LOCATED)


@pytest.mark.parametrize(
    "statement",
    [
        "griddepcontrol.launch_dependents;", "griddepcontrol.wait;", "nanosleep.u32 100;",
        "prefetch.global.L2 [%out];", "setmaxnreg.inc.sync.aligned.u32 128;",
        "fence.proxy.async;", "fence.mbarrier_init.release.cluster;", "fence.acq_rel.gpu;",
        "membar.gl;", "fence.sc.sys;", '.pragma "nounroll";',
    ],
)  # fmt: skip
def test_what_has_no_effect_is_taken(statement: str) -> None:
    out = np.zeros(32, np.uint32)
    run_ptx(f"{statement} st.global.u32 [%out_g], %t;", out=out)
    assert out.tolist() == list(range(32))


# Launches


@pytest.mark.parametrize(
    ("shape", "essential"),
    [
        ({"shared": 227 * 1024 + 1}, "got 232449 bytes of shared memory; allowed: 0 to 232448"),
        ({"shared": 1 << 40}, "bytes of shared memory"),
        ({"shared": -1}, "got -1 bytes of shared memory"),
        ({"declare": ".shared .b8 t[232448];", "shared": 1}, "got 232449 bytes of shared memory"),
        ({"block": 0}, "got 0 threads"),
        ({"block": 48}, "got 48 threads; allowed: multiples of 32"),
        ({"block": 1056}, "got 1056 threads"), ({"block": -32}, "got -32 threads"),
        ({"grid": 0}, "grid \\(0, 1, 1\\); allowed: at least 1"), ({"grid": (1, -1, 1)}, "grid"),
        ({"cluster": 0}, "cluster \\(0, 1, 1\\); allowed: at least 1"),
        ({"grid": 3, "cluster": 2}, "grid \\(3, 1, 1\\) of clusters \\(2, 1, 1\\); allowed: whole"),
        ({"grid": (4, 2, 1), "cluster": (2, 4, 1)}, "allowed: whole clusters"),
        ({"grid": 32, "cluster": 32}, "got 32 blocks per cluster; allowed: up to 16"),
    ],
)  # fmt: skip
def test_refuses_a_launch(shape: dict[str, Any], essential: str) -> None:
    out = np.zeros(32, np.uint32)
    with refuses("^k: ", essential, "Nothing was run"):
        run_ptx("st.global.u32 [%out_g], 1;", out=out, **shape)
    assert not out.any()


@pytest.mark.parametrize("size", [0, 11, 16])
def test_refuses_parameters_of_another_size(size: int) -> None:
    program = Program(parse(module("", out=np.zeros(1), n=1), "k"))
    with refuses(f"got {size} bytes of parameters; allowed: 12 bytes, as the kernel declares"):
        simulate(program, Launch(grid=(1, 1, 1), block=32), bytes(size), [])


@pytest.mark.parametrize(
    ("directive", "block", "fine"),
    [
        (".reqntid 64, 1, 1", 64, True), (".reqntid 64, 1, 1", 32, False),
        (".maxntid 64, 1, 1", 32, True), (".maxntid 64", 64, True), (".maxntid 64", 96, False),
    ],
)  # fmt: skip
def test_a_kernel_says_how_many_threads_it_is_for(directive: str, block: int, fine: bool) -> None:
    text = module("").replace("entry k()\n", f"entry k()\n{directive}\n")
    if fine:
        simulate_text(text, block=block)
    else:
        with refuses(f"got {block} threads; allowed: .* as the kernel was compiled for"):
            simulate_text(text, block=block)


def test_a_program_may_run_again_with_another_launch() -> None:
    out = np.zeros(96, np.uint32)
    program = Program(parse(module("red.global.add.u32 [%out_g], 1;", out=out), "k"))
    for grid, block in ((1, 32), (3, 32), (1, 96)):
        launch = Launch(grid=(grid, 1, 1), block=block)
        simulate(program, launch, struct.pack("<Q", out.ctypes.data), [Tensor(out).region("out")])
    assert out.tolist() == [3] * 32 + [2] * 64


# Runs that do not end


def test_a_block_may_wait_for_a_later_one() -> None:
    """Block 0 spins on a flag that block 3 sets, whose code comes later."""
    flag, out = np.zeros(1, np.uint32), np.zeros(128, np.uint32)
    run_ptx(
        """setp.eq.u32 %p1, %b, 3; @%p1 bra SET;
        SPIN: ld.acquire.gpu.global.u32 %r1, [%flag]; setp.eq.u32 %p2, %r1, 0; @%p2 bra SPIN;
        bra END; SET: bar.sync 0; st.release.gpu.global.u32 [%flag], 7; mov.u32 %r1, 7;
        END: st.global.u32 [%out_g], %r1;""",
        grid=4, flag=flag, out=out,
    )  # fmt: skip
    assert (out == 7).all()


@pytest.mark.usefixtures("impatient")
def test_warps_may_wait_for_one_another_in_a_chain() -> None:
    """Warp i waits for warp i + 1, so the last one in the code starts; every wait is a spin."""
    flag = np.zeros(4, np.uint32)
    spin = """
        W{0}: SPIN{0}: ld.acquire.gpu.global.u32 %r1, [%flag+{2}]; setp.eq.u32 %p2, %r1, 0;
        @%p2 bra SPIN{0}; st.release.gpu.global.u32 [%flag+{1}], 1; bra END;
    """
    body = "".join(f"setp.eq.u32 %p1, %warp, {w}; @%p1 bra W{w};" for w in range(3))
    body += "bra W3;" + "".join(spin.format(w, 4 * w, 4 * w + 4) for w in range(3))
    run_ptx(f"{body} W3: st.release.gpu.global.u32 [%flag+12], 1; END:", block=128, flag=flag)
    assert flag.tolist() == [1] * 4


@pytest.mark.usefixtures("impatient")
def test_two_warps_may_wait_for_one_whose_code_lies_between() -> None:
    flag = np.zeros(1, np.uint32)
    spin = "ld.acquire.gpu.global.u32 %r1, [%flag]; setp.eq.u32 %p2, %r1, 0;"
    run_ptx(
        f"""setp.eq.u32 %p1, %warp, 1; @%p1 bra WORK; setp.eq.u32 %p1, %warp, 2; @%p1 bra HIGH;
        LOW: {spin} @%p2 bra LOW; bra END;
        WORK: mov.u32 %r2, 0; L: add.u32 %r2, %r2, 1; setp.lt.u32 %p3, %r2, 20; @%p3 bra L;
        st.release.gpu.global.u32 [%flag], 1; bra END;
        HIGH: {spin} @%p2 bra HIGH; END:""",
        block=96, flag=flag,
    )  # fmt: skip
    assert flag[0] == 1


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("L: bra L;", "bra"),
        ("L: add.u32 %r1, %t, 1; bra L;", "add.u32|bra"),
        ("setp.eq.u32 %p1, %t, 5; L: @%p1 bra L;", "bra"),
        ("L: ld.volatile.global.u32 %r1, [%out]; setp.eq.u32 %p1, %r1, 0; @%p1 bra L;",
         "ld.volatile.global.u32|setp.eq.u32|bra"),
    ],
)  # fmt: skip
def test_a_loop_without_end_is_a_fault(body: str, name: str) -> None:
    with faults(
        "no end after 1000 instructions: the kernel loops, or waits for what does not happen",
        r"block \(0, 0, 0\), warp 0, lane [05]", f"in `({name})` at PTX line",
    ):  # fmt: skip
        run_ptx(body, out=np.zeros(1, np.uint32), max_steps=1000)


def test_trap_is_a_fault() -> None:
    with faults("k: trap", r"block \(1, 0, 0\), warp 1, lane 3", "`trap` at PTX line"):
        run_ptx("setp.eq.u32 %p1, %g, 99; @%p1 trap;", grid=2, block=64)


def test_what_was_written_before_a_fault_is_written() -> None:
    out = np.zeros(32, np.uint32)
    with faults("trap"):
        run_ptx("st.global.u32 [%out_g], %t; trap;", out=out)
    assert out.tolist() == list(range(32))


def test_a_fault_names_the_block_in_three_dimensions_and_in_later_batches() -> None:
    """The 60th of 64 blocks of 1024 threads."""
    with faults(r"block \(3, 1, 3\), warp 31, lane 31"):
        run_ptx(
            """mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z; setp.eq.u32 %p1, %b, 3;
            setp.eq.and.u32 %p1, %r1, 1, %p1; setp.eq.and.u32 %p1, %r2, 3, %p1;
            setp.eq.and.u32 %p1, %t, 1023, %p1; @%p1 trap;""",
            grid=(4, 4, 4), block=1024,
        )  # fmt: skip


def test_checks_are_on_by_default() -> None:
    assert Checks() == Checks(races=True, max_steps=20_000_000)
