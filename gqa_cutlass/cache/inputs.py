"""Checks what the methods of a cache are given, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from gqa_cutlass.cache.growth import Turned
from gqa_cutlass.call.layout import DTYPES
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.tensors import Flaw, byte_reach, flaw, memory_flaw, plain_shape
from gqa_cutlass.tracing import is_traced

_TOKEN = "[batch, num_kv_heads, head_dim] or [batch, 1, num_kv_heads, head_dim]"
_TOKENS = "[batch, tokens, num_kv_heads, head_dim]"
# Keys and values, [batch, max_seq_len, num_kv_heads, head_dim], and a head_dim for each.
Caches = tuple[Tensor, Tensor]


def one_token(method: str, name: str, tensor: Tensor, caches: Caches) -> Tensor:
    """One token per sequence, as [batch, 1, num_kv_heads, head_dim].

    Raises:
        InputError: Something else, or not like the cache.
    """
    batch, _, *row = _own(name, caches).shape
    tensor = plain(f"KVCache.{method}", name, tensor)
    _check_new(method, name, tensor, caches, _TOKEN, [batch, *row], [batch, 1, *row])
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor


def new_tokens(k: object) -> int:
    """How many tokens per sequence `decode` is to append; 1 for what it will refuse."""
    if not isinstance(k, Tensor):
        return 1
    shape = k.shape if type(k) is Tensor or is_traced() else plain_shape(k)
    return shape[1] if len(shape) == 4 else 1


def turned(q: object, k: object, options: Mapping[str, Any]) -> Turned | None:
    """What a rotary embedding among these options turns; None: nothing, or what is refused."""
    cos = options.get("rotary_cos")
    if not isinstance(cos, Tensor):
        return None
    shape = cos.shape if type(cos) is Tensor or is_traced() else plain_shape(cos)
    if len(shape) != 2:
        return None
    tokens, starts = max(new_tokens(q), new_tokens(k)), options.get("rotary_seqlens")
    return Turned(positions=shape[0], tokens=tokens, starts=starts)


def prompt(method: str, k: Tensor, v: Tensor, caches: Caches) -> tuple[Tensor, Tensor]:
    """As many tokens of keys and of values per sequence, [batch, tokens, num_kv_heads, head_dim].

    Raises:
        InputError: Something else, or not like the cache.
    """
    k, v = plain(f"KVCache.{method}", "k", k), plain(f"KVCache.{method}", "v", v)
    for name, tensor in (("k", k), ("v", v)):
        batch, _, *row = _own(name, caches).shape
        _check_new(method, name, tensor, caches, _TOKENS, [batch, *tensor.shape[1:2], *row])
    if k.shape[1] != v.shape[1]:
        refuse(method, "v", _describe(v), f"as many tokens as k, {k.shape[1]}")
    return k, v


def per_sequence(
    method: str, what: str, tensor: Tensor, lengths: Tensor, *dtypes: torch.dtype
) -> Tensor:
    """One value per sequence, where the lengths are.

    Raises:
        InputError: Something else.
    """
    tensor = plain(f"KVCache.{method}", what, tensor)
    same = tensor.shape == lengths.shape and tensor.device == lengths.device
    if not same or tensor.dtype not in dtypes:
        types = " or ".join(map(str, dtypes))
        allowed = f"{types} {list(lengths.shape)} on {lengths.device}, or a sequence of ints"
        refuse(method, what, _describe(tensor), allowed)
    check_memory(method, what, tensor)
    return tensor


def check_apart(call: str, name: str, tensor: Tensor, caches: Iterable[Tensor]) -> None:
    """Raise InputError for a tensor that shares memory with the caches."""
    start, reach = tensor.data_ptr(), byte_reach(tensor)
    for cache in caches:
        if start < cache.data_ptr() + byte_reach(cache) and cache.data_ptr() < start + reach:
            allowed = "memory of its own; pass a .clone()"
            refuse_in(call, name, "memory of the cache itself", allowed)


def check_memory(method: str, what: str, tensor: Tensor) -> None:
    """Raise InputError for a tensor whose storage was freed or shrunk."""
    if found := memory_flaw(tensor):
        refuse(method, what, *found)


def surroundings_flaw() -> Flaw | None:
    """What is wrong where torch makes no plain tensors, in a FakeTensorMode for instance."""
    if found := flaw(torch.empty(0, device="cpu")):
        allowed = "a call outside of modes and transforms that replace tensors"
        return Flaw(f"torch.empty making {found.got}", allowed)
    return None


def ints(
    method: str, what: str, values: object, least: int, most: int, count: int | None = None
) -> list[int]:
    """A caller's sequence of ints as a list.

    Raises:
        InputError: No such sequence, or a value out of range.
    """
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        refuse(method, what, f"a {type(values).__name__}", "a sequence of ints")
    taken = []
    for i, value in enumerate(values):  # once: a caller's class may not say the same again
        if type(value) is not int or not least <= value <= most:
            refuse(method, f"{what}[{i}]", shown(value), f"an int from {least} to {most}")
        taken.append(value)
    if count is not None and len(taken) != count:
        refuse(method, what, f"{len(taken)} values", f"{count}, one per sequence")
    return taken


def refuse(method: str, what: str, got: str, allowed: str) -> NoReturn:
    """Raise InputError in the house's words, in the name of a method of KVCache."""
    refuse_in(f"KVCache.{method}", what, got, allowed)


def refuse_in(call: str, what: str, got: str, allowed: str) -> NoReturn:
    """The same in the name of any call."""
    raise InputError(f"{call}: {what}: got {got}; allowed: {allowed}. Nothing was written.")


def types_of_tokens(cache: Tensor) -> tuple[torch.dtype, ...]:
    """What new tokens may be of: the cache's type, or 16 bits, of which it makes 8."""
    return tuple(DTYPES) if cache.dtype in FP8 else (cache.dtype,)


def _own(name: str, caches: Caches) -> Tensor:
    """The cache that k or v belongs to."""
    return caches[name == "v"]


def plain(call: str, name: str, tensor: Tensor) -> Tensor:
    """A plain, dense tensor, without what a subclass makes of it.

    Raises:
        InputError: It is something else.
    """
    if found := flaw(tensor):
        refuse_in(call, name, *found)
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.as_subclass(tensor, Tensor)


def check_no_grad(call: str, name: str, tensor: Tensor) -> None:
    """Raise InputError for a tensor whose gradient a cache would have to pass on."""
    if tensor.requires_grad and torch.is_grad_enabled():
        refuse_in(
            call,
            name,
            "a tensor that requires grad (a cache has no backward pass)",
            "tensors without grad; call it under torch.inference_mode() or torch.no_grad()",
        )


def _check_new(
    method: str, name: str, tensor: Tensor, caches: Caches, form: str, *shapes: list[int]
) -> None:
    """Raise InputError unless a tensor is of one of the shapes, and can be copied to the caches."""
    check_no_grad(f"KVCache.{method}", name, tensor)
    cache = _own(name, caches)
    like = tensor.dtype in types_of_tokens(cache) and tensor.device == cache.device
    if not like or list(tensor.shape) not in shapes:
        batch, _, num_kv_heads, head_dim = cache.shape
        sizes = f"batch {batch}, num_kv_heads {num_kv_heads}, head_dim {head_dim}"
        types = " or ".join(map(str, types_of_tokens(cache)))
        allowed = f"{form} with {sizes}; {types} on {cache.device}"
        refuse(method, name, _describe(tensor), allowed)
    check_memory(method, name, tensor)
    check_apart(f"KVCache.{method}", name, tensor, caches)


def _describe(tensor: Tensor) -> str:
    """What matters of a tensor, for a message."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
