"""What a text, a launch and a run may ask for: odd ones end in an error of ours, and soon."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ptx_kernels import faults, module, refuses, run_ptx

from gqa_cutlass.errors import KernelFault, PtxError
from gqa_cutlass.ptxsim import limits, progress
from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.simulate import simulate
from gqa_cutlass.ptxsim.text.ptx import parse

SPINS = {
    "a branch": "again: bra again;",
    "a counter that comes round": "mov.u32 %r1, 0; again: xor.b32 %r1, %r1, 1; bra again;",
    "a load": "again: ld.global.u32 %r1, [%out_g]; setp.ne.u32 %p1, %r1, 7; @%p1 bra again;",
    "a volatile load": "again: ld.volatile.global.u32 %r1, [%out_g]; setp.ne.u32 %p1, %r1, 7; "
    "@%p1 bra again;",
    "a compare and swap": "again: atom.global.cas.b32 %r1, [%out], 5, 6; setp.ne.u32 %p1, %r1, 5; "
    "@%p1 bra again;",
}  # fmt: skip


def calls(act: Callable[[], object]) -> int:
    """How many functions, Python's and built-in ones, are called meanwhile."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("body", SPINS.values(), ids=SPINS)
@pytest.mark.parametrize("blocks", [1, 64])
def test_a_loop_that_gets_nowhere_is_found_soon(body: str, blocks: int) -> None:
    """In as many instructions as a state takes to come again, however many blocks spin."""
    with pytest.raises(KernelFault, match="no end after (\\d+) instructions") as raised:
        run_ptx(body, out=np.zeros(32 * blocks, np.uint32), grid=blocks)
    steps = int(str(raised.value).split("no end after ")[1].split()[0])
    assert steps < 1 << 14


@pytest.mark.parametrize(("blocks", "size"), [(1, 32), (1, 512), (4, 128)])
def test_a_loop_that_counts_ends_by_the_size_of_its_tensors(
    blocks: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 2^20 units of work (fewer here) and, for every byte, 16 and one per block."""
    assert progress._WORK == 1 << 20
    monkeypatch.setattr(progress, "_WORK", 1 << 12)
    body = "mov.u64 %rd1, 0; again: add.u64 %rd1, %rd1, 1; bra again;"
    out = np.zeros(size, np.uint32)
    with faults(f"no end after {(1 << 12) + (16 + blocks) * out.nbytes} instructions"):
        run_ptx(body, out=out, grid=blocks, max_steps=20_000_000)


def test_many_blocks_may_all_read_everything_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """As blocks do whose heads share a cache, though not each thread of them."""
    monkeypatch.setattr(progress, "_WORK", 0)
    out = np.zeros(32, np.uint8)
    run_ptx(
        """setp.eq.u32 %p2, %b, 0; mov.u64 %rd1, 0;
        again: add.u64 %rd2, %src, %rd1; ld.global.u8 %r1, [%rd2]; add.u64 %rd1, %rd1, 1;
        setp.lt.u64 %p1, %rd1, 512; @%p1 bra again; @%p2 st.global.u8 [%out_g], %r1;""",
        src=np.arange(512, dtype=np.uint16).astype(np.uint8), out=out, grid=64,
    )  # fmt: skip
    assert (out == 255).all()


@pytest.mark.parametrize("filler", ["\n", "// nothing\n", "/* nothing */\n", ";\n"])
def test_reading_a_text_takes_steps_in_proportion_to_its_lines(filler: str) -> None:
    def read(lines: int) -> None:
        parse(module(filler * lines), "k")

    few, many = (calls(lambda n=n: read(n)) for n in (1_000, 10_000))  # type: ignore[misc]
    assert many < 15 * few


ASKS = {
    "registers": f".reg .b32 %q<{limits.REGISTERS + 1}>;",
    "a million registers": ".reg .b32 %q<1048576>;",
    "registers of 20 digits": f".reg .b32 %q<{10**20}>;",
    "registers of 5000 digits": f".reg .b32 %q<{'9' * 5000}>;",
    "shared memory": f".shared .align 16 .b8 big[{limits.SHARED + 1}];",
    "local memory": f".local .align 16 .b8 big[{limits.LOCAL + 1}];",
    "memory of 20 digits": f".shared .align 16 .b8 big[{10**20}];",
    "a negative size": ".shared .align 16 .b8 big[-8];",
    "an alignment of zero": ".shared .align 0 .b8 big[8];",
    "braces in braces": "{" * (limits.BRACES + 2) + "}" * (limits.BRACES + 2),
    "a long name": f".reg .b32 %{'q' * (limits.NAME + 1)};",
}


@pytest.mark.parametrize("declare", ASKS.values(), ids=ASKS)
def test_a_text_that_asks_for_too_much_is_refused(declare: str) -> None:
    with pytest.raises(PtxError):
        run_ptx("ret;", declare=declare, out=np.zeros(32, np.uint32))


ADDRESSES = {
    "near 2^63": "mov.b64 %rd1, 0x7ffffffffffffff8; ld.global.u32 %r1, [%rd1+16];",
    "at the end of memory": "mov.b64 %rd1, 0xfffffffffffffffc; ld.global.v4.u32 {%r1,%r2,%r3,%r4}, "
    "[%rd1];",
    "below zero": "mov.b64 %rd1, 8; ld.global.u32 %r1, [%rd1+-16];",
    "a large offset": f"ld.global.u32 %r1, [%out+{(1 << 63) - 16}];",
    "a store": "mov.b64 %rd1, 0x7ffffffffffffff8; st.global.u64 [%rd1+8], %rd1;",
    "shared": "mov.b64 %rd1, 0x7ffffffffffffff8; ld.shared.u32 %r1, [%rd1];",
    "an atomic": "mov.b64 %rd1, 0x7ffffffffffffff8; atom.global.add.u32 %r1, [%rd1], 1;",
    "a copy": "cp.async.ca.shared.global [%rd2], [%rd1], 16;",
    "a prefetch": "mov.b64 %rd1, 0xfffffffffffffff0; "
    "cp.async.bulk.prefetch.L2.global [%rd1], 64;",
}  # fmt: skip


@pytest.mark.parametrize("body", ADDRESSES.values(), ids=ADDRESSES)
def test_an_address_outside_of_everything_is_a_fault(body: str) -> None:
    with pytest.raises((KernelFault, PtxError)):
        run_ptx("mov.b64 %rd1, 0; mov.b64 %rd2, 0; " + body, out=np.zeros(32, np.uint32))


@pytest.mark.parametrize(
    "shape",
    [
        {"block": 0}, {"block": 1025}, {"block": -1}, {"grid": (0, 1, 1)}, {"grid": (1, 1, 65_536)},
        {"grid": (1 << 31, 1, 1)}, {"cluster": (1, 17, 1)}, {"cluster": (2, 1, 1)},
        {"shared_bytes": limits.SHARED + 1}, {"shared_bytes": -1}, {"shared_bytes": 10**20},
    ],
    ids=str,
)  # fmt: skip
def test_a_launch_that_asks_for_too_much_is_refused(shape: dict[str, Any]) -> None:
    program = Program(parse(module("ret;"), "k"))
    with refuses(""):
        simulate(program, Launch(**({"grid": (1, 1, 1), "block": 32} | shape)), b"", [])
