"""Checks what the methods of a cache are given, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from gqa_cutlass.errors import InputError

_TOKEN = "[batch, num_kv_heads, head_dim] or [batch, 1, num_kv_heads, head_dim]"
_TOKENS = "[batch, tokens, num_kv_heads, head_dim]"


def one_token(method: str, name: str, tensor: Tensor, cache: Tensor) -> Tensor:
    """One token per sequence, as [batch, 1, num_kv_heads, head_dim].

    Raises:
        InputError: Something else, or not like the cache.
    """
    _check_tensor(method, name, tensor)
    batch, _, *row = cache.shape
    right = list(tensor.shape) in ([batch, *row], [batch, 1, *row])
    _check_like(method, name, tensor, cache, _TOKEN, right)
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor


def check_prompt(method: str, k: Tensor, v: Tensor, cache: Tensor) -> None:
    """Raise InputError unless k and v are as many tokens of the cache's sequences."""
    for name, tensor in (("k", k), ("v", v)):
        _check_tensor(method, name, tensor)
        batch, _, *row = cache.shape
        right = tensor.dim() == 4 and [*tensor.shape[:1], *tensor.shape[2:]] == [batch, *row]
        _check_like(method, name, tensor, cache, _TOKENS, right)
    if k.shape != v.shape:
        refuse(method, "v", _describe(v), f"k's shape, {list(k.shape)}")


def check_per_sequence(
    method: str, what: str, tensor: Tensor, lengths: Tensor, *dtypes: torch.dtype
) -> None:
    """Raise InputError unless a tensor has one value per sequence, where the lengths are."""
    _check_dense(method, what, tensor)
    same = tensor.shape == lengths.shape and tensor.device == lengths.device
    if not same or tensor.dtype not in dtypes:
        types = " or ".join(map(str, dtypes))
        allowed = f"{types} {list(lengths.shape)} on {lengths.device}, or a sequence of ints"
        refuse(method, what, _describe(tensor), allowed)


def ints(
    method: str, what: str, values: object, least: int, most: int, count: int | None = None
) -> list[int]:
    """A caller's sequence of ints as a list.

    Raises:
        InputError: No such sequence, or a value out of range.
    """
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        refuse(method, what, f"a {type(values).__name__}", "a sequence of ints")
    if count is not None and len(values) != count:
        refuse(method, what, f"{len(values)} values", f"{count}, one per sequence")
    for i, value in enumerate(values):
        if type(value) is not int or not least <= value <= most:
            refuse(method, f"{what}[{i}]", repr(value)[:80], f"an int from {least} to {most}")
    return list(values)


def _check_dense(method: str, what: str, tensor: Tensor) -> None:
    """Raise InputError for a tensor that is not strided memory."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        refuse(method, what, f"a {kind} tensor", "a dense (strided) tensor")


def _describe(tensor: Tensor) -> str:
    """What matters of a tensor, for a message."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def refuse(method: str, what: str, got: str, allowed: str) -> NoReturn:
    """Raise InputError in the house's words."""
    raise InputError(
        f"KVCache.{method}: {what}: got {got}; allowed: {allowed}. Nothing was written."
    )


def _check_tensor(method: str, name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        refuse(method, name, f"a {type(tensor).__name__}", "a torch.Tensor")
    _check_dense(method, name, tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        refuse(
            method,
            name,
            "a tensor that requires grad (a cache has no backward pass)",
            "tensors without grad; call it under torch.inference_mode() or torch.no_grad()",
        )


def _check_like(
    method: str, name: str, tensor: Tensor, cache: Tensor, form: str, right_shape: bool
) -> None:
    if not right_shape or tensor.dtype != cache.dtype or tensor.device != cache.device:
        batch, _, num_kv_heads, head_dim = cache.shape
        sizes = f"batch {batch}, num_kv_heads {num_kv_heads}, head_dim {head_dim}"
        allowed = f"{form} with {sizes}; {cache.dtype} on {cache.device}"
        refuse(method, name, _describe(tensor), allowed)
