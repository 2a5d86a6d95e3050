"""Copies that go by tensor maps, in tests: a tensor, its map, the copy, and the tile after it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_kernels import run_ptx

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


X = tensor([20, 64])
MAP = map_of(X, [32, 5], 64)
COPY = load([16, 2])
SIZE = box_bytes(MAP)  # 320
SHAPES: dict[int, tuple[Indices, Indices, Indices]] = {  # shape, box, coordinates: one rank each
    1: ([104], [1], [8]),
    2: ([20, 104], [1, 9], [8, 7]),
    3: ([3, 9, 64], [1, 5, 2], [0, 4, 1]),
    4: ([2, 3, 9, 64], [1, 3, 2, 2], [16, 2, 1, 0]),
    5: ([2, 3, 2, 5, 64], [1, 2, 2, 2, 2], [8, 3, 0, 1, 0]),
}
