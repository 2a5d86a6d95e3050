"""What ships, in ptxsim with all its checks on, against the reference and at every edge."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import pytest
import torch
from edges import Edge, edges_of
from helpers import THOROUGH, by_name, diagonal, lengths_of, plan_of, sampled, share_of_bound

import gqa_cutlass
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config, shipped
from gqa_cutlass.errors import CacheOverflowError

TMA = [
    default_config(Math.TENSOROP, dtype, head_dim, group_size, 8, Schedule.TMA)
    for head_dim, group_size, dtype in (
        (128, 4, DType.F16),
        (96, 8, DType.BF16),
        (64, 32, DType.F16),
        (256, 16, DType.BF16),
    )
]
# Smaller and larger dims than are shipped: with 40, the last two blocks of a cluster own no full
# share and nothing.
NOT_SHIPPED = [
    default_config(Math.TENSOROP, DType.F16, head_dim, group_size, 8, Schedule.TMA)
    for head_dim, group_size in ((32, 3), (40, 9), (72, 1), (136, 5), (248, 2))
]


def one_type_of_each() -> list[KernelConfig]:
    """Every kernel that ships in float16 or in bfloat16, by turns: the GPU suite runs both."""
    shapes = dict.fromkeys(replace(config, dtype=DType.F16) for config in shipped())
    return [replace(shape, dtype=dtype) for shape, dtype in zip(shapes, cycle(DType))]


def kind_of(config: KernelConfig) -> object:
    """What rows a kernel reads, and how; features and groups have tests of their own.

    Of aligned rows CI takes, on each schedule, every remainder of 32.
    """
    size = config.head_dim % 32
    return config.math, config.vec_width, config.tma, size if config.vec_width == 8 else None


@pytest.mark.parametrize("config", sampled((*one_type_of_each(), *NOT_SHIPPED), kind_of))
def test_every_variant_runs_without_a_fault_and_matches_the_reference(config: KernelConfig) -> None:
    for name, edge in edges_of(config).items():
        assert share_of_bound(edge, config, "cpu") <= 1, name


def shapes_of(config: KernelConfig) -> list[Any]:
    """Every way to cut a sequence, with every number of stages, as test parameters."""
    tile, block = config.block_n, config.block_n * config.num_warps
    cuts = {  # splits; lengths around the edges that they make
        "alone": (1, (0, 1, 15, 16, 17, tile, block - 1, block, block + 1)),
        "alone, walking": (1, (2 * block + 1, 3 * block + 5)),
        "cluster of 2": (2, (block, block + 1, 2 * block, 5)),
        "cluster of 2, walking": (2, (2 * block + 1, 4 * block)),
        "cluster of 4": (4, (2 * block + 1, 3 * block, 0)),
        "cluster of 8": (8, (4 * block + 1, 3 * block, block + 1, 17)),
        "3 clusters of 1": (3, (2 * block + 1, block + 1, 1)),
        "2 of 3 clusters of 2": (6, (3 * block + 1, block)),
    }
    stages = range(1, config.num_stages + 1)
    return [
        pytest.param(
            config,
            Edge(lengths=lengths, capacity=max(lengths) + 1, splits=splits, stages=count),
            id=f"{config.name}-{name}-{count} stages",
        )
        for (name, (splits, lengths)), count in product(cuts.items(), stages)
    ]


@pytest.mark.parametrize(
    ("config", "edge"),
    [
        pytest.param(*p.values, id=p.id, marks=THOROUGH if i % 12 else ())
        for config in TMA
        for i, p in enumerate(shapes_of(config), TMA.index(config))
    ],
)
def test_every_way_to_cut_a_sequence_gives_the_answer(config: KernelConfig, edge: Edge) -> None:
    assert share_of_bound(edge, config, "cpu") <= 1


def test_two_clusters_of_eight_meet() -> None:
    (config, *_) = TMA
    block = config.block_n * config.num_warps
    edge = Edge(lengths=(15 * block + 1,), capacity=15 * block + 2, splits=16, stages=1)
    assert share_of_bound(edge, config, "cpu") <= 1


@pytest.mark.parametrize(("config", "splits", "append"), diagonal(TMA, [1, 4, 6], [True, False]))
def test_lengths_up_to_the_end_of_the_cache_and_of_a_tile(
    config: KernelConfig, splits: int, append: bool
) -> None:
    block = config.block_n * config.num_warps
    for capacity in (block, block + config.block_n, 2 * block + 1):
        last = capacity - append
        edge = Edge(
            lengths=(last, last - 1), capacity=capacity, splits=splits, stages=1, append=append,
            layout="HND",
        )  # fmt: skip
        assert share_of_bound(edge, config, "cpu") <= 1


@pytest.mark.parametrize(
    ("config", "splits", "beyond"),
    [
        *diagonal(TMA[:1], (1, 4, 3), (0, 1, 2**30)),
        *(pytest.param(config, 4, 0, id=f"{config.name}-4-0") for config in TMA[1:]),
    ],
)  # fmt: skip
def test_a_length_that_is_not_allowed_or_inactive_concerns_its_sequence_only(
    config: KernelConfig, splits: int, beyond: int
) -> None:
    edge = Edge(lengths=(150, 5, 60), capacity=151, splits=splits)
    step = edge.step(config, "cpu")
    expected, expected_lse = step.reference()
    for bad in (edge.capacity + beyond, -1 - beyond):
        step.seqlens[1] = bad
        out, lse = plan_of(edge, config, step)(*step.tensors(), step.seqlens, step.out)
        if bad < 0:  # the row is inactive
            gqa_cutlass.check_overflow("cpu")
            assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
        else:
            with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\]"):
                gqa_cutlass.check_overflow("cpu")
            assert out[1].isnan().all() and lse[1].isnan().all()
        step.check_memory(rejected=(1,))
        for b in (0, 2):
            torch.testing.assert_close(lse[b].double(), expected_lse[b], atol=2e-5, rtol=2e-6)
            assert (out[b].double() - expected[b]).abs().max() < 0.05
        step.k_cache.copy_(step.before["k_cache"])
        step.v_cache.copy_(step.before["v_cache"])


@pytest.mark.parametrize("config", by_name(TMA))
def test_strides_that_lead_nowhere_do_not_matter(config: KernelConfig) -> None:
    edge = Edge(lengths=(200,), capacity=201, splits=2, by_value=True)
    step = edge.step(config, "cpu")
    for name in ("k_cache", "v_cache"):
        cache = getattr(step, name)
        odd = cache.stride(0) + 5, cache.stride(1), 3, 1
        setattr(step, name, cache.as_strided(cache.shape, odd, cache.storage_offset()))
    out, _ = plan_of(edge, config, step)(*step.tensors(), lengths_of(edge, step), step.out)
    step.check_memory()
    assert step.errors(out).share <= 1
