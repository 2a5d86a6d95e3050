"""How kernels report what the host could not check before the launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from gqa_cutlass.errors import CacheOverflowError


class OverflowFlag:
    """A word of host memory that kernels write when a length on the device is not allowed.

    Args:
        memory: Int32[1], pinned for a GPU; 0, or 1 + the index of an offending sequence.

    Attributes:
        address: Where kernels write; the same on host and device (unified addressing).
        word: What is there, to look at without asking torch.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.address = memory.data_ptr()
        self.word = ctypes.c_int32.from_address(self.address)
        self._kept = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leave reports for later: where one rank must not stop while others wait for it."""
        before, self._kept = self._kept, True
        try:
            yield
        finally:
            self._kept = before

    def raise_if_set(self) -> None:
        """Report, once, what a kernel that has finished found.

        Raises:
            CacheOverflowError: The length of a sequence was too large for its cache.
        """
        value = self.word.value
        if value and not self._kept:
            self.word.value = 0
            raise CacheOverflowError(
                f"gqa_decode: an earlier call could not do sequence {value - 1} of its batch: "
                f"cache_seqlens[{value - 1}] is a length that the cache cannot hold, with its new "
                "tokens if there are any; or cache_batch_idx there names a row that the cache does "
                "not have; or its row of block_table, or a slot, a page that the pools do not "
                "have; or rotary_cos and rotary_sin lack its positions; or its entries of "
                "cu_seqlens_q or cu_seqlens_k_new are out of order, or more than there are. That "
                "sequence's output is NaN, and nothing was written where it does not belong; the "
                "other sequences are right. This call was not launched: correct the "
                "length (below max_seq_len to append), row, page, position or entry, and repeat "
                "it."
            )
