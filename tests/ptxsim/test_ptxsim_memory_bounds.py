"""Bounds of tensors, of shared and local memory and of parameters; and what nobody has written."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from ptx_kernels import Tensor, faults, module, run_ptx, simulate_text

from gqa_cutlass.ptxsim.memory.spaces import Region

TILE = ".shared .align 16 .b8 tile[1024];"
DEPOT = ".local .align 16 .b8 depot[32];"


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
