"""How much longer sequences of a cache get, and what of it may be taken back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How many tokens each sequence gets.

    Args:
        most: No sequence gets more.
        host: Tokens per sequence: one int for all, one each, or None when only the device knows.
        device: The same, as an int for all or as int32 [batch].
    """

    most: int
    host: int | list[int] | None
    device: int | Tensor

    @classmethod
    def of(cls, tokens: int) -> Growth:
        """As many for every sequence."""
        return cls(most=tokens, host=tokens, device=tokens)


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Tokens that the last decode of several appended, until they are accepted.

    Args:
        tokens: How many per sequence.
        known: Lengths before, if the host knew them.
        bound: What none of them exceeded.
    """

    tokens: int
    known: list[int] | None
    bound: int


ONE_TOKEN = Growth.of(1)


@dataclass(frozen=True, kw_only=True)
class Turned:
    """Tokens that a rotary embedding turns, as it must have their positions.

    Args:
        positions: Of the tables.
        tokens: How many of each sequence, the queries if they are more.
        starts: Positions of the first of them, int32 [batch] on the device; None: the lengths.
    """

    positions: int
    tokens: int
    starts: Tensor | None

    def has(self, lengths: Tensor) -> Tensor:
        """Where there are positions for tokens behind these lengths, bool like them."""
        first = lengths if self.starts is None else self.starts
        return (first >= 0) & (first <= self.positions - self.tokens)
