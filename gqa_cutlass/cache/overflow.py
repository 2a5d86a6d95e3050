"""What is said of sequences that have no room for their tokens."""

from __future__ import annotations

from typing import NoReturn

from gqa_cutlass.errors import CacheOverflowError

_MAX_NAMED = 4
REMEDY = (
    "Shorten these sequences (truncate, reset), replace them (reorder), or allocate a larger cache."
)


def overflow_message(sequences: list[int], limit: int) -> str:
    """What to say of sequences that the device found to have no room.

    Args:
        sequences: Which.
        limit: Tokens that a sequence can hold.
    """
    named = ", ".join(map(str, sequences[:8])) + ", ..." * (len(sequences) > 8)
    return (
        f"KVCache: cache overflow: append or prefill found on the device that sequences "
        f"[{named}] have no room for their tokens (max_seq_len is {limit}), or "
        "a number of tokens that was not given. Nothing was written to them and their "
        f"lengths are as they were; the other sequences are right. {REMEDY}"
    )


def raise_overflow(
    call: str, over: list[tuple[int, int, int]], exact: bool, limit: int
) -> NoReturn:
    """Refuse tokens for which sequences have no room: (sequence, tokens held, tokens to come).

    Args:
        call: That was to append them.
        over: The sequences.
        exact: Whether they hold so many, or may hold more.
        limit: Tokens that a sequence can hold.

    Raises:
        CacheOverflowError: Always.
    """
    named = ", ".join(
        f"sequence {b} holds {n}{'' if exact else ' or more'} tokens and {count} "
        f"{'is' if count == 1 else 'are'} to be appended"
        for b, n, count in over[:_MAX_NAMED]
    )
    more = f", and {len(over) - _MAX_NAMED} more like these" * (len(over) > _MAX_NAMED)
    raise CacheOverflowError(
        f"{call}: cache overflow: {named}{more}; max_seq_len is {limit}. Nothing was "
        f"written. {REMEDY}"
    )


def raise_no_positions(call: str, held: int, tokens: int, positions: int) -> NoReturn:
    """Refuse tokens that a rotary embedding has no position for.

    Args:
        call: In whose name the error is.
        held: Tokens of the sequence whose they are.
        tokens: How many are to come.
        positions: Of the embedding's tables.

    Raises:
        CacheOverflowError: Always.
    """
    raise CacheOverflowError(
        f"{call}: rotary_cos: got {positions} positions, where a sequence holds {held} tokens and "
        f"{tokens} {'is' if tokens == 1 else 'are'} to come; allowed: one for each. Nothing was "
        "written. Make longer tables, or shorten the sequence."
    )
