"""Tensor maps, and the copies that go by them: cp.async.bulk.tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ptx_kernels import Tensor, faults, module, parameters, refuses, run_ptx

from gqa_cutlass.codegen.compile import compile_source
from gqa_cutlass.errors import InputError
from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.simulate import simulate
from gqa_cutlass.ptxsim.stats import Stats
from gqa_cutlass.ptxsim.text.ptx import parse
from gqa_cutlass.tensormap import TensorMap

Bytes = NDArray[np.uint8]
Indices = Sequence[int]

TILE_BYTES, THREADS = 8192, 128
BLANK = 0xEE  # no byte of a tensor
TILE = f".shared .align 1024 .b8 tile[{TILE_BYTES}]; .shared .align 8 .b64 bars[4];"
# %r9, %rd10: the thread's 16 bytes of the tile and of out. %p1: the thread that starts copies.
PLACES = f"""
    shl.b32 %r8, %t, 4; mov.u32 %r9, tile; add.u32 %r9, %r9, %r8; cvt.u64.u32 %rd8, %r8;
    setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [bars], 1;
    mov.u32 %r7, {BLANK * 0x01010101};
"""
EVERYWHERE = range(0, TILE_BYTES, 16 * THREADS)
FILL = "".join(f"st.shared.v4.u32 [%r9+{i}], {{%r7, %r7, %r7, %r7}};" for i in EVERYWHERE)
DUMP = "".join(
    f"ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r9+{i}]; "
    f"st.global.v4.u32 [%rd10+{i}], {{%r1, %r2, %r3, %r4}};"
    for i in EVERYWHERE
)
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bars], {};"
WAIT = "W: mbarrier.try_wait.parity.shared.b64 %p2, [bars], 0; @!%p2 bra W;"
LOAD = "cp.async.bulk.tensor.{}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"


def load(start: Indices, place: str = "tile", form: str = LOAD, tail: str = "") -> str:
    """The copy of a box, by thread 0."""
    coordinates = ", ".join(map(str, start))
    name = form.format(len(start))
    return f"@%p1 {name} [{place}], [%map, {{{coordinates}}}], [bars]{tail};"


PREFETCH = "cp.async.bulk.prefetch.tensor.{}d.L2.global"


def prefetch(start: Indices, form: str = PREFETCH, tail: str = "") -> str:
    """The prefetch of a box, by thread 0."""
    coordinates = ", ".join(map(str, start))
    return f"@%p1 {form.format(len(start))} [%map, {{{coordinates}}}]{tail};"


def tensor(shape: Indices, dtype: type[np.generic] = np.uint16) -> NDArray[Any]:
    """A tensor at a multiple of 64 bytes, outermost dimension first, with no blank byte in it."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    data = aligned(count)
    data[:] = np.random.default_rng(0).integers(1, BLANK, count, dtype=np.uint8)
    return data.view(dtype).reshape(shape)


def aligned(count: int) -> Bytes:
    room = np.zeros(count + 64, np.uint8)
    return room[-room.ctypes.data % 64 :][:count]


def map_of(x: NDArray[Any], box: Indices, swizzle: int = 0) -> TensorMap:
    """All of a tensor, in boxes with the innermost extent first."""
    return TensorMap(
        address=x.ctypes.data, element_bytes=x.itemsize, sizes=x.shape[::-1],
        strides=x.strides[::-1][1:], box=tuple(box), swizzle=swizzle,
    )  # fmt: skip


def box_bytes(made: TensorMap) -> int:
    return math.prod(made.box) * made.element_bytes


def expected(x: NDArray[Any], made: TensorMap, start: Indices, offset: int = 0) -> Bytes:
    """The tile after a copy: one element after another, each put where the guide says.

    The CUDA C++ Programming Guide has the rule for the pieces of 16 bytes: with a swizzle of n
    bytes, piece i of a line of 128 bytes goes to i ^ (line % (n / 16)).
    """
    tile = np.full(TILE_BYTES, BLANK, np.uint8)
    pitch = made.swizzle or made.box[0] * x.itemsize
    boxes = itertools.product(*(range(n) for n in made.box[::-1]))
    for place, index in enumerate(boxes):
        at = [s + i for s, i in zip(start[::-1], index, strict=True)]
        inside = all(0 <= i < n for i, n in zip(at, x.shape, strict=True))
        value = x[tuple(at)] if inside else x.dtype.type(0)
        row, column = divmod(place, made.box[0])
        byte = offset + row * pitch + column * x.itemsize
        line, piece, rest = byte // 128, byte % 128 // 16, byte % 16
        if made.swizzle:
            piece ^= line % (made.swizzle // 16)
        byte = 128 * line + 16 * piece + rest
        tile[byte : byte + x.itemsize] = np.array([value]).view(np.uint8)
    return tile


def run(
    x: NDArray[Any], made: TensorMap | bytes, body: str, *, fill: str = FILL, **more: Any
) -> Bytes:
    """The tile after a body that starts with all of it blank and ends with it being dumped."""
    out = np.zeros(TILE_BYTES, np.uint8)
    data = made if isinstance(made, bytes) else made.to_bytes()
    whole = f"{PLACES} add.u64 %rd10, %out, %rd8; {fill} bar.sync 0; {body}"
    arguments = {"block": THREADS, "declare": TILE, "x": x, "out": out, "map": data, **more}
    run_ptx(whole, **arguments)
    return out


def copied(x: NDArray[Any], made: TensorMap, start: Indices, **more: Any) -> Bytes:
    """The tile after one copy, waited for."""
    return run(x, made, f"{EXPECT.format(box_bytes(made))} {load(start, **more)} {WAIT} {DUMP}")


# What is copied, and where it lands

SHAPES: dict[int, tuple[Indices, Indices, Indices]] = {  # shape, box, coordinates: one rank each
    1: ([104], [1], [8]),
    2: ([20, 104], [1, 9], [8, 7]),
    3: ([3, 9, 64], [1, 5, 2], [0, 4, 1]),
    4: ([2, 3, 9, 64], [1, 3, 2, 2], [16, 2, 1, 0]),
    5: ([2, 3, 2, 5, 64], [1, 2, 2, 2, 2], [8, 3, 0, 1, 0]),
}


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_a_box_of_any_rank_and_swizzle(rank: int, swizzle: int) -> None:
    shape, box, start = SHAPES[rank]
    x = tensor(shape)
    made = map_of(x, [(swizzle or 48) // 2, *box[1:]], swizzle)
    assert (copied(x, made, start) == expected(x, made, start)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_elements_of_any_size(dtype: type[np.generic]) -> None:
    size = np.dtype(dtype).itemsize
    x = tensor([12, 256 // size], dtype)
    made = map_of(x, [64 // size, 9], 64)
    start = [32 // size, 5]
    assert (copied(x, made, start) == expected(x, made, start)).all()


@pytest.mark.parametrize("offset", [128, 384, 1408])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_the_swizzle_goes_by_the_address(swizzle: int, offset: int) -> None:
    """Wherever the box starts: the pattern of 128 bytes repeats every 1024."""
    x = tensor([24, 128])
    made = map_of(x, [(swizzle or 64) // 2, 20], swizzle)
    got = copied(x, made, [8, 1], place=f"tile+{offset}")
    assert (got == expected(x, made, [8, 1], offset)).all()


@pytest.mark.parametrize(("swizzle", "inner"), [(32, 16), (64, 32), (128, 16), (128, 48)])
def test_rows_shorter_than_the_swizzle_keep_its_pitch(swizzle: int, inner: int) -> None:
    x = tensor([24, 128])
    made = map_of(x, [inner // 2, 20], swizzle)
    assert (copied(x, made, [8, 1]) == expected(x, made, [8, 1])).all()


@pytest.mark.parametrize(
    "start",
    [
        [-8, 0, 0], [0, -1, 0], [0, 0, -2], [-16, -2, -1], [40, 0, 0], [0, 7, 0], [0, 0, 3],
        [56, 8, 3], [1000, 0, 0], [0, -1000, 0], [-(2**31), -(2**31), -(2**31)],
        [2**31 - 8, 2**31 - 1, 2**31 - 1],
    ],
    ids=str,
)  # fmt: skip
def test_what_lies_outside_is_zero_and_counts(start: Indices) -> None:
    """The innermost dimension ends within 16 bytes."""
    x = tensor([4, 9, 64])[:, :, :61]
    made = map_of(x, [32, 4, 2], 64)
    want = expected(x, made, start)
    assert (want == 0).any()
    assert (copied(x, made, start) == want).all()


def test_a_box_may_be_larger_than_the_tensor() -> None:
    x = tensor([2, 24])
    made = map_of(x, [64, 16], 128)
    assert (copied(x, made, [0, 0]) == expected(x, made, [0, 0])).all()


def test_dimensions_may_come_in_any_order_and_share_memory() -> None:
    """As the driver takes them: a stride may be smaller than the one before, or zero."""
    x = tensor([4, 9, 64])
    swapped = x.transpose(1, 0, 2)
    made = map_of(swapped, [32, 2, 4])
    assert (copied(x, made, [0, 1, 3]) == expected(swapped, made, [0, 1, 3])).all()
    still = np.broadcast_to(x[1], (4, 9, 64))
    made = map_of(still, [32, 2, 4])
    assert (copied(x, made, [0, 1, 3]) == expected(still, made, [0, 1, 3])).all()


@pytest.mark.parametrize(
    ("form", "tail"),
    [
        (LOAD.replace(".tile", ""), ""), (LOAD.replace("cluster", "cta"), ""),
        (f"{LOAD}.L2::cache_hint", ", %rd7"),
    ],
    ids=["no tile", "cta", "policy"],
)  # fmt: skip
def test_forms(form: str, tail: str) -> None:
    x = tensor([20, 64])
    made = map_of(x, [32, 5], 64)
    body = f"""
        createpolicy.fractional.L2::evict_first.b64 %rd7, 1.0; prefetch.tensormap [%map];
        {EXPECT.format(box_bytes(made))} {load([16, 2], form=form, tail=tail)} {WAIT} {DUMP}
    """
    assert (run(x, made, body) == expected(x, made, [16, 2])).all()


def test_each_lane_copies_a_box_of_its_own() -> None:
    """From coordinates and to addresses in registers."""
    x = tensor([32, 64])
    made = map_of(x, [64, 1])
    body = f"""
        {EXPECT.format(4096)} setp.lt.u32 %p1, %t, 32; shl.b32 %r5, %t, 7; mov.u32 %r6, tile;
        add.u32 %r5, %r5, %r6; sub.u32 %r10, 31, %t; mov.u32 %r11, 0;
        {load(["%r11", "%r10"], "%r5")} {WAIT} {DUMP}
    """
    assert (run(x, made, body)[:4096].view(np.uint16) == x[::-1].reshape(-1)).all()


def test_a_tensor_map_in_global_memory() -> None:
    x = tensor([20, 64])
    made = map_of(x, [32, 5], 64)
    room = aligned(128)
    room[:] = np.frombuffer(made.to_bytes(), np.uint8)
    body = f"""
        mov.u64 %map, %room; {EXPECT.format(box_bytes(made))} {load([16, 2])} {WAIT} {DUMP}
    """
    assert (run(x, made, body, room=room) == expected(x, made, [16, 2])).all()


def test_a_box_for_another_block_of_the_cluster() -> None:
    x = tensor([8, 64])
    made = map_of(x, [64, 4])
    out = np.zeros(2 * 512, np.uint8)
    sync = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    body = f"""
        setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [bars], 1; {sync}
        {EXPECT.format(512)} xor.b32 %r1, %b, 1; mov.u32 %r2, tile; mov.u32 %r3, bars;
        mapa.shared::cluster.u32 %r2, %r2, %r1; mapa.shared::cluster.u32 %r3, %r3, {{bar}};
        shl.b32 %r5, %b, 2; mov.u32 %r6, 0; {load(["%r6", "%r5"], "%r2").replace("bars", "%r3")}
        {WAIT} mov.u32 %r9, tile; shl.b32 %r8, %t, 4; add.u32 %r9, %r9, %r8;
        ld.shared.v4.u32 {{{{%r1, %r2, %r3, %r4}}}}, [%r9]; mad.lo.u32 %r8, %b, 512, %r8;
        cvt.u64.u32 %rd1, %r8; add.u64 %rd1, %out, %rd1;
        st.global.v4.u32 [%rd1], {{{{%r1, %r2, %r3, %r4}}}}; {sync}
    """
    body = body.replace("{%r6, %r5}", "{{%r6, %r5}}")
    more = {"grid": 2, "cluster": 2, "declare": TILE, "x": x, "out": out, "map": made.to_bytes()}
    run_ptx(body.format(bar="%r1"), **more)
    assert (out.view(np.uint16).reshape(8, 64) == np.roll(x, 4, axis=0)).all()
    with faults("the mbarrier lies in another block than the data that completes on it"):
        run_ptx(body.format(bar="%b"), **more)


# When it is there

X = tensor([20, 64])
MAP = map_of(X, [32, 5], 64)
COPY = load([16, 2])
SIZE = box_bytes(MAP)  # 320


@pytest.mark.parametrize("steps", [[EXPECT.format(SIZE), COPY], [COPY, EXPECT.format(SIZE)]])
def test_bytes_may_come_before_they_are_expected(steps: list[str]) -> None:
    assert (run(X, MAP, f"{' '.join(steps)} {WAIT} {DUMP}") == expected(X, MAP, [16, 2])).all()


def test_two_copies_may_complete_one_phase() -> None:
    body = f"{EXPECT.format(2 * SIZE)} {COPY} {load([-8, 17], 'tile+1024')} {WAIT} {DUMP}"
    want = expected(X, MAP, [16, 2])
    second = expected(X, MAP, [-8, 17], 1024)
    want[1024:] = second[1024:]
    assert (run(X, MAP, body) == want).all()


@pytest.mark.parametrize(
    ("body", "essential"),
    [
        (f"{EXPECT.format(SIZE + 16)} {COPY} {WAIT}",
         "deadlock.*0 arrivals and 16 bytes from the end of phase 0"),
        (f"{EXPECT.format(SIZE - 16)} {COPY} {WAIT}", "deadlock.*0 arrivals and -16 bytes"),
        (f"{EXPECT.format(SIZE)} {COPY} {DUMP}", "race: reads what an asynchronous copy wrote"),
        (f"{EXPECT.format(SIZE)} {COPY} @%p1 ld.shared.u32 %r1, [tile];",
         "race: reads what an asynchronous copy wrote.*lane 0; in"),
        (f"{EXPECT.format(SIZE)} {COPY} bar.sync 0; {DUMP}",
         "race: reads what an asynchronous copy wrote"),
        (f"{WAIT.replace('0;', '1;')} {EXPECT.format(SIZE)} {COPY} bar.sync 0; {DUMP}",
         "race: reads what an asynchronous copy wrote"),
        (f"{COPY} {DUMP}", "reads what an asynchronous copy has not finished writing"),
        (f"{COPY} st.shared.u32 [%r9], 1;", "writes where an asynchronous copy is under way"),
        (f"{EXPECT.format(2 * SIZE)} {COPY} {COPY}", "writes where an asynchronous copy is under"),
        (f"{EXPECT.format(SIZE)} {COPY} bar.sync 0; st.shared.u32 [%r9], 1;",
         "race: writes over what an asynchronous copy wrote"),
        (f"st.shared.u32 [%r9], 1; {EXPECT.format(SIZE)} {COPY}",
         "race: writes over what another thread wrote"),
        (f"@%p1 mbarrier.init.shared.b64 [bars+8], 1; @%p1 mbarrier.arrive.expect_tx.shared.b64 _, "
         f"[bars+8], {SIZE}; {COPY.replace('[bars]', '[bars+8]')} bar.sync 0; {EXPECT.format(0)} "
         f"{WAIT} {DUMP}",
         "race: reads what an asynchronous copy wrote.*mbarrier 0x2408"),
    ],
    ids=["too few bytes", "too many bytes", "no wait", "no wait by who copies", "a barrier alone",
         "wait for the phase before", "phase not over", "store over", "copy over",
         "store without a wait", "copy over unread store", "wait for another mbarrier"],
)  # fmt: skip
def test_faults_of_time(body: str, essential: str) -> None:
    with faults(essential, r"block \(0, 0, 0\)"):
        run(X, MAP, body)


@pytest.mark.parametrize("waited", [99, 98])
def test_copies_of_many_mbarriers_are_told_apart(waited: int) -> None:
    """100 mbarriers, one copy each; the last copy is read."""
    body = f"""
        setp.lt.u32 %p1, %t, 100; shl.b32 %r5, %t, 3; mov.u32 %r6, more; add.u32 %r5, %r5, %r6;
        @%p1 mbarrier.init.shared.b64 [%r5], 1; bar.sync 0; mov.u32 %r11, 0; shl.b32 %r12, %t, 7;
        mov.u32 %r13, big; add.u32 %r12, %r12, %r13;
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 16;
        {load(["%r11", "%r11"], "%r12").replace("bars", "%r5")} bar.sync 0;
        {WAIT.replace("bars", f"more+{8 * waited}")} ld.shared.u32 %r1, [big+{99 * 128}]; EXITS
    """
    extra = ".shared .align 128 .b8 big[12800]; .shared .align 8 .b64 more[100];"
    ends = "".join(WAIT.replace("bars", f"more+{8 * i}").replace("W", f"W{i}") for i in range(100))
    body, made = body.replace("EXITS", ends), map_of(X, [8, 1])
    if waited == 99:
        run(X, made, body, declare=TILE + extra)
    else:
        with faults("race: reads what an asynchronous copy wrote"):
            run(X, made, body, declare=TILE + extra)


def test_who_learns_of_it_from_who_waited_may_read() -> None:
    """One warp waits, and a barrier tells the others."""
    alone = "setp.ge.u32 %p3, %t, 32; @%p3 bra ON;"
    body = f"{EXPECT.format(SIZE)} {COPY} {alone} {WAIT} ON: bar.sync 0; {DUMP}"
    assert (run(X, MAP, body) == expected(X, MAP, [16, 2])).all()


@pytest.mark.parametrize("fine", [True, False])
def test_a_ring_of_one_stage(fine: bool) -> None:
    """The next box may come when all have read the one before."""
    barrier = "bar.sync 0;" if fine else ""
    body = f"""
        mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r11, 0;
        L: {EXPECT.format(SIZE)} {load(["%r6", "%r5"])}
        W: mbarrier.try_wait.parity.shared.b64 %p2, [bars], %r11; @!%p2 bra W;
        xor.b32 %r11, %r11, 1; ld.shared.u32 %r1, [%r9]; {barrier}
        add.u32 %r5, %r5, 1; setp.lt.u32 %p3, %r5, 4; @%p3 bra L; bar.sync 0; {DUMP}
    """
    if fine:
        assert (run(X, MAP, body) == expected(X, MAP, [0, 3])).all()
    else:
        with faults("race: writes what another thread reads", "cp.async.bulk.tensor"):
            run(X, MAP, body)


@pytest.mark.parametrize("order", ["waits", "does not wait"])
def test_the_source_may_be_written_when_the_copy_has_been_waited_for(order: str) -> None:
    x = X.copy()
    store = "setp.eq.u32 %p4, %t, 40; @%p4 st.global.u32 [%x+288], 7;"
    steps = f"{WAIT} {store}" if order == "waits" else f"{store} {WAIT}"
    body = f"{EXPECT.format(SIZE)} {COPY} {steps}"
    if order == "waits":
        run(x, map_of(x, [32, 5], 64), body)
    else:
        with faults("race in global memory", "`st.global.u32`", "`cp.async.bulk.tensor.2d"):
            run(x, map_of(x, [32, 5], 64), body)


def test_what_another_block_writes_is_a_race() -> None:
    x = X.copy()
    body = f"""
        setp.eq.u32 %p4, %b, 1; @%p4 bra OTHER; {EXPECT.format(SIZE)} {COPY} {WAIT} ret;
        OTHER: @%p1 st.global.u32 [%x+288], 7;
    """
    with faults("race in global memory", "`cp.async.bulk.tensor.2d"):
        run(x, map_of(x, [32, 5], 64), body, grid=2)


@pytest.mark.parametrize("order", ["release", "relaxed"])
def test_a_block_tells_another_that_it_has_its_copy(order: str) -> None:
    """By a flag in global memory, upon which the other writes to the source."""
    x = X.copy()
    flag = np.zeros(1, np.uint32)
    body = f"""
        setp.eq.u32 %p4, %b, 1; @%p4 bra OTHER; {EXPECT.format(SIZE)} {COPY} {WAIT} bar.sync 0;
        @%p1 st.{order}.gpu.global.u32 [%flag], 1; ret;
        OTHER: @!%p1 ret; L: ld.acquire.gpu.global.u32 %r1, [%flag]; setp.eq.u32 %p3, %r1, 0;
        @%p3 bra L; st.global.u32 [%x+288], 7;
    """
    made = map_of(x, [32, 5], 64)
    if order == "release":
        run(x, made, body, grid=2, flag=flag)
    else:
        with faults("race in global memory", "`cp.async.bulk.tensor.2d"):
            run(x, made, body, grid=2, flag=flag)


@pytest.mark.parametrize("races", [True, False])
@pytest.mark.parametrize(
    ("body", "essential"),
    [
        (f"{EXPECT.format(SIZE)} {COPY}", "race: exits while an asynchronous copy writes, which"),
        (f"{EXPECT.format(SIZE + 16)} {COPY}", "exits where an asynchronous copy is under way"),
        (f"{COPY}", "exits where an asynchronous copy is under way"),
    ],
    ids=["phase over", "bytes missing", "not expected"],
)
def test_a_block_may_not_exit_before_its_copies_are_waited_for(
    body: str, essential: str, races: bool
) -> None:
    if essential.startswith("race") and not races:
        run(X, MAP, body, races=False)  # who knows of what is not looked at
        return
    with faults(essential, "`ret`"):
        run(X, MAP, body, races=races)
    run(X, MAP, f"{EXPECT.format(SIZE)} {COPY} {WAIT}", races=races)


def test_an_mbarrier_with_copies_under_way_stays() -> None:
    with faults("mbarrier.inval while asynchronous copies are under way"):
        run(X, MAP, f"{COPY} @%p1 mbarrier.inval.shared.b64 [bars];")


# What may not be


@pytest.mark.parametrize(
    ("place", "essential"),
    [("tile+64", "destination of a tensor copy not at a multiple of 128 bytes"),
     ("tile+16", "destination of a tensor copy not at a multiple of 128 bytes"),
     ("tile+8064", "outside the block's 8224 bytes")],
)  # fmt: skip
def test_destinations_that_do_not_fit(place: str, essential: str) -> None:
    with faults(essential, "lane 0", "address 0x"):
        run(X, MAP, load([16, 2], place), fill="")


@pytest.mark.parametrize(
    ("statement", "essential"),
    [
        (COPY.replace("bars", "bars+4"), "mbarrier not at a multiple of 8 bytes"),
        (COPY.replace("bars", "bars+16"), "mbarrier that was not initialised"),
        (COPY.replace("bars", "%x"), "address outside shared memory"),
        (COPY.replace("[tile]", "[%x]"), "address outside shared memory"),
        (load([1, 2]), "innermost coordinate 1, byte 2; allowed: multiples of 16 bytes"),
        (load([-4, 2]), "innermost coordinate -4, byte -8"),
        (load([0, 0, 0]), "tensor map of 2 dimensions, and coordinates of 3"),
        (load([0]), "tensor map of 2 dimensions, and coordinates of 1"),
        (COPY.replace("%map,", "%map+64,"), "no tensor map there .tensor map: got 64 bytes"),
        (COPY.replace("%map,", "%map+16,"), "tensor map not at a multiple of 64 bytes"),
        (COPY.replace("%map,", "%x+64,"), "no tensor map there .tensor map: got 128 bytes that"),
        (COPY.replace("%map,", "%rd5,"), "tensor map in neither parameters nor global memory"),
        (COPY.replace("%map,", "%rd6,"), "outside all tensors"),
        (prefetch([1, 2]), "innermost coordinate 1, byte 2; allowed: multiples of 16 bytes"),
        (prefetch([0, 0, 0]), "tensor map of 2 dimensions, and coordinates of 3"),
        (prefetch([0]), "tensor map of 2 dimensions, and coordinates of 1"),
        (prefetch([16, 2]).replace("%map,", "%map+16,"), "tensor map not at a multiple of 64"),
        (prefetch([16, 2]).replace("%map,", "%x+64,"), "no tensor map there"),
    ],
    ids=["barrier alignment", "no barrier", "barrier elsewhere", "target elsewhere", "coordinate",
         "negative coordinate", "rank too high", "rank too low", "beyond the map", "map alignment",
         "no map", "map in shared memory", "map nowhere", "prefetch, coordinate",
         "prefetch, rank too high", "prefetch, rank too low", "prefetch, map alignment",
         "prefetch, no map"],
)  # fmt: skip
def test_faults(statement: str, essential: str) -> None:
    with faults(essential, "lane 0", f"in `{statement.split()[1]}` at"):
        run(X, MAP, f"mov.u64 %rd5, tile; cvta.shared.u64 %rd5, %rd5; mov.u64 %rd6, 0; {statement}")


@pytest.mark.parametrize(
    ("change", "essential"),
    [
        (lambda data: bytes(128), "no tensor map there"),
        (lambda data: data[:-1] + b"\1", "bytes beyond those of its dimensions"),
        (lambda data: data[:8] + bytes([data[8] ^ 8]) + data[9:], "got address 0x"),
        (lambda data: data[:18] + b"\x21" + data[19:], "got swizzle 33"),
        (lambda data: data[:17] + b"\7" + data[18:], "got sizes .64, 20, 0, 0, 0."),
    ],
    ids=["zeros", "trailing byte", "address", "swizzle", "rank"],
)
def test_bytes_that_are_no_tensor_map(change: Any, essential: str) -> None:
    with faults("no tensor map there", essential, "lane 0"):
        run(X, change(MAP.to_bytes()), COPY)


@pytest.mark.parametrize(
    ("x", "made", "essential"),
    [
        (X[:, :40], MAP, "outside all tensors.*x"),
        (X[:5], MAP, "outside all tensors.*past the end of x"),
        (Tensor(X, readable=False), MAP, "not to be read"),
        (Tensor(X, fresh=True), MAP, "never written before"),
        (X, replace(MAP, strides=(1 << 30,)), "outside all tensors"),
    ],
    ids=["gap between rows", "end", "not readable", "never written", "stride"],
)
@pytest.mark.parametrize("statement", [COPY, prefetch([16, 2])], ids=["copy", "prefetch"])
def test_only_what_is_in_a_tensor_may_be_read(
    x: Any, made: TensorMap, essential: str, statement: str
) -> None:
    with faults(essential, f"in `{statement.split()[1]}` at"):
        run(x, made, statement)


def test_what_lies_outside_the_map_need_not_be_there() -> None:
    x = X[:5]
    made = map_of(x, [32, 5], 64)
    assert (copied(x, made, [48, 3]) == expected(x, made, [48, 3])).all()
    run(x, made, prefetch([48, 3]))


# What is prefetched


@pytest.mark.parametrize("rank", SHAPES)
def test_a_prefetch_of_any_rank_looks_and_does_not_touch(rank: int) -> None:
    shape, box, start = SHAPES[rank]
    x = tensor(shape)
    before = x.copy()
    made = map_of(x, [32, *box[1:]], 64)
    assert (run(x, made, f"{prefetch(start)} bar.sync 0; {DUMP}") == BLANK).all()
    assert (x == before).all()
    with faults("not to be read", f"`cp.async.bulk.prefetch.tensor.{rank}d.L2.global` at"):
        run(Tensor(x, readable=False), made, prefetch(start))


@pytest.mark.parametrize(
    ("form", "tail"),
    [(f"{PREFETCH}.tile", ""), (f"{PREFETCH}.L2::cache_hint", ", %rd7"),
     (f"{PREFETCH}.tile.L2::cache_hint", ", %rd7")],
    ids=["tile", "policy", "both"],
)  # fmt: skip
def test_forms_of_prefetches(form: str, tail: str) -> None:
    run(X, MAP, f"mov.u64 %rd7, 0; {prefetch([16, 2], form, tail)}")
    with faults("tensor map of 2 dimensions"):
        run(X, MAP, f"mov.u64 %rd7, 0; {prefetch([0], form, tail)}")


@pytest.mark.parametrize(("there", "fine"), [(61, True), (60, False)])
def test_a_prefetch_ends_with_the_tensor(there: int, fine: bool) -> None:
    """Within 16 bytes, behind which nothing need be."""
    x = tensor([4, 9, 64])
    made = map_of(x[:, :, :61], [32, 4, 2], 64)
    if fine:
        run(x[:, :, :there], made, prefetch([40, 7, 3]))
    else:
        with faults("outside all tensors"):
            run(x[:, :, :there], made, prefetch([40, 7, 3]))


def test_each_lane_prefetches_a_box_of_its_own() -> None:
    """From coordinates in registers, of which those of lane 30 lead to what is not there."""
    x = tensor([32, 64])
    body = f"""
        setp.lt.u32 %p1, %t, 32; sub.u32 %r10, 31, %t; mov.u32 %r11, 0;
        {prefetch(["%r11", "%r10"])}
    """
    run(x, map_of(x, [64, 1]), body)
    with faults("outside all tensors; 128 bytes before x", "warp 0, lane 30"):
        run(x[2:], map_of(x, [64, 1]), f"{body.replace('%t, 32;', '%t, 31;')}")


def test_what_another_block_writes_may_be_prefetched() -> None:
    x = X.copy()
    body = f"""
        setp.eq.u32 %p4, %b, 1; @%p4 bra OTHER; {prefetch([16, 2])} ret;
        OTHER: @%p1 st.global.u32 [%x+288], 7;
    """
    run(x, map_of(x, [32, 5], 64), body, grid=2)
    assert x.reshape(-1).view(np.uint32)[72] == 7


@pytest.mark.parametrize(
    "statement",
    [
        COPY.replace("2d", "3d"), COPY.replace("2d", "6d"), COPY.replace(", {16, 2}", ""),
        COPY.replace(".tile", ".im2col"), COPY.replace(".tile", ".tile::gather4"),
        COPY.replace("bytes [", "bytes.multicast::cluster [").replace("[bars]", "[bars], %h1"),
        COPY.replace("bytes [", "bytes.cta_group::1 ["),
        COPY.replace("bytes [", "bytes.L2::cache_hint ["), COPY.replace("[bars]", "[bars], %rd1"),
        COPY.replace("shared::cluster", "shared"), COPY.replace("mbarrier::complete_tx::bytes", ""),
        COPY.replace(", [bars]", ""), COPY.replace("[tile]", "[tile, {0}]"),
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%map, {%r1, %r2}], [tile];",
        prefetch([0, 0]).replace("2d", "1d"), prefetch([0, 0]).replace(".L2", ".L1"),
        prefetch([0, 0]).replace("global", "global.im2col"),
        prefetch([0, 0]).replace("global", "global.tile::gather4"),
        prefetch([0, 0]).replace("global", "shared"), prefetch([0, 0], tail=", %rd1"),
        prefetch([0, 0], f"{PREFETCH}.L2::cache_hint"), prefetch([]).replace(", {}", ""),
        "cp.async.bulk.prefetch.tensor.2d.L2.global %rd1;",
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%map, {%r1, %r2}], "
        "[tile];",
        "fence.proxy.tensormap::generic.acquire.gpu [%map], 128;", "fence.proxy.tensormap;",
        "ld.global.u32 %r1, [%x, {0}];", "fence.mbarrier_init.acquire.cluster;",
        "tensormap.replace.tile.rank.global.b1024.b32 [%map], 1;",
    ],
)  # fmt: skip
def test_refuses_unknown_forms(statement: str) -> None:
    with refuses("unknown .* in `"):
        run(X, MAP, statement)


def test_bytes_and_sectors_are_counted() -> None:
    """A box of 5 rows of 64 bytes, of which one lies outside. Its prefetch is none."""
    arguments = {"x": X, "map": MAP.to_bytes()}
    copy = f"{EXPECT.format(SIZE)} {load([16, -1])} {WAIT}"
    body = f"{PLACES} bar.sync 0; {prefetch([16, -1])} {copy}"
    program = Program(parse(module(body, TILE, **arguments), "k"))
    stats = Stats(len(program.code))
    params, regions = parameters(**arguments)
    simulate(program, Launch(grid=(1, 1, 1), block=THREADS), params, regions, stats=stats)
    (entry,) = stats.global_memory.values()
    assert (entry.bytes, entry.write) == (4 * 64, False)
    assert (entry.passes, entry.ideal, entry.requests) == (8, 8, 1)


# Tensor maps themselves

FINE: dict[str, Any] = {
    "address": 1 << 20, "element_bytes": 2, "sizes": (64, 9, 4), "strides": (128, 2048),
    "box": (64, 3, 2), "swizzle": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {}, {"swizzle": 0, "box": (256, 256, 256)}, {"sizes": (1 << 32, 1, 1)},
        {"strides": (0, 16)}, {"strides": ((1 << 40) - 16, 0)},
        {"element_bytes": 8, "box": (16, 1, 1)}, {"sizes": (8,), "strides": (), "box": (8,)},
        {"sizes": (8, 1, 2, 3, 4), "strides": (16, 32, 48, 64), "box": (8, 1, 1, 1, 256)},
    ],
)  # fmt: skip
def test_a_tensor_map_survives_its_bytes(change: dict[str, Any]) -> None:
    made = TensorMap(**{**FINE, **change})
    data = made.to_bytes()
    assert len(data) == 128
    assert TensorMap.from_bytes(data) == made


@pytest.mark.parametrize(
    ("change", "essential"),
    [
        ({"address": (1 << 20) + 8}, "got address 0x100008; allowed: positive multiples of 16"),
        ({"address": 0}, "got address 0x0"),
        ({"element_bytes": 3}, "got elements of 3 bytes; allowed: .1, 2, 4, 8."),
        ({"sizes": (64, 0, 4)}, "got sizes .64, 0, 4.; allowed: 1 to 2.32"),
        ({"sizes": ((1 << 32) + 1, 1, 1)}, "got sizes"),
        ({"sizes": (), "strides": (), "box": ()}, "got 0 sizes"),
        ({"sizes": (1,) * 6, "strides": (16,) * 5, "box": (8,) * 6}, "got 6 sizes"),
        ({"strides": (128,)}, "got 3 sizes, 1 strides"),
        ({"box": (64, 3)}, "2 extents of the box"),
        ({"strides": (136, 2048)}, "got strides .136, 2048.; allowed: multiples of 16 bytes below"),
        ({"strides": (128, 1 << 40)}, "got strides"),
        ({"strides": (-128, 128)}, "got strides"),
        ({"box": (64, 257, 1)}, "got box .64, 257, 1.; allowed: 1 to 256"),
        ({"box": (64, 0, 1)}, "got box"),
        ({"box": (4, 1, 1)}, "got a box of 8 bytes in the innermost dimension; allowed: multiples"),
        ({"box": (72, 1, 1)}, "got a box of 144 bytes in the innermost dimension; allowed: up to"),
        ({"swizzle": 64}, "got a box of 128 bytes .*; allowed: up to 64 with this swizzle"),
        ({"swizzle": 48}, "got swizzle 48; allowed: .0, 32, 64, 128."),
    ],
    ids=str,
)
def test_a_tensor_map_that_the_driver_refuses(change: dict[str, Any], essential: str) -> None:
    with pytest.raises(InputError, match=essential):
        TensorMap(**{**FINE, **change})


@pytest.mark.parametrize(
    "data",
    [b"", bytes(128), b"gqaTMA", MAP.to_bytes()[:-1]],
    ids=["nothing", "zeros", "a beginning", "a byte less"],  # a map holds an address
)
def test_other_bytes_are_no_tensor_map(data: bytes) -> None:
    with pytest.raises(InputError, match="tensor map: got"):
        TensorMap.from_bytes(data)


# From CUDA C++

SOURCE = r"""
struct alignas(64) TensorMap { unsigned long long opaque[16]; };
struct Params {
  uint4* out;
  int start[4];
  int bytes;
  TensorMap unused;
  TensorMap map;
};
extern __shared__ __align__(1024) unsigned char tile[];
__device__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
extern "C" __global__ void __launch_bounds__(128) k(const __grid_constant__ Params params) {
  __shared__ unsigned long long bar;
  const unsigned at = shared_address(&bar);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x < 32) {
    unsigned elected;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}"
                 : "=r"(elected));
    if (elected) {
      asm volatile("prefetch.tensormap [%0];" ::"l"(&params.map) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
                   ::"r"(at), "r"(params.bytes) : "memory");
      asm volatile(
          "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
          ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
          ::"r"(shared_address(tile)), "l"(&params.map), "r"(params.start[0]),
            "r"(params.start[1]), "r"(params.start[2]), "r"(params.start[3]), "r"(at),
            "l"(0x12F0000000000000ull) : "memory");
    }
  }
  __syncthreads();
  WAIT
  for (int i = threadIdx.x; i < params.bytes / 16; i += blockDim.x)
    params.out[i] = reinterpret_cast<const uint4*>(tile)[i];
}
"""
CUDA_WAIT = r"""
  unsigned done = 0;
  while (!done) {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], 0, "
                 "1000; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(at) : "memory");
  }
"""


@pytest.mark.parametrize("waits", [True, False])
def test_a_kernel_in_cuda(waits: bool) -> None:
    """The map lies in a parameter that is a structure: NVRTC takes its address by cvta.param."""
    x = tensor([2, 3, 20, 128])
    made = map_of(x, [64, 16, 2, 2], 128)
    start = [64, 8, -1, 0]
    out = np.zeros(TILE_BYTES, np.uint8)
    source = SOURCE.replace("WAIT", CUDA_WAIT if waits else "")
    program = Program(parse(compile_source(source, "k", "compute_90").code.decode(), "k"))
    params = np.array([out.ctypes.data], np.uint64).tobytes()
    params += np.array([*start, box_bytes(made)], np.int32).tobytes()
    params = params.ljust(64, b"\0") + bytes(128) + made.to_bytes()
    regions = [Tensor(x, writable=False).region("x"), Tensor(out, readable=False).region("out")]
    launch = Launch(grid=(1, 1, 1), block=THREADS, shared_bytes=TILE_BYTES)
    if not waits:
        with faults("race: reads what an asynchronous copy wrote", r"k\.cu:\d+"):
            simulate(program, launch, params, regions)
        return
    simulate(program, launch, params, regions)
    assert (out == expected(x, made, start)).all()
