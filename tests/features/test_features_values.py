"""Caps, sinks, slopes and outputs in float32: exact at the extremes and in every type."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import make_step, snapshot
from edges import Edge
from featured import KINDS, every_schedule, kernel_of, step_of, with_feature
from helpers import check, diagonal, run, skip_unless_it_runs

import gqa_cutlass
from gqa_cutlass.codegen import DType, default_config

PROCESS = "features"  # has all tests of this folder, for they have kernels in common


@pytest.mark.parametrize(("kind", "sign"), diagonal(KINDS, [1, -1]))
def test_extreme_logits_are_capped(kind: str, sign: int, device: str) -> None:
    config = kernel_of(kind, "softcap")
    skip_unless_it_runs(config, device)
    step = Edge(lengths=(37,), capacity=64).step(config, device)
    step.softcap = 50.0
    step.q.fill_(64)
    step.k_cache.fill_(64 * sign)
    step.k.fill_(64 * sign)
    snapshot(step)
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config, softcap=50.0
    )
    out, lse = plan(*step.tensors(), step.seqlens)
    torch.testing.assert_close(
        lse, torch.full_like(lse, 50 * sign + math.log(38)), rtol=2e-6, atol=0
    )
    assert step.errors(out).share <= 1  # the mean of the values


@pytest.mark.parametrize("cap", [1e-3, 30.0, 50.0, 1e5])
def test_caps_leave_the_lse_as_exact_as_it_was(cap: float, device: str) -> None:
    """Of scores around the cap and far below it."""
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device=device)
    step.q.mul_(8)
    step.softcap = cap
    out, lse = run(step, return_lse=True)
    torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)
    assert step.errors(out).share <= 1


@every_schedule
def test_with_nothing_to_attend_to_only_the_sink_is_left(kind: str, device: str) -> None:
    config = kernel_of(kind, "sinks")
    skip_unless_it_runs(config, device)
    edge = Edge(lengths=(0,), capacity=64, splits=2, append=False)
    step = with_feature(edge.step(config, device), "sinks")
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config, num_splits=2,
        **step.features(),
    )  # fmt: skip
    out, lse = plan(*step.tensors(), step.seqlens)
    assert (out == 0).all()
    torch.testing.assert_close(lse[0], step.sinks.float(), rtol=1e-6, atol=1e-6)


@every_schedule
def test_extreme_slopes(kind: str, device: str) -> None:
    """Steep ones leave the newest token alone; one that is no number spoils its head alone."""
    config = kernel_of(kind, "alibi")
    skip_unless_it_runs(config, device)
    step = Edge(lengths=(37,), capacity=64).step(config, device)
    step.alibi_slopes = torch.tensor([1e30, 0.0, math.nan, 1e30], device=device)
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config,
        alibi_slopes=step.alibi_slopes,
    )  # fmt: skip
    out, lse = plan(*step.tensors(), step.seqlens)
    assert step.v is not None
    for head in (0, 3):
        torch.testing.assert_close(out[0, head], step.v[0, 0], rtol=1e-3, atol=1e-3)
    assert out[0, 2].isnan().all() and lse[0, 2].isnan()
    assert not out[0, [0, 1, 3]].isnan().any()


@pytest.mark.parametrize("value", [-math.inf, -1e4, 1e4, math.nan])
def test_extreme_sinks(value: float, device: str) -> None:
    step = make_step(lengths=[37, 0], max_seq_len=64, head_dim=64, append=False, device=device)
    plain, plain_lse = run(step, return_lse=True)
    step.sinks = torch.full((8,), value, device=device)
    out, lse = run(step, return_lse=True)
    if math.isnan(value):
        assert out.isnan().all() and lse.isnan().all()
    elif value > 0:
        assert (out == 0).all()
        torch.testing.assert_close(lse, torch.full_like(lse, value))
    else:
        assert torch.equal(out, plain) and torch.equal(lse[0], plain_lse[0])
        torch.testing.assert_close(lse[1], step.sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("element", DType)
def test_sinks_of_every_type_with_queries_of_every_type(
    element: DType, dtype: torch.dtype, device: str
) -> None:
    step = make_step(
        dtype=element, lengths=[37], max_seq_len=64, head_dim=64, num_kv_heads=4, device=device
    )
    step.sinks = torch.linspace(-1, 5, 16, dtype=torch.float32, device=device).to(dtype)
    out, lse = run(step, return_lse=True)
    torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)
    check(step, out)


def test_sinks_that_change_in_place_count_as_they_are(device: str) -> None:
    step = step_of("sinks", lengths=[37], max_seq_len=64, head_dim=64, append=False, device=device)
    for _ in range(2):
        check(step, run(step))
        step.sinks.add_(1)


@every_schedule
def test_outputs_in_float32_are_those_before_they_are_rounded(kind: str, device: str) -> None:
    """In one block, in splits, and of rows aligned no better than numbers must be."""
    config = kernel_of(kind, "float32")
    skip_unless_it_runs(config, device)
    for splits in (1, 2):
        step = Edge(lengths=(300, 37, 0), capacity=512).step(config, device)
        call: dict[str, Any] = {"cache_seqlens": step.seqlens, "num_splits": splits}
        exact = gqa_cutlass.plan(*step.tensors(), **call, kernel=config, out_dtype=torch.float32)
        without = default_config(
            config.math, config.dtype, 64, 4, config.vec_width, config.schedule
        )
        rounded = gqa_cutlass.plan(*step.tensors(), **call, kernel=without)
        out = exact(*step.tensors(), step.seqlens)
        assert out.dtype == torch.float32 and not torch.equal(out, out.to(step.q.dtype).float())
        assert torch.equal(out.to(step.q.dtype), rounded(*step.tensors(), step.seqlens))


def test_out_dtype_that_of_q_is_the_kernel_without() -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    plain = gqa_cutlass.explain(*step.tensors()).dispatch
    for same in (None, torch.float16):
        assert gqa_cutlass.explain(*step.tensors(), out_dtype=same).dispatch == plain


def test_rows_of_float32_are_as_wide_as_they_are_aligned() -> None:
    """An address of 4 bytes more allows accesses of 4 bytes, two elements of the cache."""
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    memory = torch.empty(1 + 8 * 68)
    for first, stride, width in ((0, 64, 8), (0, 68, 8), (0, 66, 4), (0, 65, 2), (1, 64, 2)):
        out = memory.as_strided((1, 8, 64), (0, stride, 1), first)
        problem = gqa_cutlass.explain(*step.tensors(), out=out, out_dtype=torch.float32).problem
        assert problem.vec_width == width


@pytest.mark.parametrize("stride", [66, 65])
def test_outputs_in_float32_of_narrow_rows(stride: int, device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device=device)
    memory = torch.full((8 * stride,), math.nan, device=device)
    out = memory.as_strided((1, 8, 64), (8 * stride, stride, 1))
    step.out_dtype = torch.float32
    run(step, out=out)
    check(step, out)
    assert memory.view(8, stride)[:, 64:].isnan().all()
