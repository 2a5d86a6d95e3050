"""Pools of which every rank has its tokens of every page: page tables are the same on all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gqa_cutlass.cache.paged.pools import Pools, to_device
from gqa_cutlass.cache.paged.sequences import Held
from gqa_cutlass.cache.scales import Scales
from gqa_cutlass.distributed.decode import decode_context_parallel
from gqa_cutlass.distributed.exchange import Exchange
from gqa_cutlass.distributed.groups import Ranks
from gqa_cutlass.distributed.settle import Heads
from gqa_cutlass.distributed.sharding import Sharding


class ShardedPools(Pools):
    """A rank's rows of pages, each of whole stripes of tokens.

    Token t of a sequence is in its page t // page_size on every rank, and so is what comes before
    it there. Hence pages are full, shared and copied on all ranks at once, and the host counts as
    if there were one cache.

    Args:
        layers: As for `Pools`, of this rank.
        scales: As for `Pools`.
        ranks: The ranks.
        interleave: Tokens that follow one another on a rank; divides a page's rows.
        q_heads: As for `decode_context_parallel`.
        exchange: As for `decode_context_parallel`.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        scales: Sequence[Scales],
        ranks: Ranks,
        interleave: int,
        q_heads: Heads,
        exchange: Exchange | None,
    ) -> None:
        super().__init__(layers, scales)
        self.sharding = Sharding(rank=ranks.rank, size=ranks.size, interleave=interleave)
        self.attend = partial(
            decode_context_parallel, group=ranks.group, interleave=interleave, q_heads=q_heads,
            exchange=exchange,
        )  # fmt: skip

    @property
    def page_size(self) -> int:
        """Tokens of a page, on all ranks together."""
        return self.rows * self.sharding.size

    def here(self, tokens: int) -> int:
        """How many of a sequence's first tokens have rows here."""
        return self.sharding.count(tokens)

    def slots(
        self, given: Sequence[Held], tokens: Sequence[int], skipped: Sequence[int] | None = None
    ) -> Tensor:
        """As for `Pools`: int64 [2, tokens here], which of the tokens are here and their rows."""
        found, before = [np.empty((2, 0), dtype=np.int64)], 0
        for held, count, skip in zip(given, tokens, skipped or [0] * len(given), strict=True):
            ends = torch.arange(held.length + skip, held.length + count + 1, device="cpu")
            local = self.sharding.count(ends).numpy()  # the number of a token here, if it is
            mine = np.flatnonzero(np.diff(local))
            page, row = np.divmod(local[mine], self.rows)
            pages = np.asarray(held.pages, dtype=np.int64)[page]
            found.append(np.stack((before + mine, pages * self.rows + row)))
            before += count - skip
        return to_device(np.concatenate(found, axis=1), self.device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write those tokens of a layer that are here, of all, [tokens, num_kv_heads, head_dim]."""
        mine, rows = slots
        super().write(layer, rows, k.index_select(0, mine), v.index_select(0, mine))
