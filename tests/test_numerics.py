"""Hard numbers, in ptxsim and on a GPU: extreme logits, limits of the types, signed zeros."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from cases import TORCH_DTYPE, Step, make_step, snapshot
from helpers import on_devices, skip_unless_it_runs

import gqa_cutlass
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config

SHAPES = (
    (Math.TENSOROP, 128, 8, Schedule.MULTISTAGE),
    (Math.TENSOROP, 80, 8, Schedule.MULTISTAGE),
    (Math.SIMT, 128, 2, Schedule.MULTISTAGE),
    (Math.TENSOROP, 80, 8, Schedule.TMA),
    (Math.TENSOROP, 128, 8, Schedule.TMA),
)
KERNELS = {
    (shape, dtype): default_config(math, dtype, head_dim, 4, width, schedule)
    for shape in SHAPES
    for math, head_dim, width, schedule in (shape,)
    for dtype in DType
}
# In ptxsim one of each math and schedule, and each type.
BY_TURNS = [KERNELS[turn] for turn in zip((SHAPES[0], SHAPES[3], SHAPES[2]), cycle(DType))]
LENGTHS = [150, 0, 15, 299]
every_kernel = pytest.mark.parametrize(("device", "config"), on_devices(BY_TURNS, KERNELS.values()))


def step_for(
    config: KernelConfig, device: str, lengths: list[int] = LENGTHS, kv_heads: int = 1
) -> Step:
    skip_unless_it_runs(config, device)
    return make_step(
        dtype=config.dtype,
        head_dim=config.head_dim,
        group_size=config.group_size,
        lengths=lengths,
        max_seq_len=300,
        num_kv_heads=kv_heads,
        device=device,
    )


def run(step: Step, config: KernelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    snapshot(step)
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config, num_splits=2
    )
    out, lse = plan(*step.tensors(), step.seqlens)
    step.check_memory()
    return out, lse


def rounding(config: KernelConfig) -> float:
    """Relative spacing of the type: twice the error of rounding once."""
    return torch.finfo(TORCH_DTYPE[config.dtype]).eps


@every_kernel
@pytest.mark.parametrize("sign", [1, -1], ids=["huge", "hugely-negative"])
def test_equal_extreme_logits_average_the_values(
    config: KernelConfig, sign: int, device: str
) -> None:
    step = step_for(config, device)
    step.q.fill_(64)
    step.k_cache.fill_(64 * sign)
    step.k.fill_(64 * sign)
    out, lse = run(step, config)
    expected, expected_lse = step.reference()
    assert (out.double() - expected).abs().max() <= 2 * rounding(config) * expected.abs().max()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)


@every_kernel
def test_one_dominating_key_returns_its_value(config: KernelConfig, device: str) -> None:
    step = step_for(config, device, [299])
    step.q.fill_(8)
    step.k_cache.fill_(-8)
    step.k.fill_(-8)
    step.k_cache[:, 200] = 8
    out, _ = run(step, config)
    expected = step.v_cache[:, 200].repeat_interleave(config.group_size, dim=1)
    assert torch.equal(out, expected)


@every_kernel
def test_dominating_keys_that_rise_token_by_token(config: KernelConfig, device: str) -> None:
    step = step_for(config, device, [299])
    step.q.fill_(1)
    ramp = torch.linspace(-8, 8, 300, device=device).to(step.q.dtype)
    step.k_cache.copy_(ramp[None, :, None, None].expand_as(step.k_cache))
    step.k.fill_(8)
    out, _ = run(step, config)
    assert step.errors(out).share <= 1


@pytest.mark.sanitized
@every_kernel
def test_all_logits_equal_gives_the_mean(config: KernelConfig, device: str) -> None:
    step = step_for(config, device)
    step.q.zero_()
    out, lse = run(step, config)
    expected, expected_lse = step.reference()
    assert (out.double() - expected).abs().max() <= 2 * rounding(config) * expected.abs().max()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@every_kernel
def test_values_at_the_fp16_limit_stay_finite(config: KernelConfig, device: str) -> None:
    step = step_for(config, device)
    limit = torch.finfo(torch.float16).max
    step.v_cache.fill_(limit)
    step.v.fill_(limit)
    out, _ = run(step, config)
    expected = torch.full_like(out, limit)
    assert (out.double() - expected.double()).abs().max() <= rounding(config) * limit


@every_kernel
def test_keys_and_queries_at_the_fp16_limit(config: KernelConfig, device: str) -> None:
    step = step_for(config, device)
    limit = torch.finfo(torch.float16).max
    step.q.fill_(limit)
    step.k_cache.copy_(torch.where(step.k_cache > 0, limit, -limit))
    step.k.fill_(limit)  # the largest score of all: its value is the output
    out, _ = run(step, config)
    assert torch.equal(out, step.v.repeat_interleave(config.group_size, dim=1))


@every_kernel
def test_appended_bits_survive(config: KernelConfig, device: str) -> None:
    step = step_for(config, device)
    odd = torch.tensor(
        [-0.0, 0.0, 6e-8, -6e-8, 1e-40, float("inf"), float("-inf"), 65504.0],
        device=device,
        dtype=torch.float32,
    ).to(step.q.dtype)
    step.k.copy_(odd.repeat(config.head_dim // 8).expand_as(step.k))
    step.v.copy_(odd.flip(0).repeat(config.head_dim // 8).expand_as(step.v))
    run(step, config)  # check_memory compares bits


@every_kernel
def test_denormal_inputs_count(config: KernelConfig, device: str) -> None:
    step = step_for(config, device)
    tiny = torch.finfo(torch.float16).smallest_normal / 4
    step.q.zero_()
    step.v_cache.fill_(tiny)
    step.v.fill_(tiny)
    out, _ = run(step, config)
    assert torch.equal(out, torch.full_like(out, tiny))


@every_kernel
def test_nan_in_one_sequence_stays_there(config: KernelConfig, device: str) -> None:
    step = step_for(config, device, [100, 100], kv_heads=2)
    step.k_cache[0, 50, 0, 0] = float("nan")
    out, _ = run(step, config)
    assert out[0, : config.group_size].isnan().all()
    assert not out[0, config.group_size :].isnan().any() and not out[1].isnan().any()


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 1e-3])
def test_softmax_scale(scale: float, device: str) -> None:
    step = make_step(lengths=[70, 200], max_seq_len=256, device=device)
    step.scale = scale
    out = gqa_cutlass.gqa_decode(*step.tensors(), cache_seqlens=step.seqlens, softmax_scale=scale)
    assert step.errors(out).share <= 1
