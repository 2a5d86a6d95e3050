"""Decode steps at the edges of tiles, and how their launches are cut."""

from __future__ import annotations

from dataclasses import dataclass

from cases import Layout, Step, make_step

from gqa_cutlass.codegen import DType, KernelConfig


@dataclass(frozen=True, kw_only=True)
class Edge:
    """A decode step on random data, and how its launch is cut.

    Args:
        lengths: Tokens in each sequence's cache.
        capacity: Tokens a cache can hold.
        splits: Parts per sequence; with tma in the largest clusters that divide them.
        stages: Of the ring of a kernel with tma; None for all that it has.
        layout: Of the caches.
        append: Whether a new token comes along.
        by_value: Whether the (one) length is passed as an int.
        kv_heads: KV heads.
    """

    lengths: tuple[int, ...]
    capacity: int
    splits: int = 1
    stages: int | None = None
    layout: Layout = "NHD"
    append: bool = True
    by_value: bool = False
    kv_heads: int = 1

    def step(self, config: KernelConfig, device: str) -> Step:
        """The step for a kernel."""
        return make_step(
            dtype=config.dtype, head_dim=config.head_dim, group_size=config.group_size,
            vec_width=config.vec_width, lengths=list(self.lengths), max_seq_len=self.capacity,
            num_kv_heads=self.kv_heads, layout=self.layout, append=self.append,
            seed=sum(self.lengths) + self.splits, device=device, head_dim_v=config.head_dim_v,
        ).asking_for(config.policies)  # fmt: skip


def edges_of(config: KernelConfig) -> dict[str, Edge]:
    """The steps that every kernel must get right: few, and each at many edges of tiles."""
    return _edges_of_clusters(config) if config.tma else _edges_of_splits(config)


def _edges_of_splits(config: KernelConfig) -> dict[str, Edge]:
    """The longest sequence takes every warp through its ring of stages and once again."""
    tile = config.block_n
    whole = tile * config.num_warps * config.num_stages
    capacity = whole + 2 * tile + 3
    edges = 0, 1, tile - 2, tile - 1, tile, whole - 1, whole, capacity - 1
    return {
        "one block": Edge(lengths=edges, capacity=capacity, layout="HND"),
        "splits": Edge(lengths=(capacity - 1, 40), capacity=capacity, splits=3, layout="padded"),
        "attend only": Edge(lengths=(37,), capacity=capacity, splits=2, append=False),
    }


def _edges_of_clusters(config: KernelConfig) -> dict[str, Edge]:
    """With `block` tokens a block's warps take one tile each, and with more they walk."""
    tile, block = config.block_n, config.block_n * config.num_warps
    # Half of a cluster's blocks, and one tile: the rest gets none. In small clusters, which cost
    # ptxsim less, there is also a sequence that one block attends to.
    half, short = (4, ()) if config.dtype is DType.F16 else (2, (5,))
    return {
        "one block": Edge(
            lengths=(0, 15, 16, block - 1, 2 * block + tile + 2),
            capacity=2 * block + tile + 3, layout="HND",
        ),
        "cluster": Edge(
            lengths=(half * block + 1, *short), capacity=half * block + 2, splits=2 * half,
            layout="padded",
        ),
        "warps that walk in a cluster": Edge(
            lengths=(2 * block + tile + 1,), capacity=2 * block + tile + 2, splits=2, stages=1,
            by_value=True,
        ),
        "clusters up to the cache's end": Edge(
            lengths=(2 * block + 7,), capacity=2 * block + 7, splits=3, append=False
        ),
    }  # fmt: skip
