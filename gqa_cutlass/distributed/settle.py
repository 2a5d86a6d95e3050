"""What calls of one layout have in common, settled once: checked, and as far as ranks must agree.

Tokens of a rank are every so many of the sequence, in its order, so that whatever is hidden of a
sequence's start (a window, padding) is the start of a rank's part, and is told to the kernel as
padding. What is not exact for a part is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gqa_cutlass.api import plan
from gqa_cutlass.call.asked import NO_WINDOW, check_window
from gqa_cutlass.call.flag import OverflowFlag
from gqa_cutlass.call.stored import SCALES, of_tokens
from gqa_cutlass.call.tokens import TREE, WORD_BITS, packed_tree
from gqa_cutlass.devices import executor_of
from gqa_cutlass.distributed.exchange import EXCHANGES, Exchange, chosen
from gqa_cutlass.distributed.groups import Ranks
from gqa_cutlass.distributed.refusal import refuse
from gqa_cutlass.distributed.several import (
    Several,
    Tokens,
    first_query,
    tabulate_several,
    tokens_of,
)
from gqa_cutlass.distributed.sharding import Sharding, Table, tabulate
from gqa_cutlass.errors import shown
from gqa_cutlass.tensors import is_tensor

Heads = Literal["whole", "sharded"]
Tensors = Sequence[Any]  # q, k_cache, v_cache, k, v
MAX_TOKENS = 2**26  # that shards hold together: lengths are tabulated, 8 to 16 bytes each
STORAGE = "cache_batch_idx", "block_table", *SCALES  # where a token is, and how it is stored
TENSORS = *STORAGE, "sinks", "alibi_slopes", "cache_leftpad"
# To kernels as they are.
_PASSED = frozenset(("softmax_scale", "num_splits", "ragged", "softcap", "causal"))
_REMEDIES = {
    "out": "the exchange makes the output, which can be copied",
    "slot_mapping": "a rank's own block_table says where its tokens go",
}
_TAKEN = _PASSED | {*TENSORS, TREE, "window_size", "out_dtype"}


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What calls of one layout have in common.

    Args:
        sharding: Which tokens are here.
        local_max: Tokens that a sequence's shard can hold.
        heads: Whether all ranks have all heads of q.
        exchange: How parts are exchanged.
        part_shape: Of a rank's part of the output: all heads.
        new: Tokens that calls bring to each sequence.
        several: Of calls with several tokens: which of them are here.
        masked: Whether their queries are told what they see of these.
        device: Where it is.
        out_dtype: Of the merged output.
        window: Tokens before the newest that are attended to, where ranks may have more than
            kernels are told to look at; -1 where they have not.
        table: What lengths come to, or None for an int and up to one token.
        padding: What padding on the device comes to, in its row `attended`; None without.
        flag: Where kernels report what they found.
        kernel: Options of kernels that are the same in every call.
    """

    sharding: Sharding
    local_max: int
    heads: Heads
    exchange: Exchange
    part_shape: tuple[int, ...]
    new: int
    several: Several | None
    masked: bool
    device: torch.device
    out_dtype: torch.dtype
    window: int
    table: Table | None
    padding: Table | None
    flag: OverflowFlag
    kernel: dict[str, Any]


def key_of(
    given: Tensors, lengths: object, asked: Mapping[str, Any], options: Mapping[str, Any]
) -> object | None:
    """What calls that have it in common may be settled together by; None for no such call."""
    q, k_cache, v_cache, k, v = given
    try:
        paged = options.get("block_table") is not None
        key = (
            q.shape, q.dtype, q.device, k_cache.shape[paged:], k_cache.dtype,
            v_cache.shape[paged:], v_cache.dtype,
            _kind(k), _kind(v), _kind(lengths) if isinstance(lengths, Tensor) else type(lengths),
            *asked.items(), *map(type, asked.values()),
            *((n, _kind(value, paged and n in SCALES)) for n, value in options.items()),
        )  # fmt: skip
        hash(key)
    except Exception:  # no tensors, or options that are none
        return None
    return key


def _kind(value: Any, of_pages: bool = False) -> object:
    """What settling looks at of a tensor, or another value."""
    if isinstance(value, Tensor):
        shape = value.shape
        return shape[1:] if of_pages and of_tokens(shape) else shape, value.dtype
    return type(value), tuple(value) if isinstance(value, list) else value


def terms_of(
    given: Tensors, lengths: object, asked: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What ranks must have in common, by argument: pools alone may have other numbers of pages."""
    names = "q", "k_cache", "v_cache", "k", "v"
    terms = {name: _text(value) for name, value in zip(names, given, strict=True)}
    terms["cache_seqlens"] = _text(lengths) if isinstance(lengths, Tensor) else "an int"
    terms |= asked
    terms |= {n: _text(options[n]) for n in sorted(options) if options[n] is not None}
    if options.get("block_table") is not None:
        pools = {"k_cache": given[1], "v_cache": given[2]}
        pools |= {n: t for n in SCALES if is_tensor(t := options.get(n)) and of_tokens(t.shape)}
        for name, pool in pools.items():
            terms[name] = f"pages of {list(pool.shape[1:])}, {pool.dtype} on {pool.device.type}"
    return terms


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device.type}"
    return shown(value)


def settle(
    ranks: Ranks,
    given: Tensors,
    lengths: object,
    asked: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Settled:
    """Check a call as far as this rank can, and find what all calls of its layout have in common.

    Kernels are compiled and loaded; nothing is launched.

    Raises:
        GqaError: The call is not allowed.
    """
    _check_asked(asked, options)
    sharding = Sharding(rank=ranks.rank, size=ranks.size, interleave=asked["interleave"])
    seen = check_window(options.get("window_size", NO_WINDOW), options.get("causal") is not False)
    tokens = tokens_of(given, options, seen, sharding)
    window = seen[0]
    hides = window >= 0 and (window + 1) % sharding.stripe != 0
    kernel = {
        **{name: options[name] for name in _PASSED & options.keys()},
        "window_size": (sharding.most(window + 1) - 1, -1),
        "out_dtype": torch.float32,
    }
    times = ranks.size if asked["q_heads"] == "sharded" else 1
    _check_by_plans(
        given, lengths, options, kernel, times, tokens, hides=hides, first=not ranks.rank
    )
    q, k_cache, v_cache, *_ = given
    out_dtype = _out_dtype(options.get("out_dtype"), q.dtype)
    pages = options.get("block_table")
    local_max = k_cache.shape[1] * (1 if pages is None else pages.shape[1])
    capacity = sharding.capacity(local_max)
    if capacity > MAX_TOKENS:
        allowed = f"up to {MAX_TOKENS}; allocate shorter ones, or narrow block_table"
        refuse("k_cache", f"shards that hold {capacity} tokens of a sequence", allowed)
    shape = *q.shape[:-2], q.shape[-2] * times, v_cache.shape[-1]
    table = padding = several = None
    if isinstance(lengths, Tensor) or tokens.several:
        table = tabulate(
            sharding, local_max, q.device, new=tokens.new, window=window if hides else -1,
            behind=options.get("alibi_slopes") is not None,
        )  # fmt: skip
    if options.get("cache_leftpad") is not None:
        padding = tabulate(sharding, local_max, q.device, new=0)
    if tokens.several:
        several = tabulate_several(sharding, tokens.queries, tokens.new, q.device)
    how = asked["exchange"] or chosen(ranks.size, math.prod(shape[:-1]), shape[-1], times > 1)
    return Settled(
        sharding=sharding, local_max=local_max, heads=asked["q_heads"], exchange=how,
        part_shape=shape, new=tokens.new, several=several, masked=tokens.masked, device=q.device,
        out_dtype=out_dtype, window=window if hides else -1,
        table=table, padding=padding, flag=executor_of(q.device).flag, kernel=kernel,
    )  # fmt: skip


def _check_asked(asked: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise InputError for what parts of a context do not have."""
    interleave = asked["interleave"]
    if type(interleave) is not int or not 1 <= interleave <= MAX_TOKENS:
        refuse("interleave", shown(interleave), f"an int from 1 to {MAX_TOKENS}")
    if asked["q_heads"] not in ("whole", "sharded"):
        refuse("q_heads", shown(asked["q_heads"]), "'whole' or 'sharded'")
    if asked["exchange"] not in (None, *EXCHANGES):
        refuse("exchange", shown(asked["exchange"]), f"None or one of {', '.join(EXCHANGES)}")
    if type(asked["return_lse"]) is not bool:
        refuse("return_lse", shown(asked["return_lse"]), "True or False")
    given = {name for name, value in options.items() if value is not None}
    for name in sorted(given - _TAKEN):
        remedy = _REMEDIES.get(name, "do it before the call, or use gqa_decode on one device")
        refuse(name, "one", f"none: it is not done over shards; {remedy}")
    if "alibi_slopes" in given and interleave != 1:
        allowed = "interleave=1, where a rank's tokens are all as far from one another"
        refuse("alibi_slopes", f"some with interleave={interleave}", allowed)
    if {"alibi_slopes", "sinks"} <= given:
        refuse("alibi_slopes and sinks", "both", "one of them; use gqa_decode on one device")


def _check_by_plans(
    given: Tensors,
    lengths: Any,
    options: Mapping[str, Any],
    kernel: Mapping[str, Any],
    times: int,
    tokens: Tokens,
    *,
    hides: bool,
    first: bool,
) -> None:
    """Plan what calls will launch, which checks, compiles and loads.

    Args:
        given: Tensors of the call.
        lengths: Its lengths; ints are checked with every call.
        options: Its options.
        kernel: Those of its kernels.
        times: How many times the heads of q all ranks have.
        tokens: Its tokens.
        hides: Whether there will be padding though none was given.
        first: Whether this rank is the one whose kernel adds sinks.
    """
    q, k_cache, v_cache, k, v = given
    if times > 1 and isinstance(q, Tensor) and q.dim() in (3, 4):
        shape = *q.shape[:-2], q.shape[-2] * times, q.shape[-1]
        q = q.new_empty(shape).requires_grad_(q.requires_grad)
    if type(lengths) is int:
        lengths = 0 if not tokens.several else _zeros(q)
    tensors = {name: options.get(name) for name in TENSORS}
    stored: dict[str, Any] = {name: tensors[name] for name in STORAGE}
    if hides and tensors["cache_leftpad"] is None and isinstance(q, Tensor):
        tensors["cache_leftpad"] = _zeros(q)
    if tokens.masked and isinstance(q, Tensor):
        tree = packed_tree(options.get(TREE))
        if tree is None:
            shape = *q.shape[:2], -(-tokens.queries // WORD_BITS)
            tree = torch.zeros(shape, dtype=torch.int32, device=q.device).view(torch.uint32)
        tensors[TREE] = tree
    appends = k is not None or v is not None
    if appends and not isinstance(lengths, int):
        one = q
        if tokens.several and isinstance(q, Tensor):
            one = first_query(q)
            stored["cu_seqlens_k_new"] = _zeros(q, 1)
            k, v = (
                t.new_empty(len(q) * tokens.most, *t.shape[-2:]).requires_grad_(t.requires_grad)
                for t in (k, v)
            )
        plan(one, k_cache, v_cache, k, v, cache_seqlens=lengths, window_size=(0, -1), **stored)
        appends = False
    for sinks in dict.fromkeys((tensors["sinks"], tensors["sinks"] if first else None)):
        asked = {**kernel, **tensors, "sinks": sinks, "return_lse": True}
        plan(q, k_cache, v_cache, cache_seqlens=lengths, **asked)
        if appends:
            plan(q, k_cache, v_cache, k, v, cache_seqlens=lengths, **asked)


def _zeros(q: Tensor, more: int = 0) -> Tensor:
    """One for every sequence."""
    return torch.zeros(len(q) + more, dtype=torch.int32, device=q.device)


def _out_dtype(out_dtype: object, of_q: torch.dtype) -> torch.dtype:
    if out_dtype not in (None, of_q, torch.float32):
        refuse("out_dtype", shown(out_dtype), f"None, q's dtype, {of_q}, or torch.float32")
    return out_dtype if isinstance(out_dtype, torch.dtype) else of_q
