"""Loads, stores and atomics: every width and space, and the bounds of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from ptx_kernels import Tensor, faults, module, refuses, run_ptx, simulate_text

from gqa_cutlass.ptxsim.memory.spaces import Region

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


def values(dtype: str, n: int) -> NDArray[Any]:
    """Numbers of both signs that differ in all their bytes."""
    bits = np.random.default_rng(0).integers(0, 256, n * np.dtype(dtype).itemsize, dtype=np.uint8)
    return np.nan_to_num(bits.view(dtype)) if dtype[0] == "f" else bits.view(dtype)


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


# Bounds


@pytest.mark.parametrize("space", ["global", "generic"])
@pytest.mark.parametrize(
    ("kind", "index", "essential"),
    [
        ("u32", -1, "4 bytes before x"), ("u32", 32, "0 bytes past the end of x"),
        ("u8", -1, "1 bytes before x"), ("u8", 128, "0 bytes past the end of x"),
        ("v4.u32", 8, "0 bytes past the end of x"), ("v2.u32", -1, "8 bytes before x"),
    ],
)  # fmt: skip
def test_faults_right_outside_a_tensor(space: str, kind: str, index: int, essential: str) -> None:
    """Lane 5 of warp 1 of block 1 alone."""
    room = np.zeros(256, np.uint32)
    x = room[64:96]
    count, width = (int(kind[1]), 4) if kind[0] == "v" else (1, int(kind[1:]) // 8)
    target = "%r1" if count == 1 else "{" + ", ".join(f"%r{i}" for i in range(1, count + 1)) + "}"
    words = "ld." + ("global." if space == "global" else "") + kind
    address = x.ctypes.data + index * count * width
    with faults(
        "global access outside all tensors", essential, rf"x \(128 bytes at {x.ctypes.data:#x}\)",
        f"address {address:#x}", r"block \(1, 0, 0\), warp 1, lane 5", f"`{words}` at PTX line",
    ):  # fmt: skip
        run_ptx(
            f"""mov.u64 %rd1, %x; setp.eq.u32 %p1, %g, {64 + 32 + 5};
            @%p1 add.s64 %rd1, %rd1, {index * count * width}; {words} {target}, [%rd1];""",
            grid=2, block=64, x=x,
        )  # fmt: skip


def test_the_first_and_the_last_byte_of_a_tensor_may_be_used() -> None:
    room = np.arange(256, dtype=np.uint8)
    x, out = room[17:50], np.zeros(2, np.uint8)
    run_ptx(
        """ld.global.u8 %h1, [%x]; ld.global.u8 %h2, [%x+32];
        st.global.u8 [%out], %h1; st.global.u8 [%out+1], %h2;""",
        x=x, out=out, races=False,
    )  # fmt: skip
    assert out.tolist() == [17, 49]


def test_an_access_across_the_end_of_a_tensor_is_a_fault() -> None:
    x = np.zeros(128, np.uint8)[:6]
    with faults("outside all tensors", "at byte 4 of x"):
        run_ptx("ld.global.u32 %r1, [%x+4];", x=x)


def test_nothing_is_stored_by_an_access_that_faults() -> None:
    room = np.zeros(64, np.uint32)
    with faults("outside all tensors", "lane 16"):
        run_ptx("st.global.u32 [%x_g], 1;", x=room[:16])
    assert not room[16:].any()


def test_no_tensor_at_all() -> None:
    with faults("outside all tensors", "no tensor was given"):
        run_ptx("mov.u64 %rd1, 4096; ld.global.u32 %r1, [%rd1];")


def test_the_null_pointer_is_a_fault() -> None:
    with faults("outside all tensors", "address 0x0"):
        run_ptx("mov.u64 %rd1, 0; ld.global.u32 %r1, [%rd1];", x=np.zeros(4, np.uint32))


def strided(gap: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Memory, and in it rows of 8 numbers with gaps between them."""
    room = np.zeros((4, 8 + gap), np.uint32)
    return room, room[:, :8]


def test_the_rows_of_a_strided_tensor_may_be_used() -> None:
    room, rows = strided(4)
    run_ptx(
        """shr.u32 %r1, %t, 3; mul.lo.u32 %r1, %r1, 48; and.b32 %r2, %t, 7;
        mad.lo.u32 %r1, %r2, 4, %r1; cvt.u64.u32 %rd1, %r1; add.u64 %rd1, %x, %rd1;
        st.global.u32 [%rd1], %t; ld.global.u32 %r3, [%rd1]; st.global.u32 [%rd1], %r3;""",
        x=rows,
    )  # fmt: skip
    assert rows.tolist() == np.arange(32).reshape(4, 8).tolist()
    assert not room[:, 8:].any()


@pytest.mark.parametrize("words", ["ld.global.u32 %r1, [%rd1];", "st.global.u32 [%rd1], 1;"])
@pytest.mark.parametrize("offset", [32, 44, 48 + 40])
def test_faults_in_the_gap_of_a_strided_tensor(words: str, offset: int) -> None:
    room, rows = strided(4)
    with faults("outside all tensors", f"at byte {offset} of x"):
        run_ptx(f"add.u64 %rd1, %x, {offset}; {words}", x=rows)
    assert not room.any()


def test_a_broadcast_tensor_may_be_read() -> None:
    x = as_strided(np.array([5], np.uint32), (32,), (0,), writeable=False)
    out = np.zeros(32, np.uint32)
    run_ptx(
        "ld.global.u32 %r1, [%x]; st.global.u32 [%out_g], %r1;",
        x=Tensor(x, writable=False), out=out,
    )  # fmt: skip
    assert (out == 5).all()
    with faults("outside all tensors"):
        run_ptx("ld.global.u32 %r1, [%x+4];", x=Tensor(x, writable=False))


def test_tensors_that_share_memory_allow_what_either_allows() -> None:
    room = np.zeros(16, np.uint32)
    arguments = {"a": Tensor(room[:8], writable=False), "b": Tensor(room[4:], readable=False)}
    run_ptx(
        """ld.global.u32 %r1, [%a]; ld.global.u32 %r2, [%a+28]; bar.sync 0;
        setp.eq.u32 %p1, %t, 0; @%p1 st.global.u32 [%b], 1; @%p1 st.global.u32 [%b+44], 2;""",
        **arguments,
    )
    assert (room[4], room[15]) == (1, 2)
    with faults("not to be written", "at byte 12 of a"):
        run_ptx("st.global.u32 [%a+12], 1;", **arguments)
    with faults("not to be read", "at byte 16 of b"):
        run_ptx("ld.global.u32 %r1, [%b+16];", **arguments)


@pytest.mark.parametrize("rows", ["dense", "strided"])
@pytest.mark.parametrize(
    "words",
    ["st.global.u32 [%x], 1;", "red.global.add.u32 [%x], 1;", "atom.global.exch.b32 %r1, [%x], 1;"],
)
def test_faults_on_writes_to_a_read_only_tensor(rows: str, words: str) -> None:
    x = np.zeros(8, np.uint32) if rows == "dense" else strided(4)[1]
    with faults("not to be written", "at byte 0 of x", words.split()[0]):
        run_ptx(words, x=Tensor(x, writable=False))
    assert not x.any()


@pytest.mark.parametrize("rows", ["dense", "strided"])
@pytest.mark.parametrize("words", ["ld.global.u32 %r1, [%x];", "red.global.add.u32 [%x], 1;"])
def test_faults_on_reads_of_a_write_only_tensor(rows: str, words: str) -> None:
    """Also of what the kernel itself wrote."""
    x = np.zeros(8, np.uint32) if rows == "dense" else strided(4)[1]
    with faults("not to be read", "at byte 0 of x"):
        run_ptx(f"st.global.u32 [%x], 1; {words}", x=Tensor(x, readable=False), races=False)


def test_a_fresh_tensor_must_be_written_before_it_is_read() -> None:
    x, out = np.full(32, 9, np.uint32), np.zeros(32, np.uint32)
    run_ptx(
        "st.global.u32 [%x_g], %t; ld.global.u32 %r1, [%x_g]; st.global.u32 [%out_g], %r1;",
        x=Tensor(x, fresh=True), out=out,
    )  # fmt: skip
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize("words", ["ld.global.u32 %r1, [%rd1];", "red.global.add.u32 [%rd1], 1;"])
def test_faults_on_reads_of_a_fresh_tensor(words: str) -> None:
    x = np.full(32, 9, np.uint32)
    with faults("never written before", "at byte 40 of x", "lane 9"):
        run_ptx(
            f"""setp.ne.u32 %p1, %t, 10; @%p1 st.global.u32 [%x_g], %t;
            add.u64 %rd1, %x_g, 4; setp.lt.u32 %p1, %t, 31; @!%p1 ret; {words}""",
            x=Tensor(x, fresh=True), races=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "size"),
    [("ld.global.u16 %h1", 2), ("ld.global.u32 %r1", 4), ("ld.global.v2.u32 {%r1, %r2}", 8),
     ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}", 16), ("ld.global.u64 %rd2", 8)],
)  # fmt: skip
def test_faults_on_misaligned_global_accesses(words: str, size: int) -> None:
    x = np.zeros(64, np.uint32)
    with faults(f"not a multiple of {size} bytes", f"address {x.ctypes.data + size // 2:#x}"):
        run_ptx(f"add.u64 %rd1, %x, {size // 2}; {words}, [%rd1];", x=x)


# Shared and local memory, parameters


@pytest.mark.parametrize(("offset", "fine"), [(0, True), (60, True), (-4, False), (64, False)])
@pytest.mark.parametrize("dynamic", [0, 32])
def test_bounds_of_shared_memory(offset: int, fine: bool, dynamic: int) -> None:
    """64 bytes, half of them dynamic or none."""
    declare = f".shared .align 16 .b8 tile[{64 - dynamic}];"
    body = f"setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [tile+{offset}], 1;"
    if fine:
        run_ptx(body, declare=declare, shared=dynamic)
        return
    with faults(
        "shared access outside the block's 64 bytes of shared memory", "lane 0",
        f"address {1024 + offset:#x}",
    ):  # fmt: skip
        run_ptx(body, declare=declare, shared=dynamic)


def test_an_access_across_the_end_of_shared_memory_is_a_fault() -> None:
    with faults("outside the block's 24 bytes of shared memory", "address 0x410"):
        run_ptx(
            "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [tile+16];",
            declare=".shared .align 16 .b8 tile[24];",
        )


def test_shared_addresses_of_32_bits_wrap() -> None:
    out = np.zeros(32, np.uint32)
    run_ptx(
        """setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [tile+4], 7; bar.sync 0;
        mov.u32 %r1, 0xfffffff4; ld.shared.u32 %r2, [%r1+1040]; st.global.u32 [%out_g], %r2;""",
        declare=TILE, out=out,
    )  # fmt: skip
    assert (out == 7).all()


def test_dynamic_shared_memory_lies_behind_the_static_one() -> None:
    out = np.zeros(3, np.uint32)
    text = module(
        """mov.u32 %r1, fixed; mov.u32 %r2, dynamic; mov.u32 %r3, other;
        st.global.u32 [%out], %r1; st.global.u32 [%out+4], %r2; st.global.u32 [%out+8], %r3;""",
        declare=".shared .align 4 .b8 fixed[20];", out=out,
    )  # fmt: skip
    outside = (
        ".extern .shared .align 16 .b8 dynamic[];\n.extern .shared .b8 other[];\n.visible .entry"
    )
    simulate_text(text.replace(".visible .entry", outside), shared=64, out=out, races=False)
    assert out.tolist() == [1024, 1024 + 32, 1024 + 32]


def test_blocks_have_their_own_shared_memory() -> None:
    out = np.zeros(96, np.uint32)
    run_ptx(
        """mov.u32 %r1, tile; shl.b32 %r2, %t, 2; add.u32 %r1, %r1, %r2;
        st.shared.u32 [%r1], %g; ld.shared.u32 %r3, [%r1]; st.global.u32 [%out_g], %r3;""",
        declare=TILE, grid=3, out=out,
    )  # fmt: skip
    assert out.tolist() == list(range(96))


def test_faults_on_misaligned_shared_accesses() -> None:
    with faults("shared access not a multiple of 8 bytes", "address 0x404"):
        run_ptx("ld.shared.u64 %rd1, [tile+4];", declare=TILE)


def test_faults_on_shared_memory_that_was_never_written() -> None:
    with faults("reads shared memory that was never written", "address 0x420", "lane 8"):
        run_ptx(
            """mov.u32 %r1, tile; shl.b32 %r2, %t, 2; add.u32 %r1, %r1, %r2;
            setp.lt.u32 %p1, %t, 8; @%p1 st.shared.u32 [%r1], %t; ld.shared.u32 %r3, [%r1];""",
            declare=TILE,
        )


def test_faults_on_the_unwritten_part_of_a_wide_read() -> None:
    with faults("never written", "address 0x408"):
        run_ptx(
            """setp.ne.u32 %p1, %t, 0; @%p1 ret; st.shared.v2.u32 [tile], {1, 2};
            st.shared.u32 [tile+12], 3; ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [tile];""",
            declare=TILE,
        )


@pytest.mark.parametrize("offset", [-4, 30, 32])
def test_faults_outside_local_memory(offset: int) -> None:
    with faults("local access outside the 32 bytes", "lane 0"):
        run_ptx(f"st.local.u32 [depot+{offset}], 1;", declare=DEPOT)


@pytest.mark.parametrize("offset", [12, 16, 2])
def test_faults_outside_the_parameters(offset: int) -> None:
    """Of 12 bytes: a pointer and a number."""
    with faults("param access outside the 12 bytes", "block"):
        run_ptx(f"ld.param.u32 %r1, [x+{offset}];", x=np.zeros(4, np.uint32), n=7)


def test_parameters_of_odd_size_can_be_read_in_words_of_64_bits() -> None:
    x, out = np.array([3], np.uint32), np.zeros(32, np.uint32)
    run_ptx("ld.global.u32 %r1, [%x]; st.global.u32 [%out_g], %r1;", x=x, out=out, n=7)
    assert (out == 3).all()


@pytest.mark.parametrize(
    "words",
    ["st.param.u32 [n], 1;", "mov.u64 %rd1, n; cvta.param.u64 %rd1, %rd1; st.u32 [%rd1], 1;"],
)
def test_parameters_cannot_be_written(words: str) -> None:
    with faults("parameters cannot be written"):
        run_ptx(words, n=7)


# Atomics


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


@pytest.mark.parametrize(
    ("shape", "strides", "dense"),
    [
        ((4, 8), (16, 2), True),
        ((8, 4), (2, 16), True),  # transposed
        ((4, 8), (18, 2), False),
        ((1, 8), (999, 2), True),
        ((3, 8), (0, 2), True),  # expanded
        ((2, 2, 8), (0, 48, 2), False),  # expanded, with a gap that the copies would fill
        ((2, 7), (8, 2), True),  # overlapping
    ],
)
def test_regions_know_whether_they_have_gaps(
    shape: tuple[int, ...], strides: tuple[int, ...], dense: bool
) -> None:
    region = Region(name="t", address=4096, shape=shape, strides=strides, itemsize=2)
    assert region.dense == dense
