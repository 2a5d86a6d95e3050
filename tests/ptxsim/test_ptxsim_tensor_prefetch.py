"""Prefetches that go by tensor maps: cp.async.bulk.prefetch.tensor."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_kernels import Tensor, faults, module, parameters, refuses
from tensor_copies import (
    BLANK,
    COPY,
    DUMP,
    EXPECT,
    MAP,
    PLACES,
    PREFETCH,
    SHAPES,
    SIZE,
    THREADS,
    TILE,
    WAIT,
    X,
    load,
    map_of,
    prefetch,
    run,
    tensor,
)

from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.simulate import simulate
from gqa_cutlass.ptxsim.stats import Stats
from gqa_cutlass.ptxsim.text.ptx import parse


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
