"""A rank's part of a step: what the lengths come to here, and attention over what is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.api import gqa_decode
from gqa_cutlass.distributed.exchange import Part
from gqa_cutlass.distributed.refusal import refuse
from gqa_cutlass.distributed.settle import STORAGE, TENSORS, Settled
from gqa_cutlass.distributed.several import first_query
from gqa_cutlass.errors import CacheOverflowError


@dataclass(frozen=True, kw_only=True)
class Here:
    """What a call comes to on this rank: ints where the lengths are one, or int32 [batch].

    Args:
        attended: Tokens here, new ones included.
        appended: Tokens here before the new ones; None or negative where all go elsewhere.
        hidden: Tokens here that are not attended to, the first ones; None for none.
        behind: Tokens elsewhere that are newer than the last one here, where it matters.
        places: Where in their stripes the lengths before the call are; None for one token.
    """

    attended: int | Tensor
    appended: int | Tensor | None = None
    hidden: Tensor | None = None
    behind: int | Tensor | None = None
    places: Tensor | None = None


def here_of(settled: Settled, lengths: int | Tensor, padding: Tensor | None) -> Here:
    """What a call comes to on this rank.

    Raises:
        InputError: An int is negative.
        CacheOverflowError: It is one that the shards cannot hold.
    """
    padded = None
    if settled.padding is not None and padding is not None:
        padded = settled.padding.look_up(padding)["attended"]
    if not isinstance(lengths, Tensor):
        _check_length(settled, lengths)
    if settled.table is None:
        return _here_of_all(settled, int(lengths), padded)
    if not isinstance(lengths, Tensor):
        shape, device = settled.part_shape[:1], settled.device
        lengths = torch.full(shape, lengths, dtype=torch.int32, device=device)
    found = settled.table.look_up(lengths)
    hidden = found.get("hidden", padded)
    if hidden is not None and padded is not None:
        hidden = torch.maximum(hidden, padded)
    return Here(
        attended=found["attended"], appended=found.get("appended"), hidden=hidden,
        behind=found.get("behind"),
        places=None if settled.several is None else lengths % settled.sharding.stripe,
    )  # fmt: skip


def _check_length(settled: Settled, length: int) -> None:
    """Raise for a length of all sequences that is negative, or that the shards cannot hold."""
    sharding, new = settled.sharding, settled.new
    capacity = sharding.capacity(settled.local_max)
    if length < 0:
        refuse("cache_seqlens", str(length), f"an int from 0 to {max(0, capacity - new)}")
    if length + new > capacity:
        raise CacheOverflowError(
            f"decode_context_parallel: cache overflow: sequences of {length} tokens"
            f"{f' and {new} new' * (new > 0)} are more than {sharding.size} shards of "
            f"{settled.local_max} tokens hold, {capacity} with interleave={sharding.interleave}; "
            "nothing was written. Shorten the sequences, or allocate larger shards."
        )


def _here_of_all(settled: Settled, length: int, padded: Tensor | None) -> Here:
    """What a call comes to where all sequences have one length, which the host knows."""
    sharding, new = settled.sharding, settled.new
    after = length + new
    attended = sharding.count(after)
    hidden = padded
    if settled.window >= 0:
        first = sharding.count(max(0, after - 1 - settled.window))
        if hidden is None:
            shape, device = settled.part_shape[:1], settled.device
            hidden = torch.full(shape, first, dtype=torch.int32, device=device)
        else:
            hidden = hidden.clamp(min=first)
    return Here(
        attended=attended,
        appended=attended - 1 if new and sharding.owns(length) else None,
        hidden=hidden,
        behind=after - 1 - sharding.position(attended - 1) if attended else 0,
    )


def attend(
    settled: Settled, given: Sequence[Any], here: Here, options: Mapping[str, Any], part: Part
) -> None:
    """Append the tokens that are this rank's, and attend to what is here.

    Where only the device knows whose tokens they are, and always of several, they are appended by a
    step that attends to nothing else, inactive where none is to come; what else there would do so,
    such as a masked copy, reads and writes rows that may be another sequence's.
    """
    q, k_cache, v_cache, k, v = given
    tensors: dict[str, Any] = {name: options.get(name) for name in TENSORS}
    slopes = tensors["alibi_slopes"]
    if settled.sharding.rank:
        tensors["sinks"] = None
    if isinstance(slopes, Tensor):
        tensors["alibi_slopes"] = slopes * settled.sharding.size
    tensors["cache_leftpad"] = here.hidden
    several, places = settled.several, here.places
    lengths = here.attended
    if here.appended is None:
        k = v = None
    elif isinstance(here.appended, Tensor):
        stored: dict[str, Any] = {name: tensors[name] for name in STORAGE}
        one = q
        if several is not None and places is not None:
            k, v, stored["cu_seqlens_k_new"] = several.arriving(places, here.appended, k, v)
            one = first_query(q)
        gqa_decode(
            one, k_cache, v_cache, k, v, cache_seqlens=here.appended, window_size=(0, -1), **stored
        )
        k = v = None
    else:
        lengths = here.appended
    if several is not None and places is not None and settled.masked:
        tensors["tree_mask"] = several.seen(places, options.get("tree_mask"))
    _, lse = gqa_decode(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, return_lse=True,
        out=part.out.view(settled.part_shape), **settled.kernel, **tensors,
    )  # fmt: skip
    if lse.dim() == 3:  # of several queries, heads before tokens
        part.lse.view_as(lse.mT).copy_(lse.mT)
    elif isinstance(slopes, Tensor) and here.behind is not None:
        behind = here.behind[:, None] if isinstance(here.behind, Tensor) else here.behind
        torch.sub(lse, slopes * behind, out=part.lse)
    else:
        part.lse.copy_(lse)
