"""Caches of 8 bits with a scale for every token and KV head, which the append computes."""

from __future__ import annotations

import pytest
import torch
from helpers import diagonal, few
from token_scales import (
    BAD,
    BF16,
    E4M3,
    F16,
    FEATURES,
    HEADS,
    NO_NUMBERS,
    ODD_SCALES,
    by_multistage,
    case,
    check_no_number,
    growing,
    is_seen_alone,
    of_values_scaled,
    seen_alone,
    unlike_sizes,
)

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.errors import CacheOverflowError, InputError
from gqa_cutlass.proof.reference import attend, scale_of_row

PROCESS = "features"  # has all tests of this folder, for they have kernels in common


@pytest.mark.sanitized
@pytest.mark.parametrize(
    ("dtype", "queries", "head_dim", "lengths"),
    diagonal(FP8, [F16, BF16], [64, 128, 40], [(37, 300), (0, 16), (511, 127)]),
)
def test_appends_compute_scales_and_attention_counts_them(
    dtype: torch.dtype, queries: torch.dtype, head_dim: int, lengths: tuple[int, ...], device: str
) -> None:
    case(device, dtype, queries, lengths=lengths, capacity=520, head_dim=head_dim).check()


@pytest.mark.parametrize("appends", [True, False], ids=["a new one", "a stored one"])
@pytest.mark.parametrize("queries", [F16, BF16], ids=str)
def test_a_single_token_is_its_value_rounded_once(
    queries: torch.dtype, appends: bool, device: str
) -> None:
    """As PyTorch's is: its probability is 1, whatever its scale."""
    made = case(device, E4M3, queries, lengths=(0, 0) if appends else (1, 1), capacity=16)
    out = made.run() if appends else made.attend_only(1)
    values = made.v_cache[:, 0].float() * made.v_scale[:, 0, :, None]
    assert torch.equal(out, values.repeat_interleave(out.shape[1] // HEADS, 1).to(queries))


@pytest.mark.parametrize("tokens", [None, (3, 3)], ids=["one", "several"])
@pytest.mark.parametrize("length", [64, 600])
def test_a_token_that_has_all_weight_is_its_value(
    length: int, tokens: tuple[int, int] | None, device: str
) -> None:
    """Though its scale is not the largest, which its probability is multiplied by and rounded."""
    made = by_multistage(seen_alone(device, length, tokens))
    assert is_seen_alone(made)


@pytest.mark.parametrize("apart", [3, 10])
def test_scores_that_are_far_apart(apart: int, device: str) -> None:
    """In pools of 64 heads, where some have a token with almost all weight."""
    made = case(device, lengths=(2, 8, 20, 33, 64, 100, 130, 200), capacity=208)
    made.q *= apart
    by_multistage(made).check()


@pytest.mark.parametrize("name", few(FEATURES, 2))
def test_features_go_with_scales_of_tokens(name: str, device: str) -> None:
    made = case(device, capacity=304)
    FEATURES[name](made)
    made.check()


def test_values_of_any_size_count(device: str) -> None:
    """Outputs are those of the largest."""
    unlike_sizes(device).check()


@pytest.mark.parametrize(("odd", "tokens"), diagonal(ODD_SCALES, [None, (3, 3)]))
def test_scales_of_values_may_be_zero_tiny_or_negative(
    odd: tuple[float, int], tokens: tuple[int, int] | None, device: str
) -> None:
    of_values_scaled(device, *odd, tokens).check()


@pytest.mark.parametrize("growth", [1.5, 1.89, 2.2])
def test_scales_of_values_may_grow(growth: float, device: str) -> None:
    """By what float16 has room for, and by more."""
    growing(device, growth).check()


@pytest.mark.parametrize("bits", NO_NUMBERS)
def test_scales_that_are_no_number_leave_none(bits: int, device: str) -> None:
    check_no_number(by_multistage(case(device, lengths=(100,), capacity=128)), bits)


def test_values_that_are_small_count_beside_larger_ones_that_are_not_seen(device: str) -> None:
    """Of ten millions in size, which no score chooses."""
    made = case(device, queries=BF16, lengths=(64,), capacity=96)
    made.q[:] = 1
    made.k_cache.view(torch.uint8)[:] = 0x38  # 1
    made.k_scale[:] = -8.0
    made.k_scale[:, 40] = 1.0
    made.v_scale[:, 3] = 1e7
    made.v_scale[:, 40] = 1e-3
    made.k[:] = -8 * 448
    made.check()


@pytest.mark.parametrize("group", few([32, 1]))
def test_groups_of_other_sizes(group: int, device: str) -> None:
    """Several blocks of heads share a KV head, and one of them appends."""
    made = case(device, lengths=(37,), capacity=64, head_dim=128)
    made.q = made.q[:, :1].expand(1, HEADS * group, 128).contiguous()
    made.check()


def test_rows_of_zeros_and_of_what_is_no_number(device: str) -> None:
    """Zeros have a scale of 1; the largest number counts beside NaN, which stays; infinity leaves
    none beside it."""
    made = case(device, lengths=(20, 20), capacity=64)
    made.k[0, 0] = 0
    made.v[0, 0], made.v[0, 1, 3] = 0, torch.nan
    made.v[1, 0, 5] = torch.inf
    out = made.run()
    assert made.k_scale[0, 20, 0] == made.v_scale[0, 20, 0] == 1
    assert not made.k_cache[0, 20, 0].float().any() and not made.v_cache[0, 20, 0].float().any()
    assert made.v_scale[0, 20, 1] == scale_of_row(made.v[0, 1], E4M3)
    assert made.v_cache[0, 20, 1].float().isnan().nonzero().tolist() == [[3]]
    assert out[0, 4:].isnan().any(0).nonzero().tolist() == [[3]]
    assert made.v_scale[1, 20, 0] == torch.inf and out[1, :4].isnan().all()
    assert not out[0, :4].isnan().any() and not out[1, 4:].isnan().any()


def test_splits_and_attending_without_a_token(device: str) -> None:
    made = case(device, lengths=(300, 301))
    right = attend(
        made.q, made.k_cache.double(), made.v_cache.double(), made.lengths, 64**-0.5, torch.float64,
        k_scale=made.k_scale, v_scale=made.v_scale,
    )[0]  # fmt: skip
    before = made.k_scale.clone()
    for splits in (1, 3):
        out = made.attend_only(splits)
        torch.testing.assert_close(out.double(), right, atol=2e-3, rtol=2e-3)
    assert torch.equal(made.k_scale.nan_to_num(), before.nan_to_num())


def test_norms_and_rotations_come_before_the_scale(device: str) -> None:
    """The largest number is that of the key as it is stored."""
    made = case(device, lengths=(20, 33), capacity=64)
    turned = case(device, lengths=(20, 33), capacity=64)
    made.options["k_norm_weight"] = torch.full((64,), 2.0, device=device)
    made.run()
    key = turned.k.float()
    key = (2 * key / (key.square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(F16)
    for b, length in enumerate(made.lengths):
        scale = made.k_scale[b, length]
        torch.testing.assert_close(scale, scale_of_row(key[b], E4M3), rtol=1e-3, atol=0)
        held = made.k_cache[b, length].float() * scale[:, None]
        torch.testing.assert_close(held, key[b].float(), rtol=0.07, atol=1e-3)
        torch.testing.assert_close(held.abs().amax(-1), 448 * scale, rtol=1e-6, atol=0)


def test_a_token_that_does_not_fit_writes_no_scale(device: str) -> None:
    made = case(device, lengths=(20, 64), capacity=64)
    before = made.k_scale[1].clone()
    made.run()
    assert torch.equal(made.k_scale[1], before) and made.k_scale[0, 20].isfinite().all()
    with pytest.raises(CacheOverflowError):
        gqa_cutlass.check_overflow(device)


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_allowed_is_refused_and_nothing_written(name: str, device: str) -> None:
    made = case(device, lengths=(20,), capacity=64)
    before = made.k_scale.clone(), made.k_cache.view(torch.uint8).clone()
    changes, message = BAD[name]
    with pytest.raises(InputError, match=message):
        gqa_decode(**made.given() | changes(made), cache_seqlens=20)
    assert torch.equal(made.k_scale.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(made.k_cache.view(torch.uint8), before[1])
