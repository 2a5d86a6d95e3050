"""Every shipped kernel in ptxsim, with all its checks on, against the reference and every edge."""

from __future__ import annotations

import pytest
import torch
from cases import Step, make_step
from helpers import by_name

import gqa_cutlass
from gqa_cutlass.codegen import KernelConfig, shipped


def edges_of(config: KernelConfig) -> tuple[list[int], int]:
    """Lengths around every edge of tiles and rounds, all in one batch, and the cache's capacity.

    The longest sequence takes every warp through its ring of stages and once again.
    """
    tile = config.block_n
    whole = tile * config.num_warps * config.num_stages
    capacity = whole + 2 * tile + 3
    return [0, 1, tile - 2, tile - 1, tile, whole - 1, whole, capacity - 1], capacity


def run(step: Step, config: KernelConfig, splits: int) -> float:
    """Run a step with a kernel, check memory and lse, and return the error over its bound."""
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, num_splits=splits, return_lse=True,
        out=step.out, kernel=config,
    )  # fmt: skip
    out, lse = plan(*step.tensors(), step.seqlens, step.out)
    step.check_memory()
    torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)
    return step.errors(out).share


@pytest.mark.parametrize("config", by_name(shipped()))
def test_every_variant_runs_without_a_fault_and_matches_the_reference(config: KernelConfig) -> None:
    lengths, capacity = edges_of(config)
    shape = {
        "dtype": config.dtype, "head_dim": config.head_dim, "group_size": config.group_size,
        "max_seq_len": capacity, "vec_width": config.vec_width, "device": "cpu",
    }  # fmt: skip
    whole = make_step(**shape, lengths=lengths, num_kv_heads=1, layout="HND")
    assert run(whole, config, splits=1) <= 1
    split = make_step(**shape, lengths=[capacity - 1, 40], layout="padded", seed=1)
    assert run(split, config, splits=3) <= 1
    attend_only = make_step(**shape, lengths=[37], append=False, seed=2)
    assert run(attend_only, config, splits=2) <= 1
