"""The rule for errors, on the kernels' arithmetic for thousands of heads: chance, or the kernel?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gqa_cutlass import gqa_decode
from gqa_cutlass.proof.reference import MIN_HEADS, Errors, errors, pooled

F16, BF16 = torch.float16, torch.bfloat16


def random_heads(count: int, tokens: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, [count, dim], and k and v, [count, tokens, dim]: as many problems of one head."""
    generator = torch.Generator().manual_seed(1)
    shapes = (count, dim), (count, tokens, dim), (count, tokens, dim)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nd,ntd->nt", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.einsum("nt,ntd->nd", torch.softmax(scores, -1), v.double())


def in_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every step in the input type, as `reference.attend` does it, to the bit."""
    scores = torch.bmm(q[:, None], k.transpose(1, 2)) * q.shape[-1] ** -0.5
    return torch.bmm(torch.softmax(scores, -1), v)[:, 0]


def as_a_kernel(q: Tensor, k: Tensor, v: Tensor, tile: int = 32) -> Tensor:
    """In tiles, each with a maximum of its own; P is rounded to the input type, all else fp32."""
    scale = torch.tensor(q.shape[-1] ** -0.5 * math.log2(math.e), dtype=torch.float32)
    scores = torch.einsum("nd,ntd->nt", q.double(), k.double()).float() * scale
    total = torch.zeros(len(q), 1)
    out = torch.zeros(q.shape)
    for s, values in zip(scores.split(tile, 1), v.split(tile, 1), strict=True):
        p = torch.exp2(s - s.amax(1, keepdim=True))
        weight = torch.exp2(s.amax(1, keepdim=True) - scores.amax(1, keepdim=True))
        o = torch.einsum("nt,ntd->nd", p.to(q.dtype).double(), values.double()).float()
        out, total = out + weight * o, total + weight * p.sum(1, keepdim=True)
    return (out * (1 / total)).to(q.dtype)


def each_head(count: int, tokens: int, dim: int, dtype: torch.dtype) -> list[Errors]:
    q, k, v = random_heads(count, tokens, dim, dtype)
    outs = as_a_kernel(q, k, v), exact(q, k, v), in_torch(q, k, v)
    return [errors(*head) for head in zip(*(out.split(1) for out in outs), strict=True)]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
def test_the_arithmetic_is_that_of_a_kernel(dtype: torch.dtype) -> None:
    q, k, v = random_heads(64, 10, 64, dtype)
    out = gqa_decode(q[:, None], k[:, :, None], v[:, :, None], cache_seqlens=10)
    assert isinstance(out, Tensor)
    assert (out[:, 0] == as_a_kernel(q, k, v)).double().mean() > 0.995


@pytest.mark.parametrize(
    ("dim", "tokens", "dtype"),
    [(128, 10, F16), (40, 36, F16), (64, 2, F16), (32, 3, BF16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_kernels_errors_keep_the_rule_over_16_heads(
    dim: int, tokens: int, dtype: torch.dtype
) -> None:
    """And with room: they are smaller than PyTorch's, and their ratio gathers about its mean."""
    heads = each_head(3200, tokens, dim, dtype)
    deviations = []
    for size in (1, MIN_HEADS):
        pools = [pooled(heads[i : i + size]) for i in range(0, len(heads), size)]
        assert all(pool.heads == size for pool in pools)
        ratios = torch.tensor([pool.mean / pool.mean_torch for pool in pools])
        deviations.append(ratios.std().item())
    assert max(pool.share for pool in pools) <= 1
    assert pooled(heads).mean < 0.85 * pooled(heads).mean_torch
    assert deviations[1] == pytest.approx(deviations[0] / math.sqrt(MIN_HEADS), rel=0.2)


def test_a_single_head_breaks_the_rule_by_chance() -> None:
    """Which is why the rule is not for one: a kernel that is right would fail."""
    heads = each_head(3200, 3, 32, BF16)
    assert 0 < sum(head.share > 1 for head in heads) < 200


def test_a_kernel_that_is_wrong_breaks_the_rule_over_16_heads() -> None:
    """One that works in bfloat16 on float16."""
    q, k, v = random_heads(MIN_HEADS, 10, 128, F16)
    coarse = as_a_kernel(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(F16)
    assert errors(coarse, exact(q, k, v), in_torch(q, k, v)).share > 1


def test_pools_are_as_one_problem_with_all_the_heads() -> None:
    q, k, v = random_heads(30, 10, 64, F16)
    outs = as_a_kernel(q, k, v), exact(q, k, v), in_torch(q, k, v)
    parts = [errors(*(out[cut] for out in outs)) for cut in (slice(0, 7), slice(7, 30))]
    assert [part.heads for part in parts] == [7, 23]
    whole, pool = errors(*outs), pooled(parts)
    assert (pool.heads, pool.max, pool.max_torch) == (30, whole.max, whole.max_torch)
    assert (pool.mean, pool.mean_torch) == pytest.approx((whole.mean, whole.mean_torch))


@pytest.mark.parametrize("head", [3, 12], ids=["in the first part", "in the last part"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_breaks_the_rule(bad: float, head: int) -> None:
    q, k, v = random_heads(MIN_HEADS, 10, 64, F16)
    outs = [as_a_kernel(q, k, v), exact(q, k, v), in_torch(q, k, v)]
    outs[0][head, 5] = bad
    parts = [errors(*(out[cut] for out in outs)) for cut in (slice(0, 8), slice(8, 16))]
    assert errors(*outs).share > 1 and pooled(parts).share > 1
