"""Runs a launch: the blocks in batches, then the accesses to global memory compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gqa_cutlass.errors import KernelFault, PtxError
from gqa_cutlass.ptxsim import limits
from gqa_cutlass.ptxsim.machine import Context, Machine
from gqa_cutlass.ptxsim.memory.spaces import GlobalMemory, Region
from gqa_cutlass.ptxsim.order.clocks import WARP
from gqa_cutlass.ptxsim.order.ledger import GlobalLedger
from gqa_cutlass.ptxsim.order.races import Race
from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.stats import Stats

_LANES_TOGETHER = 16384  # registers of so many lanes stay in the caches
# Who of a cluster's warps touched which granule of a batch's shared memory: entries of a table of
# which there are three, 8 bytes each, that memory is taken for where something was touched.
_TOUCHES_TOGETHER = 1 << 26
_TABLES, _ENTRY_BYTES, _WARPS_PER_ENTRY = 3, 8, 64


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is looked for. Bounds, alignment and what was never written always are.

    Args:
        races: Races in shared and in global memory.
        max_steps: Instructions after which a batch of blocks is taken to hang. It is earlier, too:
            after more work than its tensors can make necessary, or when nothing changes any more
            (see `progress`).
    """

    races: bool = True
    max_steps: int = 20_000_000


def simulate(
    program: Program,
    launch: Launch,
    params: bytes,
    regions: Sequence[Region],
    checks: Checks = Checks(),  # noqa: B008 - frozen
    stats: Stats | None = None,
) -> None:
    """Run a kernel.

    Args:
        program: The kernel.
        launch: Grid, block, cluster and shared memory.
        params: The parameters, as they lie in memory.
        regions: All global memory that it may use, at the host's addresses.
        checks: What to look for.
        stats: Where to count, if at all.

    Raises:
        PtxError: The launch is not possible.
        KernelFault: The kernel did what it may not. What it wrote before is written.
    """
    _check_launch(program, launch, params)
    cluster_lanes = launch.block * launch.cluster_size
    num_bytes = sum(math.prod(r.shape) * r.itemsize for r in regions)
    context = Context(
        program=program,
        launch=launch,
        params=np.frombuffer(params.ljust(-(-len(params) // 16) * 16, b"\0"), dtype=np.uint8),
        memory=GlobalMemory(regions),
        ledger=GlobalLedger(cluster_lanes, num_bytes) if checks.races else None,
        stats=stats,
        max_steps=checks.max_steps,
        num_bytes=num_bytes,
    )
    together = _clusters_together(program, launch) * launch.cluster_size
    with np.errstate(all="ignore"):
        for first in range(0, launch.num_blocks, together):
            blocks = launch.block_ids(first, min(together, launch.num_blocks - first))
            Machine(context, blocks, first, checks.races).run()
    if context.ledger is not None:
        for race in context.ledger.races():
            raise _race_fault(context, race)


def _clusters_together(program: Program, launch: Launch) -> int:
    """How many clusters run in one batch: as many as their bookkeeping has room for."""
    lanes = launch.block * launch.cluster_size
    # The table has a row per warp of a cluster, as long as the shared memory of the batch.
    most = min(
        _LANES_TOGETHER // lanes,
        _TOUCHES_TOGETHER // max(1, _touches(program, launch)),
        limits.TOGETHER // max(1, _cluster_bytes(program, launch)),
    )
    return max(1, most)


def _touches(program: Program, launch: Launch) -> int:
    """Granules of a cluster's shared memory, times its warps."""
    lanes = launch.block * launch.cluster_size
    return program.shared_size(launch) * launch.cluster_size // program.granule * (lanes // WARP)


def _cluster_bytes(program: Program, launch: Launch) -> int:
    """What a cluster takes at most: threads, shared memory, who wrote it and who touched it."""
    lanes = launch.block * launch.cluster_size
    shared = program.shared_size(launch) * launch.cluster_size
    tables = 1 + _TABLES * -(-lanes // (WARP * _WARPS_PER_ENTRY))  # writers, and marks of warps
    return (
        lanes * program.bytes_per_thread
        + shared
        + _ENTRY_BYTES * tables * (shared // program.granule)
        + _ENTRY_BYTES * _TABLES * _touches(program, launch)
    )


def _check_launch(program: Program, launch: Launch, params: bytes) -> None:
    name = program.kernel.name
    total = program.shared_size(launch)
    for wrong, got, allowed in (
        (total > limits.SHARED or launch.shared_bytes < 0, f"{total} bytes of shared memory",
         f"0 to {limits.SHARED} bytes per block"),
        (not 0 < launch.block <= limits.THREADS or launch.block % 32, f"{launch.block} threads",
         f"multiples of 32 up to {limits.THREADS}"),
        (launch.block not in _block_sizes(program), f"{launch.block} threads",
         f"{_block_sizes(program)} threads, as the kernel was compiled for"),
        (min(launch.grid) < 1, f"grid {launch.grid}", "at least 1 block in every direction"),
        (any(n > most for n, most in zip(launch.grid, limits.GRID, strict=True)),
         f"grid {launch.grid}", f"up to {limits.GRID} blocks"),
        (min(launch.cluster) < 1, f"cluster {launch.cluster}",
         "at least 1 block in every direction"),
        (any(c > 0 and g % c for g, c in zip(launch.grid, launch.cluster, strict=True)),
         f"grid {launch.grid} of clusters {launch.cluster}", "whole clusters"),
        (launch.cluster_size > limits.CLUSTER, f"{launch.cluster_size} blocks per cluster",
         f"up to {limits.CLUSTER}"),
        (_cluster_bytes(program, launch) > limits.TOGETHER,
         f"{_cluster_bytes(program, launch)} bytes for the registers and the memory of a cluster",
         f"up to {limits.TOGETHER}"),
        (len(params) != program.param_bytes, f"{len(params)} bytes of parameters",
         f"{program.param_bytes} bytes, as the kernel declares"),
    ):  # fmt: skip
        if wrong:
            raise PtxError(f"{name}: got {got}; allowed: {allowed}. Nothing was run.")


def _block_sizes(program: Program) -> range:
    """How many threads a block may have by the kernel's own word (PTX ISA 11.4)."""
    directives = program.kernel.directives
    if "reqntid" in directives:
        exactly = math.prod(directives["reqntid"])
        return range(exactly, exactly + 1)
    return range(1, math.prod(directives.get("maxntid", (limits.THREADS,))) + 1)


def _race_fault(context: Context, race: Race) -> KernelFault:
    program, threads = context.program, context.launch.block

    def who(lane: int) -> str:
        block = tuple(int(i) for i in context.launch.block_ids(lane // threads, 1)[0])
        return f"block {block}, warp {lane % threads // 32}, lane {lane % 32}"

    other = program.code[race.other_pc].instruction
    verb = {True: "writes", False: "reads"}
    return program.fault(
        f"race in global memory: {verb[race.write]} what {who(race.other_lane)} "
        f"{verb[race.other_write]} in `{other.name}` at {other.where}, and nothing orders the two; "
        f"{context.memory.locate(race.address)}",
        who(race.lane),
        race.pc,
        race.address,
    )
