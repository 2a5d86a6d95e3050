"""What dispatch weighed: the figures behind a choice, and what it would have taken instead."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.schema.kinds import Math, Schedule
from gqa_cutlass.codegen.schema.problem import WIDEST, Problem
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.codegen.schema.storage import BOX_DIMS
from gqa_cutlass.codegen.variants import default_config
from gqa_cutlass.dispatch.device import Device
from gqa_cutlass.dispatch.launch import Dispatch, dispatch
from gqa_cutlass.dispatch.model import MODELS
from gqa_cutlass.dispatch.splits import most_splits, read_terms
from gqa_cutlass.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class Term:
    """One figure that a choice rests on.

    Args:
        name: Of what.
        value: The figure.
        unit: What it is in; "" for a count.
        limit: Up to which it speaks for the choice; None: it is no limit.
    """

    name: str
    value: float
    unit: str = ""
    limit: float | None = None

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        most = "" if self.limit is None else f" of at most {self.limit:g}"
        return f"{self.name} {self.value:.4g}{most}{unit}"


def terms(problem: Problem, device: Device, chosen: Dispatch) -> tuple[Term, ...]:
    """The model's terms for a kernel and its launch.

    Of the multistage schedule they are those of its cost, without launch latency; of tma the
    measured limits up to which it is taken.

    Args:
        problem: What was asked for.
        device: Where it runs.
        chosen: The kernel and its launch.
    """
    config, model = chosen.config, MODELS[device.arch.name]
    heads = problem.num_kv_heads * problem.batch_size
    tiles = problem.tiles(config.block_n)
    if config.tma:
        partial = problem.head_dim % BOX_DIMS or problem.value_dim % BOX_DIMS
        limit = model.tma_mib_partial_boxes if partial else model.tma_mib
        small = problem.cache_mib <= limit
        return (
            Term(
                name="caches", value=problem.cache_mib, unit="MiB", limit=limit if small else None
            ),
            Term(
                name="KV heads of the batch",
                value=heads,
                limit=model.tma_heads if small else model.tma_large_heads,
            ),
            Term(
                name="tiles per warp",
                value=ceil_div(tiles, chosen.num_splits * config.num_warps),
            ),
        )
    cost = read_terms(
        heads * config.row_blocks(problem.num_tokens), tiles, chosen.num_splits, config, device
    )
    return (
        Term(name="modelled", value=cost.micros, unit="us"),
        Term(name="reading at full rate", value=cost.ideal, unit="us"),
        Term(name="warps busy", value=100 * cost.busy_warps, unit="%"),
        Term(name="multiprocessors busy", value=100 * cost.busy_sms, unit="%"),
        Term(name="bytes in flight", value=100 * cost.fed, unit="%"),
        Term(name="merging", value=cost.merging, unit="us"),
    )


def runner_up(
    problem: Problem, device: Device, chosen: Dispatch, *, ragged: bool = False
) -> Dispatch | None:
    """What would have been next: the other schedule's kernel, or else another number of splits.

    Args:
        problem: What was asked for.
        device: Where it runs.
        chosen: What dispatch took.
        ragged: As for `dispatch`.

    Returns:
        None where there is nothing else to take.
    """
    config = chosen.config
    if config.math is Math.TENSOROP and config.vec_width == WIDEST:
        other = Schedule.MULTISTAGE if config.tma else Schedule.TMA
        if all(other in policy.schedules for policy in config.policies):
            try:
                kernel = default_config(
                    config.math, config.dtype, config.head_dim, config.group_size, WIDEST, other,
                    config.policies, config.head_dim_v,
                )  # fmt: skip
                return dispatch(problem, device, kernel=kernel, ragged=ragged)
            except (ConfigError, InputError):  # there is none, here or for such pages
                pass
    return _other_splits(problem, device, chosen, ragged)


def _other_splits(
    problem: Problem, device: Device, chosen: Dispatch, ragged: bool
) -> Dispatch | None:
    """The same kernel with the next best number of splits."""
    config = replace(chosen.config, pdl=False)
    if config.tma:
        return None
    costs = {
        splits: _cost(problem, config, device, splits)
        for splits in range(1, most_splits(problem, config, device) + 1)
        if splits != chosen.num_splits
    }
    if not costs:
        return None
    splits = min(costs, key=lambda s: (costs[s], s))
    return dispatch(problem, device, splits, kernel=config, ragged=ragged)


def _cost(problem: Problem, config: KernelConfig, device: Device, splits: int) -> float:
    blocks = problem.num_kv_heads * config.row_blocks(problem.num_tokens) * problem.batch_size
    return read_terms(blocks, problem.tiles(config.block_n), splits, config, device).micros
