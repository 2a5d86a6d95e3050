"""A `PagedKVCache` whose tokens are spread over ranks: every page has rows on each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gqa_cutlass.cache.paged.inputs import check_reach
from gqa_cutlass.cache.paged.paged_kv_cache import PagedKVCache
from gqa_cutlass.cache.scales import LayerScales, allocate_scaled, by_token, bytes_with
from gqa_cutlass.cache.sizes import PoolSizes, refuse
from gqa_cutlass.distributed.exchange import Exchange
from gqa_cutlass.distributed.groups import Group, ranks_of
from gqa_cutlass.distributed.pools import ShardedPools
from gqa_cutlass.distributed.settle import MAX_TOKENS, Heads
from gqa_cutlass.distributed.sharding import Sharding


@dataclass(frozen=True, kw_only=True)
class _Sizes(PoolSizes):
    """Of a rank's pools; `page_size` is that of all ranks together.

    Args:
        size: Ranks.
        interleave: Tokens that follow one another on a rank.
    """

    size: int = 1
    interleave: int = 1

    owner = "ShardedPagedKVCache"
    limits = {**PoolSizes.limits, "size": MAX_TOKENS, "interleave": MAX_TOKENS}

    def __post_init__(self) -> None:
        super().__post_init__()
        stripe = self.size * self.interleave
        if self.page_size % stripe:
            allowed = (
                f"a multiple of {stripe}: pages of whole stripes, {self.size} ranks with "
                f"interleave={self.interleave}"
            )
            refuse(self.owner, "page_size", str(self.page_size), allowed)

    @property
    def rows(self) -> dict[str, int]:
        """The first two dimensions."""
        return {"num_pages": self.num_pages, "page_size": self.page_size // self.size}


class ShardedPagedKVCache(PagedKVCache):
    """A `PagedKVCache` of which every rank of a group holds its tokens, as `Sharding` deals them.

    Every rank makes every call, with the same arguments, and keeps what is its own: of a prompt,
    which all ranks are given whole, or of new tokens. Pages have tokens of all ranks, and the same
    numbers on each: so lengths, pages and all that is said of them are the same on all ranks, and
    what does not fit is refused on all of them, without an exchange. All methods are those of
    `PagedKVCache`; only `decode` exchanges anything, and takes what `decode_context_parallel` does.
    `gather` gives this rank's tokens.

    Args:
        num_pages: Pages of the pool.
        page_size: Tokens of a page, on all ranks together: a multiple of the number of ranks times
            interleave, of which each rank has an equal share.
        num_kv_heads: As for `PagedKVCache`, as are those that follow.
        head_dim: As for `PagedKVCache`.
        dtype: As for `PagedKVCache`.
        device: As for `PagedKVCache`.
        num_layers: As for `PagedKVCache`.
        head_dim_v: As for `PagedKVCache`.
        window: As for `PagedKVCache`.
        k_scale: As for `PagedKVCache`, the same on all ranks.
        v_scale: As k_scale.
        group: As for `decode_context_parallel`, as are those that follow.
        interleave: Tokens that follow one another on a rank.
        q_heads: "whole" or "sharded".
        exchange: How parts are exchanged; None: by size.

    Attributes:
        k: Keys of this rank's tokens, of each layer: [num_pages, page_size / ranks, num_kv_heads,
            head_dim], contiguous.
        v: Values, as k but for head_dim_v.

    Raises:
        GqaError: As for `PagedKVCache`, and as for `decode_context_parallel` of its group.
    """

    _pools: ShardedPools

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | int | str = "cuda",
        *,
        num_layers: int = 1,
        head_dim_v: int | None = None,
        window: int | None = None,
        k_scale: LayerScales = None,
        v_scale: LayerScales = None,
        group: Group = None,
        interleave: int = 1,
        q_heads: Heads = "whole",
        exchange: Exchange | None = None,
    ) -> None:
        ranks = ranks_of(group)
        check_reach("ShardedPagedKVCache", window)
        sizes = _Sizes(
            num_layers=num_layers, num_pages=num_pages, page_size=page_size,
            num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim_v,
            size=ranks.size, interleave=interleave,
            by_token=by_token("ShardedPagedKVCache", k_scale, v_scale),
        )  # fmt: skip
        memory, scales = allocate_scaled(sizes, device, k_scale, v_scale)
        pools = ShardedPools(memory.layers, scales, ranks, interleave, q_heads, exchange)
        self._adopt(pools, window)

    @property
    def sharding(self) -> Sharding:
        """Which tokens are here."""
        return self._pools.sharding

    @staticmethod
    def bytes_needed(
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float16,
        *,
        num_layers: int = 1,
        head_dim_v: int | None = None,
        window: int | None = None,
        k_scale: LayerScales = None,
        v_scale: LayerScales = None,
        size: int = 1,
        interleave: int = 1,
    ) -> int:
        """Bytes that such a cache would take on each of `size` ranks; allocates nothing.

        Raises:
            InputError: A size, the type or a scale is not allowed.
        """
        check_reach("ShardedPagedKVCache", window)
        sizes = _Sizes(
            num_layers=num_layers, num_pages=num_pages, page_size=page_size,
            num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim_v,
            size=size, interleave=interleave,
            by_token=by_token("ShardedPagedKVCache", k_scale, v_scale),
        )  # fmt: skip
        return bytes_with(sizes, k_scale, v_scale)
