"""What dispatch was measured to do best, per GPU: data."""

from __future__ import annotations

from dataclasses import dataclass

from gqa_cutlass.codegen.config import ARCHES


@dataclass(frozen=True, kw_only=True)
class Model:
    """The figures of one GPU. Caches are all of a call's, K and V, when full.

    Args:
        bytes_per_sm_and_microsecond: What a multiprocessor reads.
        microseconds_per_split: What the merge of a split costs.
        bytes_in_flight: That a multiprocessor needs under way to draw its share of the bandwidth.
        tma_mib: Up to how many MiB of caches the tma schedule won, with few heads.
        tma_mib_partial_boxes: The same where rows are no multiple of 128 bytes.
        tma_heads: Up to how many KV heads in the batch.
        tma_blocks: Blocks that it then takes.
        tma_pairs_mib: From how many MiB on it lost where these are two for every head, for as many
            heads as leave half of the multiprocessors without one, and sequences equally long.
        tma_early_dims: Above how many dims of values warps do not ask for the first tile early
            where they have one each.
        tma_large_heads: In larger caches whose rows are whole boxes and whose sequences are equally
            long: up to how many KV heads in the batch.
        tma_large_cluster: Blocks of a cluster there where heads would get fewer than four of those
            blocks; one block then runs on every multiprocessor.
        tma_few_heads: Up to how many heads one does so, too, and clusters are the largest, for
            pairs would meet too often in global memory.
        prefetch_mib: Up to how many MiB first tiles are read before lengths are known: with so few
            bytes latency counts, and reading a tile per warp too many costs little.
        pdl_whole_mib: Up to how many MiB of caches the next dependent launch may start at once
            and fetch its first tiles meanwhile; with more, that disturbs this one, and the next may
            start when this one's tiles are done.
        pdl_end_mib: Beyond so many, dependent launches gain nothing that can be relied on.
        balanced_batch: Largest batch in which splits are dealt out by length.
        balanced_tokens: Smallest caches, in tokens of a sequence, in which they are.
        balanced_rounds: Most rounds that one block per sequence may make there.
        invariant_splits: Splits of a sequence, at most, where its result may depend on nothing but
            itself: what loses least over all batches and lengths.
    """

    bytes_per_sm_and_microsecond: int
    microseconds_per_split: float
    bytes_in_flight: int
    tma_mib: float
    tma_mib_partial_boxes: float
    tma_heads: int
    tma_blocks: int
    tma_pairs_mib: float
    tma_early_dims: int
    tma_large_heads: int
    tma_large_cluster: int
    tma_few_heads: int
    prefetch_mib: float
    pdl_whole_mib: float
    pdl_end_mib: float
    balanced_batch: int
    balanced_tokens: int
    balanced_rounds: int
    invariant_splits: int


# docs/design has the measurements: of ragged batches 0001-decode-kernel.md, of the tma schedule and
# overlaps 0002-tma-schedule.md. 1x131072 of 8 heads took 143 us with half as many bytes in flight,
# and 124 us with these and with more.
H200 = Model(
    bytes_per_sm_and_microsecond=33_500,
    microseconds_per_split=0.08,
    bytes_in_flight=48 * 1024,
    tma_mib=128,
    tma_mib_partial_boxes=16,
    tma_heads=64,
    tma_blocks=64,
    tma_pairs_mib=64,
    tma_early_dims=128,
    tma_large_heads=32,
    tma_large_cluster=2,
    tma_few_heads=2,
    prefetch_mib=16,
    pdl_whole_mib=5,
    pdl_end_mib=32,
    balanced_batch=256,
    balanced_tokens=4096,
    balanced_rounds=4,
    invariant_splits=8,
)
MODELS = dict.fromkeys(ARCHES, H200)  # by architecture; those that nobody measured have the H200's
