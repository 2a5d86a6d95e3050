"""Who executes what: branches, loops, guards, and registers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from ptx_kernels import faults, result, run_ptx

TILE = ".shared .align 16 .b8 tile[1024];"

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
