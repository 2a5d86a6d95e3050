"""Ranks that agree on a call before its first exchange, so that none waits for what never comes.

A rank that refuses a call, or that was given another one than the others, would leave them waiting.
So every layout that is new to a group is announced to all of its ranks, with what a rank has
against it, and all of them raise. Later calls of the layout exchange nothing but results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from gqa_cutlass.devices import capturing
from gqa_cutlass.distributed.groups import Ranks
from gqa_cutlass.errors import InputError

Terms = Mapping[str, Any]  # what must be alike: text, by argument
_agreed: WeakKeyDictionary[dist.ProcessGroup, dict[object, object]] = WeakKeyDictionary()


def known(ranks: Ranks, key: object) -> object | None:
    """What was kept when the group agreed on a layout, or None: it has not yet."""
    return _agreed.get(ranks.group, {}).get(key)


def keep(ranks: Ranks, key: object, value: object) -> None:
    """Remember that the group has agreed on a layout."""
    _agreed.setdefault(ranks.group, {})[key] = value


def agree(ranks: Ranks, device: torch.device, terms: Terms, error: Exception | None) -> None:
    """Compare a call with those of the other ranks; waits for them.

    Args:
        ranks: All of them come here.
        device: Where the call's tensors are.
        terms: What must be alike, by argument.
        error: What this rank has against the call.

    Raises:
        InputError: A rank refuses its call, or has another one: the same on every rank.
        CollectiveError: A rank did not come.
    """
    if capturing(device):
        raise InputError(
            "decode_context_parallel: got a layout that is new to this group, in a CUDA-graph "
            "capture; allowed: one that the ranks have agreed on, which waits for the GPU. Nothing "
            "was captured. Make the same call once before the capture."
        ) from error
    texts = {name: str(value) for name, value in terms.items()}
    flaw = "" if error is None else str(error)
    said = [json.loads(word) for word in ranks.gather_words(json.dumps((texts, flaw)))]
    for rank, (_, flaw) in enumerate(said):
        if flaw:
            raise InputError(
                f"decode_context_parallel: rank {rank} of {ranks.size} refuses the call: {flaw}"
            ) from error
    first, _ = said[0]
    for rank, (other, _) in enumerate(said):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise InputError(
                    f"decode_context_parallel: {name}: got {first.get(name)} on rank 0 and "
                    f"{other.get(name)} on rank {rank}; allowed: the same on all {ranks.size} "
                    "ranks. Nothing was launched. Make the same call on every rank; caches with "
                    "room for equally many tokens."
                )
