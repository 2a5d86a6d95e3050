"""Which tokens of a sequence a rank holds, and what it must know of a sequence of any length.

Ranks take tokens in turns, `interleave` at a time, and a rank's own are numbered without gaps. All
that a call asks of a length (how many of its tokens are here, whether the next one comes here) is a
function of that length alone. It is tabulated once: a call then looks it up on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeVar

import torch
from torch import Tensor

Count = TypeVar("Count", int, Tensor)  # tokens: of one sequence, or int32 of several
INACTIVE = -1


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """A rank's part of the tokens: those t for which (t // interleave) mod size is its number.

    Args:
        rank: The number, 0 to size - 1.
        size: Ranks.
        interleave: Tokens that follow one another on a rank.
    """

    rank: int
    size: int
    interleave: int = 1

    @property
    def stripe(self) -> int:
        """Tokens until it is a rank's turn again."""
        return self.size * self.interleave

    def count(self, tokens: Count) -> Count:
        """How many of a sequence's first tokens are here."""
        over = tokens % self.stripe - self.rank * self.interleave
        if isinstance(over, int):
            partial: Count = max(0, min(over, self.interleave))
        else:
            partial = over.clamp(0, self.interleave)
        return tokens // self.stripe * self.interleave + partial

    def position(self, local: Count) -> Count:
        """The number in the sequence of a token that is number `local` here."""
        turn, rest = local // self.interleave, local % self.interleave
        return turn * self.stripe + self.rank * self.interleave + rest

    def most(self, tokens: int) -> int:
        """The most that can be here of so many tokens that follow one another."""
        turns, rest = divmod(tokens, self.stripe)
        return turns * self.interleave + min(rest, self.interleave)

    def owns(self, token: int) -> bool:
        """Whether a token is here."""
        return token // self.interleave % self.size == self.rank

    def capacity(self, local_max: int) -> int:
        """Tokens of a sequence that ranks with room for `local_max` each hold together.

        The first rank has as many as any other, so that it is full first.
        """
        turns, rest = divmod(local_max, self.interleave)
        return turns * self.stripe + rest

    @cached_property
    def first(self) -> Sharding:
        """Of the first rank, which no other has more tokens than."""
        return Sharding(rank=0, size=self.size, interleave=self.interleave)


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a rank must know of a sequence, for every length that it may have before a call.

    A length that the shards cannot hold is one that this rank's shard cannot hold either, so that
    every rank's kernel finds it, and reports it, without asking the others.

    Args:
        values: Int32 [what, lengths], one row per attribute below, lengths from `INACTIVE` on.
        names: What the rows are.
    """

    values: Tensor
    names: tuple[str, ...]

    def look_up(self, lengths: Tensor) -> dict[str, Tensor]:
        """What holds for sequences of these lengths, int32 [batch] each, by name.

        Returns:
            attended: Tokens here, new ones included; negative for an inactive sequence.
            appended: Tokens here before the new ones, or negative where all go to other ranks.
            hidden: Tokens here that are older than the window.
            behind: Tokens elsewhere that are newer than the last one here.
        """
        index = lengths.clamp(INACTIVE, self.values.shape[1] - 1 + INACTIVE) - INACTIVE
        return dict(zip(self.names, self.values.index_select(1, index).unbind(), strict=True))


@cache  # for good: CUDA graphs read what was made
def tabulate(
    sharding: Sharding,
    local_max: int,
    device: torch.device,
    *,
    new: int,
    window: int = -1,
    behind: bool = False,
) -> Table:
    """Tabulate for shards of `local_max` tokens.

    Args:
        sharding: Whose they are.
        local_max: Tokens that a sequence's shard can hold.
        device: Where the lengths will be.
        new: Tokens that calls bring to each sequence.
        window: Tokens before the newest that are attended to; -1 for all: no `hidden`.
        behind: Whether to have `behind`.
    """
    capacity = sharding.capacity(local_max)
    too_long = max(0, capacity + 1 - new)
    lengths = torch.arange(INACTIVE, too_long + 1, dtype=torch.int32, device=device)
    after = lengths + new
    attended = sharding.count(after)
    attended[0], attended[-1] = INACTIVE, local_max + 1
    rows = {"attended": attended}
    if new:
        here = sharding.count(lengths)
        rows["appended"] = here.masked_fill(here == attended, INACTIVE)
        rows["appended"][0] = rows["appended"][-1] = INACTIVE
    if window >= 0:
        rows["hidden"] = sharding.count((after - 1 - window).clamp(min=0))
    if behind:
        last = sharding.position(attended - 1)
        rows["behind"] = (after - 1 - last).masked_fill(attended < 1, 0)
    return Table(values=torch.stack(tuple(rows.values())), names=tuple(rows))
