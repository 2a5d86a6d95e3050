"""Ranks that agree on a call before its first exchange, so that none waits for what never comes.

A rank that refuses a call, or that was given another one than the others, would leave them waiting.
So every layout that is new to a group is announced to all of its ranks, with what a rank has
against it, and all of them raise. Later calls of the layout exchange nothing but results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from gqa_cutlass.cache.lengths import capturing
from gqa_cutlass.distributed.groups import Ranks
from gqa_cutlass.errors import InputError

Terms = Mapping[str, Any]  # what must be alike: text, by argument
_agreed: WeakKeyDictionary[dist.ProcessGroup, dict[object, object]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class _Word:
    """What a rank says of a call.

    Args:
        terms: What it was given.
        flaw: What is wrong with it, or None.
    """

    terms: dict[str, str]
    flaw: str | None


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
    own = _Word(terms=texts, flaw=None if error is None else str(error))
    words = ranks.gather_objects(own)
    said = [word for word in words if isinstance(word, _Word)]
    for rank, word in enumerate(said):
        if word.flaw is not None:
            raise InputError(
                f"decode_context_parallel: rank {rank} of {ranks.size} refuses the call: "
                f"{word.flaw}"
            ) from error
    for rank, word in enumerate(said):
        for name in {**said[0].terms, **word.terms}:
            first, other = said[0].terms.get(name), word.terms.get(name)
            if first != other:
                raise InputError(
                    f"decode_context_parallel: {name}: got {first} on rank 0 and {other} on rank "
                    f"{rank}; allowed: the same on all {ranks.size} ranks. Nothing was launched. "
                    "Make the same call on every rank; caches with room for equally many tokens."
                )
