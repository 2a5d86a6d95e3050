"""What can be seen of a cache at any time, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_cutlass.cache.lengths import Lengths
from gqa_cutlass.cache.ring import Ring
from gqa_cutlass.cache.scales import Scale, Scales
from gqa_cutlass.cache.sizes import rows_text


class CacheView:
    """Sizes and lengths of a cache; nothing here changes it.

    Attributes:
        k: Keys, [batch_size, max_seq_len, num_kv_heads, head_dim], or of fewer tokens in a window.
        v: Values, as k but for head_dim_v.
    """

    k: Tensor
    v: Tensor
    _lengths: Lengths
    _scales: Scales
    _ring: Ring | None = None

    @property
    def k_scale(self) -> Scale:
        """What stored keys are multiplied by; None for 1.

        A number, float32 [] or [num_kv_heads]; or, if scales are of tokens, float32 as k is without
        head_dim: 1 where there has been no token yet.
        """
        return self._scales.k_scale

    @property
    def v_scale(self) -> Scale:
        """The same of values."""
        return self._scales.v_scale

    @property
    def seqlens(self) -> Tensor:
        """Tokens cached, int32 [batch_size] on the device."""
        return self._lengths.seqlens

    @property
    def lengths(self) -> list[int] | None:
        """Tokens cached, if the host knows it exactly without waiting."""
        return self._lengths.known

    @property
    def bound(self) -> int:
        """What no length exceeds, as far as the host knows; max_seq_len at worst."""
        return self._lengths.bound

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.k.shape[0]

    @property
    def max_seq_len(self) -> int:
        """Tokens that a sequence can hold."""
        return self._lengths.limit

    @property
    def window(self) -> int | None:
        """Newest tokens that a query may see, its own included; None: all."""
        return None if self._ring is None else self._ring.window.size

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self.k.device

    def __repr__(self) -> str:
        size = sum(t.nbytes for t in (self.k, self.v, *self._scales.of_tokens))
        window = "" if self.window is None else f"window={self.window}, "
        return (
            f"KVCache(batch_size={self.batch_size}, max_seq_len={self.max_seq_len}, {window}"
            f"{rows_text(self.k, self.v)}, device='{self.device}', bytes={size}, "
            f"bound={self.bound})"
        )
