"""One decode step over a context that ranks hold parts of."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from gqa_cutlass.call.asked import rename
from gqa_cutlass.call.options import CallOptions, listed
from gqa_cutlass.call.plan import Pair, Result
from gqa_cutlass.distributed import agreement
from gqa_cutlass.distributed.exchange import Exchange, Part, by_heads, whole
from gqa_cutlass.distributed.groups import Group, Ranks, check_backend, ranks_of
from gqa_cutlass.distributed.local import attend, here_of
from gqa_cutlass.distributed.settle import Heads, Settled, key_of, settle, terms_of
from gqa_cutlass.errors import CollectiveError, GqaError
from gqa_cutlass.tracing import untraced

WHY = "gqa_cutlass: decode_context_parallel waits for other ranks when a layout is new to them"


@overload
def decode_context_parallel(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    *, cache_seqlens: int | Tensor, group: Group = None, interleave: int = 1,
    q_heads: Heads = "whole", exchange: Exchange | None = None,
    return_lse: Literal[False] = False, **options: Unpack[CallOptions],
) -> Tensor: ...  # fmt: skip
@overload
def decode_context_parallel(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    *, cache_seqlens: int | Tensor, group: Group = None, interleave: int = 1,
    q_heads: Heads = "whole", exchange: Exchange | None = None,
    return_lse: Literal[True], **options: Unpack[CallOptions],
) -> Pair: ...  # fmt: skip
@overload
def decode_context_parallel(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    *, cache_seqlens: int | Tensor, group: Group = None, interleave: int = 1,
    q_heads: Heads = "whole", exchange: Exchange | None = None,
    return_lse: bool, **options: Unpack[CallOptions],
) -> Result: ...  # fmt: skip
@partial(untraced, why=WHY)
@listed(CallOptions, without=("out", "slot_mapping"))
def decode_context_parallel(  # noqa: D417 - the decorator completes the list
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    group: Group = None,
    interleave: int = 1,
    q_heads: Heads = "whole",
    exchange: Exchange | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Result:
    """Run one decode step over caches that are spread over ranks, token by token.

    Rank r of the group holds token t of a sequence if (t // interleave) mod size is r, as its token
    number t // (interleave * size) * interleave + t mod interleave. Every rank makes this call,
    with the same arguments but for its caches. Each attends over its own tokens, and the parts are
    exchanged once and merged by `merge_states`. Results are equal to the bit on all ranks. Of
    several new tokens every rank gets its own, and every query sees what it would see of the whole.

    Nothing waits for the GPU, but for the first call of a layout: ranks then compare what they were
    given, and tabulate what they must know of a sequence of every length (8 to 16 bytes for every
    token that the shards can hold). After it the call can be captured into a CUDA graph, where the
    group's backend can (NCCL). A length on the device that the shards cannot hold makes the
    sequence's output NaN on all ranks, and is reported by `check_overflow`, which all ranks call at
    the same point; this call never raises for an earlier one, for ranks would not do so at once.
    A rank whose call fails after the layout was agreed on gives NaN to the others, and raises.

    Args:
        q: As for `gqa_decode`. With q_heads="sharded" this rank's heads, those that come
            rank * num_q_heads behind the first.
        k_cache: This rank's shard, [batch, local_max, num_kv_heads, head_dim], with room for
            equally many tokens on all ranks; or its pools of pages, with its own `block_table`.
        v_cache: As k_cache, with head_dim_v.
        k: As for `gqa_decode`: all KV heads of the cache, the same on all ranks. A token is written
            by its owner alone, which the device decides where the lengths are there.
        v: As k.
        cache_seqlens: As for `gqa_decode`: tokens on all ranks together before this call; the same
            on all ranks, whose values nobody compares.
        group: The ranks: a ProcessGroup, a DeviceMesh of one dimension (`mesh["context"]`), or
            None for all of them.
        interleave: Tokens that follow one another on a rank.
        q_heads: "whole": every rank has all heads of q, and gets all heads of the output.
            "sharded": heads are spread over the ranks, as tensor parallelism leaves them where KV
            heads are held by several ranks (vLLM's decode context parallelism): q is gathered
            before, and every rank gets its own heads. `sinks` and `alibi_slopes` are those of all
            heads either way, the same on all ranks.
        exchange: "all_gather": every rank gets all parts and merges all rows. "all_to_all": every
            rank merges a share of the rows, and the merged are gathered. "reduce_scatter": as
            all_to_all, but log-sum-exps go first, and the backend adds outputs; repeats to the bit
            as far as its sums do. None: by size.
        return_lse: As for `gqa_decode`.
        **options: `CallOptions`.

    Returns:
        As `gqa_decode` for the whole context: the output, and the log-sum-exp.

    Raises:
        InputError: An argument is not allowed on this rank or another, or ranks disagree: on all
            ranks, at the first call of a layout. There is no process group. Nothing was launched.
        CacheOverflowError: cache_seqlens is an int that the shards cannot hold.
        CollectiveError: A rank did not come, or is gone.
        GqaError: As for `gqa_decode`.

    Source: Yang et al., "Context Parallelism for Scalable Million-Token Inference"
    (arXiv:2411.01783); the order of tokens and sharded heads are vLLM's.
    """
    given = q, k_cache, v_cache, k, v
    asked = {"return_lse": return_lse, "interleave": interleave, "q_heads": q_heads,
             "exchange": exchange}  # fmt: skip
    for name in options.keys() - CallOptions.__annotations__.keys():
        raise TypeError(f"decode_context_parallel() got an unexpected keyword argument {name!r}")
    rename(options)
    ranks = ranks_of(group)
    return _decode(ranks, given, cache_seqlens, asked, options)


def _decode(
    ranks: Ranks,
    given: tuple[Any, ...],
    lengths: int | Tensor,
    asked: dict[str, Any],
    options: dict[str, Any],
) -> Result:
    key = key_of(given, lengths, asked, options)
    settled = None if key is None else agreement.known(ranks, key)
    if not isinstance(settled, Settled):
        settled = _agree(ranks, given, lengths, asked, options)
        if key is not None:
            agreement.keep(ranks, key, settled)
    sharded, device = settled.heads == "sharded", given[0].device
    here = here_of(settled, lengths, options.get("cache_leftpad"))
    part = Part.empty(settled.part_shape, device)
    failure: Exception | None = None
    try:
        if sharded:
            given = _all_heads(ranks, given[0]), *given[1:]
        with settled.flag.kept():
            attend(settled, given, here, options, part)
    except CollectiveError:
        raise
    except (GqaError, RuntimeError) as error:
        failure = error
        part.memory.fill_(torch.nan)  # for the others, which wait
    if ranks.size == 1:
        out, lse = part.out.to(settled.out_dtype), part.lse
    else:
        exchanged = by_heads if sharded else whole
        out, lse = exchanged(ranks, part, settled.exchange, settled.out_dtype)
    if failure is not None:
        raise failure
    tokens = settled.part_shape[:-2]  # the batch's, or [batch, tokens]
    out, lse = out.view(*tokens, *out.shape[1:]), lse.view(*tokens, *lse.shape[1:])
    if lse.dim() == 3:
        lse = lse.mT.contiguous() if lse.shape[1] > 1 else lse[:, 0]
    return (out, lse) if asked["return_lse"] else out


def _agree(
    ranks: Ranks,
    given: tuple[Any, ...],
    lengths: int | Tensor,
    asked: dict[str, Any],
    options: dict[str, Any],
) -> Settled:
    """Settle a layout that is new, with all ranks."""
    q = given[0]
    device = q.device if isinstance(q, Tensor) else ranks.device
    check_backend(ranks, device)
    try:
        settled = settle(ranks, given, lengths, asked, options)
        terms = terms_of(given, lengths, asked, options)
    except GqaError as error:
        agreement.agree(ranks, device, {}, error)
        raise
    agreement.agree(ranks, device, terms, None)
    return settled


def _all_heads(ranks: Ranks, q: Tensor) -> Tensor:
    """The heads of all ranks, those of the first one in front."""
    everything = q.new_empty(ranks.size, *q.shape)
    ranks.all_gather(everything.view(-1), q.contiguous().view(-1))
    return everything.movedim(0, -3).flatten(-3, -2)
