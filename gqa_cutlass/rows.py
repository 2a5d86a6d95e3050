"""Moves tokens into and within caches, to and from rows that only the device knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_TEMPORARY_BYTES = 2**28


def scatter(
    pairs: Sequence[tuple[Tensor, Tensor]],
    starts: Tensor,
    counts: int | Tensor,
    room: Tensor | None,
) -> None:
    """Write the first tokens of every sequence behind those that it has.

    Token j of a sequence goes to row (start + j) modulo max_seq_len, each to another one, so that
    what must not be written can be written back as it was. No index is out of bounds, whatever the
    starts are.

    Args:
        pairs: Caches, [batch, max_seq_len, heads, dim], each with what is new,
            [batch, tokens, heads, dim].
        starts: Integer [batch], the sequences' lengths.
        counts: How many of the tokens to write: one int for all, or integer [batch].
        room: Bool [batch], False for sequences to leave alone; None for none of them.
    """
    (cache, new), *_ = pairs
    batch, max_seq_len = cache.shape[:2]
    tokens = min(new.shape[1], max_seq_len)  # sequences with more have no room
    step = torch.arange(tokens, device=cache.device)
    rows = (starts.long()[:, None] + step).remainder_(max_seq_len)
    sequence = torch.arange(batch, device=cache.device)[:, None]
    written = step < (counts[:, None] if isinstance(counts, Tensor) else counts)
    if room is not None:
        written = written & room[:, None]
    for cache, new in pairs:
        old = cache[sequence, rows]
        cache[sequence, rows] = torch.where(written[..., None, None], new[:, :tokens], old)


def gather(
    caches: Iterable[Tensor], reach: int, sources: Tensor, targets: Tensor | None = None
) -> None:
    """Copy rows of the batch over others, as if all at once, in pieces of bounded size.

    Args:
        caches: Each [batch, max_seq_len, heads, dim].
        reach: How many of their tokens to copy.
        sources: Int64, the rows to read.
        targets: Int64, the rows to write, each once; None for all of them, in order.
    """
    for cache in caches:
        window = max(1, _TEMPORARY_BYTES // (len(sources) * cache[0, 0].nbytes))
        for start in range(0, reach, window):
            tokens = cache[:, start : min(start + window, reach)]
            moved = tokens.index_select(0, sources)
            if targets is None:
                tokens.copy_(moved)
            else:
                tokens.index_copy_(0, targets, moved)
