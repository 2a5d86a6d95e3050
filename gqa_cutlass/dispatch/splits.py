"""How many blocks share a sequence, by what a GPU's model says of their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.codegen.schema.storage import MAX_CLUSTER
from gqa_cutlass.dispatch.device import Device
from gqa_cutlass.dispatch.model import MODELS

MOST_TILES = 2**31  # 32-bit sums; a tile has more than one token


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


def counted(number: int, noun: str) -> str:
    """How many there are of something, as reasons say it: 1 split, 2 splits."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def choose_clusters(problem: Problem, config: KernelConfig, device: Device) -> Splits:
    """How the blocks of the tma schedule share sequences, when caches are full.

    As many blocks as keep memory busy and no more, in clusters of at most 8: clusters that share a
    head meet in global memory, which costs a microsecond. A second stage pays once warps walk
    several tiles, and takes the room of a second block. More blocks for larger caches, whose
    sequences may be short, cost them up to half: only where clusters would be of fewer than four.
    """
    model = MODELS[device.arch.name]
    heads = problem.num_kv_heads * config.row_blocks(problem.num_tokens) * problem.batch_size
    tiles = problem.tiles(config.block_n)
    wanted = max(2, ceil_div(model.tma_blocks, heads))
    if problem.cache_mib > model.tma_mib and (wanted < 4 or heads <= model.tma_few_heads):
        return _fill_with_clusters(heads, tiles, config, device)
    splits = _power_of_two(min(wanted, ceil_div(tiles, config.num_warps)))
    per_warp = ceil_div(tiles, splits * config.num_warps)
    deep = per_warp > 2 and heads * splits < 2 * model.tma_blocks
    cluster = min(MAX_CLUSTER, splits)
    return Splits(
        splits=splits,
        cluster=cluster,
        num_stages=config.num_stages if deep else 1,
        why=f"{_clusters(splits, cluster)} {_for_each(heads)}, at most "
        f"{counted(per_warp, 'tile')} per warp",
    )


def _fill_with_clusters(heads: int, tiles: int, config: KernelConfig, device: Device) -> Splits:
    """The same for large caches: a block for every multiprocessor."""
    model = MODELS[device.arch.name]
    few = heads <= model.tma_few_heads
    cluster = MAX_CLUSTER if few else model.tma_large_cluster
    most = tiles // (config.num_warps * cluster)  # clusters whose warps have a tile each
    clusters = max(1, min(device.num_sms // (heads * cluster), most))
    return Splits(
        splits=clusters * cluster,
        cluster=cluster,
        num_stages=1 if few else config.num_stages,
        why=f"{_clusters(clusters * cluster, cluster)} {_for_each(heads)}: {device.num_sms} SMs",
    )


def _clusters(blocks: int, cluster: int) -> str:
    """Blocks that share a head, in words."""
    if cluster == 1:
        return counted(blocks, "block")
    return f"{counted(blocks // cluster, 'cluster')} of {cluster}"


def _for_each(heads: int) -> str:
    return "for the only head" if heads == 1 else f"for each of {heads} heads"


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (n - 1).bit_length()


def choose_splits(problem: Problem, config: KernelConfig, device: Device) -> tuple[int, str]:
    """The number of splits that the cost model finds cheapest for a full cache.

    No more than let all blocks be resident at once, or than leave every warp a tile. (The kernel
    itself uses fewer for sequences that are too short for so many.)
    """
    blocks = problem.num_kv_heads * config.row_blocks(problem.num_tokens) * problem.batch_size
    tiles = problem.tiles(config.block_n)
    most = most_splits(problem, config, device)
    costs = {
        splits: read_cost(blocks, tiles, splits, config, device) for splits in range(1, most + 1)
    }
    splits = min(costs, key=lambda s: (costs[s], s))
    return splits, (
        f"{counted(splits, 'split')} of at most {most}: {counted(blocks * splits, 'block')} of "
        f"{counted(config.num_warps, 'warp')} for {counted(blocks * tiles, 'tile')} on "
        f"{device.num_sms} SMs; modelled reading and merging {costs[splits]:.1f} us"
    )


def most_splits(problem: Problem, config: KernelConfig, device: Device) -> int:
    """As many as let all blocks be resident at once, and leave every warp a tile."""
    blocks = problem.num_kv_heads * config.row_blocks(problem.num_tokens) * problem.batch_size
    slots = device.num_sms * config.blocks_per_sm(device.arch)
    return max(1, min(ceil_div(problem.tiles(config.block_n), config.num_warps), slots // blocks))


class ReadTerms(NamedTuple):
    """What the modelled microseconds are made of.

    Args:
        ideal: Microseconds to read the cache at a GPU's full rate.
        busy_warps: Share of the warps' time that is used.
        busy_sms: The same of the multiprocessors'.
        fed: Share of the bytes in flight that the full rate needs.
        merging: Microseconds to merge the splits.
    """

    ideal: float
    busy_warps: float
    busy_sms: float
    fed: float
    merging: float

    @property
    def micros(self) -> float:
        """Their sum."""
        return self.ideal / (self.busy_warps * self.busy_sms * self.fed) + self.merging


def read_cost(blocks: int, tiles: int, splits: int, config: KernelConfig, device: Device) -> float:
    """Modelled microseconds to read the cache and merge the splits (launch latency excluded).

    Args:
        blocks: Blocks per split.
        tiles: Tiles per sequence.
        splits: Parts that a sequence is cut into.
        config: The kernel.
        device: The GPU.
    """
    return read_terms(blocks, tiles, splits, config, device).micros


def read_terms(
    blocks: int, tiles: int, splits: int, config: KernelConfig, device: Device
) -> ReadTerms:
    """The same, term by term."""
    model = MODELS[device.arch.name]
    ideal = (
        blocks * tiles * config.tile_bytes / (device.num_sms * model.bytes_per_sm_and_microsecond)
    )
    busy_warps = _share_used(tiles, config.num_warps * splits)
    busy_sms = _share_used(blocks * splits, device.num_sms)
    resident = min(ceil_div(blocks * splits, device.num_sms), config.blocks_per_sm(device.arch))
    fed = min(1.0, resident * config.bytes_in_flight / model.bytes_in_flight)
    return ReadTerms(ideal, busy_warps, busy_sms, fed, model.microseconds_per_split * (splits - 1))


def _share_used(work: int, workers: int) -> float:
    """Share of the workers' time used when equal pieces of work are dealt out in rounds."""
    return work / (ceil_div(work, workers) * workers)


def may_balance(problem: Problem, config: KernelConfig) -> bool:
    """Whether splits can be dealt out by lengths."""
    several = not config.tma and problem.batch_size >= 2
    return several and problem.reach <= MOST_TILES // problem.batch_size


def spare_splits(problem: Problem, config: KernelConfig, device: Device) -> int:
    """Rows of blocks beyond the splits, so that ragged sequences can be cut by their lengths.

    They cost every block a look at all lengths, for which short caches are not worth it; and where
    blocks come in many rounds, the hardware evens out when they finish. One is what rounding
    needs. Three end more evenly where lengths differ much and are long, by 2%; of shorter sequences
    they cost 15% and more.
    """
    model = MODELS[device.arch.name]
    rounds = ceil_div(
        problem.num_kv_heads * config.row_blocks(problem.num_tokens) * problem.batch_size,
        device.num_sms * config.blocks_per_sm(device.arch),
    )
    worth_it = (
        problem.batch_size <= model.balanced_batch
        and problem.reach >= model.balanced_tokens
        and rounds <= model.balanced_rounds
    )
    return 1 if worth_it else 0
