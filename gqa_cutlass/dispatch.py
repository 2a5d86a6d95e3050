"""Problem to kernel and launch shape: the dispatch table's analytic model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, prod

from gqa_cutlass.codegen.config import Arch, KernelConfig
from gqa_cutlass.codegen.schema.kinds import Math, Schedule
from gqa_cutlass.codegen.schema.launch import Overlap
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.codegen.schema.storage import BOX_DIMS, MAX_CLUSTER
from gqa_cutlass.codegen.variants import default_config, shipped
from gqa_cutlass.errors import InputError
from gqa_cutlass.inputs import WIDEST, Problem
from gqa_cutlass.launcher import Device, LaunchShape

# The cost model's figures, measured on an H200. A split costs its merge; a multiprocessor draws its
# share of the bandwidth only with so many bytes under way (1x131072 of 8 heads took 143 us with
# half as many and 124 us with these and with more).
BYTES_PER_SM_AND_MICROSECOND = 33_500
MICROSECONDS_PER_SPLIT = 0.08
BYTES_IN_FLIGHT = 48 * 1024

# Where the tma schedule won, and with how many blocks (docs/design/0002-tma-schedule.md has the
# measurements): caches up to so many MiB, fewer where rows are no multiple of 128 bytes; so many KV
# heads in the batch.
TMA_MIB, TMA_MIB_PARTIAL_BOXES = 128, 16
TMA_HEADS = 64
TMA_BLOCKS = 64

# Larger caches, where rows are whole boxes: so many KV heads in the batch, whose sequences are
# equally long. Blocks in pairs, one on every multiprocessor; in the largest clusters for so few
# heads that pairs would meet too often in global memory.
TMA_LARGE_HEADS = 32
TMA_LARGE_CLUSTER, TMA_FEW_HEADS = 2, 2

# What caches may hold in all for first tiles to be read before lengths are known: with so few bytes
# latency counts, and reading a tile per warp too many costs little.
EARLY_MIB = 16
SMALLEST_COPY = 2  # elements that an asynchronous copy moves at least (cp.async: four bytes)

# Up to how many MiB of caches dependent launches pay: with fewer, the next launch may start at once
# and fetches its first tiles meanwhile; with more, that disturbs this one, and the next may start
# when this one's tiles are done; beyond, nothing is gained that can be relied on.
WHOLE_OVERLAP_MIB, END_OVERLAP_MIB = 5, 32

# Where splits are dealt out by length (docs/design/0001-decode-kernel.md, "Ragged batches"): the
# batch, the tokens that a cache can hold, and the rounds that one block per sequence makes.
BALANCED_BATCH, BALANCED_TOKENS = 256, 4096
BALANCED_ROUNDS = 4
MOST_TILES = 2**31  # 32-bit sums; a tile has more than one token
_WORD_BYTES = 4
_BALANCED = "spare blocks, to balance ragged lengths"


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The kernel for a problem, and how it is launched.

    Args:
        config: The kernel.
        shape: Grid, block, cluster and shared memory.
        num_splits: Parts that a sequence is cut into when all are about as long.
        num_stages: K tiles (and V tiles) that a warp keeps in flight.
        early: Whether warps ask for their first tile before they know the length.
        overlap: When the next kernel may start.
        reasons: Why, one sentence per decision.
    """

    config: KernelConfig
    shape: LaunchShape
    num_splits: int
    num_stages: int
    early: bool
    overlap: Overlap
    reasons: tuple[str, ...]

    @property
    def balanced(self) -> bool:
        """Whether ragged sequences get splits by their lengths, for which there are more blocks."""
        return self.shape.grid[1] > self.num_splits

    @property
    def num_partials(self) -> int:
        """Partial outputs per sequence in global memory: of splits, or of clusters of splits."""
        return self.shape.grid[1] // self.shape.cluster

    @property
    def num_tickets(self) -> int:
        """Merges in global memory, which need a counter each; none without partials."""
        x, _, z = self.shape.grid
        return x * z * self.shape.cluster if self.num_partials > 1 else 0

    @property
    def partial_floats(self) -> int:
        """Floats of workspace for the partial outputs."""
        return self.num_tickets * self.num_partials * self.config.partial_floats

    @property
    def workspace_bytes(self) -> int:
        """Bytes of partial outputs and tickets."""
        return _WORD_BYTES * (self.partial_floats + self.num_tickets)


@lru_cache(maxsize=4096)
def dispatch(
    problem: Problem,
    device: Device,
    num_splits: int = 0,
    kernel: KernelConfig | None = None,
    ragged: bool = False,
    dependent: bool = False,
) -> Dispatch:
    """Choose a kernel and a launch shape.

    Args:
        problem: What is asked for.
        device: Where it will run.
        num_splits: Parts to cut every sequence into; 0 leaves the choice to the model.
        kernel: A kernel to use instead of the model's choice.
        ragged: Whether sequences may differ in length, by lengths that only the device knows.
        dependent: Whether the kernel may start before the kernel before it is done.

    Raises:
        InputError: The given kernel cannot solve the problem.
    """
    if kernel is None:
        config, why_config = choose_config(problem, device, ragged)
    else:
        _check_fits(kernel, problem, device)
        config, why_config = kernel, "this kernel, as asked"
    overlap, why_overlap = Overlap.NONE, ""
    if dependent:
        early_starter = replace(config, dependent=True)
        overlap, why_overlap = _choose_overlap(early_starter, problem, device)
        if overlap:
            config = early_starter
    if num_splits:
        splits = Splits(
            cluster=gcd(num_splits, MAX_CLUSTER) if config.tma else 1,
            splits=num_splits,
            num_stages=config.num_stages,
            why=f"{num_splits} splits, as asked",
        )
    elif config.tma:
        splits = choose_clusters(problem, config, device)
    else:
        count, why = choose_splits(problem, config, device)
        splits = Splits(cluster=1, splits=count, num_stages=config.num_stages, why=why)
    spare = spare_rows(problem, config, device) if ragged and not num_splits else 0
    grid = (problem.num_kv_heads * config.head_blocks, splits.splits + spare, problem.batch_size)
    shared_bytes = config.shared_bytes_with(splits.num_stages)
    if overlap:
        shared_bytes = max(shared_bytes, _shared_bytes_alone(prod(grid), device))
    return Dispatch(
        config=config,
        shape=LaunchShape(
            grid=grid,
            block=config.num_threads,
            shared_bytes=shared_bytes,
            cluster=splits.cluster,
            dependent=overlap is not Overlap.NONE,
        ),
        num_splits=splits.splits,
        num_stages=splits.num_stages,
        early=not spare and _may_be_early(problem, config),
        overlap=overlap,
        reasons=tuple(
            filter(None, (why_config, splits.why, _BALANCED if spare else "", why_overlap))
        ),
    )


def _may_be_early(problem: Problem, config: KernelConfig) -> bool:
    """Whether warps should ask for their first tile before they know the length.

    It may reach into the row that another block appends meanwhile. Asynchronous copies of rows that
    turn out to be none are of no consequence; the loads by which single elements come would race.
    """
    limit = TMA_MIB if config.tma else EARLY_MIB
    return config.vec_width >= SMALLEST_COPY and problem.cache_mib <= limit


def _choose_overlap(
    early_starter: KernelConfig, problem: Problem, device: Device
) -> tuple[Overlap, str]:
    """When the launch after one of such a kernel may start, where it has been measured to pay."""
    if device.arch.name not in early_starter.archs:
        return Overlap.NONE, f"ordinary launch: {device.arch.name} has no dependent ones"
    if problem.cache_mib > END_OVERLAP_MIB:
        return Overlap.NONE, f"ordinary launch: more than {END_OVERLAP_MIB} MiB"
    whole = problem.cache_mib <= WHOLE_OVERLAP_MIB
    return (
        Overlap.WHOLE if whole else Overlap.END,
        f"dependent launch, a kernel of its own that the first use compiles: the next launch may "
        f"start {'at once' if whole else 'at the end'}",
    )


def _shared_bytes_alone(blocks: int, device: Device) -> int:
    """Shared memory with which no more blocks fit on a multiprocessor than a launch has for each.

    Otherwise the next launch's blocks crowd where this one's ended first, and take longer. Where
    both launches find room side by side, nothing is asked for.
    """
    if 2 * blocks <= device.num_sms:
        return 0
    return device.arch.shared_per_sm // (ceil_div(blocks, device.num_sms) + 1)


def spare_rows(problem: Problem, config: KernelConfig, device: Device) -> int:
    """Rows of blocks beyond the splits, so that ragged sequences can be cut by their lengths.

    They cost every block a look at all lengths, for which short caches are not worth it; and where
    blocks come in many rounds, the hardware evens out when they finish. One row is what rounding
    needs. Where one block per sequence fills the multiprocessors more than once, shares of a third
    end more evenly; a finer cut costs more merges than it gains.
    """
    rounds = ceil_div(
        problem.num_kv_heads * config.head_blocks * problem.batch_size,
        device.num_sms * config.blocks_per_sm(device.arch),
    )
    worth_it = (
        not config.tma
        and 2 <= problem.batch_size <= BALANCED_BATCH
        and BALANCED_TOKENS <= problem.max_seq_len <= MOST_TILES // problem.batch_size
        and rounds <= BALANCED_ROUNDS
    )
    return (1 if rounds == 1 else 3) if worth_it else 0


@dataclass(frozen=True, kw_only=True)
class Splits:
    """How the blocks of a launch share a sequence.

    Args:
        splits: Blocks per sequence and KV head (and block of query heads).
        cluster: Blocks of a cluster; divides `splits`.
        num_stages: Stages of every warp.
        why: A sentence.
    """

    splits: int
    cluster: int
    num_stages: int
    why: str


def _check_fits(kernel: KernelConfig, problem: Problem, device: Device) -> None:
    """Raise InputError unless a kernel can solve a problem."""
    needed = (problem.dtype, problem.head_dim, problem.group_size)
    offered = (kernel.dtype, kernel.head_dim, kernel.group_size)
    if device.arch.name not in kernel.archs:
        raise InputError(
            f"gqa_decode: kernel: got {kernel.name} for {device.arch.name}; allowed there: kernels "
            f"for it, which this one is not: {', '.join(kernel.archs)}. Nothing was launched."
        )
    if needed != offered or problem.vec_width % kernel.vec_width:
        raise InputError(
            f"gqa_decode: kernel: got {kernel.name}; allowed: kernels for {problem.dtype}, "
            f"head_dim {problem.head_dim}, group size {problem.group_size} and an alignment of at "
            f"most {problem.vec_width} elements. Nothing was launched."
        )
    if kernel.policies != problem.policies:
        wanted = ", ".join(policy.feature for policy in problem.policies) or "no feature"
        raise InputError(
            f"gqa_decode: kernel: got {kernel.name}; allowed: kernels with what the call asks for: "
            f"{wanted}. Nothing was launched."
        )


def choose_config(
    problem: Problem, device: Device, ragged: bool = False
) -> tuple[KernelConfig, str]:
    """The kernel for a problem: tensor cores wherever the copies can move what was passed.

    Args:
        problem: What is asked for.
        device: Where it will run.
        ragged: As for `dispatch`.

    Returns:
        The kernel, and why.
    """
    math = Math.TENSOROP if problem.vec_width >= 2 else Math.SIMT
    schedule, why = _choose_schedule(problem, device, ragged)
    config = default_config(
        math, problem.dtype, problem.head_dim, problem.group_size, problem.vec_width, schedule,
        problem.policies,
    )  # fmt: skip
    aligned = f"every row is aligned to {2 * problem.vec_width} bytes"
    origin = "shipped" if config in shipped() else "compiled on first use"
    if math is Math.SIMT:
        return config, f"simt: {aligned}, less than cp.async moves; {origin}"
    return config, f"tensorop: {aligned}; {schedule}: {why}; {origin}"


def _choose_schedule(problem: Problem, device: Device, ragged: bool) -> tuple[Schedule, str]:
    """The tma schedule for few heads: if caches are large, only of sequences that are as long."""
    if problem.vec_width < WIDEST:
        return Schedule.MULTISTAGE, "the copy engine wants rows aligned to 16 bytes"
    for policy in problem.policies:
        if Schedule.TMA not in policy.schedules:
            return Schedule.MULTISTAGE, f"{Schedule.TMA} does not have {policy.feature}"
    head_dim, group_size = problem.head_dim, problem.group_size
    tma = default_config(Math.TENSOROP, problem.dtype, head_dim, group_size, WIDEST, Schedule.TMA)
    if device.arch.name not in tma.archs:
        return Schedule.MULTISTAGE, f"{device.arch.name} is not among {', '.join(tma.archs)}"
    whole_boxes = head_dim % BOX_DIMS == 0
    limit = TMA_MIB if whole_boxes else TMA_MIB_PARTIAL_BOXES
    mib = problem.cache_mib
    heads = problem.num_kv_heads * problem.batch_size
    alone = problem.max_seq_len <= tma.block_n * tma.num_warps  # one block's warps at once
    if mib <= limit and heads <= TMA_HEADS and not alone:
        return Schedule.TMA, f"{mib:.1f} MiB, at most {limit}; few heads"
    equal = problem.batch_size == 1 or not ragged
    if mib > limit and whole_boxes and heads <= TMA_LARGE_HEADS and equal:
        return Schedule.TMA, f"{mib:.1f} MiB of at most {TMA_LARGE_HEADS} heads, not ragged"
    return Schedule.MULTISTAGE, f"{mib:.1f} MiB of {problem.max_seq_len} tokens"


def choose_clusters(problem: Problem, config: KernelConfig, device: Device) -> Splits:
    """How the blocks of the tma schedule share sequences, when caches are full.

    As many blocks as keep memory busy and no more, in clusters of at most 8: clusters that share a
    head meet in global memory, which costs a microsecond. A second stage pays once warps walk
    several tiles, and takes the room of a second block.
    """
    heads = problem.num_kv_heads * config.head_blocks * problem.batch_size
    tiles = ceil_div(problem.max_seq_len, config.block_n)
    if problem.cache_mib > TMA_MIB:
        return _fill_with_clusters(heads, tiles, config, device)
    wanted = max(2, ceil_div(TMA_BLOCKS, heads))
    splits = _power_of_two(min(wanted, ceil_div(tiles, config.num_warps)))
    per_warp = ceil_div(tiles, splits * config.num_warps)
    deep = per_warp > 2 and heads * splits < 2 * TMA_BLOCKS
    cluster = min(MAX_CLUSTER, splits)
    return Splits(
        splits=splits,
        cluster=cluster,
        num_stages=config.num_stages if deep else 1,
        why=f"{splits // cluster} clusters of {cluster} for each of {heads} heads, at most "
        f"{per_warp} tiles per warp",
    )


def _fill_with_clusters(heads: int, tiles: int, config: KernelConfig, device: Device) -> Splits:
    """The same for large caches: a block for every multiprocessor."""
    few = heads <= TMA_FEW_HEADS
    cluster = MAX_CLUSTER if few else TMA_LARGE_CLUSTER
    most = tiles // (config.num_warps * cluster)  # clusters whose warps have a tile each
    clusters = max(1, min(device.num_sms // (heads * cluster), most))
    return Splits(
        splits=clusters * cluster,
        cluster=cluster,
        num_stages=1 if few else config.num_stages,
        why=f"{clusters} clusters of {cluster} for each of {heads} heads: {device.num_sms} SMs",
    )


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (n - 1).bit_length()


def choose_splits(problem: Problem, config: KernelConfig, device: Device) -> tuple[int, str]:
    """The number of splits that the cost model finds cheapest for a full cache.

    No more than let all blocks be resident at once, or than leave every warp a tile. (The kernel
    itself uses fewer for sequences that are too short for so many.)
    """
    blocks = problem.num_kv_heads * config.head_blocks * problem.batch_size
    tiles = ceil_div(problem.max_seq_len, config.block_n)
    slots = device.num_sms * config.blocks_per_sm(device.arch)
    most = max(1, min(ceil_div(tiles, config.num_warps), slots // blocks))
    costs = {
        splits: read_cost(blocks, tiles, splits, config, device) for splits in range(1, most + 1)
    }
    splits = min(costs, key=lambda s: (costs[s], s))
    return splits, (
        f"{splits} splits of at most {most}: {blocks * splits} blocks of {config.num_warps} warps "
        f"for {blocks * tiles} tiles on {device.num_sms} SMs; modelled reading and merging "
        f"{costs[splits]:.1f} us"
    )


def read_cost(blocks: int, tiles: int, splits: int, config: KernelConfig, device: Device) -> float:
    """Modelled microseconds to read the cache and merge the splits (launch latency excluded).

    Args:
        blocks: Blocks per split.
        tiles: Tiles per sequence.
        splits: Parts that a sequence is cut into.
        config: The kernel.
        device: The GPU.
    """
    ideal = blocks * tiles * config.tile_bytes / (device.num_sms * BYTES_PER_SM_AND_MICROSECOND)
    busy_warps = _share_used(tiles, config.num_warps * splits)
    busy_sms = _share_used(blocks * splits, device.num_sms)
    resident = min(ceil_div(blocks * splits, device.num_sms), config.blocks_per_sm(device.arch))
    fed = min(1.0, resident * config.bytes_in_flight / BYTES_IN_FLIGHT)
    return ideal / (busy_warps * busy_sms * fed) + MICROSECONDS_PER_SPLIT * (splits - 1)


def _share_used(work: int, workers: int) -> float:
    """Share of the workers' time used when equal pieces of work are dealt out in rounds."""
    return work / (ceil_div(work, workers) * workers)


def model_device(arch: Arch) -> Device:
    """A stand-in for a GPU that is not there: an H200's 132 multiprocessors."""
    return Device(index=-1, arch=arch, num_sms=132)
