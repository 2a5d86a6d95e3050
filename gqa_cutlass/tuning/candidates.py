"""What is tried for a problem: lengths that a cache may hold, and launches. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from math import gcd, log

from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.schema.kinds import Math, Schedule
from gqa_cutlass.codegen.schema.problem import MAX_SPLITS, Problem
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.codegen.schema.storage import MAX_CLUSTER
from gqa_cutlass.codegen.variants import default_config
from gqa_cutlass.dispatch import Choice, Device, Dispatch, dispatch
from gqa_cutlass.errors import ConfigError, InputError

_APART = 8  # factor between equal lengths
_SHORTEST, _RAGGED_BATCH, _RAGGED_ROOM = 16, 4, 512
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_MOST_BLOCKS = 128  # per multiprocessor: rows that have nothing to do cost little


def lengths_of(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Tokens that sequences may hold before a step, by what they are called.

    Equal ones from all that there is room for down to a few; and unlike ones: as many of every
    length, lognormal with a standard deviation of 1 in the logarithm, and a long one among short
    ones.
    """
    batch, room = problem.batch_size, problem.max_seq_len
    most = room - problem.appended
    found: dict[str, tuple[int, ...]] = {}
    held = room
    while held >= _SHORTEST or not found:
        each = max(held - problem.appended, 0)
        found[f"{each} each"] = (each,) * batch
        held //= _APART
    if batch >= _RAGGED_BATCH and room >= _RAGGED_ROOM:
        evenly = [most * (2 * i + 1) // (2 * batch) for i in range(batch)]
        found["uniform"] = tuple(random.Random(batch).sample(evenly, batch))
        for mean in (room // 4, room // 16):
            found[f"lognormal {mean}"] = lognormal(batch, mean, 1.0, most)
        found[f"one of {most}"] = (most, *[min(63, most)] * (batch - 1))
    return found


def lognormal(batch: int, mean: float, sigma: float, most: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths drawn from a lognormal distribution, the same for equal arguments.

    Args:
        batch: How many.
        mean: Of the distribution, in tokens.
        sigma: Standard deviation of the logarithm.
        most: The longest; draws are cut there, and at 1.
        seed: Of the draw.
    """
    drawn = random.Random(f"{batch} {mean} {sigma} {seed}")
    center = log(mean) - sigma**2 / 2
    return tuple(
        min(max(round(drawn.lognormvariate(center, sigma)), 1), most) for _ in range(batch)
    )


def candidates(problem: Problem, device: Device) -> list[Choice]:
    """Launches of the kernels that dispatch may choose, its own choices among them; each once."""
    found = [chosen(dispatch(problem, device, ragged=ragged)) for ragged in (True, False)]
    found += _multistage(problem, device)
    tma = _kernel(problem, device, Schedule.TMA)
    if tma:
        found += _clusters(problem, tma, device)
    return list(
        dict.fromkeys(chosen(dispatch(problem, device, 0, each, ragged=True)) for each in found)
    )


def chosen(found: Dispatch) -> Choice:
    """What dispatch found, as a choice."""
    return Choice(
        config=replace(found.config, pdl=False), splits=found.num_splits,
        num_stages=found.num_stages, cluster=found.shape.cluster,
        spare=found.shape.grid[1] - found.num_splits, prefetch=found.prefetch_first_tile,
    )  # fmt: skip


def variants(choice: Choice, tiles: bool = True) -> list[Choice]:
    """The same launch of kernels with other tiles, and with the first tile early or not.

    Args:
        choice: What to vary.
        tiles: Whether tiles vary; kernels with other tiles are compiled on first use.
    """
    base = choice.config
    found = [] if choice.spare else [replace(choice, prefetch=not choice.prefetch)]
    if not tiles:
        return found
    sizes = ((n // 2, n, n * 2) for n in (base.block_n, base.num_warps, base.num_stages))
    for block_n, num_warps, num_stages in product(*sizes):
        smaller = max(base.block_n * base.num_warps // (block_n * num_warps), 1)
        for splits in {choice.splits, choice.splits * smaller}:  # as many blocks, or tokens of one
            with suppress(ConfigError, InputError):  # there is no such kernel
                config = replace(base, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
                other = replace(
                    choice, config=config, splits=splits,
                    cluster=gcd(splits, MAX_CLUSTER) if choice.cluster > 1 else 1,
                    num_stages=min(choice.num_stages, num_stages) if config.tma else num_stages,
                )  # fmt: skip
                found.append(other)
    return [other for other in dict.fromkeys(found) if other != choice]


def kernels_of(problem: Problem, device: Device, tiles: bool = True) -> list[KernelConfig]:
    """The kernels of candidates and of their variants, each once."""
    bases = {choice.config: choice for choice in candidates(problem, device)}
    varied = (other.config for base in bases.values() for other in variants(base, tiles))
    return list(dict.fromkeys((*bases, *varied)))


def _kernel(problem: Problem, device: Device, schedule: Schedule) -> KernelConfig | None:
    """The default kernel of a schedule, where it can solve the problem."""
    try:
        config = default_config(
            Math.TENSOROP, problem.dtype, problem.head_dim, problem.group_size, problem.vec_width,
            schedule, problem.policies, problem.head_dim_v, problem.num_tokens,
        )  # fmt: skip
        dispatch(problem, device, 1, config)
    except (ConfigError, InputError):
        return None
    return config


def _multistage(problem: Problem, device: Device) -> Iterator[Choice]:
    config = _kernel(problem, device, Schedule.MULTISTAGE)
    if config is None:
        return
    columns = _columns(problem, config)
    counts = list(_counts(problem, config, device, _MOST_BLOCKS))
    for splits in counts:
        yield Choice(config=config, splits=splits, num_stages=config.num_stages)
    if problem.batch_size < 2:
        return
    fitting = max(1, device.num_sms * config.blocks_per_sm(device.arch) // columns)
    for splits in {1, 2, fitting} & {*counts, 1}:
        for spare in (1, 3):
            yield Choice(config=config, splits=splits, num_stages=config.num_stages, spare=spare)


def _clusters(problem: Problem, config: KernelConfig, device: Device) -> Iterator[Choice]:
    for splits in _counts(problem, config, device, 8):
        largest = gcd(splits, MAX_CLUSTER)
        for cluster in {largest, min(largest, 2)}:
            for stages in {1, config.num_stages}:
                yield Choice(config=config, splits=splits, num_stages=stages, cluster=cluster)


def _counts(
    problem: Problem, config: KernelConfig, device: Device, most_per_sm: int
) -> Iterator[int]:
    """Numbers of splits: few, and what fills the multiprocessors in whole rounds."""
    columns = _columns(problem, config)
    useful = ceil_div(problem.tiles(config.block_n), config.num_warps)
    rounds = range(1, config.blocks_per_sm(device.arch) + 1)
    filling = [n * device.num_sms // columns for n in rounds]
    even = [n // 2 * 2 for n in filling]
    for splits in sorted({*_SPLITS, *filling, *even}):
        fits = columns * splits <= most_per_sm * device.num_sms and splits <= MAX_SPLITS
        if 1 <= splits <= useful and (fits or splits == 1):
            yield splits


def _columns(problem: Problem, config: KernelConfig) -> int:
    return problem.num_kv_heads * config.row_blocks(problem.num_tokens) * problem.batch_size
