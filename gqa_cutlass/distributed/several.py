"""Several tokens of a sequence over shards: which of them are here, and which a query sees.

Kernels take the last tokens of a rank's part for those of the queries. They are older, or drafts of
other numbers; which, depends on where in a stripe the sequence ends, and is tabulated for all of
its places. A mask of drafts then says what each query sees of them. All that is older it sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.call.asked import NO_WINDOW
from gqa_cutlass.call.tokens import TREE, WORD_BITS, is_tree, pack_tree_mask
from gqa_cutlass.codegen.schema.problem import MAX_TOKENS
from gqa_cutlass.distributed.refusal import refuse
from gqa_cutlass.distributed.sharding import Sharding
from gqa_cutlass.errors import shown

_MAX_TABLE_BYTES = 2**22  # of what is tabulated, which takes 64 times as many meanwhile


@dataclass(frozen=True, kw_only=True)
class Several:
    """What a rank must know of several tokens, for every place that a length has in its stripe.

    Args:
        drafts: Which query's token each of the last ones here is, as many as there are queries;
            negative for older ones. Int32 [stripe, queries].
        causal: What queries see of these, if they see tokens up to their own, as `pack_tree_mask`
            packs it, but int32. [stripe, queries, words].
        here: 1 for the new tokens that come here, else 0. Int32 [stripe, new].
        most: New tokens that can come here.
    """

    drafts: Tensor
    causal: Tensor
    here: Tensor
    most: int

    def seen(self, places: Tensor, tree: Tensor | None) -> Tensor:
        """What queries see of the last tokens here.

        Args:
            places: Those of the lengths before the call in their stripes, int32 [batch].
            tree: What they see of all drafts, as `gqa_decode` has it; None: those up to their own.

        Returns:
            Such a mask, packed or not.
        """
        if tree is None:
            return self.causal.index_select(0, places).view(torch.uint32)
        drafts = self.drafts.index_select(0, places)[:, None]  # for all queries
        index = drafts.clamp(min=0).long().expand(-1, tree.shape[1], -1)
        if is_tree(tree):
            sees = tree.gather(2, index)
        else:
            words = tree.view(torch.int32).gather(2, index // WORD_BITS)
            sees = (words >> index % WORD_BITS) & 1 != 0
        return sees | (drafts < 0)

    def arriving(
        self, places: Tensor, appended: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new tokens that come here, one sequence's behind another's.

        Args:
            places: As for `seen`.
            appended: Negative for sequences of which none is to come; int32 [batch].
            k: Keys, [batch, new, num_kv_heads, head_dim]; without the second dimension, of one.
            v: Values, likewise.

        Returns:
            Keys and values, [most of all, num_kv_heads, head_dim], and where each sequence's
            begin, int32 [batch + 1]. Behind the last there is anything.
        """
        here = self.here.index_select(0, places) * (appended >= 0)[:, None]
        batch, new = here.shape
        ends = here.flatten().cumsum(0, dtype=torch.int32)
        number = torch.arange(batch * new, device=ends.device)
        others = ends[-1] + number - ends  # behind those that come, in their order
        target = torch.where(here.flatten() != 0, ends - 1, others)
        order = torch.empty_like(number).scatter_(0, target, number)[: batch * self.most]
        keys, values = (t.reshape(-1, *t.shape[-2:]).index_select(0, order) for t in (k, v))
        return keys, values, torch.nn.functional.pad(ends[new - 1 :: new], (1, 0))


@cache  # for good: CUDA graphs read what was made
def tabulate_several(sharding: Sharding, queries: int, new: int, device: torch.device) -> Several:
    """Tabulate for so many queries, the last tokens of sequences that get so many new ones."""
    places = torch.arange(sharding.stripe, dtype=torch.int32, device=device)[:, None]
    count = torch.arange(max(queries, new), dtype=torch.int32, device=device)
    # Of longer lengths at the same places, which have as many tokens on every rank as are asked of.
    after = places + queries * sharding.stripe + new
    drafts = sharding.position(sharding.count(after) - queries + count[:queries])
    drafts -= after - queries
    tokens = places + count[:new]
    return Several(
        drafts=drafts,
        causal=pack_tree_mask(drafts[:, None] <= count[:queries, None]).view(torch.int32),
        here=sharding.count(tokens + 1) - sharding.count(tokens),
        most=sharding.most(new),
    )


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a call, of each sequence.

    Args:
        queries: Those of q.
        new: Those of k and v.
        several: Whether they are not one of each, at most, which see all.
        masked: Whether queries are told which of them they see.
        most: New ones that can come to a rank.
    """

    queries: int
    new: int
    several: bool
    masked: bool
    most: int


def tokens_of(
    given: Sequence[Any], options: Mapping[str, Any], window: tuple[int, int], sharding: Sharding
) -> Tokens:
    """Count the tokens of a call.

    Args:
        given: q, k_cache, v_cache, k and v.
        options: Its options.
        window: What queries see before and behind their own tokens; -1 for all.
        sharding: Which tokens are here.

    Raises:
        InputError: Several are too many, or with what is not exact for them; or not all alike.
    """
    q, _, _, k, v = given
    queries, new = _count(q), 0 if k is None and v is None else _count(k)
    tree = options.get(TREE) is not None
    several = isinstance(q, Tensor) and q.dim() in (3, 4) and (max(queries, new) > 1 or tree)
    masked = several and (tree or (queries > 1 and options.get("causal") is not False))
    if several:
        _check_several(queries, new, options, window, sharding)
        batch = len(q)
        for name, tensor in (("k", k), ("v", v)) if new else ():
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else None
            if shape is None or shape[:-2] not in ([batch, new], [batch] * (new == 1)):
                got = shown(tensor) if shape is None else f"shape {shape}"
                refuse(name, got, f"[{batch}, {new}, num_kv_heads, head_dim], as q and k have them")
    return Tokens(queries=queries, new=new, several=several, masked=masked, most=sharding.most(new))


def _count(tensor: object) -> int:
    return tensor.shape[1] if isinstance(tensor, Tensor) and tensor.dim() == 4 else 1


def _check_several(
    queries: int, new: int, options: Mapping[str, Any], window: tuple[int, int], sharding: Sharding
) -> None:
    """Raise InputError for several tokens that shards do not have."""
    if not 1 <= max(queries, new) <= MAX_TOKENS:
        refuse("tokens of q and k", f"{queries} and {new}", f"up to {MAX_TOKENS} per sequence")
    if options.get(TREE) is not None and new not in (0, queries):
        refuse(TREE, f"one with {queries} queries and {new} new tokens", "as many of both")
    if window != NO_WINDOW:
        allowed = f"{NO_WINDOW} with several tokens, of which each has another window of a shard"
        refuse("window_size", shown(options["window_size"]), allowed)
    if options.get("alibi_slopes") is not None:
        allowed = "none with several tokens, whose distances are not those in a shard"
        refuse("alibi_slopes", "some", allowed)
    most = _MAX_TABLE_BYTES // _table_bytes(sharding.size, queries, new)
    if sharding.interleave > most:
        got = f"{sharding.interleave} with {queries} queries and {new} new tokens"
        refuse("interleave", got, f"up to {most} with so many on {sharding.size} ranks")


def first_query(q: Tensor) -> Tensor:
    """The first token of every sequence."""
    return q[:, 0] if q.dim() == 4 else q


def _table_bytes(stripe: int, queries: int, new: int) -> int:
    """Bytes of what `tabulate_several` makes."""
    return 4 * stripe * (queries * (1 + -(-queries // WORD_BITS)) + new)
