"""Problem to kernel and launch shape: the dispatch table's analytic model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gqa_cutlass.codegen.config import Arch, KernelConfig, Math, ceil_div
from gqa_cutlass.codegen.variants import default_config, shipped
from gqa_cutlass.errors import InputError
from gqa_cutlass.inputs import Problem
from gqa_cutlass.launcher import Device, LaunchShape

# The cost model's figures, measured on an H200. A split costs its merge; a multiprocessor draws its
# share of the bandwidth only with so many bytes under way (1x131072 of 8 heads took 143 us with
# half as many and 124 us with these and with more).
_BYTES_PER_SM_AND_MICROSECOND = 33_500
_MICROSECONDS_PER_SPLIT = 0.08
_BYTES_IN_FLIGHT = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The kernel for a problem, and how it is launched.

    Args:
        config: The kernel.
        shape: Grid, block and shared memory.
        reasons: Why, one sentence per decision.
    """

    config: KernelConfig
    shape: LaunchShape
    reasons: tuple[str, ...]

    @property
    def num_splits(self) -> int:
        """Parts that a sequence is cut into."""
        return self.shape.grid[1]

    @property
    def partial_floats(self) -> int:
        """Floats of workspace for the partial outputs of all splits."""
        per_block = self.config.block_h * (self.config.head_dim + 2)
        return self.num_tickets * self.num_splits * per_block

    @property
    def num_tickets(self) -> int:
        """Counters that the split merge needs; none without splits."""
        x, _, z = self.shape.grid
        return x * z if self.num_splits > 1 else 0


@lru_cache(maxsize=4096)
def dispatch(
    problem: Problem, device: Device, num_splits: int = 0, kernel: KernelConfig | None = None
) -> Dispatch:
    """Choose a kernel and a launch shape.

    Args:
        problem: What is asked for.
        device: Where it will run.
        num_splits: Parts to cut every sequence into; 0 leaves the choice to the model.
        kernel: A kernel to use instead of the model's choice.

    Raises:
        InputError: The given kernel cannot solve the problem.
    """
    if kernel is None:
        config, why_config = choose_config(problem)
    else:
        _check_fits(kernel, problem)
        config, why_config = kernel, "this kernel, as asked"
    if num_splits:
        splits, why_splits = num_splits, f"{num_splits} splits, as asked"
    else:
        splits, why_splits = choose_splits(problem, config, device)
    grid = (problem.num_kv_heads * config.head_blocks, splits, problem.batch_size)
    return Dispatch(
        config=config,
        shape=LaunchShape(grid=grid, block=config.num_threads, shared_bytes=config.shared_bytes),
        reasons=(why_config, why_splits),
    )


def _check_fits(kernel: KernelConfig, problem: Problem) -> None:
    """Raise InputError unless a kernel can solve a problem."""
    needed = (problem.dtype, problem.head_dim, problem.group_size)
    offered = (kernel.dtype, kernel.head_dim, kernel.group_size)
    if needed != offered or problem.vec_width % kernel.vec_width:
        raise InputError(
            f"gqa_decode: kernel: got {kernel.name}; allowed: kernels for {problem.dtype}, "
            f"head_dim {problem.head_dim}, group size {problem.group_size} and an alignment of at "
            f"most {problem.vec_width} elements. Nothing was launched."
        )


def choose_config(problem: Problem) -> tuple[KernelConfig, str]:
    """The kernel for a problem: tensor cores wherever cp.async can move what was passed."""
    math = Math.TENSOROP if problem.vec_width >= 2 else Math.SIMT
    config = default_config(
        math, problem.dtype, problem.head_dim, problem.group_size, problem.vec_width
    )
    aligned = f"every row is aligned to {2 * problem.vec_width} bytes"
    origin = "shipped" if config in shipped() else "compiled on first use"
    if math is Math.SIMT:
        return config, f"simt: {aligned}, less than cp.async moves; {origin}"
    return config, f"tensorop: {aligned}; {origin}"


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
    ideal = blocks * tiles * config.tile_bytes / (device.num_sms * _BYTES_PER_SM_AND_MICROSECOND)
    busy_warps = _share_used(tiles, config.num_warps * splits)
    busy_sms = _share_used(blocks * splits, device.num_sms)
    resident = min(ceil_div(blocks * splits, device.num_sms), config.blocks_per_sm(device.arch))
    fed = min(1.0, resident * config.bytes_in_flight / _BYTES_IN_FLIGHT)
    return ideal / (busy_warps * busy_sms * fed) + _MICROSECONDS_PER_SPLIT * (splits - 1)


def _share_used(work: int, workers: int) -> float:
    """Share of the workers' time used when equal pieces of work are dealt out in rounds."""
    return work / (ceil_div(work, workers) * workers)


def model_device(arch: Arch) -> Device:
    """A stand-in for a GPU that is not there: an H200's 132 multiprocessors."""
    return Device(index=-1, arch=arch, num_sms=132)
