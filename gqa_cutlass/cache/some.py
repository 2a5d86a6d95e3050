"""Decoding for some sequences of a cache: which, what they hold, and that it is a token more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.api import gqa_decode
from gqa_cutlass.cache.guard import Stored, lack_of_memory, raise_no_temporaries
from gqa_cutlass.cache.inputs import ints, per_sequence, refuse
from gqa_cutlass.cache.lengths import Lengths
from gqa_cutlass.call.plan import Result
from gqa_cutlass.errors import shown
from gqa_cutlass.tensors import is_tensor, plain_shape
from gqa_cutlass.tracing import break_graph, is_traced

Rows = Sequence[int] | Tensor | None  # None: all of them
_LEAST = torch.iinfo(torch.int32).min


def decode_some(
    cache: Stored,
    lengths: Lengths,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    rows: Rows,
    leads: bool,
    **options: Any,
) -> Result:
    """`KVCache.decode` for some sequences.

    Args:
        cache: Keys and values.
        lengths: What all of its sequences hold.
        tensors: q, k and v.
        rows: The sequences.
        leads: Whether the lengths go on with the token.
        **options: Those of `gqa_decode`.

    Raises:
        GqaError: As for `KVCache.decode`.
    """
    if rows is None or "cache_batch_idx" in options:
        refuse("decode", "cache_batch_idx", "an index", "rows=, which finds the lengths by it too")
    q, k, v = tensors
    try:
        some = (_traced if is_traced() else _some)(lengths, q, rows, k is not None)
        result: Result = gqa_decode(
            q, cache.k, cache.v, k, v, cache_seqlens=some.held, cache_batch_idx=some.rows, **options
        )
        if k is not None and leads:
            (some.advance_unseen if is_traced() else some.advance)()
        return result
    except RuntimeError as error:
        told = lack_of_memory(error)
    raise_no_temporaries("KVCache.decode", cache.device, told)


class Some:
    """Some sequences, one for each row of queries.

    Args:
        lengths: Of all.
        rows: Which, int32 on the device; they may be none of the cache's.
        host: The same, if the host knows them.

    Attributes:
        rows: As given.
        held: What they hold, likewise; anything where there is no such row.
    """

    def __init__(self, lengths: Lengths, rows: Tensor, host: list[int] | None = None) -> None:
        self._lengths, self.rows, self._host = lengths, rows, host
        self._nearest = rows.clamp(0, lengths.batch_size - 1)
        self.held = lengths.seqlens.index_select(0, self._nearest)

    def advance(self) -> None:
        """Add a token to those that had room for it."""
        self._lengths.advance_to(self._longer(), self._host)

    def advance_unseen(self) -> None:
        """The same in code that torch traces."""
        self._lengths.seqlens.copy_(self._longer())
        self._lengths.forget()

    def _longer(self) -> Tensor:
        """All lengths afterwards. A row that comes twice gets one token."""
        lengths, held = self._lengths, self.held
        fits = (self.rows == self._nearest) & (held >= 0) & (held < lengths.limit)
        grown = (held + 1).masked_fill(~fits, _LEAST)
        return lengths.seqlens.scatter_reduce(0, self._nearest.long(), grown, "amax")


def _traced(lengths: Lengths, q: Tensor, rows: Sequence[int] | Tensor, appends: bool) -> Some:
    """As `_some` in code that torch traces, where only the device knows what is there.

    What is not allowed breaks the graph, so that the host says what is wrong with it.
    """
    if not _may_be_traced(lengths, q, rows, appends):
        why = "KVCache.decode: rows: ints, or int32 on the device, one for each row of q"
        return break_graph(_some, why)(lengths, q, rows, appends)
    return Some(lengths, torch.as_tensor(rows, dtype=torch.int32, device=lengths.device))


def _may_be_traced(lengths: Lengths, q: object, rows: object, appends: bool) -> bool:
    if not isinstance(q, Tensor) or not q.dim():
        return False
    if isinstance(rows, Tensor):
        where = rows.dtype, rows.device, rows.shape
        return where == (torch.int32, lengths.device, q.shape[:1])
    if not isinstance(rows, (list, tuple, range)) or len(rows) != q.shape[0]:
        return False
    known = all([type(row) is int and 0 <= row < lengths.batch_size for row in rows])
    return known and not (appends and len(set(rows)) < len(rows))


def _some(lengths: Lengths, q: Tensor, rows: Sequence[int] | Tensor, appends: bool) -> Some:
    """The sequences that `decode` is asked for.

    Raises:
        InputError: No such rows, or not as many as q has; or ints that name one twice, to append.
        CacheOverflowError: One that gets a token is known to be full.
    """
    count, *_ = *plain_shape(q), 0  # what has none, `gqa_decode` refuses
    if is_tensor(rows):
        like = lengths.seqlens.new_empty(1).expand(count)
        return Some(lengths, per_sequence("decode", "rows", rows, like, torch.int32))
    host = ints("decode", "rows", rows, 0, lengths.batch_size - 1)
    if len(host) != count:
        refuse("decode", "rows", f"{len(host)} rows", f"{count}, one for each row of q")
    if appends:
        if len(set(host)) < len(host):
            refuse("decode", "rows", shown(rows), "no row twice, where a token is appended")
        lengths.check_room_of("decode", host)
    return Some(lengths, lengths.upload("decode", host, torch.int32), host)
