"""Problem to kernel and launch shape: the dispatch table's analytic model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import gcd, prod

from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.schema.kinds import Math, Schedule
from gqa_cutlass.codegen.schema.launch import LaunchShape, Pdl
from gqa_cutlass.codegen.schema.problem import WIDEST, Problem
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.codegen.schema.storage import BOX_DIMS, MAX_CLUSTER, PAGE_TOKENS
from gqa_cutlass.codegen.variants import default_config, shipped
from gqa_cutlass.dispatch.choice import Choice
from gqa_cutlass.dispatch.device import Device
from gqa_cutlass.dispatch.model import MODELS
from gqa_cutlass.dispatch.splits import (
    Splits,
    choose_clusters,
    choose_splits,
    counted,
    may_balance,
    spare_splits,
)
from gqa_cutlass.errors import ConfigError, InputError

SMALLEST_COPY = 2  # elements that an asynchronous copy moves at least (cp.async: four bytes)
_WORD_BYTES = 4
_ASKED = "as asked"


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The kernel for a problem, and how it is launched.

    Args:
        config: The kernel.
        shape: Grid, block, cluster and shared memory.
        num_splits: Parts that a sequence is cut into when all are about as long.
        num_stages: K tiles (and V tiles) that a warp keeps in flight.
        prefetch_first_tile: Whether warps ask for their first tile before they know the length.
        pdl: When the next kernel may start.
        reasons: Why, one sentence per decision.

    Attributes:
        num_partials: Partial outputs per sequence in global memory: of splits, or of clusters.
        num_merge_counters: Merges in global memory, each of which counts its arrivals.
        partial_floats: Floats of workspace for the partial outputs.
    """

    config: KernelConfig
    shape: LaunchShape
    num_splits: int
    num_stages: int
    prefetch_first_tile: bool
    pdl: Pdl
    reasons: tuple[str, ...]

    num_partials: int = field(init=False)
    num_merge_counters: int = field(init=False)
    partial_floats: int = field(init=False)

    def __post_init__(self) -> None:
        x, y, z = self.shape.grid
        num_partials = y // self.shape.cluster
        merges = x * z * self.shape.cluster if num_partials > 1 else 0
        object.__setattr__(self, "num_partials", num_partials)
        object.__setattr__(self, "num_merge_counters", merges)
        floats = merges * num_partials * self.config.partial_floats
        object.__setattr__(self, "partial_floats", floats)

    @property
    def balanced(self) -> bool:
        """Whether ragged sequences get splits by their lengths, for which there are more blocks."""
        return self.shape.grid[1] > self.num_splits

    @property
    def workspace_bytes(self) -> int:
        """Bytes of partial outputs and merge counters."""
        return _WORD_BYTES * (self.partial_floats + self.num_merge_counters)


@lru_cache(maxsize=4096)
def dispatch(
    problem: Problem,
    device: Device,
    num_splits: int = 0,
    kernel: KernelConfig | Choice | None = None,
    ragged: bool = False,
    pdl: bool = False,
    longest: int | None = None,
    invariant: bool = False,
) -> Dispatch:
    """Choose a kernel and a launch shape.

    Args:
        problem: What is asked for.
        device: Where it will run.
        num_splits: Parts to cut every sequence into; 0 leaves the choice to the model.
        kernel: A kernel, or with it a launch, to use instead of the model's choice.
        ragged: Whether sequences may differ in length, by lengths that only the device knows.
        pdl: Whether the kernel may start before the kernel before it is done.
        longest: Tokens of the longest sequence, where the host knows them.
        invariant: Whether a sequence's result may depend on nothing but itself.

    Raises:
        InputError: The given kernel cannot solve the problem.
    """
    sized = problem
    if longest is not None and longest < problem.max_seq_len:
        sized = replace(problem, max_seq_len=longest)
    choice = kernel if isinstance(kernel, Choice) else None
    forced = kernel.config if isinstance(kernel, Choice) else kernel
    if forced is not None:
        _check_fits(forced, problem, device)
        config = forced
        launch = " and launch" if choice and not num_splits and not invariant else ""
        why_config = f"this kernel{launch}, {choice.why if choice else _ASKED}"
    elif invariant:
        config = _config_of(problem, Schedule.MULTISTAGE)
        why_config = "batch-invariant: the schedule that suits every batch and room"
    else:
        config, why_config = choose_config(sized, device, ragged)
    next_starts, why_pdl = Pdl.NONE, ""
    if pdl:
        pdl_config = replace(config, pdl=True)
        next_starts, why_pdl = _choose_pdl(pdl_config, sized, device)
        if next_starts:
            config = pdl_config
    if invariant and not num_splits:
        num_splits = choice.splits if choice else MODELS[device.arch.name].invariant_splits
    if num_splits:
        splits = Splits(
            cluster=gcd(num_splits, MAX_CLUSTER) if config.tma else 1,
            splits=num_splits,
            num_stages=config.num_stages,
            why=f"{counted(num_splits, 'split')}, {'the same for all' if invariant else _ASKED}",
        )
    elif choice:
        splits = Splits(
            cluster=choice.cluster,
            splits=choice.splits,
            num_stages=choice.num_stages,
            why=choice.shared,
        )
    elif config.tma:
        splits = choose_clusters(sized, config, device)
    else:
        count, why = choose_splits(sized, config, device)
        splits = Splits(cluster=1, splits=count, num_stages=config.num_stages, why=why)
    spare = 0
    if ragged and not num_splits and may_balance(problem, config):
        spare = choice.spare if choice else spare_splits(sized, config, device)
    early = choice.prefetch if choice else None
    prefetch = _may_prefetch_first_tile(sized, config, device, early, splits.splits)
    columns = problem.num_kv_heads * config.row_blocks(problem.num_tokens)
    grid = (columns, splits.splits + spare, problem.batch_size)
    shared_bytes = config.shared_bytes_with(splits.num_stages)
    if next_starts:
        shared_bytes = max(shared_bytes, _shared_bytes_alone(prod(grid), device))
    return Dispatch(
        config=config,
        shape=LaunchShape(
            grid=grid,
            block=config.num_threads,
            shared_bytes=shared_bytes,
            cluster=splits.cluster,
            pdl=next_starts is not Pdl.NONE,
        ),
        num_splits=splits.splits,
        num_stages=splits.num_stages,
        prefetch_first_tile=prefetch and not spare,
        pdl=next_starts,
        reasons=tuple(
            filter(
                None,
                (
                    why_config,
                    _windowed(problem),
                    _paged(problem),
                    _hinted(problem, sized),
                    splits.why,
                    _balanced(spare),
                    why_pdl,
                ),
            )  # fmt: skip
        ),
    )


def _balanced(spare: int) -> str:
    return f"{counted(spare, 'spare split')}, to balance ragged lengths" if spare else ""


def _windowed(problem: Problem) -> str:
    if problem.window is None:
        return ""
    return f"a window of {problem.window} of at most {problem.max_seq_len} tokens"


def _hinted(problem: Problem, sized: Problem) -> str:
    if sized.max_seq_len == problem.max_seq_len:
        return ""
    return f"sequences of at most {sized.max_seq_len} of {problem.max_seq_len} tokens, as told"


def _paged(problem: Problem) -> str:
    if problem.page_size is None:
        return ""
    size = counted(problem.page_size, "token")
    return f"pages of {size}, at most {problem.max_seq_len} of a sequence"


def _check_fits(kernel: KernelConfig, problem: Problem, device: Device) -> None:
    """Raise InputError unless a kernel can solve a problem."""
    needed = (problem.dtype, problem.head_dim, problem.value_dim, problem.group_size)
    offered = (kernel.dtype, kernel.head_dim, kernel.value_dim, kernel.group_size)
    if device.arch.name not in kernel.archs:
        raise InputError(
            f"gqa_decode: kernel: got {kernel.name} for {device.arch.name}; allowed there: kernels "
            f"for it, which this one is not: {', '.join(kernel.archs)}. Nothing was launched."
        )
    if needed != offered or problem.vec_width % kernel.vec_width:
        raise InputError(
            f"gqa_decode: kernel: got {kernel.name}; allowed: kernels for {problem.dtype}, "
            f"head_dim {_dims(problem)}, group size {problem.group_size} and an alignment of at "
            f"most {problem.vec_width} elements. Nothing was launched."
        )
    if kernel.tma and problem.page_size and problem.page_size % kernel.box_tokens:
        raise InputError(
            f"gqa_decode: kernel: got {kernel.name} for pages of {problem.page_size} tokens; "
            f"allowed: pages of multiples of {kernel.box_tokens}, or a kernel of the multistage "
            "schedule. Nothing was launched."
        )
    if kernel.policies != problem.policies:
        wanted = ", ".join(policy.feature for policy in problem.policies) or "no feature"
        raise InputError(
            f"gqa_decode: kernel: got {kernel.name}; allowed: kernels with what the call asks for: "
            f"{wanted}. Nothing was launched."
        )


def _dims(problem: Problem) -> str:
    """The dimensions of heads: one, or of keys and values."""
    values = f" and of values {problem.head_dim_v}" if problem.head_dim_v else ""
    return f"{problem.head_dim}{values}"


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
    schedule, why = _choose_schedule(problem, device, ragged)
    config = _config_of(problem, schedule)
    aligned = f"every row is aligned to {2 * problem.vec_width} bytes"
    origin = "shipped" if config in shipped() else "compiled on first use"
    if config.math is Math.SIMT:
        return config, f"simt: {aligned}, less than cp.async moves; {origin}"
    return config, f"tensorop: {aligned}; {schedule}: {why}; {origin}"


def _config_of(problem: Problem, schedule: Schedule) -> KernelConfig:
    """The default kernel of a schedule."""
    math = Math.TENSOROP if problem.vec_width >= SMALLEST_COPY else Math.SIMT
    return default_config(
        math, problem.dtype, problem.head_dim, problem.group_size, problem.vec_width, schedule,
        problem.policies, problem.head_dim_v, problem.num_tokens,
    )  # fmt: skip


def _choose_schedule(problem: Problem, device: Device, ragged: bool) -> tuple[Schedule, str]:
    """The tma schedule for few heads: if caches are large, only of sequences that are as long."""
    if problem.vec_width < WIDEST:
        return Schedule.MULTISTAGE, "the copy engine wants rows aligned to 16 bytes"
    if problem.page_size and problem.page_size % PAGE_TOKENS:
        return Schedule.MULTISTAGE, f"the copy engine wants pages of multiples of {PAGE_TOKENS}"
    for policy in problem.policies:
        if Schedule.TMA not in policy.schedules:
            return Schedule.MULTISTAGE, f"{Schedule.TMA} does not have {policy.feature}"
    try:
        tma = _config_of(problem, Schedule.TMA)
    except ConfigError:
        return Schedule.MULTISTAGE, "tiles of pages are too short for values so wide with tma"
    if device.arch.name not in tma.archs:
        return Schedule.MULTISTAGE, f"{device.arch.name} is not among {', '.join(tma.archs)}"
    model = MODELS[device.arch.name]
    box = BOX_DIMS * tma.packed
    whole_boxes = problem.head_dim % box == 0 == problem.value_dim % box
    limit = model.tma_mib if whole_boxes else model.tma_mib_partial_boxes
    mib = problem.cache_mib
    if problem.num_tokens > 1 and tma.row_blocks(problem.num_tokens) > 1:
        return Schedule.MULTISTAGE, f"several blocks for the rows of {problem.num_tokens} tokens"
    heads = problem.num_kv_heads * problem.batch_size
    alone = problem.tiles(tma.block_n) <= tma.num_warps  # one block's warps at once
    equal = problem.batch_size == 1 or not ragged
    pairs = equal and ceil_div(model.tma_blocks, heads) == 2 and mib > model.tma_pairs_mib
    if mib <= limit and heads <= model.tma_heads and not (alone or pairs):
        return Schedule.TMA, f"{_shown(mib)} MiB, at most {limit}; few heads"
    if mib > limit and whole_boxes and heads <= model.tma_large_heads and equal:
        return Schedule.TMA, f"{_shown(mib)} MiB, more than {limit}; few heads, not ragged"
    most = model.tma_heads if mib <= limit else model.tma_large_heads
    if mib > limit and not whole_boxes:
        why = f"more than {limit}, in rows of partial copies"
    elif heads > most:
        why = f"{heads} KV heads in the batch, more than {most}"
    elif mib > limit:
        why = f"more than {limit}, ragged"
    elif alone:
        why = "which the warps of one block read at once"
    else:
        why = f"of which {heads} pairs of blocks would leave multiprocessors idle"
    return Schedule.MULTISTAGE, f"{_shown(mib)} MiB at length {problem.reach}, {why}"


def _shown(mib: float) -> str:
    """A size that is small, or not: 0.0039, 0.5, 32.0."""
    return f"{mib:.1f}" if mib >= 1 else f"{mib:.2g}"


def _may_prefetch_first_tile(
    problem: Problem, config: KernelConfig, device: Device, asked: bool | None, splits: int
) -> bool:
    """Whether warps should ask for their first tile before they know the length.

    It may reach into the row that another block appends meanwhile. Asynchronous copies of rows that
    turn out to be none are of no consequence; the loads by which single elements come would race.
    """
    model = MODELS[device.arch.name]
    limit = model.tma_mib if config.tma else model.prefetch_mib
    if asked is None:
        a_tile_each = problem.tiles(config.block_n) <= splits * config.num_warps
        wide = config.tma and config.value_dim > model.tma_early_dims
        asked = problem.cache_mib <= limit and not (wide and a_tile_each)
    return (
        config.vec_width >= SMALLEST_COPY
        and asked
        and all(policy.prefetches_first_tile for policy in problem.policies)
    )


def _choose_pdl(pdl_config: KernelConfig, problem: Problem, device: Device) -> tuple[Pdl, str]:
    """When the launch after one of such a kernel may start, where it has been measured to pay."""
    if device.arch.name not in pdl_config.archs:
        return Pdl.NONE, f"ordinary launch: {device.arch.name} has no dependent ones"
    model = MODELS[device.arch.name]
    if problem.cache_mib > model.pdl_end_mib:
        return Pdl.NONE, f"ordinary launch: more than {model.pdl_end_mib} MiB"
    whole = problem.cache_mib <= model.pdl_whole_mib
    return (
        Pdl.WHOLE if whole else Pdl.END,
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
