"""Bugs of kernels that start before the one before them is done."""

from __future__ import annotations

from mutants.cases import (
    CLUSTER_END_PDL,
    CLUSTER_WHOLE_PDL,
    END_PDL,
    ODD_BOXES_PDL,
    PADDED_PDL,
    WHOLE_PDL,
)
from mutants.mutant import Mutant

_TOO_SOON = "before griddepcontrol.wait: the kernel before this one may not be done"
_FOLLOW = """\
  if constexpr (T::kPdl) {
    follow_previous_kernel(p.pdl, [&] { ring.prefetch(p, first_tile); });
  }
"""
_LENGTH = "  int const length = Work<T>::read_length(p);\n"
_FOLLOW_TMA = """\
    follow_previous_kernel(p.decode.pdl, [&] { ring.prefetch(first_tile); });
"""
_LENGTH_TMA = "    length = Work<T>::read_length(p.decode);\n"
_START, _START_TMA = "  ring.start(p, first_tile);\n", "  ring.start(first_tile);\n"
_WAIT = "  wait_for_previous_kernel();\n"

DEPENDENT = (
    # Before the wait
    Mutant(
        name="the length read before the wait",
        header="decode.cuh",
        old=_FOLLOW + _LENGTH,
        new=_LENGTH + _FOLLOW,
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of seqlens.* at tile_scheduler.cuh",
        case=WHOLE_PDL,
    ),
    Mutant(
        name="the length read before the wait of a cluster",
        header="decode_tma.cuh",
        old=_FOLLOW_TMA + _LENGTH_TMA,
        new=_LENGTH_TMA + _FOLLOW_TMA,
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of seqlens.* at tile_scheduler.cuh",
        case=CLUSTER_WHOLE_PDL,
    ),
    Mutant(
        name="the first tile asked for before the wait",
        header="decode.cuh",
        old=_FOLLOW + _LENGTH + _START,
        new=_START + _FOLLOW + _LENGTH,
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of k_cache.* in `cp.async.c",
        case=END_PDL,
    ),
    Mutant(
        name="the first tile asked for before the wait by a copy",
        header="decode_tma.cuh",
        old=f"{_FOLLOW_TMA}{_LENGTH_TMA}  }}\n{_START_TMA}",
        new=f"{_START_TMA}{_FOLLOW_TMA}{_LENGTH_TMA}  }}\n",
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of k_cache.* in `cp.async.bulk.tensor",
        case=CLUSTER_END_PDL,
    ),
    Mutant(
        name="a tile brought to the block instead of to L2",
        header="load.cuh",
        old="      keys_.prefetch_tile(first_tile, p.prefetch_limit);\n",
        new="      keys_.copy_tile(pages_, first_tile, 0, p.prefetch_limit, key_slot(0));\n",
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of k_cache.* in `cp.async.c",
        case=WHOLE_PDL,
    ),
    Mutant(
        name="waits only if it may start the next kernel at once",
        header="pdl.cuh",
        old=f"{_WAIT}  if (pdl == Pdl::kWhole) start_next_kernel();\n",
        new=f"  if (pdl != Pdl::kWhole) return;\n{_WAIT}  start_next_kernel();\n",
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of seqlens",
        case=END_PDL,
    ),
    Mutant(
        name="one warp waits for all of the block",
        header="pdl.cuh",
        old=_WAIT,
        new="  if (threadIdx.x < 32) wait_for_previous_kernel();\n  __syncthreads();\n",
        fault=f"global memory is read {_TOO_SOON}.* warp 1, lane 0",
        case=CLUSTER_WHOLE_PDL,
    ),
    # What is prefetched
    Mutant(
        name="rows past the end of the cache prefetched",
        header="load.cuh",
        old="if (token < (tile + 1) * T::kBlockN && token < end) {",
        new="if (token < (tile + 1) * T::kBlockN) {",
        fault="outside all tensors; 0 bytes past the end of k_cache.* in `cp.async.bulk.prefetch",
        case=WHOLE_PDL,
    ),
    Mutant(
        name="padding behind the rows prefetched",
        header="load.cuh",
        old="prefetch_to_l2(row(token), kRowBytes);",
        new="prefetch_to_l2(row(token), kRowBytes / Tile::kDims * Tile::kDimsPadded);",
        fault="outside all tensors; at byte 80 of k_cache.* in `cp.async.bulk.prefetch",
        case=PADDED_PDL,
    ),
    Mutant(
        name="rows prefetched from one element further",
        header="load.cuh",
        old="prefetch_to_l2(row(token), kRowBytes);",
        new="prefetch_to_l2(row(token) + 1, kRowBytes);",
        fault="global access not a multiple of 16 bytes.* in `cp.async.bulk.prefetch.L2",
        case=PADDED_PDL,
    ),
    Mutant(
        name="bytes taken for elements",
        header="load.cuh",
        old="prefetch_to_l2(row(token), kRowBytes);",
        new="prefetch_to_l2(row(token), Tile::kDims);",
        fault="cp.async.bulk: 40 bytes; allowed: positive multiples of 16",
        case=PADDED_PDL,
    ),
    Mutant(
        name="a prefetch of another rank than the map's",
        header="load_tma.cuh",
        old="using Prefetch = cute::SM90_TMA_LOAD_5D::PREFETCH;\n"
        "      Prefetch::copy(&map, 0, at.token, 0, at.head, at.sequence);",
        new="using Prefetch = cute::SM90_TMA_LOAD_4D::PREFETCH;\n"
        "      Prefetch::copy(&map, 0, at.token, at.head, at.sequence);",
        fault="tensor map of 5 dimensions, and coordinates of 4",
        case=CLUSTER_WHOLE_PDL,
    ),
    Mutant(
        name="a prefetch by boxes as if they were pieces of 8 bytes",
        header="load_tma.cuh",
        old="Prefetch::copy(&map, box * kBoxDims, at.token",
        new="Prefetch::copy(&map, box * kBoxDims + 4, at.token",
        fault="innermost coordinate 4, byte 8; .* in `cp.async.bulk.prefetch.tensor.4d",
        case=ODD_BOXES_PDL,
    ),
)
