"""How new tokens are rounded to 8 bits: as torch rounds the quotient, whatever the scale."""

from __future__ import annotations

import math

import pytest
import torch
from cases import TORCH_DTYPE
from helpers import diagonal, skip_unless_it_runs
from torch import Tensor

import gqa_cutlass
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.proof.reference import same_bits, stored

PROCESS = "features"  # has all tests of this folder, for they have kernels in common

E4M3, _ = FP8
SCALES = (
    1.0, 0.5, 0.3, 0.02, 7e-4, 123.456, 2.0**-64, 2.0**64, 5.3e-20, 1.9e19, 1e-24, 3e24, 1e-30,
    1e30, 2.0**-120, 2.0**120, -0.3, -1.0,
)  # fmt: skip


def _halfway(dtype: torch.dtype) -> Tensor:
    """All numbers, what lies between neighbours, and what lies beyond the last."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    ordered = codes[codes.isfinite()].unique()
    between = (ordered[1:] + ordered[:-1]) / 2
    most = torch.finfo(dtype).max
    beyond = torch.tensor([most * 1.03125, most * 1.0625, most * 1.1, math.inf, math.nan, 0.0])
    return torch.cat([ordered, between, beyond, -beyond])


@pytest.mark.parametrize(
    ("dtype", "queries", "kind", "scale"),
    diagonal(FP8, DType, ["multistage", "tma"], [1.0, 0.3, 1e-3]),
)
def test_new_tokens_are_rounded_as_torch_rounds_their_quotient(
    dtype: torch.dtype, queries: DType, kind: str, scale: float, device: str
) -> None:
    """To the nearest, ties to even, and to the last what is beyond it; NaN stays NaN."""
    values = (_halfway(dtype) * scale).to(TORCH_DTYPE[queries])
    _check(dtype, kind, queries, _rows(values).unsqueeze(1), scale, device)


@pytest.mark.parametrize(("dtype", "kind"), diagonal(FP8, ["multistage", "tma"]))
def test_scales_may_be_of_any_size(dtype: torch.dtype, kind: str, device: str) -> None:
    """Those of heads, on the device, where the quotient is at the ends of float32 or beyond."""
    scales = torch.tensor(SCALES)
    values = (_halfway(dtype) * scales[:, None]).bfloat16()
    rows = torch.stack([_rows(each) for each in values], 1)
    _check(dtype, kind, DType.BF16, rows, scales.to(device), device)


@pytest.mark.parametrize(("math_", "row"), diagonal(Math, [(8, 48), (4, 64), (4, 40), (2, 32)]))
def test_lanes_without_a_part_of_a_row_quantise_with_the_others(
    math_: Math, row: tuple[int, int], device: str
) -> None:
    """As both rows of a token are quantised at once."""
    width, head_dim = row
    config = default_config(math_, DType.F16, head_dim, 4, width, policies=(FP8[E4M3],))
    skip_unless_it_runs(config, device)
    generator = torch.Generator().manual_seed(head_dim)
    k, v = torch.randn(2, 1, 2, head_dim, generator=generator).half().to(device)
    caches = [torch.zeros(1, 16, 2, head_dim, dtype=E4M3, device=device) for _ in "kv"]
    q = torch.zeros(1, 8, head_dim, dtype=k.dtype, device=device)
    scales = {"k_scale": 0.3, "v_scale": 0.02}
    made = gqa_cutlass.plan(q, *caches, k, v, cache_seqlens=7, kernel=config, **scales)
    made(q, *caches, k, v, 7)
    for cache, token, scale in zip(caches, (k, v), scales.values(), strict=True):
        assert same_bits(cache[:, 7], stored(token, scale, E4M3))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])  # ptxsim would take hours
@pytest.mark.parametrize("queries", DType)
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_every_number_of_16_bits_is_rounded_as_torch_rounds_it(
    dtype: torch.dtype, queries: DType, device: str
) -> None:
    """Divided by scales at random, which have all bits of float32."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(TORCH_DTYPE[queries])
    random = torch.Generator().manual_seed(3)
    for power in (-40, -9, -3, 0, 30):
        scales = torch.rand(64, generator=random).add(1) * 2.0**power
        rows = numbers.view(-1, 1, 64).expand(-1, 64, -1)
        _check(dtype, "multistage", queries, rows, scales.to(device), device)


def _rows(values: Tensor) -> Tensor:
    """Numbers in rows of 64, the last of them filled with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 64)


def _check(
    dtype: torch.dtype,
    kind: str,
    queries: DType,
    rows: Tensor,
    scale: float | Tensor,
    device: str,
) -> None:
    """Append rows, [sequences, heads, 64], as keys, and what they are negated as values.

    Args:
        dtype: Of the caches.
        kind: Schedule.
        queries: Type of queries, and of the rows.
        rows: What is appended.
        scale: For keys and values: a number, or a tensor with one per head.
        device: Where.
    """
    schedule = Schedule.TMA if kind == "tma" else Schedule.MULTISTAGE
    config: KernelConfig = default_config(Math.TENSOROP, queries, 64, 4, 8, schedule, (FP8[dtype],))
    skip_unless_it_runs(config, device)
    count, heads, _ = rows.shape
    k = rows.to(device).contiguous()
    cache = torch.zeros(count, 16, heads, 64, dtype=dtype, device=device)
    caches = cache, cache.clone()
    q = torch.zeros(count, 4 * heads, 64, dtype=k.dtype, device=device)
    made = gqa_cutlass.plan(
        q, *caches, k, -k, cache_seqlens=7, k_scale=scale, v_scale=scale, kernel=config
    )
    made(q, *caches, k, -k, 7)
    divisor = torch.as_tensor(scale, device=device).reshape(-1, 1)
    for held, token in zip(caches, (k, -k), strict=True):
        expected = stored(token, divisor, dtype)
        nan = expected.float().isnan()
        bits, wanted = held[:, 7].view(torch.uint8), expected.view(torch.uint8)
        assert torch.equal(held[:, 7].float().isnan(), nan)
        assert torch.equal(bits[~nan], wanted[~nan])
        assert not held[:, :7].view(torch.uint8).any() and not held[:, 8:].view(torch.uint8).any()
