"""Which kernels ship, and the tile shape of every configuration, shipped or not."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from itertools import product

from gqa_cutlass.codegen.config import KernelConfig, check_head_dim
from gqa_cutlass.codegen.merge import PARTS_AT_ONCE, Kernel, MergeConfig, widest
from gqa_cutlass.codegen.models import MODELS, Model
from gqa_cutlass.codegen.schema.kinds import DType, Math, Schedule
from gqa_cutlass.codegen.schema.launch import NumberType
from gqa_cutlass.codegen.schema.policies import (
    E4M3,
    E5M2,
    OF_TOKENS,
    POLICIES,
    Policy,
    named,
    packed,
)
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.codegen.schema.slots import QUERIES
from gqa_cutlass.codegen.schema.storage import BOX_DIMS, PAGE_TOKENS, box_tile_bytes

# (why, head_dim, that of values if it is another, group_size, vec_widths, policies) of what ships
# for no model's sake. Kernels of several tokens have blocks for _TOKENS of them.
PROOFS: tuple[tuple[str, int, int | None, int, tuple[int, ...], tuple[Policy, ...]], ...] = (
    ("the last box of a tensor copy is a quarter", 80, None, 4, (8,), ()),
    ("the last box of a tensor copy is a half", 96, None, 4, (8,), ()),
    ("the last box of a tensor copy is three quarters", 112, None, 4, (8,), ()),
    ("three boxes of a tensor copy", 192, None, 4, (8,), ()),
    ("two blocks of heads share a KV head", 128, None, 32, (8,), ()),
    ("one block of 32 heads", 64, None, 32, (8,), ()),
    ("misaligned views", 64, None, 4, (4, 2, 1), ()),
    ("misaligned views", 128, None, 4, (4, 2, 1), ()),
    ("values narrower than keys", 192, 128, 4, (8, 1), ()),
    ("values wider than keys, and a partial box", 64, 80, 4, (8,), ()),
    ("parts, to be merged", 128, None, 4, (8,), (named("InFloat32"),)),
    ("pages", 128, None, 4, (8,), (named("PagedCache"),)),
    ("a tile of two pages", 64, None, 8, (8,), (named("PagedCache"),)),
    ("a cache of float8_e4m3fn", 128, None, 4, (8,), (E4M3,)),
    ("a cache of float8_e5m2, and half a box of a tensor copy", 64, None, 8, (8,), (E5M2,)),
    ("pages of float8_e4m3fn", 128, None, 4, (8,), (named("PagedCache"), E4M3)),
    ("several tokens", 128, None, 4, (8,), (named("SeveralQueries"),)),
    ("several tokens", 64, None, 8, (8,), (named("SeveralQueries"),)),
    ("norm and rotation", 128, None, 4, (8,), (named("RmsNormed"), named("RotatedByTables"))),
)
_TOKENS = 4

# (largest head_dim served, block_n, num_warps, num_stages), chosen by measurement on an H200. The
# rings of K and V tiles stay below the 99 KiB that a block may use on every architecture.
_TILES: tuple[tuple[int, int, int, int], ...] = ((80, 32, 8, 1), (176, 16, 8, 1), (256, 16, 4, 1))
# The same with tma, whose tiles are boxes of 64 dims and may fill a multiprocessor of Hopper.
_TMA_TILES: tuple[tuple[int, int, int, int], ...] = (
    (64, 32, 8, 2),
    (192, 16, 8, 2),
    (256, 16, 8, 1),
)
# The same of caches with elements of 8 bits.
_FP8_TILES: tuple[tuple[int, int, int, int], ...] = (
    (64, 32, 4, 1),
    (80, 32, 8, 1),
    (128, 16, 4, 1),
    (160, 16, 8, 2),
    (176, 16, 8, 1),
    (256, 32, 4, 1),
)
# With scales of tokens, which take registers: more blocks, of fewer warps; and with several tokens.
_TOKENS_TILES: tuple[tuple[int, int, int, int], ...] = (
    (64, 32, 4, 1),
    (80, 32, 8, 1),
    (128, 16, 4, 1),
    (256, 32, 4, 1),
)
_SEVERAL_TOKENS_TILES: tuple[tuple[int, int, int, int], ...] = ((80, 32, 4, 1), (256, 16, 4, 2))
_FP8_TMA_TILES: tuple[tuple[int, int, int, int], ...] = ((128, 32, 8, 2), (256, 16, 8, 2))
_TOKENS_TMA_TILES: tuple[tuple[int, int, int, int], ...] = ((128, 32, 8, 2), (256, 32, 8, 1))


@cache
def default_config(
    math: Math,
    dtype: DType,
    head_dim: int,
    group_size: int,
    vec_width: int,
    schedule: Schedule = Schedule.MULTISTAGE,
    policies: tuple[Policy, ...] = (),
    head_dim_v: int | None = None,
    num_tokens: int = 1,
) -> KernelConfig:
    """Choose the tile shape for what a problem fixes.

    Args:
        math: Tensor cores or CUDA cores.
        dtype: Element type.
        head_dim: Dimension per head of queries and keys.
        group_size: Query heads per KV head.
        vec_width: Elements per access that every address allows.
        schedule: How it loads and merges.
        policies: Features.
        head_dim_v: Dimension per head of values and outputs; None: as head_dim.
        num_tokens: Query tokens of a sequence.

    Raises:
        ConfigError: head_dim, group_size or vec_width is out of range; or, with tma and pages,
            values are so much wider than keys that a warp's partial output has no room in tiles.
    """
    check_head_dim(head_dim)
    value_dim = head_dim if head_dim_v is None else head_dim_v
    check_head_dim(value_dim, "head_dim_v")
    largest = max(head_dim, value_dim)
    each = packed(policies)
    paged = any(p.feature == "block_table" for p in policies)
    of_tokens = bool({*OF_TOKENS} & {*policies})
    several = any(p.slot is QUERIES for p in policies)
    tiles = _tiles(schedule, each, of_tokens, several)
    block_n, num_warps, num_stages = next(tile for limit, *tile in tiles if largest <= limit)
    if schedule is Schedule.TMA and paged and largest > BOX_DIMS * each:
        block_n = PAGE_TOKENS
    # With tma, a warp's partial output takes the place of its tiles: wide values beside narrow keys
    # want longer ones.
    dims = head_dim, value_dim
    room = _heads_in_tiles(dims, each, block_n) if schedule is Schedule.TMA else None
    if room is not None and room < 8 and not paged:
        block_n, num_stages = 2 * block_n, 1
        room = _heads_in_tiles(dims, each, block_n)
    if largest > 224 and room is None and (paged or each > 1):
        room = 8  # more heads of 256 dims spill, with addresses of pages or conversions beside them
    elif of_tokens and several:
        # More rows of several tokens spill, with scales and what each sees beside them.
        most = 16 if largest <= 128 else 8
        room = most if room is None else min(room, most)
    elif of_tokens and room is not None and largest > 224:
        room = 8
    return KernelConfig(
        math=math,
        dtype=dtype,
        head_dim=head_dim,
        group_size=group_size,
        vec_width=vec_width,
        block_h=_block_h(math, largest, group_size * num_tokens, room),
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        schedule=schedule,
        head_dim_v=head_dim_v,
        policies=policies,
    )


def _heads_in_tiles(dims: tuple[int, int], each: int, block_n: int) -> int:
    """Heads whose partial outputs have room in a warp's tiles of K and V, with tma."""
    tiles_bytes = sum(box_tile_bytes(dim // each, block_n) for dim in dims)
    return tiles_bytes // (4 * dims[1])


def _tiles(
    schedule: Schedule, each: int, of_tokens: bool, several: bool
) -> tuple[tuple[int, int, int, int], ...]:
    """Tile shapes of a schedule, by what a cache holds."""
    if schedule is Schedule.TMA:
        return _TMA_TILES if each == 1 else _TOKENS_TMA_TILES if of_tokens else _FP8_TMA_TILES
    if not of_tokens:
        return _TILES if each == 1 else _FP8_TILES
    return _SEVERAL_TOKENS_TILES if several else _TOKENS_TILES


def _block_h(math: Math, head_dim: int, rows: int, room: int | None) -> int:
    """Heads (of all tokens) per block: what registers and `room` hold, in as few blocks."""
    if math is Math.SIMT:
        limit = 8 if head_dim <= 64 else 4 if head_dim <= 128 else 2
        return ceil_div(rows, ceil_div(rows, limit))
    # 16 heads of 232 to 248 dims spill, where those of 256 just fit: the shape is the compiler's.
    limit = 32 if head_dim <= 64 else 8 if 224 < head_dim < 256 else 16
    if room is not None:
        limit = max(8, min(limit, room // 8 * 8))
    tiles = ceil_div(rows, 8)
    blocks = ceil_div(tiles * 8, limit)
    return min(limit, 8 * ceil_div(tiles, blocks))


@cache
def shipped() -> tuple[KernelConfig, ...]:
    """Every kernel that the package carries as source: those of `MODELS`, and a few for proof.

    Each is there for both types and, where vectors are of 8 elements, in both schedules. Whatever
    else a call needs is compiled on first use.
    """
    shapes = {(m.head_dim, 0, m.group_size, 8, each) for m in MODELS for each in policies_of(m)}
    shapes |= {
        (d, v or 0, group, w, each) for _, d, v, group, widths, each in PROOFS for w in widths
    }
    ordered = sorted(shapes, key=lambda s: (*s[:4], [policy.tag for policy in s[4]]))
    return tuple(
        default_config(
            math, dtype, dim, group, width, schedule, policies, dim_v or None,
            _TOKENS if named("SeveralQueries") in policies else 1,
        )
        for schedule in Schedule
        for (dim, dim_v, group, width, policies), dtype in product(ordered, DType)
        if width == 8 or schedule is not Schedule.TMA
        for math in (Math.SIMT if width == 1 else Math.TENSOROP,)
    )  # fmt: skip


# Types of parts and of what they become: parts that were not rounded, and parts that were.
_MERGES = (
    *((NumberType.FLOAT32, out) for out in NumberType),
    *((rounded, rounded) for rounded in NumberType if rounded is not NumberType.FLOAT32),
)


@cache
def merges() -> tuple[MergeConfig, ...]:
    """Every kernel that merges and that the package carries as source.

    Each is there for rows aligned to 16 bytes, and for any others; for few parts, and for many.
    """
    return tuple(
        MergeConfig(dtype=dtype, out_dtype=out, vec_width=width, parts_at_once=parts)
        for dtype, out in _MERGES
        for width in (widest(dtype), 1)
        for parts in PARTS_AT_ONCE
    )


@cache
def carried() -> tuple[Kernel, ...]:
    """All that the package carries as source: kernels that decode, and kernels that merge."""
    return (*shipped(), *merges())


def policies_of(model: Model) -> tuple[tuple[Policy, ...], ...]:
    """What the kernels of a model's layers have in their slots: those with a window, if there are
    any, and those without.
    """
    full = [feature for feature in model.needs if feature != "window_size"]
    return tuple({policies_for(model.needs): 0, policies_for(full): 0})


def policies_for(features: Collection[str]) -> tuple[Policy, ...]:
    """The policies of options that a call asks for, in their order."""
    return tuple(policy for policy in POLICIES if policy.feature and policy.feature in features)
