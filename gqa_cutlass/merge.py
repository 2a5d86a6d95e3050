"""Attention over parts of a sequence's keys, made one: shared prefixes, chunks, other devices.

Each part's output counts by its share of the softmax's sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from gqa_cutlass.call.merge import Parts, merge
from gqa_cutlass.call.plan import Pair
from gqa_cutlass.codegen.schema.merge import MAX_PARTS
from gqa_cutlass.devices import executor_of
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.gpu.torch_private import foreign_keys
from gqa_cutlass.tensors import memory_flaw
from gqa_cutlass.tracing import is_traced

_WITHOUT_VALUES = UninitializedParameter, UninitializedBuffer
_OUTS = torch.float32, torch.float16, torch.bfloat16
_executor_of = cache(executor_of)  # which takes its time
_BY_KERNEL = frozenset({"cuda"})  # on the CPU, operators are faster than ptxsim


class _Stack(NamedTuple):
    """What parts are together: one tensor, with the parts in front."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device


def merge_states(outs: Parts, lses: Parts, *, out_dtype: torch.dtype | None = None) -> Pair:
    """Merge attention of the same queries over parts of the keys into attention over all of them.

    One kernel on a GPU, which reads parts where they are: one tensor, or up to 16 of equal strides;
    others are stacked first. CPU tensors, gradients and transforms of torch.func take operators of
    torch. Computed in float32; decode the parts with `out_dtype=torch.float32`, so that only the
    result is rounded. Pass sinks to the decode of one part only.

    Args:
        outs: The parts' outputs, as `gqa_decode` returns them: [batch, heads, dim] or
            [batch, tokens, heads, dim] each, float32, float16 or bfloat16, all alike; a sequence of
            tensors, or one tensor with the parts as its first dimension.
        lses: The parts' log-sum-exps, float32, as many as outs: [batch, heads], or
            [batch, heads, tokens] as FlashAttention returns them. Natural logarithms: multiply
            FlashInfer's, which are to base 2, by math.log(2). Minus infinity marks a part without
            keys, whose output is ignored.
        out_dtype: Type of the merged output: float32, float16 or bfloat16; None for that of outs.

    Returns:
        The output, shaped as one of outs, and the log-sum-exp, float32, shaped as one of lses.
        Where all parts are empty: zeros and minus infinity, and gradients of zero. NaN in a part is
        NaN in the result, for that head alone.

    Raises:
        InputError: A tensor's shape, dtype or device is not allowed.
        DeviceError: No usable GPU, for tensors on one.
        GqaError: Compiling, storing or launching the kernel failed; see `gqa_cutlass.errors`.

    Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (arXiv:2112.05682).
    """
    out, lse = _stack("outs", outs), _stack("lses", lses)
    _check(out, lse)
    dtype = out.dtype if out_dtype is None else out_dtype
    if not isinstance(dtype, torch.dtype) or dtype not in _OUTS:
        _fail("out_dtype", shown(dtype), f"None, {', '.join(map(str, _OUTS))}")
    if out.device.type in _BY_KERNEL:
        if is_traced():
            return _traced(outs, lses, dtype)
        merged = merge(_executor_of, outs, lses, dtype)
        if merged is not None:
            return merged
    if not is_traced():
        _check_memory("outs", outs)
        _check_memory("lses", lses)
    return by_operators(outs, lses, dtype)


def _traced(outs: Parts, lses: Parts, dtype: torch.dtype) -> Pair:
    """In compiled code, one operator; or several, which the compiler fuses."""
    listed = list(outs), list(lses)
    learned = torch.is_grad_enabled() and any(t.requires_grad for part in listed for t in part)
    if learned or len(outs) > MAX_PARTS:
        return by_operators(outs, lses, dtype)
    from gqa_cutlass import ops  # noqa: F401 - which registers it

    merged: Pair = torch.ops.gqa_cutlass.merge_states(*listed, dtype)
    return merged


def by_operators(outs: Parts, lses: Parts, dtype: torch.dtype) -> Pair:
    """Merge parts, which were checked, by operators of torch."""
    out, lse = _stacked(outs), _stacked(lses)
    empty = lse == -math.inf
    nothing = empty.all(0)
    lse = lse.masked_fill(nothing, 0)  # where the gradient is zero, and not infinity less infinity
    shares = torch.softmax(lse, 0).masked_fill(empty, 0)
    merged = (out.float() * _by_output(shares, out)).masked_fill(_by_output(empty, out), 0).sum(0)
    return merged.to(dtype), torch.logsumexp(lse, 0).masked_fill(nothing, -math.inf)


def _by_output(sums: Tensor, out: Tensor) -> Tensor:
    """What is said by [parts, batch, heads], or of tokens behind them, for every dimension."""
    if sums.dim() < out.dim() - 1:  # the one token
        sums = sums.unsqueeze(-1)
    return (sums.transpose(2, 3) if out.dim() == 5 else sums).unsqueeze(-1)


def _stacked(parts: Parts) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.stack(tuple(parts))


def _stack(name: str, parts: Parts) -> _Stack:
    """What parts are together.

    Raises:
        InputError: There is none, or one is no dense tensor, or not like the first.
    """
    if isinstance(parts, Tensor):
        _check_dense(name, parts)
        return _Stack(parts.shape, parts.dtype, parts.device)
    if not isinstance(parts, Sequence) or not parts:
        _fail(name, shown(parts), "one tensor with parts in front, or a sequence of tensors")
    for part in parts:
        _check_dense(name, part)
        if _kind(part) != _kind(parts[0]):
            _fail(name, f"{_text(part)} behind {_text(parts[0])}", "parts that are all alike")
    first = parts[0]
    return _Stack((len(parts), *first.shape), first.dtype, first.device)


def _check_dense(name: str, part: object) -> None:
    if not isinstance(part, Tensor):
        _fail(name, f"a {type(part).__name__} among the parts", "tensors")
    if type(part) is not Tensor and isinstance(part, _WITHOUT_VALUES):
        _fail(name, "a parameter that is not initialised", "dense tensors")
    if part.is_nested or part.layout is not torch.strided:
        _fail(name, "a nested or sparse tensor", "dense tensors")


def _check_memory(name: str, parts: Parts) -> None:
    """Raise InputError for a plain tensor whose memory is gone, which operators would read."""
    for part in [parts] if isinstance(parts, Tensor) else parts:
        plain = foreign_keys(part) == "" and not part.is_meta
        if plain and (found := memory_flaw(part)):
            _fail(name, *found)


def _kind(part: Tensor) -> tuple[object, ...]:
    return part.shape, part.dtype, part.device


def _check(out: _Stack, lse: _Stack) -> None:
    """Raise InputError unless these are stacked outputs and their log-sum-exps."""
    if len(out.shape) not in (4, 5) or out.dtype not in _OUTS or not out.shape[0]:
        _fail(
            "outs",
            _text(out),
            "1 part or more of [batch, heads, dim] or [batch, tokens, heads, dim], float32, "
            "float16 or bfloat16",
        )
    parts, batch, *tokens, heads, _ = out.shape
    allowed = [[parts, batch, heads, *tokens]] + [[parts, batch, heads]] * (tokens == [1])
    right = list(lse.shape) in allowed and lse.dtype == torch.float32 and lse.device == out.device
    if not right:
        _fail("lses", _text(lse), f"float32 {allowed[-1]}, parts in front, on {out.device}")


def _text(tensor: Tensor | _Stack) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _fail(what: str, got: str, allowed: str) -> NoReturn:
    raise InputError(f"merge_states: {what}: got {got}; allowed: {allowed}.")
