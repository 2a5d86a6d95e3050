"""Who executes what: branches, loops, guards, registers, and instructions of whole warps."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ptx_kernels import faults, refuses, run_ptx

TILE = ".shared .align 16 .b8 tile[1024];"
STORE = "st.global.u32 [%out_g], %r1;"


def result(body: str, *, lanes: int = 32, **more: Any) -> list[int]:
    """What every thread leaves in %r1, which starts as 0."""
    out = np.full(lanes, 0xDEAD, np.uint32)
    run_ptx(f"mov.u32 %r1, 0; {body} {STORE}", out=out, **more)
    values: list[int] = out.tolist()
    return values


# Branches


def test_lanes_that_part_meet_again() -> None:
    """Both paths are taken, and all lanes take part in what follows: a ballot sees all of them."""
    body = """
        setp.lt.u32 %p1, %t, 10; @!%p1 bra ELSE; add.u32 %r1, %r1, 100; bra JOIN;
        ELSE: add.u32 %r1, %r1, 200;
        JOIN: activemask.b32 %r2; popc.b32 %r2, %r2; add.u32 %r1, %r1, %r2;
    """
    assert result(body) == [132] * 10 + [232] * 22


def test_on_each_path_only_its_lanes_are_active() -> None:
    body = """
        setp.lt.u32 %p1, %t, 10; @!%p1 bra ELSE; activemask.b32 %r1; bra JOIN;
        ELSE: activemask.b32 %r1; JOIN:
    """
    assert result(body) == [0x3FF] * 10 + [0xFFFFFC00] * 22


def test_branches_nest() -> None:
    body = """
        setp.lt.u32 %p1, %t, 16; and.b32 %r2, %t, 1; setp.eq.u32 %p2, %r2, 0;
        @!%p1 bra HIGH;
        @%p2 bra LOW_EVEN; add.u32 %r1, %r1, 1; bra LOW;
        LOW_EVEN: add.u32 %r1, %r1, 2;
        LOW: add.u32 %r1, %r1, 10; bra JOIN;
        HIGH: @%p2 bra HIGH_EVEN; add.u32 %r1, %r1, 3; bra JOIN;
        HIGH_EVEN: add.u32 %r1, %r1, 4;
        JOIN: add.u32 %r1, %r1, 100;
    """
    assert result(body) == [112, 111] * 8 + [104, 103] * 8


def test_every_lane_goes_round_a_loop_as_often_as_it_needs() -> None:
    body = """
        LOOP: setp.ge.u32 %p1, %r1, %t; @%p1 bra END; add.u32 %r1, %r1, 1; bra LOOP; END:
    """
    assert result(body) == list(range(32))


def test_loops_nest() -> None:
    """1 + ... + t."""
    body = """
        mov.u32 %r2, 0;
        OUTER: setp.gt.u32 %p1, %r2, %t; @%p1 bra END; mov.u32 %r3, 0;
        INNER: setp.ge.u32 %p2, %r3, %r2; @%p2 bra NEXT; add.u32 %r1, %r1, 1; add.u32 %r3, %r3, 1;
        bra INNER;
        NEXT: add.u32 %r2, %r2, 1; bra OUTER; END:
    """
    assert result(body) == [t * (t + 1) // 2 for t in range(32)]


def test_lanes_leave_a_loop_from_its_middle() -> None:
    body = """
        LOOP: add.u32 %r1, %r1, 3; setp.eq.u32 %p1, %t, %r1; @%p1 bra BREAK;
        setp.lt.u32 %p2, %r1, 30; @%p2 bra LOOP; mov.u32 %r1, 1000; BREAK: activemask.b32 %r2;
        popc.b32 %r2, %r2; shl.b32 %r2, %r2, 16; or.b32 %r1, %r1, %r2;
    """
    expected = [t if t and t % 3 == 0 else 1000 for t in range(32)]
    assert result(body) == [32 << 16 | e for e in expected]


def test_a_uniform_branch_is_a_branch() -> None:
    assert result("bra.uni OVER; mov.u32 %r1, 1; OVER: add.u32 %r1, %r1, 2;") == [2] * 32


def test_a_branch_may_go_back_to_the_first_instruction() -> None:
    out = np.zeros(32, np.uint32)
    run_ptx(
        """bra START; BACK: add.u32 %r1, %r1, 5; bra END; START: mov.u32 %r1, 1; bra BACK;
        END: st.global.u32 [%out_g], %r1;""",
        out=out,
    )  # fmt: skip
    assert (out == 6).all()


def test_guarded_instructions_leave_the_other_lanes_alone() -> None:
    body = """
        setp.lt.u32 %p1, %t, 4; @%p1 mov.u32 %r1, 7; @!%p1 add.u32 %r1, %r1, %t;
        setp.gt.u32 %p2, %t, 100; @%p2 mov.u32 %r1, 9; @%p2 st.global.u32 [%out], %r1;
    """
    assert result(body) == [7] * 4 + list(range(4, 32))


def test_a_guard_may_be_changed_by_what_it_guards() -> None:
    body = "setp.lt.u32 %p1, %t, 4; @%p1 setp.lt.u32 %p1, %t, 2; @%p1 mov.u32 %r1, 1;"
    assert result(body) == [1, 1] + [0] * 30


def test_lanes_that_exit_do_nothing_more() -> None:
    out = np.full(64, 9, np.uint32)
    run_ptx(
        """setp.ge.u32 %p1, %g, 40; @%p1 exit; setp.lt.u32 %p2, %g, 8; @%p2 ret;
        st.global.u32 [%out_g], %g;""",
        block=64, out=out,
    )  # fmt: skip
    assert out.tolist() == [9] * 8 + list(range(8, 40)) + [9] * 24


def test_an_exit_may_follow_on_a_store_of_the_same_guard() -> None:
    out = np.zeros(32, np.uint32)
    run_ptx(
        """setp.eq.u32 %p1, %t, 3; @%p1 st.global.u32 [%out_g], 1; @%p1 ret;
        st.global.u32 [%out_g], 2;""",
        out=out,
    )  # fmt: skip
    assert out.tolist() == [2] * 3 + [1] + [2] * 28


def test_blocks_and_warps_go_their_own_ways() -> None:
    """Loops of as many turns as the block's and the warp's numbers say."""
    body = """
        mad.lo.u32 %r2, %b, 10, %warp; setp.eq.u32 %p1, %r2, 0; @%p1 bra END;
        LOOP: add.u32 %r1, %r1, 2; sub.u32 %r2, %r2, 1; setp.ne.u32 %p1, %r2, 0; @%p1 bra LOOP; END:
    """
    expected = [2 * (10 * b + w) for b, w, _ in product(range(3), range(3), range(32))]
    assert result(body, lanes=288, grid=3, block=96) == expected


def test_many_blocks_run_in_several_batches() -> None:
    grid = 40
    body = """
        setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [tile], %b; bar.sync 0;
        ld.shared.u32 %r1, [tile];
    """
    found = result(body, lanes=grid * 1024, grid=grid, block=1024, declare=TILE)
    assert found == [b for b in range(grid) for _ in range(1024)]


SPECIALS = [
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "%laneid", "%warpid", "%nwarpid", "%lanemask_eq", "%lanemask_lt", "%lanemask_le",
    "%lanemask_gt", "%lanemask_ge", "%dynamic_smem_size", "%total_smem_size",
]  # fmt: skip


@pytest.mark.parametrize("name", SPECIALS)
def test_special_registers_in_a_grid_of_three_dimensions(name: str) -> None:
    grid, block = (2, 3, 2), 64
    out = np.full(12 * block, 0xDEAD, np.uint32)
    run_ptx(
        f"""mov.u32 %r2, %ctaid.z; mov.u32 %r3, %ctaid.y; mad.lo.u32 %r2, %r2, 3, %r3;
        mad.lo.u32 %r2, %r2, 2, %b; mad.lo.u32 %r2, %r2, {block}, %t; mul.wide.u32 %rd1, %r2, 4;
        add.u64 %rd1, %out, %rd1; mov.u32 %r1, {name}; st.global.u32 [%rd1], %r1;""",
        grid=grid, block=block, shared=48, declare=TILE, out=out,
    )  # fmt: skip
    expected = []
    for z, y, x, t in product(range(2), range(3), range(2), range(block)):
        lane = t % 32
        bit = 1 << lane
        expected.append({
            "%tid.x": t, "%tid.y": 0, "%tid.z": 0, "%ntid.x": block, "%ntid.y": 1, "%ntid.z": 1,
            "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z,
            "%nctaid.x": 2, "%nctaid.y": 3, "%nctaid.z": 2,
            "%laneid": lane, "%warpid": t // 32, "%nwarpid": 2, "%lanemask_eq": bit,
            "%lanemask_lt": bit - 1, "%lanemask_le": 2 * bit - 1,
            "%lanemask_gt": 2**32 - 2 * bit, "%lanemask_ge": 2**32 - bit,
            "%dynamic_smem_size": 48, "%total_smem_size": 1024 + 48,
        }[name])  # fmt: skip
    assert out.tolist() == expected


# Registers


def test_a_register_may_be_dead_on_one_path_and_needed_on_the_other() -> None:
    body = """
        mov.u32 %r2, 50; setp.lt.u32 %p1, %t, 16; @%p1 bra USES; mov.u32 %r1, 1; bra JOIN;
        USES: add.u32 %r1, %r2, %t; JOIN: add.u32 %r1, %r1, 1000;
    """
    assert result(body) == [1050 + t for t in range(16)] + [1001] * 16


def test_a_register_that_is_read_only_in_the_next_turn_of_a_loop_lives_on() -> None:
    body = """
        mov.u32 %r2, 1; mov.u32 %r3, 0;
        LOOP: setp.eq.u32 %p1, %r3, 0; @%p1 bra SKIP; add.u32 %r1, %r1, %r2;
        SKIP: add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 5; @%p2 bra LOOP;
    """
    assert result(body) == [4] * 32


def test_both_sides_of_a_branch_may_write_what_follows_reads() -> None:
    body = """
        setp.lt.u32 %p1, %t, 16; @%p1 bra A; mov.u32 %r2, 5; bra B; A: mov.u32 %r2, 6;
        B: add.u32 %r1, %r2, 0;
    """
    assert result(body) == [6] * 16 + [5] * 16


def test_a_register_written_by_two_complementary_guards_is_written() -> None:
    body = "setp.lt.u32 %p1, %t, 16; @%p1 mov.u32 %r2, 1; @!%p1 mov.u32 %r2, 2; mov.u32 %r1, %r2;"
    assert result(body) == [1] * 16 + [2] * 16


def test_a_register_may_be_read_by_just_the_lanes_that_wrote_it() -> None:
    body = "setp.lt.u32 %p1, %t, 16; @%p1 mov.u32 %r2, 1; @%p1 add.u32 %r1, %r2, 1;"
    assert result(body) == [2] * 16 + [0] * 16


@pytest.mark.parametrize(
    ("body", "register", "who", "name"),
    [
        ("add.u32 %r1, %r2, 1;", "%r2", "lane 0", "add.u32"),
        ("setp.lt.u32 %p1, %t, 16; @%p1 mov.u32 %r2, 1; mov.u32 %r1, %r2;", "%r2", "lane 16",
         "mov.u32"),
        ("setp.eq.u32 %p1, %g, 70; @%p1 bra A; mov.u32 %r2, 1; A: mov.u32 %r1, %r2;", "%r2",
         r"block \(1, 0, 0\), warp 0, lane 6", "mov.u32"),
        ("@%p5 mov.u32 %r1, 1;", "%p5", "lane 0", "mov.u32"),
        ("@!%p5 bra A; A:", "%p5", "lane 0", "bra"),
        ("setp.lt.u32 %p1, %t, 9; @!%p1 setp.eq.u32 %p2, %t, 1; @%p2 mov.u32 %r1, 1;", "%p2",
         "lane 0", "mov.u32"),
        ("st.global.u32 [%out_g], %r9;", "%r9", "lane 0", "st.global.u32"),
        ("ld.global.u32 %r1, [%rd9];", "%rd9", "lane 0", "ld.global.u32"),
        ("mov.b64 %rd1, {%r1, %r7};", "%r7", "lane 0", "mov.b64"),
        ("shfl.sync.idx.b32 %r1, %r7, 0, 31, -1;", "%r7", "lane 0", "shfl.sync.idx.b32"),
        ("atom.global.add.u32 %r1, [%out], %r7;", "%r7", "lane 0", "atom.global.add.u32"),
        ("red.global.add.u32 [%out], %r7;", "%r7", "lane 0", "red.global.add.u32"),
    ],
)  # fmt: skip
def test_faults_on_a_register_that_was_never_written(
    body: str, register: str, who: str, name: str
) -> None:
    with faults(f"register {register} is read and was never written", who, f"`{name}` at PTX"):
        result(body, lanes=128, grid=2, block=64)


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
