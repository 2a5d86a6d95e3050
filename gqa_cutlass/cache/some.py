"""Decoding for some sequences of a cache: which, what they hold, and what they hold then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.api import gqa_decode
from gqa_cutlass.cache.growth import Turned
from gqa_cutlass.cache.guard import Stored, lack_of_memory, raise_no_temporaries
from gqa_cutlass.cache.inputs import ints, new_tokens, per_sequence, refuse, turned
from gqa_cutlass.cache.lengths import Lengths
from gqa_cutlass.cache.ring import Ring
from gqa_cutlass.call.options import CallOptions, Options
from gqa_cutlass.call.plan import Result
from gqa_cutlass.errors import shown
from gqa_cutlass.tensors import is_tensor, plain_shape
from gqa_cutlass.tracing import break_graph, is_traced

_FOREIGN = tuple(CallOptions.__annotations__.keys() - Options.__annotations__.keys())
Rows = Sequence[int] | Tensor | None  # None: all of them
_LEAST = torch.iinfo(torch.int32).min


def is_foreign(options: Mapping[str, Any]) -> bool:
    """Whether there are options that `gqa_decode` has, and `KVCache.decode` has not."""
    for name in _FOREIGN:  # which torch can trace
        if name in options:
            return True
    return False


def decode_some(
    cache: Stored,
    lengths: Lengths,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    rows: Rows,
    leads: bool,
    ring: Ring | None,
    **options: Any,
) -> Result:
    """`KVCache.decode` for some sequences.

    Args:
        cache: Keys and values.
        lengths: What all of its sequences hold.
        tensors: q, k and v.
        rows: The sequences.
        leads: Whether the lengths go on with the tokens.
        ring: The cache's, if it has a window.
        **options: Those of `gqa_decode`.

    Raises:
        GqaError: As for `KVCache.decode`.
    """
    if "cache_batch_idx" in options:
        refuse("decode", "cache_batch_idx", "an index", "rows=, which finds the lengths by it too")
    if rows is None or is_foreign(options):
        named = next(name for name in _FOREIGN if name in options)
        refuse("decode", named, "an option of gqa_decode", "those of KVCache.decode alone")
    q, k, v = tensors
    if ring is not None:
        options = ring.options(q, k, options)
    memory = ring or cache
    tokens = 0 if k is None else new_tokens(k)
    try:
        some = (_traced if is_traced() else _some)(lengths, q, rows, tokens)
        positions = turned(q, k, options) if tokens and options else None
        if positions is not None and not is_traced():
            some.check_positions(positions)
        result: Result = gqa_decode(
            q, memory.k, memory.v, k, v, cache_seqlens=some.held, cache_batch_idx=some.rows,
            **options,
        )  # fmt: skip
        if k is not None and leads:
            (some.advance_unseen if is_traced() else some.advance)(tokens, positions)
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

    def check_positions(self, turned: Turned) -> None:
        """Refuse what `Lengths.check_positions` refuses, where the host knows the rows."""
        if self._host is not None:
            self._lengths.check_positions(turned, self._host)

    def advance(self, tokens: int, turned: Turned | None) -> None:
        """Add so many tokens to those that had room for them, and positions."""
        sure = turned is None or turned.starts is None
        rows = self._host if sure else None
        self._lengths.advance_to(self._longer(tokens, turned), rows, tokens)

    def advance_unseen(self, tokens: int, turned: Turned | None) -> None:
        """The same in code that torch traces."""
        self._lengths.advance_unseen(tokens, lengths=self._longer(tokens, turned))

    def _longer(self, tokens: int, turned: Turned | None) -> Tensor:
        """All lengths afterwards. A row that comes twice gets the tokens once."""
        lengths, held = self._lengths, self.held
        fits = (self.rows == self._nearest) & lengths.fits(tokens, held, turned)
        grown = (held + tokens).masked_fill(~fits, _LEAST)
        return lengths.seqlens.scatter_reduce(0, self._nearest.long(), grown, "amax")


def _traced(lengths: Lengths, q: Tensor, rows: Sequence[int] | Tensor, tokens: int) -> Some:
    """As `_some` in code that torch traces, where only the device knows what is there.

    What is not allowed breaks the graph, so that the host says what is wrong with it.
    """
    if not _may_be_traced(lengths, q, rows, tokens > 0):
        why = "KVCache.decode: rows: ints, or int32 on the device, one for each row of q"
        return break_graph(_some, why)(lengths, q, rows, tokens)
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


def _some(lengths: Lengths, q: Tensor, rows: Sequence[int] | Tensor, tokens: int) -> Some:
    """The sequences that `decode` is asked for.

    Raises:
        InputError: No such rows, or not as many as q has; or ints that name one twice, to append.
        CacheOverflowError: One is known to have no room for its tokens.
    """
    count, *_ = *plain_shape(q), 0  # what has none, `gqa_decode` refuses
    if is_tensor(rows):
        like = lengths.seqlens.new_empty(1).expand(count)
        return Some(lengths, per_sequence("decode", "rows", rows, like, torch.int32))
    host = ints("decode", "rows", rows, 0, lengths.batch_size - 1)
    if len(host) != count:
        refuse("decode", "rows", f"{len(host)} rows", f"{count}, one for each row of q")
    if tokens:
        if len(set(host)) < len(host):
            refuse("decode", "rows", shown(rows), "no row twice, where a token is appended")
        lengths.check_room_of("decode", host, tokens)
    return Some(lengths, lengths.upload("decode", host, torch.int32), host)
