"""The shipped grid, as data, and the tile shape of every configuration in or outside of it."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from itertools import product

from gqa_cutlass.codegen.config import KernelConfig, check_head_dim
from gqa_cutlass.codegen.schema.kinds import DType, Math, Schedule
from gqa_cutlass.codegen.schema.policies import Policy
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.errors import ConfigError

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
# (math, head dims, group sizes, vector widths). Groups 3, 5, 6 and 7 are those of Llama-3.2-3B,
# Qwen2.5-14B, Qwen2.5-1.5B and Qwen2.5-0.5B/7B; narrow vectors serve misaligned views.
SHIPPED_GRID: tuple[tuple[Math, tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = (
    (Math.TENSOROP, HEAD_DIMS, (1, 2, 4, 8, 16), (8,)),
    (Math.TENSOROP, (128,), (3, 5, 6, 7), (8,)),
    (Math.TENSOROP, (64,), (7,), (8,)),
    (Math.TENSOROP, (64, 128), (32,), (8,)),
    (Math.TENSOROP, HEAD_DIMS, (4,), (4, 2)),
    (Math.SIMT, HEAD_DIMS, (1,), (8, 2)),
    (Math.SIMT, (64, 128), (4,), (4, 2, 1)),
)
# (head dims, group sizes) of the tma kernels: few heads, on Hopper.
SHIPPED_TMA: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    (HEAD_DIMS, (1, 2, 4, 8, 16)),
    ((128,), (3, 5, 6, 7)),
    ((64,), (7,)),
    ((64, 128), (32,)),
)

# (largest head_dim served, block_n, num_warps, num_stages), chosen by measurement on an H200. The
# rings of K and V tiles stay below the 99 KiB that a block may use on every architecture.
_TILES: tuple[tuple[int, int, int, int], ...] = ((80, 32, 8, 1), (176, 16, 8, 1), (256, 16, 4, 1))
# The same with tma, whose tiles are boxes of 64 dims and may fill a multiprocessor of Hopper.
_TMA_TILES: tuple[tuple[int, int, int, int], ...] = (
    (64, 32, 8, 2),
    (192, 16, 8, 2),
    (256, 16, 8, 1),
)


@cache
def default_config(
    math: Math,
    dtype: DType,
    head_dim: int,
    group_size: int,
    vec_width: int,
    schedule: Schedule = Schedule.MULTISTAGE,
    policies: tuple[Policy, ...] = (),
) -> KernelConfig:
    """Choose the tile shape for what a problem fixes.

    Args:
        math: Tensor cores or CUDA cores.
        dtype: Element type.
        head_dim: Dimension per head.
        group_size: Query heads per KV head.
        vec_width: Elements per access that every address allows.
        schedule: How it loads and merges.
        policies: Features.

    Raises:
        ConfigError: head_dim, group_size or vec_width is out of range.
    """
    check_head_dim(head_dim)
    tiles = _TMA_TILES if schedule is Schedule.TMA else _TILES
    block_n, num_warps, num_stages = next(tile for limit, *tile in tiles if head_dim <= limit)
    return KernelConfig(
        math=math,
        dtype=dtype,
        head_dim=head_dim,
        group_size=group_size,
        vec_width=vec_width,
        block_h=_block_h(math, head_dim, group_size),
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        schedule=schedule,
        policies=policies,
    )


def _block_h(math: Math, head_dim: int, group_size: int) -> int:
    """Heads per block: as many as the registers hold, and no more blocks than that needs."""
    if math is Math.SIMT:
        limit = 8 if head_dim <= 64 else 4 if head_dim <= 128 else 2
        return ceil_div(group_size, ceil_div(group_size, limit))
    # 16 heads of 232 to 248 dims spill, where those of 256 just fit: the shape is the compiler's.
    limit = 32 if head_dim <= 64 else 8 if 224 < head_dim < 256 else 16
    tiles = ceil_div(group_size, 8)
    blocks = ceil_div(tiles * 8, limit)
    return min(limit, 8 * ceil_div(tiles, blocks))


def _named(name: str) -> KernelConfig | None:
    """The kernel of this name, if it is one."""
    try:
        return KernelConfig.from_name(name)
    except ConfigError:
        return None


@cache
def shipped() -> tuple[KernelConfig, ...]:
    """Every kernel that the package carries as source, in the order of the grid."""
    multistage = tuple(
        default_config(math, dtype, head_dim, group_size, vec_width)
        for math, dims, groups, widths in SHIPPED_GRID
        for head_dim, group_size, vec_width, dtype in product(dims, groups, widths, DType)
    )
    tma = tuple(
        default_config(Math.TENSOROP, dtype, head_dim, group_size, 8, Schedule.TMA)
        for dims, groups in SHIPPED_TMA
        for head_dim, group_size, dtype in product(dims, groups, DType)
    )
    return multistage + tma


def select(
    filters: str | None, configs: Iterable[KernelConfig] | None = None
) -> list[KernelConfig]:
    """Pick kernels by name, in CUTLASS' `--kernels` syntax.

    Args:
        filters: Comma-separated entries; each is a `*`-separated list of substrings that must occur
            in the name in this order, or a kernel's whole name, which need not be shipped. None or
            empty picks everything.
        configs: What to pick from; the shipped grid by default.

    Raises:
        ConfigError: Nothing matches.
    """
    pool = list(shipped() if configs is None else configs)
    if not filters:
        return pool
    entries = [entry.strip() for entry in filters.split(",") if entry.strip()]
    pool += [config for config in map(_named, entries) if config and config not in pool]
    picked = [c for c in pool if any(fnmatchcase(c.name, f"*{e}*") for e in entries)]
    if not picked:
        raise ConfigError(
            f"--kernels: got {filters!r}, which matches none of {len(pool)} kernels; "
            "`gqa-cutlass list` prints the names"
        )
    return picked
