"""A rank's part of a step: what the lengths come to here, and attention over what is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.api import gqa_decode
from gqa_cutlass.distributed.exchange import Part
from gqa_cutlass.distributed.settle import STORAGE, TENSORS, Settled, refuse
from gqa_cutlass.errors import CacheOverflowError


@dataclass(frozen=True, kw_only=True)
class Here:
    """What a call comes to on this rank: ints where the lengths are one, or int32 [batch].

    Args:
        attended: Tokens here, the new one included.
        appended: Tokens here before the new one; None or negative where it goes elsewhere.
        hidden: Tokens here that are not attended to, the first ones; None for none.
        behind: Tokens elsewhere that are newer than the last one here, where it matters.
    """

    attended: int | Tensor
    appended: int | Tensor | None = None
    hidden: Tensor | None = None
    behind: int | Tensor | None = None


def here_of(settled: Settled, lengths: int | Tensor, append: bool, padding: Tensor | None) -> Here:
    """What a call comes to on this rank.

    Raises:
        InputError: An int is negative.
        CacheOverflowError: It is one that the shards cannot hold.
    """
    padded = None
    if settled.padding is not None and padding is not None:
        padded = settled.padding.look_up(padding)["attended"]
    if not isinstance(lengths, Tensor) or settled.table is None:
        return _here_of_all(settled, int(lengths), append, padded)
    found = settled.table.look_up(lengths)
    hidden = found.get("hidden", padded)
    if hidden is not None and padded is not None:
        hidden = torch.maximum(hidden, padded)
    return Here(
        attended=found["attended"], appended=found.get("appended"), hidden=hidden,
        behind=found.get("behind"),
    )  # fmt: skip


def _here_of_all(settled: Settled, length: int, append: bool, padded: Tensor | None) -> Here:
    """What a call comes to where all sequences have one length, which the host knows."""
    sharding, after = settled.sharding, length + append
    capacity = sharding.capacity(settled.local_max)
    if length < 0:
        refuse("cache_seqlens", str(length), f"an int from 0 to {capacity - append}")
    if after > capacity:
        raise CacheOverflowError(
            f"decode_context_parallel: cache overflow: sequences of {length} tokens"
            f"{' and a new one' * append} are more than {sharding.size} shards of "
            f"{settled.local_max} tokens hold, {capacity} with interleave={sharding.interleave}; "
            "nothing was written. Shorten the sequences, or allocate larger shards."
        )
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
        appended=attended - 1 if append and sharding.owns(length) else None,
        hidden=hidden,
        behind=after - 1 - sharding.position(attended - 1) if attended else 0,
    )


def attend(
    settled: Settled, given: Sequence[Any], here: Here, options: Mapping[str, Any], part: Part
) -> None:
    """Append the token if it is this rank's, and attend to what is here.

    Where only the device knows whose token it is, it is appended by a step that attends to nothing
    else, inactive on the other ranks; what else there would do so, such as a masked copy, reads
    and writes rows that may be another sequence's.
    """
    q, k_cache, v_cache, k, v = given
    tensors: dict[str, Any] = {name: options.get(name) for name in TENSORS}
    slopes = tensors["alibi_slopes"]
    if settled.sharding.rank:
        tensors["sinks"] = None
    if isinstance(slopes, Tensor):
        tensors["alibi_slopes"] = slopes * settled.sharding.size
    tensors["cache_leftpad"] = here.hidden
    lengths = here.attended
    if here.appended is None:
        k = v = None
    elif isinstance(here.appended, Tensor):
        stored: dict[str, Any] = {name: tensors[name] for name in STORAGE}
        gqa_decode(
            q, k_cache, v_cache, k, v, cache_seqlens=here.appended, window_size=(0, -1), **stored
        )
        k = v = None
    else:
        lengths = here.appended
    _, lse = gqa_decode(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, return_lse=True, out=part.out,
        **settled.kernel, **tensors,
    )  # fmt: skip
    if isinstance(slopes, Tensor) and here.behind is not None:
        behind = here.behind[:, None] if isinstance(here.behind, Tensor) else here.behind
        torch.sub(lse, slopes * behind, out=part.lse)
    else:
        part.lse.copy_(lse)
