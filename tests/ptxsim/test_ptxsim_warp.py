"""Instructions of whole warps: shuffles, votes, and matrices through shared memory."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from ptx_kernels import faults, refuses, result, run_ptx

TILE = ".shared .align 16 .b8 tile[1024];"


# Instructions of a whole warp


def test_lanes_that_come_late_are_waited_for() -> None:
    """Half of the warp goes round a loop before the shuffle, whose code comes first."""
    body = """
        mov.u32 %r2, 0; setp.lt.u32 %p1, %t, 16; @%p1 bra MEET; bra LATE;
        MEET: shfl.sync.bfly.b32 %r1, %t, 16, 31, -1; bra END;
        LATE: add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 20; @%p2 bra LATE; bra MEET;
        END:
    """
    assert result(body) == [t ^ 16 for t in range(32)]


@pytest.mark.parametrize(
    ("mode", "b", "expected"),
    [
        ("idx", "5", [5] * 32),
        ("up", "1", [0, *range(31)]),
        ("down", "4", [*range(4, 32), *range(28, 32)]),
        ("bfly", "3", [t ^ 3 for t in range(32)]),
    ],
)
def test_shuffles(mode: str, b: str, expected: list[int]) -> None:
    clamp = 0 if mode == "up" else 31
    body = f"add.u32 %r2, %t, 100; shfl.sync.{mode}.b32 %r1, %r2, {b}, {clamp}, 0xffffffff;"
    assert result(body) == [100 + e for e in expected]


def test_a_shuffle_tells_whether_its_source_is_in_range() -> None:
    body = """
        shfl.sync.down.b32 %r2|%p1, %t, 8, 31, -1; selp.u32 %r1, %r2, 99, %p1;
        shfl.sync.up.b32 _|%p2, %t, 4, 0, -1; @!%p2 add.u32 %r1, %r1, 1000;
    """
    assert result(body) == [
        (t + 8 if t < 24 else 99) + (1000 if t < 4 else 0) for t in range(32)
    ]  # fmt: skip


def test_a_shuffle_of_a_part_of_the_warp() -> None:
    body = """
        setp.lt.u32 %p1, %t, 16; @!%p1 bra END; shfl.sync.bfly.b32 %r1, %t, 1, 31, 0xffff; END:
    """
    assert result(body) == [t ^ 1 for t in range(16)] + [0] * 16


def test_a_guarded_shuffle_lets_the_others_pass() -> None:
    body = "setp.ge.u32 %p1, %t, 16; @%p1 shfl.sync.bfly.b32 %r1, %t, 1, 31, 0xffff0000;"
    assert result(body) == [0] * 16 + [t ^ 1 for t in range(16, 32)]


def test_two_halves_of_a_warp_shuffle_among_themselves() -> None:
    """With masks in a register, at the same instruction."""
    body = """
        setp.lt.u32 %p1, %t, 16; selp.b32 %r2, 0xffff, 0xffff0000, %p1;
        shfl.sync.idx.b32 %r1, %t, %r3, 31, %r2;
    """.replace("shfl", "and.b32 %r3, %t, 16; shfl")
    assert result(body) == [0] * 16 + [16] * 16


def test_faults_on_a_shuffle_from_a_lane_that_does_not_take_part() -> None:
    with faults("shfl reads a lane that does not take part", "warp 1, lane 0"):
        result(
            """setp.ge.u32 %p2, %warp, 1; @!%p2 bra END; setp.lt.u32 %p1, %lane, 16;
            @%p1 shfl.sync.idx.b32 %r1, %t, 20, 31, 0xffff; END:""",
            lanes=64, block=64,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("shfl.sync.idx.b32 %r1, %t, 0, 31, %r9;", "shfl.sync.idx.b32"),
        ("vote.sync.ballot.b32 %r1, %p1, %r9;", "vote.sync.ballot.b32"),
        ("redux.sync.add.u32 %r1, %t, %r9;", "redux.sync.add.u32"),
        ("match.any.sync.b32 %r1, %t, %r9;", "match.any.sync.b32"),
        ("elect.sync _|%p2, %r9;", "elect.sync"),
        ("bar.warp.sync %r9;", "bar.warp.sync"),
    ],
)
@pytest.mark.parametrize("half", [False, True], ids=["whole", "half"])
def test_faults_on_a_lane_that_its_own_mask_leaves_out(words: str, name: str, half: bool) -> None:
    guard = "@!%p1" if half else ""
    with faults("the lane is not in its membermask, 0x0000ffff", "warp 0, lane 16", f"`{name}`"):
        result(f"setp.lt.u32 %p1, %t, 16; mov.u32 %r9, 0xffff; {guard} {words}")


@pytest.mark.parametrize(
    "words",
    [
        "shfl.sync.idx.b32 %r1, %t, 0, 31, -1;", "vote.sync.any.pred %p2, %p1, 0xffffffff;",
        "match.any.sync.b32 %r1, %t, -1;", "redux.sync.max.s32 %r1, %t, -1;",
        "elect.sync _|%p2, -1;", "bar.warp.sync -1;",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r2,%r3}, {%r4}, "
        "{%f1,%f2,%f3,%f4};",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [tile];",
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [tile], {%r2};",
        "movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r2;",
    ],
)  # fmt: skip
@pytest.mark.parametrize("rest", ["waits elsewhere", "has exited", "is guarded off"])
def test_half_a_warp_alone_is_a_deadlock(words: str, rest: str) -> None:
    """Also where the other half has exited, which the ISA leaves undefined or forbids."""
    start = {
        "waits elsewhere": "@!%p1 bra B; A:",
        "has exited": "@!%p1 ret;",
        "is guarded off": "@%p1",
    }[rest]
    end = "bra END; B: bar.warp.sync 0xffffffff; END:" if rest == "waits elsewhere" else ""
    zeros = "".join(f"mov.u32 %r{i}, 0; mov.b32 %f{i}, 0f00000000;" for i in range(1, 5))
    name = words.split()[0].replace(".", r"\.")
    with faults(
        "deadlock: nobody can go on", "16 threads, first block \\(1, 0, 0\\), warp 1, lane 0",
        f"wait for the rest of its warp in `{name}` at PTX line",
    ):  # fmt: skip
        run_ptx(
            f"""{zeros} setp.lt.u32 %p1, %lane, 16; setp.eq.u32 %p3, %g, 9999;
            setp.ge.u32 %p4, %g, 96; @!%p4 ret; {start} {words} {end}""",
            grid=2, block=64, declare=TILE,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vote.sync.ballot.b32 %r1, %p1, -1;", 0b10101 | 1 << 31),
        ("vote.sync.any.pred %p2, %p1, -1; selp.u32 %r1, 1, 2, %p2;", 1),
        ("vote.sync.all.pred %p2, %p1, -1; selp.u32 %r1, 1, 2, %p2;", 2),
        ("vote.sync.uni.pred %p2, %p1, -1; selp.u32 %r1, 1, 2, %p2;", 2),
        ("vote.sync.ballot.b32 %r1, !%p1, -1;", 2**32 - 1 - (0b10101 | 1 << 31)),
        ("redux.sync.add.u32 %r1, %t, -1;", sum(range(32))),
        ("redux.sync.min.s32 %r1, %r4, -1;", 2**32 - 16),
        ("redux.sync.or.b32 %r1, %t, -1;", 31),
    ],
)
def test_votes_and_reductions(words: str, expected: int) -> None:
    body = f"""
        mov.u32 %r3, {0b10101 | 1 << 31}; shr.u32 %r3, %r3, %t; and.b32 %r3, %r3, 1;
        setp.eq.u32 %p1, %r3, 1; sub.s32 %r4, %t, 16; {words}
    """
    assert result(body) == [expected] * 32


def test_match_finds_the_lanes_with_the_same_value() -> None:
    body = "and.b32 %r2, %t, 3; match.any.sync.b32 %r1, %r2, -1;"
    assert result(body) == [0x11111111 << (t & 3) for t in range(32)]


def test_match_all_tells_whether_all_agree() -> None:
    body = """
        mov.u32 %r2, 5; match.all.sync.b32 %r1|%p1, %r2, -1; @!%p1 mov.u32 %r1, 1;
        match.all.sync.b32 _|%p2, %t, -1; @%p2 mov.u32 %r1, 2;
    """
    assert result(body) == [0xFFFFFFFF] * 32


def test_elect_chooses_one_lane() -> None:
    body = """
        setp.lt.u32 %p1, %t, 8; @%p1 bra END;
        elect.sync %r2|%p2, 0xffffff00; selp.u32 %r1, 1, 2, %p2; mad.lo.u32 %r1, %r2, 10, %r1; END:
    """
    assert result(body) == [0] * 8 + [81] + [82] * 23


# Matrices, through shared memory


def tile_of(seed: int, rows: int, columns: int) -> NDArray[np.float16]:
    return np.random.default_rng(seed).integers(-4, 5, (rows, columns)).astype(np.float16)


FILL = """
    mov.u32 %r9, tile; shl.b32 %r8, %t, 4; add.u32 %r9, %r9, %r8;
    mul.wide.u32 %rd9, %t, 16; add.u64 %rd9, %x, %rd9;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd9];
    st.shared.v4.b32 [%r9], {%r10, %r11, %r12, %r13}; bar.warp.sync -1;
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_two_neighbours_of_each_matrix(transposed: bool) -> None:
    x, out = np.arange(256, dtype=np.uint16), np.zeros((32, 8), np.uint16)
    trans = ".trans" if transposed else ""
    run_ptx(
        f"""{FILL} ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r9];
        mul.wide.u32 %rd1, %t, 16; add.u64 %rd1, %out, %rd1;
        st.global.v4.b32 [%rd1], {{%r1, %r2, %r3, %r4}};""",
        declare=TILE, x=x, out=out,
    )  # fmt: skip
    matrices = x.reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        assert out[lane].tolist() == matrices[:, row, column : column + 2].reshape(-1).tolist()


def test_stmatrix_undoes_ldmatrix() -> None:
    x, out = np.arange(256, dtype=np.uint16), np.zeros(256, np.uint16)
    run_ptx(
        f"""{FILL} ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r9];
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r9+512], {{%r1, %r2, %r3, %r4}};
        bar.warp.sync -1; ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r9+512];
        mul.wide.u32 %rd1, %t, 16; add.u64 %rd1, %out, %rd1;
        st.global.v4.b32 [%rd1], {{%r1, %r2, %r3, %r4}};""",
        declare=TILE, x=x, out=out,
    )  # fmt: skip
    assert out.tolist() == x.tolist()


@pytest.mark.parametrize(
    ("where", "essential"),
    [
        ("[tile+8]", "shared access not a multiple of 16 bytes"),
        ("[tile+1016]", "outside the block's 1024 bytes"),
        ("[tile+512]", "never written"),
    ],
)
def test_faults_of_ldmatrix(where: str, essential: str) -> None:
    with faults(essential, "warp 0, lane 0", "ldmatrix.sync.aligned.m8n8.x1.shared.b16"):
        run_ptx(
            f"{FILL} ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, {where};",
            declare=TILE, x=np.zeros(256, np.uint16),
        )  # fmt: skip


def test_ldmatrix_of_one_matrix_needs_the_addresses_of_eight_lanes_only() -> None:
    run_ptx(
        f"""{FILL} setp.ge.u32 %p1, %t, 8; @%p1 mov.u32 %r9, 0xfffff3;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, [%r9];""",
        declare=TILE, x=np.zeros(256, np.uint16),
    )  # fmt: skip


def test_a_product_of_matrices() -> None:
    """A, 16 by 16, lies in rows; B, 16 by 8, in columns; each warp multiplies."""
    a, b = tile_of(0, 16, 16), tile_of(1, 16, 8)
    x = np.concatenate(
        [a.reshape(2, 8, 2, 8).transpose(2, 0, 1, 3).reshape(-1), np.zeros(0, np.float16)]
    )
    y = np.ascontiguousarray(b.T)
    out = np.zeros((16, 8), np.float32)
    run_ptx(
        f"""{FILL} ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r9];
        shr.u32 %r5, %t, 2; and.b32 %r6, %t, 3; shl.b32 %r7, %r5, 5; mad.lo.u32 %r7, %r6, 4, %r7;
        cvt.u64.u32 %rd2, %r7; add.u64 %rd2, %y, %rd2;
        ld.global.b32 %r14, [%rd2]; ld.global.b32 %r15, [%rd2+16];
        mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f1, %f2, %f3, %f4}},
            {{%r1, %r2, %r3, %r4}}, {{%r14, %r15}}, {{%f1, %f2, %f3, %f4}};
        shl.b32 %r7, %r5, 5; mad.lo.u32 %r7, %r6, 8, %r7; cvt.u64.u32 %rd3, %r7;
        add.u64 %rd3, %out, %rd3; st.global.v2.f32 [%rd3], {{%f1, %f2}};
        st.global.v2.f32 [%rd3+256], {{%f3, %f4}};""",
        declare=TILE, x=x, y=y, out=out,
    )  # fmt: skip
    assert (out == a.astype(np.float32) @ b.astype(np.float32)).all()


def test_movmatrix_transposes() -> None:
    x, out = np.arange(64, dtype=np.uint16), np.zeros((8, 8), np.uint16)
    run_ptx(
        """shl.b32 %r9, %t, 2; cvt.u64.u32 %rd9, %r9; add.u64 %rd8, %x, %rd9;
        ld.global.b32 %r1, [%rd8]; movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;
        add.u64 %rd8, %out, %rd9; st.global.b32 [%rd8], %r2;""",
        x=x, out=out,
    )  # fmt: skip
    assert (out == x.reshape(8, 8).T).all()


@pytest.mark.parametrize(
    "statement",
    [
        "shfl.idx.b32 %r1, %r2, 0, 31, -1;", "shfl.sync.left.b32 %r1, %r2, 0, 31, -1;",
        "shfl.sync.idx.b64 %rd1, %rd2, 0, 31, -1;", "shfl.sync.idx.b32 %r1, %r2, 0, 31;",
        "vote.sync.most.pred %p1, %p2, -1;", "vote.any.pred %p1, %p2;",
        "match.sync.any.b32 %r1, %r2, -1;", "redux.sync.add.f32 %f1, %f2, -1;",
        "elect %r1|%p1, -1;",
        "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r1,%r2,%r3}, [tile];",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [tile];",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b16 {%r1}, [tile];",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r2}, {%f2};",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r1}, {%r2}, "
        "{%f1,%f2,%f3,%f4};",
        "movmatrix.sync.aligned.m8n8.b16 %r1, %r2;",
        "bra NOWHERE;", "bra %r1;", "mov.b64 {%r1, %r2, %r3}, %rd1;",
    ],
)  # fmt: skip
def test_refuses_unknown_forms(statement: str) -> None:
    name = statement.split()[0].rstrip(";").replace(".", r"\.")
    with refuses(f"unknown .* in `{name}`", r"PTX line \d+"):
        run_ptx(statement, declare=TILE)
