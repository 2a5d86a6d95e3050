"""Shared memory of one block, part by part, as the kernels' structures have it.

Every generated file asserts the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from gqa_cutlass.codegen.schema.rounding import round_up

MAX_CLUSTER = 8  # what every GPU with clusters allows
BOX_DIMS = 64  # of a tensor copy: 128 bytes, the span of the swizzle
PAGE_TOKENS = 16  # of a tensor copy from a page, which holds a multiple of them
ELEMENT_BYTES = 2
_FLOAT, _PAIR, _BARRIER = 4, 8, 8
_RING_ALIGN = 1024  # the period of the swizzle


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A part of a block's shared memory.

    Args:
        name: The member of `SharedStorage` or `ClusterStorage`.
        bytes: Its size.
        align: Of its address.
    """

    name: str
    bytes: int
    align: int = _FLOAT


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What shared memory depends on; as in `KernelConfig`.

    `packed` elements of a cache are as large as one of the queries.
    """

    head_dim: int
    value_dim: int
    block_h: int
    block_n: int
    num_warps: int
    num_stages: int
    simt: bool = False
    prepares_rows: bool = False
    packed: int = 1

    @property
    def dims(self) -> tuple[int, int]:
        """What a row of K and one of V count in tiles: elements, or so many packed ones as one."""
        return self.head_dim // self.packed, self.value_dim // self.packed


def total(parts: tuple[Shared, ...]) -> int:
    """Bytes of all parts, one behind the other, up to a multiple of the largest alignment."""
    end = 0
    for part in parts:
        end = round_up(end, part.align) + part.bytes
    return round_up(end, max(part.align for part in parts))


def multistage(s: Shape) -> tuple[Shared, ...]:
    """`SharedStorage` in schedule/multistage/storage.cuh."""
    ring = s.num_stages * s.block_n * sum(map(row_bytes, s.dims))
    partial = s.block_h * (s.value_dim + 4) * _FLOAT
    rows = s.num_warps * s.block_h * _FLOAT
    nothing = 4 * _FLOAT
    return (
        *_prepared(s),
        Shared(name="warp", bytes=s.num_warps * round_up(max(ring, partial), 16), align=16),
        Shared(name="row_max", bytes=rows),
        Shared(name="row_sum", bytes=rows),
        Shared(
            name="query", bytes=s.block_h * s.head_dim * _FLOAT if s.simt else nothing, align=16
        ),
        Shared(
            name="probability",
            bytes=s.num_warps * s.block_h * s.block_n * _FLOAT if s.simt else nothing,
            align=16,
        ),
        Shared(name="is_last", bytes=4),
    )


def cluster(s: Shape, launched_stages: int) -> tuple[Shared, ...]:
    """`ClusterStorage` in schedule/tma/storage_tma.cuh, and the ring of tiles behind it.

    Args:
        s: Of the kernel, whose barriers are those of all its stages.
        launched_stages: Stages of the ring.
    """
    rows = s.num_warps * s.block_h * _FLOAT
    return (
        *_prepared(s),
        Shared(name="row_max", bytes=rows, align=16),
        Shared(name="row_sum", bytes=rows, align=16),
        Shared(
            name="probability", bytes=s.num_warps * s.block_n * s.block_h * ELEMENT_BYTES, align=8
        ),
        Shared(name="new_key", bytes=row_bytes(s.dims[0]), align=16),
        Shared(name="new_value", bytes=row_bytes(s.dims[1]), align=16),
        Shared(name="new_score", bytes=rows),
        Shared(name="max_sum", bytes=MAX_CLUSTER * s.block_h * _PAIR, align=_PAIR),
        Shared(
            name="out",
            bytes=(s.value_dim + 4 * MAX_CLUSTER) * s.block_h // 2 * _PAIR,
            align=_PAIR,
        ),
        Shared(
            name="ring_barrier", bytes=s.num_stages * s.num_warps * 2 * _BARRIER, align=_BARRIER
        ),
        Shared(name="combine_barrier", bytes=_BARRIER, align=_BARRIER),
        Shared(name="is_last", bytes=4),
        Shared(
            name="ring",
            bytes=launched_stages
            * s.num_warps
            * sum(box_tile_bytes(dim, s.block_n) for dim in s.dims),
            align=_RING_ALIGN,
        ),
    )


def _prepared(s: Shape) -> tuple[Shared, ...]:
    """`PreparedQueries` in stage/prepared_queries.cuh."""
    if not s.prepares_rows:
        return ()
    return (Shared(name="prepared_query", bytes=s.block_h * row_bytes(s.head_dim), align=16),)


def row_bytes(head_dim: int) -> int:
    """From one row of a tile to the next: an odd number of 16-byte chunks, for ldmatrix."""
    chunks = round_up(head_dim, 16) // 8 | 1
    return chunks * 16


def box_tile_bytes(head_dim: int, block_n: int) -> int:
    """A tile of K or V as boxes."""
    return round_up(head_dim, BOX_DIMS) * block_n * ELEMENT_BYTES
