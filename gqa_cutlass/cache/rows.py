"""Moves tokens into and within caches, to and from rows that only the device knows.

Rows go through a buffer of bounded size, which is allocated before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gqa_cutlass.cache.growth import Growth
from gqa_cutlass.cache.lengths import Lengths

_TEMPORARY_BYTES = 2**26  # a GPU is busy with as much for longer than a launch takes
_INDEX_BYTES = 18  # of a token of a sequence, to know where it goes: two int64, two bools


def buffer(cache: Tensor, sequences: int, tokens: int) -> Tensor:
    """Memory for the rows that `scatter` and `gather` have under way.

    Args:
        cache: [batch, max_seq_len, heads, dim].
        sequences: Of how many rows of the batch tokens are moved.
        tokens: How many of each at most.

    Returns:
        [sequences, tokens, heads, dim] of the largest piece, all of it unless that is too large.
    """
    heads, dim = cache.shape[2:]
    per_head = dim * cache.element_size()
    each = _TEMPORARY_BYTES // max(1, sequences)  # bytes of a sequence
    width = max(1, min(heads, (each - _INDEX_BYTES) // per_head))
    window = max(1, min(tokens, each // (width * per_head + _INDEX_BYTES)))
    return cache.new_empty(sequences, window, width, dim)


def widest(caches: Iterable[Tensor]) -> Tensor:
    """Of keys and values the one whose rows take more memory."""
    return max(caches, key=lambda cache: cache.shape[-1])


def extend(
    pairs: Sequence[tuple[Tensor, Tensor]], lengths: Lengths, growth: Growth, *, leads: bool
) -> None:
    """Write tokens behind every sequence's, where there is room, and count them.

    Args:
        pairs: As for `scatter`.
        lengths: Of the sequences.
        growth: How many of the tokens each gets.
        leads: Whether the lengths go on with them.
    """
    room = lengths.room(growth)
    _write(pairs, lengths, growth, room)
    if room is not None:
        lengths.note_overflow(room)
    if leads:
        lengths.advance(growth, room)


def _write(
    pairs: Sequence[tuple[Tensor, Tensor]], lengths: Lengths, growth: Growth, room: Tensor | None
) -> None:
    """As `extend`, but counting none: `scatter`, or one copy."""
    settled = lengths.settled
    slots = pairs[0][0].shape[1]
    ring = slots < lengths.limit
    whole = not ring or isinstance(growth.device, int)  # or else padding would land on tokens
    if room is None and whole and settled is not None and len(set(settled)) == 1:
        for cache, new in pairs:
            _copy(cache, new, settled[0])  # padding included, which lands behind the lengths
        return
    cache = widest(cache for cache, _ in pairs)
    through = buffer(cache, lengths.batch_size, min(growth.most, slots))
    scatter(pairs, lengths.seqlens, growth.device, room, through, ring=ring)


def _copy(cache: Tensor, new: Tensor, start: int) -> None:
    """Write tokens of all sequences from one on; of a ring, the last ones that it has room for."""
    slots = cache.shape[1]
    skipped = max(0, new.shape[1] - slots)
    first = (start + skipped) % slots
    begun = new[:, skipped : skipped + slots - first]
    cache[:, first : first + begun.shape[1]].copy_(begun)
    rest = new[:, skipped + begun.shape[1] :]
    if rest.shape[1]:
        cache[:, : rest.shape[1]].copy_(rest)


def scatter(
    pairs: Sequence[tuple[Tensor, Tensor]],
    starts: Tensor,
    counts: int | Tensor,
    room: Tensor | None,
    buffer: Tensor,
    *,
    ring: bool = False,
) -> None:
    """Write the first tokens of every sequence behind those that it has.

    Token j of a sequence goes to row (start + j) modulo max_seq_len, each of a piece to another
    one, so that what must not be written can be written back as it was. No index is out of bounds,
    whatever the starts are.

    Args:
        pairs: Caches, [batch, max_seq_len, heads, dim], contiguous, each with what is new,
            [batch, tokens, heads, dim].
        starts: Integer [batch], the sequences' lengths.
        counts: How many of the tokens to write: one int for all, or integer [batch].
        room: Bool [batch], False for sequences to leave alone; None for none of them.
        buffer: What `buffer` made for so many sequences and tokens, no more than rows.
        ring: Whether of more tokens than rows the last ones stay, as they come last.
    """
    cache, new = pairs[0]
    tokens = new.shape[1]
    if not ring:
        tokens = min(tokens, cache.shape[1])  # sequences with more have no room
    for window, some in _pieces(tokens, cache.shape[2], buffer):
        pieces = [(cache[:, :, some], new[:, window, some]) for cache, new in pairs]
        _scatter_piece(pieces, window.start, starts, counts, room, buffer)


def _scatter_piece(
    pairs: Sequence[tuple[Tensor, Tensor]],
    skipped: int,
    starts: Tensor,
    counts: int | Tensor,
    room: Tensor | None,
    buffer: Tensor,
) -> None:
    """As `scatter`, for tokens of which the first is number `skipped` of its sequence."""
    cache, new = pairs[0]
    batch, max_seq_len, _, _ = cache.shape
    number = torch.arange(skipped, skipped + new.shape[1], device=cache.device)
    sequence = torch.arange(batch, device=cache.device)[:, None]
    rows = (starts[:, None] + number).remainder_(max_seq_len).add_(sequence * max_seq_len).flatten()
    written = number < (counts[:, None] if isinstance(counts, Tensor) else counts)
    if room is not None:
        written = written & room[:, None]
    for cache, new in pairs:
        held = _part(buffer, *new.shape)
        cache = cache.view(-1, *cache.shape[2:])
        torch.index_select(cache, 0, rows, out=held.flatten(0, 1))
        torch.where(written[..., None, None], new, held, out=held)
        cache.index_copy_(0, rows, held.flatten(0, 1))


def gather(
    caches: Iterable[Tensor], reach: int, sources: Tensor, targets: Tensor | None, buffer: Tensor
) -> None:
    """Copy rows of the batch over others, as if all at once.

    Args:
        caches: Each [batch, max_seq_len, heads, dim].
        reach: How many of their tokens to copy.
        sources: Int64, the rows to read.
        targets: Int64, the rows to write, each once; None for all of them, in order.
        buffer: What `buffer` made for so many sequences and tokens.
    """
    for cache in caches:
        for window, some in _pieces(reach, cache.shape[2], buffer):
            tokens = cache[:, window, some]
            moved = _part(buffer, len(sources), *tokens.shape[1:])
            torch.index_select(tokens, 0, sources, out=moved)
            if targets is None:
                tokens.copy_(moved)
            else:
                tokens.index_copy_(0, targets, moved)


def _pieces(tokens: int, heads: int, buffer: Tensor) -> Iterator[tuple[slice, slice]]:
    """Of all tokens and heads, as many at a time as there is a buffer for."""
    _, window, width, _ = buffer.shape
    for start in range(0, tokens, window):
        for head in range(0, heads, width):
            yield slice(start, min(start + window, tokens)), slice(head, min(head + width, heads))


def _part(buffer: Tensor, *shape: int) -> Tensor:
    """The first elements of a buffer."""
    return buffer.flatten()[: torch.Size(shape).numel()].view(shape)
