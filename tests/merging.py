"""Parts, and how they are merged by the kernel, in ptxsim or on a GPU, and seen to be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import gqa_cutlass.merge as module
from gqa_cutlass import merge_states
from gqa_cutlass.codegen import MergeConfig, NumberType

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Parts = Sequence[Tensor] | Tensor
FLOAT32 = MergeConfig(
    dtype=NumberType.FLOAT32, out_dtype=NumberType.FLOAT32, vec_width=4, parts_at_once=4
)  # the kernel of parts like those of `parts`


def parts(
    num_parts: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Outputs [parts, batch, tokens, heads, dim] or without tokens, and their log-sum-exps."""
    generator = torch.Generator().manual_seed(seed)
    batch, *tokens, heads, dim = shape
    outs = torch.randn(num_parts, *shape, generator=generator).to(dtype)
    lses = torch.randn(num_parts, batch, heads, *tokens, generator=generator) * 4
    return outs, lses


def exact(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in double."""
    empty = lses == -math.inf
    shares = torch.softmax(lses.double(), 0).masked_fill(empty, 0)
    if outs.dim() == 5:
        shares, empty = shares.transpose(2, 3), empty.transpose(2, 3)
    products = (outs.double() * shares.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0)
    return products.sum(0), torch.logsumexp(lses.double(), 0)


def worst_share(found: tuple[Tensor, Tensor], outs: Tensor, lses: Tensor) -> float:
    """The worst error over what is allowed: rounding once, and what float32 loses before."""
    out, lse = found
    right, right_lse = exact(outs, lses)
    rounding = torch.finfo(out.dtype).eps / 2 * right.abs()
    of_outs = (out.double() - right).abs() / (rounding + 2e-6 * outs.double().abs().amax(0))
    off = (lse.double() - right_lse).abs().masked_fill(lse.double() == right_lse, 0)
    of_lses = off / (1e-6 * right_lse.abs() + 1e-6)
    return torch.cat([of_outs.flatten(), of_lses.flatten()]).max().item()  # NaN if one is


def merged_by_kernel(
    device: str, outs: Parts, lses: Parts, *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """What `merge_states` gives for CPU tensors, by the kernel; on a GPU, of copies there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BY_KERNEL", frozenset({device}))
        patch.setattr(module, "by_operators", _no_operators)
        out, lse = merge_states(_on(device, outs), _on(device, lses), out_dtype=out_dtype)
    return out.cpu(), lse.cpu()


def _on(device: str, parts: Parts) -> Parts:
    if device == "cpu":
        return parts
    if isinstance(parts, Tensor):
        return _copy(parts, device)
    return type(parts)(_copy(part, device) for part in parts)  # type: ignore[call-arg]


def _copy(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides and alignment."""
    base = tensor.new_empty(0).set_(tensor.untyped_storage())  # all that is around it
    return base.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _no_operators(*given: object) -> None:
    raise AssertionError("operators were asked, where the kernel should have been")
