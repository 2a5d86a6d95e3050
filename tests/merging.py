"""Parts merged by the kernel, in ptxsim or on a GPU, and seen to be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import gqa_cutlass.merge as module
from gqa_cutlass import merge_states

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Parts = Sequence[Tensor] | Tensor


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
