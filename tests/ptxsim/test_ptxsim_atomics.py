"""Atomics and reductions: every operation and type, where lanes collide, and what is a fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ptx_kernels import faults, run_ptx, values

TILE = ".shared .align 16 .b8 tile[1024];"
DEPOT = ".local .align 16 .b8 depot[32];"


def wrapped(value: int, dtype: str) -> int:
    return int(np.array(value & (1 << 8 * int(dtype[1])) - 1, f"u{dtype[1]}").view(dtype))


UPDATES: dict[str, Callable[[int, int], int]] = {
    "add": lambda old, b: old + b,
    "min": min,
    "max": max,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: b,
    "inc": lambda old, b: 0 if old >= b else old + 1,
    "dec": lambda old, b: b if old == 0 or old > b else old - 1,
}
ATOMICS = [
    *(("add", kind) for kind in ("u32", "s32", "u64")),
    *((op, kind) for op in ("min", "max") for kind in ("u32", "s32", "u64", "s64")),
    *((op, kind) for op in ("and", "or", "xor", "exch") for kind in ("b32", "b64")),
    ("inc", "u32"), ("dec", "u32"),
]  # fmt: skip
each_atomic = pytest.mark.parametrize(("op", "kind"), ATOMICS, ids=[".".join(a) for a in ATOMICS])


def operands_of(op: str, dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Initial values of 32 cells, and an operand for each lane."""
    rng = np.random.default_rng(1)
    if op in ("inc", "dec"):
        return rng.integers(0, 4, 32).astype(dtype), rng.integers(0, 4, 32).astype(dtype)
    return values(dtype, 32), values(dtype, 64)[32:]


@each_atomic
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics_on_cells_of_their_own(op: str, kind: str, space: str) -> None:
    dtype = {"b": "u", "u": "u", "s": "i"}[kind[0]] + str(int(kind[1:]) // 8)
    register = "%rd" if kind[1:] == "64" else "%r"
    x, b = operands_of(op, dtype)
    before, old = x.copy(), np.zeros(32, dtype)
    size = np.dtype(dtype).itemsize
    bits = f"b{kind[1:]}"
    if space == "global":
        body = f"atom.global.{op}.{kind} {register}2, [%x_g], {register}1;"
    else:
        body = f"""mov.u32 %r9, tile; mad.lo.u32 %r9, %t, {size}, %r9;
        ld.global.{bits} {register}3, [%x_g]; st.shared.{bits} [%r9], {register}3;
        atom.shared.{op}.{kind} {register}2, [%r9], {register}1;
        ld.shared.{bits} {register}3, [%r9]; st.global.{bits} [%x_g], {register}3;"""
    run_ptx(
        f"ld.global.{bits} {register}1, [%b_g]; {body} st.global.{bits} [%old_g], {register}2;",
        declare=TILE, x=x, b=b, old=old,
    )  # fmt: skip
    assert old.tolist() == before.tolist()
    pairs = zip(before.tolist(), b.tolist(), strict=True)
    assert x.tolist() == [wrapped(UPDATES[op](p, q), dtype) for p, q in pairs]


@each_atomic
def test_colliding_lanes_update_one_after_another(op: str, kind: str) -> None:
    """Each result is the value that the lanes before left."""
    dtype = {"b": "u", "u": "u", "s": "i"}[kind[0]] + str(int(kind[1:]) // 8)
    register = "%rd" if kind[1:] == "64" else "%r"
    cells, b = operands_of(op, dtype)
    x, old, bits = cells[:1].copy(), np.zeros(32, dtype), f"b{kind[1:]}"
    run_ptx(
        f"""ld.global.{bits} {register}1, [%b_g]; atom.{op}.{kind} {register}2, [%x], {register}1;
        st.global.{bits} [%old_g], {register}2;""",
        x=x, b=b, old=old,
    )  # fmt: skip
    value, expected = int(cells[0]), []
    for operand in b.tolist():
        expected.append(value)
        value = wrapped(UPDATES[op](value, operand), dtype)
    assert old.tolist() == expected
    assert x.tolist() == [value]


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_compare_and_swap(kind: str) -> None:
    """Lane i swaps i for i + 1: all of them succeed, one after another, from 3 on."""
    dtype, register = {"b32": ("u4", "%r"), "b64": ("u8", "%rd")}[kind]
    x, old = np.array([3], dtype), np.zeros(32, dtype)
    convert = "" if kind == "b32" else "cvt.u64.u32 %rd1, %t; cvt.u64.u32 %rd2, %r2;"
    run_ptx(
        f"""mov.u32 %r1, %t; add.u32 %r2, %t, 1; {convert}
        atom.global.cas.{kind} {register}3, [%x], {register}1, {register}2;
        st.global.{kind} [%old_g], {register}3;""",
        x=x, old=old,
    )  # fmt: skip
    assert x.tolist() == [32]
    assert old.tolist() == [3, 3, 3, *range(3, 32)]


def test_float_additions_round_one_after_another() -> None:
    x = np.array([2.0**24], np.float32)
    b = np.array([1.0] * 31 + [3.0], np.float32)
    old = np.zeros(32, np.float32)
    run_ptx(
        """ld.global.f32 %f1, [%b_g]; atom.global.add.f32 %f2, [%x], %f1;
        st.global.f32 [%old_g], %f2;""",
        x=x, b=b, old=old,
    )  # fmt: skip
    assert (old == 2.0**24).all()
    assert x[0] == 2.0**24 + 4.0


@pytest.mark.parametrize(("space", "expected"), [("global", 0.0), ("shared", 2.0**-140)])
def test_float_additions_flush_subnormals_in_global_memory_alone(
    space: str, expected: float
) -> None:
    x, out = np.array([2.0**-140], np.float32), np.zeros(32, np.float32)
    where = {"global": "[%x]", "shared": "[tile]"}[space]
    run_ptx(
        f"""setp.eq.u32 %p1, %t, 0; @!%p1 ret; ld.global.f32 %f1, [%x]; st.shared.f32 [tile], %f1;
        mov.f32 %f2, 0f00000000; atom.{space}.add.f32 %f3, {where}, %f2;
        ld.{space}.f32 %f4, {where}; st.global.f32 [%out], %f4;""",
        declare=TILE, x=x, out=out,
    )  # fmt: skip
    assert out[0] == expected


@pytest.mark.parametrize("words", ["red.global.add.u32", "red.relaxed.gpu.global.add.u32",
                                   "red.release.gpu.global.add.u32", "red.add.u32"])  # fmt: skip
def test_reductions_have_no_result(words: str) -> None:
    x = np.zeros(2, np.uint32)
    run_ptx(
        f"""and.b32 %r1, %t, 1; shl.b32 %r1, %r1, 2; cvt.u64.u32 %rd1, %r1; add.u64 %rd1, %x, %rd1;
        {words} [%rd1], %t;""",
        x=x, grid=2,
    )  # fmt: skip
    assert x.tolist() == [2 * sum(range(0, 32, 2)), 2 * sum(range(1, 32, 2))]


def test_an_atomic_may_throw_its_result_away() -> None:
    x = np.zeros(1, np.uint32)
    run_ptx("atom.global.add.u32 _, [%x], 1;", x=x)
    assert x[0] == 32


def test_a_ticket_counter_wraps() -> None:
    """The last block takes the highest ticket and resets the counter."""
    x, old = np.zeros(1, np.uint32), np.zeros(5, np.uint32)
    run_ptx(
        """setp.ne.u32 %p1, %t, 0; @%p1 ret; atom.acq_rel.gpu.global.inc.u32 %r1, [%x], 4;
        mul.wide.u32 %rd1, %b, 4; add.u64 %rd1, %old, %rd1; st.global.u32 [%rd1], %r1;""",
        grid=5, x=x, old=old,
    )  # fmt: skip
    assert sorted(old.tolist()) == [0, 1, 2, 3, 4]
    assert x[0] == 0


@pytest.mark.parametrize(
    ("where", "essential"),
    [("[%x+2]", "not a multiple of 4"), ("[%x+4]", "0 bytes past the end of x")],
)
def test_faults_of_atomics_in_global_memory(where: str, essential: str) -> None:
    with faults("global access", essential, "lane 0", "atom.global.add.u32"):
        run_ptx(f"atom.global.add.u32 %r1, {where}, 1;", x=np.zeros(1, np.uint32))


@pytest.mark.parametrize(
    ("where", "essential"),
    [
        ("[tile+1024]", "outside the block's 1024 bytes"), ("[tile+2]", "not a multiple of 4"),
        ("[tile]", "atomic on shared memory that was never written"),
    ],
)  # fmt: skip
def test_faults_of_atomics_in_shared_memory(where: str, essential: str) -> None:
    with faults(essential, "lane 0", "atom.shared.add.u32"):
        run_ptx(f"atom.shared.add.u32 %r1, {where}, 1;", declare=TILE)


def test_atomics_on_local_memory_are_a_fault() -> None:
    with faults("atomic on local memory", "lane 0"):
        run_ptx(
            "mov.u64 %rd1, depot; cvta.local.u64 %rd1, %rd1; atom.add.u32 %r1, [%rd1], 1;",
            declare=DEPOT,
        )
