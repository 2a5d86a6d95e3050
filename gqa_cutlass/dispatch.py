"""Problem to kernel and launch shape: the dispatch table's analytic model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gqa_cutlass.codegen.config import Arch, KernelConfig, Math
from gqa_cutlass.codegen.variants import default_config, shipped
from gqa_cutlass.errors import InputError
from gqa_cutlass.inputs import Problem
from gqa_cutlass.launcher import Device, LaunchShape

# A launch whose last wave of blocks is this full, relative to the best, is good enough: fewer
# splits are cheaper to merge. The rule and the figure are Flash-Decoding's.
_GOOD_ENOUGH = 0.85


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The kernel for a problem, and how it is launched.

    Args:
        config: The kernel.
        shape: Grid, block and shared memory.
        num_splits: Parts that a sequence is cut into.
        reasons: Why, one sentence per decision.
    """

    config: KernelConfig
    shape: LaunchShape
    num_splits: int
    reasons: tuple[str, ...]

    @property
    def partial_floats(self) -> int:
        """Floats of workspace for the partial outputs of all splits."""
        x, y, z = self.shape.grid
        return x * y * z * self.config.block_h * (self.config.head_dim + 2) * (y > 1)

    @property
    def num_tickets(self) -> int:
        """Counters that the split merge needs."""
        x, y, z = self.shape.grid
        return x * z * (y > 1)


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
        num_splits=splits,
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
    """As many splits as fill the GPU, and no more than give every warp a tile."""
    blocks = problem.num_kv_heads * config.head_blocks * problem.batch_size
    slots = device.num_sms * config.blocks_per_sm(device.arch)
    most = -(-problem.max_seq_len // (config.block_n * config.num_warps))
    candidates = range(1, max(1, min(most, slots // blocks or 1)) + 1)
    fullness = {splits: _fullness(blocks * splits, slots) for splits in candidates}
    best = max(fullness.values())
    splits = next(s for s in candidates if fullness[s] >= _GOOD_ENOUGH * best)
    return splits, (
        f"{splits} splits: {blocks} blocks without, room for {slots} "
        f"({device.num_sms} SMs x {slots // device.num_sms}), at most {most} with tiles to do"
    )


def _fullness(blocks: int, slots: int) -> float:
    waves = -(-blocks // slots)
    return blocks / (waves * slots)


def model_device(arch: Arch) -> Device:
    """A stand-in for a GPU that is not there: an H200's 132 multiprocessors."""
    return Device(index=-1, arch=arch, num_sms=132)
