"""Checks what the methods of a paged cache are given, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gqa_cutlass.cache.inputs import check_apart, check_no_grad, plain, types_of_tokens
from gqa_cutlass.cache.paged.sequences import refuse
from gqa_cutlass.call.asked import check_window
from gqa_cutlass.codegen.schema.problem import MAX_SEQ_LEN
from gqa_cutlass.errors import shown
from gqa_cutlass.tensors import memory_flaw

UNWRITTEN = "Nothing was written."


def packed(
    call: str,
    name: str,
    tensor: Tensor,
    pools: Sequence[Tensor],
    count: int,
    others: Sequence[Tensor],
) -> Tensor:
    """Tokens of several sequences, one after the other, for each of some layers.

    Args:
        call: In whose name an error is.
        name: Of the argument.
        tensor: [tokens, num_kv_heads, head_dim], or one of them per pool.
        pools: Of the layers that they are for, [num_pages, page_size, num_kv_heads, head_dim].
        count: How many tokens there must be.
        others: Pools that are written in the same call.

    Returns:
        A plain tensor, [pools, tokens, num_kv_heads, head_dim].

    Raises:
        InputError: Something else, not like the pools, or memory of theirs.
    """
    tensor = plain(call, name, tensor)
    check_no_grad(call, name, tensor)
    like, row = pools[0], [count, *pools[0].shape[2:]]
    shapes = [[len(pools), *row], *([row] if len(pools) == 1 else [])]
    types = types_of_tokens(like)
    same = tensor.dtype in types and tensor.device == like.device
    if not same or list(tensor.shape) not in shapes:
        got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        layers = "num_layers, " if len(pools) > 1 else ""
        form = f"{shapes[-1]} ([{layers}tokens, num_kv_heads, head_dim])"
        allowed = f"{' or '.join(map(str, types))} {form} on {like.device}"
        refuse(call, name, got, allowed, UNWRITTEN)
    if found := memory_flaw(tensor):
        refuse(call, name, *found, UNWRITTEN)
    check_apart(call, name, tensor, (*pools, *others))
    return tensor if tensor.dim() == 4 else tensor[None]


def check_reach(owner: str, window: int | None) -> None:
    """Raise InputError for what is no number of newest tokens."""
    if window is not None and (type(window) is not int or not 1 <= window <= MAX_SEQ_LEN):
        allowed = f"an int from 1 to {MAX_SEQ_LEN}, the tokens that a step may attend to; or None"
        refuse(owner, "window", shown(window), allowed, "Nothing was allocated.")


def check_seen(call: str, window_size: object, reach: int | None) -> int:
    """Tokens that a call attends to, if the cache has so many; 0 where it has all.

    Args:
        call: In whose name an error is.
        window_size: The option.
        reach: Newest tokens that the cache has of every sequence; None: all.

    Raises:
        InputError: No such window, or a wider one.
    """
    if reach is None:
        return 0
    left, _ = check_window(window_size)
    if not 0 <= left < reach:
        got = f"{window_size}" + (", no window" if left < 0 else f", a window of {left + 1} tokens")
        allowed = f"({reach - 1}, 0) and less: older tokens may be freed, or are, as `window` says"
        refuse(call, "window_size", got, allowed, UNWRITTEN)
    return left + 1


def counts(call: str, tokens: int | Sequence[int], batch: int) -> list[int]:
    """Tokens per sequence.

    Raises:
        InputError: Not an int for all, nor one for each.
    """
    given = [tokens] * batch if type(tokens) is int else tokens
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        refuse(call, "tokens", shown(tokens), "an int for all sequences, or one for each")
    for count in given:
        if type(count) is not int or count < 0:
            refuse(call, "tokens", shown(count), "ints, 0 and more")
    if len(given) != batch:
        refuse(call, "tokens", f"{len(given)} ints", f"{batch}, one per sequence")
    return list(given)
