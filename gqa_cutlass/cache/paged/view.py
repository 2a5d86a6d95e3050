"""What of a paged cache can be looked at, at any time, by any of its methods and by its user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gqa_cutlass.cache.guard import with_memory
from gqa_cutlass.cache.paged.host import on_host
from gqa_cutlass.cache.paged.inputs import counts
from gqa_cutlass.cache.paged.pools import Pools, check_scaled
from gqa_cutlass.cache.paged.sequences import refuse
from gqa_cutlass.cache.paged.storage import Storage
from gqa_cutlass.cache.paged.tables import Tables
from gqa_cutlass.cache.scales import Scale
from gqa_cutlass.cache.sizes import rows_text
from gqa_cutlass.errors import shown


class PagedView:
    """Sizes, sequences, their pages and their tokens; nothing here changes any of them.

    Args:
        pools: Keys and values of all layers.
        window: Newest tokens of a sequence that keep their pages; None: all.
    """

    def __init__(self, pools: Pools, window: int | None = None) -> None:
        self._pools = pools
        self._storage = Storage(pools, window)

    @property
    def k(self) -> tuple[Tensor, ...]:
        """Keys of each layer, [num_pages, page_size, num_kv_heads, head_dim], contiguous."""
        return self._pools.k

    @property
    def v(self) -> tuple[Tensor, ...]:
        """Values of each layer, as keys but for head_dim_v."""
        return self._pools.v

    @property
    def k_scale(self) -> tuple[Scale, ...]:
        """What stored keys of each layer are multiplied by; None for 1.

        A number, float32 [] or [num_kv_heads]; or, if scales are of tokens, float32 [num_pages,
        page_size, num_kv_heads].
        """
        return tuple(scales.k_scale for scales in self._pools.scales)

    @property
    def v_scale(self) -> tuple[Scale, ...]:
        """The same of values."""
        return tuple(scales.v_scale for scales in self._pools.scales)

    @property
    def num_layers(self) -> int:
        """Layers."""
        return self._pools.num_layers

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self._pools.num_pages

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._pools.page_size

    @property
    def window(self) -> int | None:
        """Newest tokens of every sequence that keep their pages; None: all."""
        return self._storage.sequences.window

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self._pools.device

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return self._storage.pages.num_free

    @property
    def sequences(self) -> list[int]:
        """All that there are, in the order in which they were made."""
        return list(self._storage.sequences)

    def __repr__(self) -> str:
        window = f"window={self.window}, " if self.window is not None else ""
        size = sum(pool.nbytes for pool in (*self.k, *self.v, *self._pools.of_tokens))
        return (
            f"{type(self).__name__}(num_pages={self.num_pages}, page_size={self.page_size}, "
            f"{rows_text(self.k[0], self.v[0])}, "
            f"device='{self.device}', num_layers={self.num_layers}, {window}bytes={size}, "
            f"sequences={len(self._storage.sequences)}, free_pages={self.free_pages})"
        )

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, those of an open step not counted.

        Raises:
            InputError: There is no such sequence.
        """
        return self._storage.sequences.get("PagedKVCache.length", sequence).length

    def pages(self, sequence: int) -> list[int]:
        """Pages of a sequence in the order of its tokens, those ahead of them included.

        Those that were freed, before the window, are -1.

        Raises:
            InputError: There is no such sequence.
        """
        return list(self._storage.sequences.get("PagedKVCache.pages", sequence).pages)

    def freed(self, sequence: int) -> int:
        """A sequence's first tokens that it has no more, for their pages were before the window.

        Raises:
            InputError: There is no such sequence.
        """
        sequences = self._storage.sequences
        return sequences.freed(sequences.get("PagedKVCache.freed", sequence))

    def pages_needed(self, sequences: Sequence[int], tokens: int | Sequence[int] = 1) -> int:
        """Free pages that a step of so many tokens would take, copies of shared ones included.

        What the window frees is free when the step is over, and so not counted against it. A
        `prefill` of more tokens than the window has takes fewer pages than a step.

        Args:
            sequences: As for `step`.
            tokens: As for `step`.

        Raises:
            InputError: There is no such sequence, or no such number of tokens.
        """
        call = "PagedKVCache.pages_needed"
        given = self._storage.sequences.each(call, sequences)
        return self._storage.sequences.needed(call, given, counts(call, tokens, len(given)))

    @on_host
    def gather(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values that a layer holds of a sequence.

        Args:
            layer: Which, from 0.
            sequence: Which.

        Returns:
            Keys, [tokens, num_kv_heads, head_dim], and values, with head_dim_v: all tokens, but the
            first `freed(sequence)`, which are gone.

        Raises:
            InputError: There is no such layer or sequence.
            CacheAllocationError: There is no memory for them.
        """
        return self._gather("PagedKVCache.gather", self._pools.read, layer, sequence)

    @on_host
    def gather_scales(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Copies of the scales of the tokens that `gather` gives.

        Args:
            layer: Which, from 0.
            sequence: Which.

        Returns:
            Of keys and of values, float32 [tokens, num_kv_heads].

        Raises:
            InputError: There is no such layer or sequence, or scales are not of tokens.
            CacheAllocationError: There is no memory for them.
        """
        call = "PagedKVCache.gather_scales"
        check_scaled(call, self._pools)
        return self._gather(call, self._pools.read_scales, layer, sequence)

    def _gather(
        self, call: str, read: Callable[..., tuple[Tensor, Tensor]], layer: int, sequence: int
    ) -> tuple[Tensor, Tensor]:
        self._storage.check_surroundings(call)
        if type(layer) is not int or not 0 <= layer < self.num_layers:
            refuse(call, "layer", shown(layer), f"an int from 0 to {self.num_layers - 1}")
        held = self._storage.sequences.get(call, sequence)
        return with_memory(call, self.device, partial(read, layer, held, held.length))

    @on_host
    def table(self, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What other kernels need to read the pools, as tensors of their own.

        Args:
            sequences: In the order of the batch, each once.

        Returns:
            `block_table`, int32 [batch, max_pages], with -1 behind each sequence's last page
            and for those that were freed, and `cache_seqlens`, int32 [batch], on the device.

        Raises:
            InputError: There is no such sequence, or one is named twice.
            CacheAllocationError: There is no memory for them.
        """
        call = "PagedKVCache.table"
        self._storage.check_surroundings(call)
        given = self._storage.sequences.each(call, sequences)
        if not given:
            refuse(call, "sequences", "none", "at least one")
        fill = partial(Tables(self.device).fill, given, [0] * len(given), self.page_size)
        table = with_memory(call, self.device, fill)
        return table.block_table, table.before
