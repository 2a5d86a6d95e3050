"""Loads and stores: every type, width and space, and the forms of their instructions."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_kernels import faults, refuses, run_ptx, values

TILE = ".shared .align 16 .b8 tile[1024];"
DEPOT = ".local .align 16 .b8 depot[32];"
# Type, register that takes it exactly, NumPy's type.
TYPES = [
    ("b8", "%h1", "u1"), ("u8", "%h1", "u1"), ("s8", "%h1", "i1"),
    ("b16", "%h1", "u2"), ("u16", "%h1", "u2"), ("s16", "%h1", "i2"),
    ("b32", "%r1", "u4"), ("u32", "%r1", "u4"), ("s32", "%r1", "i4"), ("f32", "%f1", "f4"),
    ("b64", "%rd1", "u8"), ("u64", "%rd1", "u8"), ("s64", "%rd1", "i8"), ("f64", "%fd1", "f8"),
]  # fmt: skip
each_type = pytest.mark.parametrize(("kind", "register", "dtype"), TYPES, ids=[t[0] for t in TYPES])


# Every type in every space


@each_type
def test_global_memory(kind: str, register: str, dtype: str) -> None:
    x, out = values(dtype, 64), np.zeros(64, dtype)
    run_ptx(
        f"ld.global.{kind} {register}, [%x_g]; st.global.{kind} [%out_g], {register};",
        x=x, out=out, grid=2,
    )  # fmt: skip
    assert out.tobytes() == x.tobytes()


@each_type
def test_generic_addresses_reach_global_memory(kind: str, register: str, dtype: str) -> None:
    x, out = values(dtype, 32), np.zeros(32, dtype)
    run_ptx(f"ld.{kind} {register}, [%x_g]; st.{kind} [%out_g], {register};", x=x, out=out)
    assert out.tobytes() == x.tobytes()


@each_type
@pytest.mark.parametrize("space", ["shared", "local"])
def test_shared_and_local_memory(kind: str, register: str, dtype: str, space: str) -> None:
    """Written by address of a variable, read by a register; every thread of 64 has its own."""
    x, out = values(dtype, 64), np.zeros(64, dtype)
    size = np.dtype(dtype).itemsize
    body = {
        "shared": f"mov.u32 %r9, tile; mad.lo.u32 %r9, %t, {size}, %r9;",
        "local": "mov.u32 %r9, depot; add.u32 %r9, %r9, 8;",
    }[space]
    run_ptx(
        f"""{body} ld.global.{kind} {register}, [%x_g]; st.{space}.{kind} [%r9+16], {register};
        ld.{space}.{kind} {register}, [%r9+16]; st.global.{kind} [%out_g], {register};""",
        declare=TILE + DEPOT, block=64, x=x, out=out,
    )  # fmt: skip
    assert out.tobytes() == x.tobytes()


@each_type
@pytest.mark.parametrize("space", ["shared", "local"])
def test_cvta_makes_generic_addresses(kind: str, register: str, dtype: str, space: str) -> None:
    x, out = values(dtype, 32), np.zeros(32, dtype)
    size = np.dtype(dtype).itemsize if space == "shared" else 0
    name = {"shared": "tile", "local": "depot"}[space]
    run_ptx(
        f"""mov.u64 %rd8, {name}; mul.wide.u32 %rd9, %t, {size}; add.u64 %rd8, %rd8, %rd9;
        cvta.{space}.u64 %rd9, %rd8; cvta.to.{space}.u64 %rd10, %rd9;
        ld.global.{kind} {register}, [%x_g]; st.{kind} [%rd9+8], {register};
        ld.{space}.{kind} {register}, [%rd10+8]; st.{space}.{kind} [%rd8], {register};
        ld.{kind} {register}, [%rd9]; st.global.{kind} [%out_g], {register};""",
        declare=TILE + DEPOT, x=x, out=out, races=False,
    )  # fmt: skip
    assert out.tobytes() == x.tobytes()


def test_cvta_of_global_memory_changes_nothing() -> None:
    out = np.zeros(32, np.uint32)
    run_ptx(
        "cvta.to.global.u64 %rd1, %out_g; cvta.global.u64 %rd2, %rd1; st.global.u32 [%rd2], %t;",
        out=out,
    )
    assert out.tolist() == list(range(32))


def test_one_instruction_may_go_to_several_spaces() -> None:
    """By the lane: global, shared and local memory, through the same generic pointer."""
    x, out = np.arange(100, 132, dtype=np.uint32), np.zeros(32, np.uint32)
    run_ptx(
        """
        mov.u32 %r1, 7; mul.lo.u32 %r1, %t, %r1; st.local.u32 [depot], %r1;
        shl.b32 %r2, %t, 2; mov.u32 %r3, tile; add.u32 %r3, %r3, %r2; st.shared.u32 [%r3], %t;
        mov.u64 %rd1, tile; cvta.shared.u64 %rd1, %rd1; mul.wide.u32 %rd2, %t, 4;
        add.u64 %rd1, %rd1, %rd2; mov.u64 %rd3, depot; cvta.local.u64 %rd3, %rd3;
        mov.u64 %rd4, %x_g;
        setp.ge.u32 %p1, %t, 10; @%p1 mov.u64 %rd4, %rd1;
        setp.ge.u32 %p2, %t, 20; @%p2 mov.u64 %rd4, %rd3;
        ld.u32 %r4, [%rd4]; add.u32 %r4, %r4, 1; st.u32 [%rd4], %r4; ld.u32 %r5, [%rd4];
        st.global.u32 [%out_g], %r5;
        """,
        declare=TILE + DEPOT, x=x, out=out,
    )  # fmt: skip
    assert out.tolist() == [100 + i + 1 for i in range(10)] + [i + 1 for i in range(10, 20)] + [
        7 * i + 1 for i in range(20, 32)
    ]
    assert x.tolist() == [100 + i + (i < 10) for i in range(32)]


def test_a_generic_address_between_the_spaces_is_a_fault() -> None:
    with faults("global access outside all tensors", "0x1000000200000000"):
        run_ptx(f"mov.u64 %rd1, {(1 << 60) + (1 << 33)}; ld.u32 %r1, [%rd1];")


def test_parameters() -> None:
    """Directly, with an offset, through a register and through a generic address."""
    out = np.zeros(32 * 5, np.uint64)
    run_ptx(
        """
        mad.lo.u32 %r9, %t, 40, 0; cvt.u64.u32 %rd9, %r9; add.u64 %rd9, %out, %rd9;
        ld.param.u32 %r1, [n]; cvt.u64.u32 %rd1, %r1; st.global.u64 [%rd9], %rd1;
        ld.param.s8 %r2, [n]; cvt.s64.s32 %rd2, %r2; st.global.u64 [%rd9+8], %rd2;
        mov.u64 %rd3, out; ld.param.u64 %rd4, [%rd3+0]; st.global.u64 [%rd9+16], %rd4;
        ld.param.u16 %h1, [n+2]; cvt.u64.u16 %rd5, %h1; st.global.u64 [%rd9+24], %rd5;
        mov.u64 %rd6, n; cvta.param.u64 %rd6, %rd6; ld.u32 %r7, [%rd6]; cvt.u64.u32 %rd7, %r7;
        st.global.u64 [%rd9+32], %rd7;
        """,
        out=out, n=0xABCD12F4,
    )  # fmt: skip
    expected = [0xABCD12F4, 2**64 - 12, out.ctypes.data, 0xABCD, 0xABCD12F4]
    assert out.reshape(32, 5).tolist() == [expected] * 32


@pytest.mark.parametrize(
    ("kind", "count", "registers"),
    [
        ("u8", 2, "%h1,%h2"), ("u8", 4, "%h1,%h2,%h3,%h4"), ("u16", 2, "%h1,%h2"),
        ("b16", 4, "%h1,%h2,%h3,%h4"), ("u32", 2, "%r1,%r2"), ("b32", 4, "%r1,%r2,%r3,%r4"),
        ("f32", 4, "%f1,%f2,%f3,%f4"), ("u64", 2, "%rd1,%rd2"), ("f64", 2, "%fd1,%fd2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("space", ["global", "shared", "local"])
def test_vectors(kind: str, count: int, registers: str, space: str) -> None:
    size = int(kind[1:]) // 8 * count
    x, out = values("u1", 32 * size), np.zeros(32 * size, np.uint8)
    where = {"global": "%rd10", "shared": "%r9", "local": "depot+16"}[space]
    vector = f"v{count}.{kind}"
    run_ptx(
        f"""
        mul.wide.u32 %rd8, %t, {size}; add.u64 %rd9, %x, %rd8; add.u64 %rd10, %out, %rd8;
        mov.u32 %r9, tile; mad.lo.u32 %r9, %t, {size}, %r9;
        ld.global.{vector} {{{registers}}}, [%rd9]; st.{space}.{vector} [{where}], {{{registers}}};
        ld.{space}.{vector} {{{registers}}}, [{where}]; st.global.{vector} [%rd10], {{{registers}}};
        """,
        declare=TILE + DEPOT, x=x, out=out,
    )  # fmt: skip
    assert out.tobytes() == x.tobytes()


def test_the_elements_of_a_vector_lie_in_order() -> None:
    x, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    run_ptx(
        """mul.wide.u32 %rd1, %t, 16; add.u64 %rd2, %x, %rd1; add.u64 %rd3, %out, %rd1;
        ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd2];
        st.global.v4.u32 [%rd3], {%r4, %r3, 7, %r1};""",
        x=x, out=out,
    )  # fmt: skip
    assert out[:8].tolist() == [3, 2, 7, 0, 7, 6, 7, 4]


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ("ld.global.s8 %r1", 0xFFFFFFF4), ("ld.global.u8 %r1", 0xF4), ("ld.global.b8 %r1", 0xF4),
        ("ld.global.s16 %r1", 0xFFFF80F4), ("ld.global.u16 %r1", 0x80F4),
    ],
)  # fmt: skip
def test_narrow_loads_extend_by_the_sign_of_their_type(load: str, expected: int) -> None:
    x, out = np.array([0x80F4] * 2, np.uint16), np.zeros(32, np.uint32)
    run_ptx(f"{load}, [%x]; st.global.u32 [%out_g], %r1;", x=x, out=out)
    assert (out == expected).all()


def test_narrow_loads_extend_to_64_bits() -> None:
    x, out = np.array([-5], np.int32), np.zeros(64, np.uint64)
    run_ptx(
        """ld.global.s32 %rd1, [%x]; ld.global.u32 %rd2, [%x]; shl.b32 %r1, %t, 4;
        cvt.u64.u32 %rd3, %r1; add.u64 %rd3, %out, %rd3; st.global.v2.u64 [%rd3], {%rd1, %rd2};""",
        x=x, out=out,
    )  # fmt: skip
    assert out.reshape(32, 2).tolist() == [[2**64 - 5, 2**32 - 5]] * 32


def test_narrow_stores_cut() -> None:
    out = np.zeros(32, np.uint8)
    run_ptx("add.u32 %r1, %t, 0x7f00; st.global.u8 [%out_g], %r1;", out=out)
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize(
    "words",
    [
        "ld.volatile.global.u32", "ld.relaxed.gpu.global.u32", "ld.acquire.gpu.global.u32",
        "ld.acquire.sys.global.u32", "ld.global.nc.u32", "ld.global.ca.u32", "ld.global.cg.u32",
        "ld.global.cs.u32", "ld.global.cv.u32", "ld.global.nc.L1::no_allocate.L2::128B.u32",
        "ld.weak.global.u32", "ld.global.L1::evict_last.u32", "ldu.global.u32",
    ],
)  # fmt: skip
def test_modifiers_of_loads(words: str) -> None:
    x, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    run_ptx(f"{words} %r1, [%x_g]; st.global.u32 [%out_g], %r1;", x=x, out=out)
    assert out.tolist() == x.tolist()


@pytest.mark.parametrize(
    "words",
    [
        "st.volatile.global.u32", "st.relaxed.gpu.global.u32", "st.release.gpu.global.u32",
        "st.release.sys.global.u32", "st.global.wb.u32", "st.global.cg.u32", "st.global.cs.u32",
        "st.global.wt.u32", "st.global.L1::no_allocate.u32", "st.weak.global.u32",
    ],
)  # fmt: skip
def test_modifiers_of_stores(words: str) -> None:
    out = np.zeros(32, np.uint32)
    run_ptx(f"{words} [%out_g], %t;", out=out)
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize("order", ["volatile", "relaxed.cta"])
def test_strong_accesses_to_shared_memory(order: str) -> None:
    out = np.zeros(32, np.uint32)
    run_ptx(
        f"""shl.b32 %r1, %t, 2; mov.u32 %r2, tile; add.u32 %r1, %r1, %r2;
        st.{order}.shared.u32 [%r1], %t; ld.{order}.shared.u32 %r3, [%r1];
        st.global.u32 [%out_g], %r3;""",
        declare=TILE, out=out,
    )  # fmt: skip
    assert out.tolist() == list(range(32))


def test_a_cache_policy_is_taken_and_means_nothing() -> None:
    x, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    run_ptx(
        """createpolicy.fractional.L2::evict_last.b64 %rd1, 1.0;
        ld.global.L2::cache_hint.u32 %r1, [%x_g], %rd1;
        st.global.L2::cache_hint.u32 [%out_g], %r1, %rd1;""",
        x=x, out=out,
    )  # fmt: skip
    assert out.tolist() == x.tolist()


@pytest.mark.parametrize(
    "statement",
    [
        "ld.global.u24 %r1, [%out];", "ld.global.v3.u32 {%r1, %r2, %r3}, [%out];",
        "ld.global.v4.u64 {%rd1, %rd2, %rd3, %rd4}, [%out];", "ld.global.v2.u32 %r1, [%out];",
        "ld.global.u32 {%r1, %r2}, [%out];", "ld.global.u64 %r1, [%out];",
        "ld.release.gpu.global.u32 %r1, [%out];", "ld.global.bogus.u32 %r1, [%out];",
        "ld.global.u32 %r1, %out;", "ld.global.u32 %r1, [%nothing];",
        "ld.global.u32 %r1, [nothing];", "ld.global.u32 7, [%out];",
        "ld.global.u32 %r1, [%out], %rd1;", "ld.global.L2::cache_hint.u32 %r1, [%out];",
        "st.acquire.gpu.global.u32 [%out], %r1;", "st.global.u32 [%out], %h1;",
        "st.global.u32 [%out], nothing;", "st.global.u32 [%out];", "st.global.u32 %out, %r1;",
        "atom.global.add.u16 %h1, [%out], %h2;", "atom.global.add.b32 %r1, [%out], %r2;",
        "atom.global.and.u32 %r1, [%out], %r2;", "atom.global.inc.s32 %r1, [%out], %r2;",
        "atom.global.max.f32 %f1, [%out], %f2;", "atom.global.bogus.u32 %r1, [%out], %r2;",
        "atom.global.cas.b32 %r1, [%out], %r2;", "atom.global.add.u32 %r1, [%out], %rd2;",
        "atom.global.add.u64 %r1, [%out], %rd2;", "red.global.exch.b32 [%out], %r1;",
        "atom.global.add.u32 %r1, [%out];", "cvta.bogus.u64 %rd1, %rd2;",
    ],
)  # fmt: skip
def test_refuses_unknown_forms(statement: str) -> None:
    out = np.zeros(32, np.uint32)
    name = statement.split()[0].replace(".", r"\.")
    with refuses(f"unknown .* in `{name}`", r"PTX line \d+", "Nothing was run"):
        run_ptx(f"mov.u32 %r1, 0; st.global.u32 [%out], %r1; {statement}", out=out)
    assert not out.any()
