"""Copies that go by tensor maps, cp.async.bulk.tensor: what lands where, and what may not be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ptx_kernels import Tensor, faults, run_ptx
from tensor_copies import (
    COPY,
    DUMP,
    EXPECT,
    LOAD,
    MAP,
    SHAPES,
    THREADS,
    TILE,
    TILE_BYTES,
    WAIT,
    Indices,
    X,
    aligned,
    box_bytes,
    copied,
    expected,
    load,
    map_of,
    prefetch,
    run,
    tensor,
)

from gqa_cutlass.codegen.compile import compile_source
from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.simulate import simulate
from gqa_cutlass.ptxsim.text.ptx import parse
from gqa_cutlass.tensormap import TensorMap

# What is copied, and where it lands


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
