"""A `KVCache` whose tokens are spread over ranks: lengths are those of sequences, rows a rank's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, Unpack, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gqa_cutlass.cache.growth import ONE_TOKEN, Growth
from gqa_cutlass.cache.guard import with_memory
from gqa_cutlass.cache.inputs import new_tokens, refuse_in
from gqa_cutlass.cache.kv_cache import KVCache
from gqa_cutlass.cache.lengths import Lengths
from gqa_cutlass.cache.rows import buffer, scatter, widest
from gqa_cutlass.cache.scales import GivenScale, LayerScales, allocate_scaled, by_token, bytes_with
from gqa_cutlass.cache.sizes import BatchSizes
from gqa_cutlass.cache.some import Rows
from gqa_cutlass.call.options import Options, listed
from gqa_cutlass.call.plan import Pair, Result
from gqa_cutlass.call.stored import SCALES
from gqa_cutlass.distributed.decode import WHY, decode_context_parallel
from gqa_cutlass.distributed.groups import Group, Ranks, ranks_of
from gqa_cutlass.distributed.settle import MAX_TOKENS
from gqa_cutlass.distributed.sharding import Sharding
from gqa_cutlass.errors import shown
from gqa_cutlass.tracing import untraced

_ALL = "None, for all sequences; write a negative length to seqlens for inactive ones"
_TEMPORARY_BYTES = 2**26  # of a piece of a prompt; as many again are under way in `scatter`


@dataclass(frozen=True, kw_only=True)
class _Sizes(BatchSizes):
    """Of a rank's shards; `max_seq_len` is that of whole sequences.

    Args:
        size: Ranks.
        interleave: Tokens that follow one another on a rank.
    """

    size: int = 1
    interleave: int = 1

    owner = "ShardedKVCache"
    limits = {
        **BatchSizes.limits, "size": MAX_TOKENS, "interleave": MAX_TOKENS, "max_seq_len": MAX_TOKENS
    }  # fmt: skip

    @property
    def local_max(self) -> int:
        """Tokens of a sequence that a rank has room for."""
        return self._first.count(self.max_seq_len)

    @property
    def rows(self) -> dict[str, int]:
        """The first two dimensions."""
        return {"batch_size": self.batch_size, "max_seq_len": self.local_max}

    @property
    def total_bytes(self) -> int:
        """Bytes of K and V of all layers, of their scales, and of what they share, on a rank."""
        return self.num_layers * self.local_max * sum(self._unit_bytes) + self._state_bytes

    def largest(self, available: int) -> int:
        """As for `Sizes`, with so many bytes on every rank."""
        return min(self._first.capacity(super().largest(available)), MAX_TOKENS)

    @property
    def _first(self) -> Sharding:
        return Sharding(rank=0, size=self.size, interleave=self.interleave)


class _Lengths(Lengths):
    """Lengths of whole sequences, of which a rank's rows hold a part."""

    owner = "ShardedKVCache"

    def __init__(self, state: Tensor, limit: int, sharding: Sharding) -> None:
        super().__init__(state, limit)
        self.sharding = sharding

    @property
    def reach(self) -> int:
        """What no number of a rank's rows exceeds, whatever graphs have been replayed."""
        return self.sharding.first.count(super().reach)


class ShardedKVCache(KVCache):
    """A `KVCache` of which every rank of a group holds its tokens, as `Sharding` deals them out.

    Every rank makes every call, with the same arguments, and keeps what is its own: of a prompt,
    which all ranks are given whole, or of new tokens. Lengths, `max_seq_len` and all that is said
    of them concern whole sequences, and are the same on all ranks, so that a token that does not
    fit is refused on all of them. All methods are those of `KVCache`, but `rows=` of `decode`; only
    `decode` exchanges anything. It reports in `check` alone what did not fit, which all ranks call
    at the same point: see `decode_context_parallel`. Temporaries take up to 128 MiB.

    Args:
        batch_size: As for `KVCache`, as are those that follow.
        max_seq_len: Tokens that a sequence can hold on all ranks together. The attribute may be up
            to a stripe larger: what shards that are equally large hold.
        num_kv_heads: As for `KVCache`.
        head_dim: As for `KVCache`.
        dtype: As for `KVCache`.
        device: As for `KVCache`.
        head_dim_v: As for `KVCache`.
        group: As for `decode_context_parallel`, as is interleave.
        interleave: Tokens that follow one another on a rank.
        k_scale: As for `KVCache`, the same on all ranks.
        v_scale: As k_scale.

    Attributes:
        k: Keys of this rank's tokens, [batch_size, local_max, num_kv_heads, head_dim], contiguous.
        v: Values, as k but for head_dim_v.
        sharding: Which tokens these are.

    Raises:
        GqaError: As for `KVCache`, and as for `decode_context_parallel` of its group.
    """

    sharding: Sharding
    _group: ProcessGroup

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | int | str = "cuda",
        head_dim_v: int | None = None,
        *,
        group: Group = None,
        interleave: int = 1,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
    ) -> None:
        ranks = ranks_of(group)
        sizes = _Sizes(
            num_layers=1, batch_size=batch_size, max_seq_len=max_seq_len,
            num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim_v,
            size=ranks.size, interleave=interleave,
            by_token=by_token("ShardedKVCache", k_scale, v_scale),
        )  # fmt: skip
        _fill([self], sizes, device, ranks, (k_scale, v_scale))

    @classmethod
    def for_layers(  # type: ignore[override]  # windows are not spread
        cls,
        num_layers: int,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | int | str = "cuda",
        head_dim_v: int | None = None,
        *,
        group: Group = None,
        interleave: int = 1,
        k_scale: LayerScales = None,
        v_scale: LayerScales = None,
    ) -> list[Self]:
        """Allocate the caches of a model's layers, which share their lengths: as for `KVCache`.

        Args:
            num_layers: Caches.
            batch_size: As for `ShardedKVCache`, as are the others.
            max_seq_len: As for `ShardedKVCache`.
            num_kv_heads: As for `ShardedKVCache`.
            head_dim: As for `ShardedKVCache`.
            dtype: As for `ShardedKVCache`.
            device: As for `ShardedKVCache`.
            head_dim_v: As for `ShardedKVCache`.
            group: As for `ShardedKVCache`.
            interleave: As for `ShardedKVCache`.
            k_scale: As for `ShardedKVCache`; or a list, with one for each layer. "token" is of all.
            v_scale: As k_scale.

        Raises:
            GqaError: As for `ShardedKVCache`.
        """
        ranks = ranks_of(group)
        sizes = _Sizes(
            num_layers=num_layers, batch_size=batch_size, max_seq_len=max_seq_len,
            num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim_v,
            size=ranks.size, interleave=interleave,
            by_token=by_token("ShardedKVCache", k_scale, v_scale),
        )  # fmt: skip
        caches = [cls.__new__(cls) for _ in range(num_layers)]
        _fill(caches, sizes, device, ranks, (k_scale, v_scale))
        return caches

    @staticmethod
    def bytes_needed(  # type: ignore[override]  # windows are not spread
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float16,
        num_layers: int = 1,
        head_dim_v: int | None = None,
        *,
        size: int = 1,
        interleave: int = 1,
        k_scale: LayerScales = None,
        v_scale: LayerScales = None,
    ) -> int:
        """Bytes that such caches would take on each of `size` ranks; allocates nothing.

        Raises:
            InputError: A size, the type or a scale is not allowed.
        """
        sizes = _Sizes(
            num_layers=num_layers, batch_size=batch_size, max_seq_len=max_seq_len,
            num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim_v,
            size=size, interleave=interleave,
            by_token=by_token("ShardedKVCache", k_scale, v_scale),
        )  # fmt: skip
        return bytes_with(sizes, k_scale, v_scale)

    @property
    def max_seq_len(self) -> int:
        """Tokens that a sequence can hold, on all ranks together."""
        return self._lengths.limit

    def __repr__(self) -> str:
        return (
            f"ShardedKVCache(max_seq_len={self.max_seq_len}, rank={self.sharding.rank}, "
            f"size={self.sharding.size}, interleave={self.sharding.interleave}, "
            f"k={list(self.k.shape)}, v={list(self.v.shape)}, dtype={self.k.dtype}, "
            f"device='{self.device}', bound={self.bound})"
        )

    @overload
    def decode(
        self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *,
        return_lse: Literal[False] = False, rows: Rows = None, **options: Unpack[Options],
    ) -> Tensor: ...  # fmt: skip
    @overload
    def decode(
        self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *,
        return_lse: Literal[True], rows: Rows = None, **options: Unpack[Options],
    ) -> Pair: ...  # fmt: skip
    @overload
    def decode(
        self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *,
        return_lse: bool, rows: Rows = None, **options: Unpack[Options],
    ) -> Result: ...  # fmt: skip
    @partial(untraced, why=WHY)
    @listed(Options, without=("out", *SCALES))
    def decode(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        return_lse: bool = False,
        rows: Rows = None,
        **options: Any,
    ) -> Result:
        """Append new tokens' K and V on their owners, if given, and attend over what ranks hold.

        Of several tokens, `accept` keeps the first so many, as for `KVCache`.

        Args:
            q: As for `decode_context_parallel`, on all ranks.
            k: As q.
            v: As q.
            return_lse: As for `gqa_decode`.
            rows: None: all sequences. Some are not for shards; a negative length in `seqlens`
                makes a sequence inactive.
            **options: `Options`; also `q_heads` and `exchange`.

        Returns:
            As `decode_context_parallel`.

        Raises:
            CacheOverflowError: A sequence has no room for its tokens. Nothing was launched, on no
                rank.
            GqaError: As for `KVCache.decode` and `decode_context_parallel`.
        """
        call = "ShardedKVCache.decode"
        options = self._scales.asked(call, options)
        if rows is not None:
            refuse_in(call, "rows", shown(rows), _ALL)
        if "cache_batch_idx" in options:
            refuse_in(call, "cache_batch_idx", "an index", _ALL)
        growth = ONE_TOKEN if k is None else Growth.of(new_tokens(k))
        if k is not None:
            self._lengths.check_room("decode", growth)

        def work() -> Result:
            result: Result = decode_context_parallel(
                q, self.k, self.v, k, v, cache_seqlens=self.seqlens, group=self._group,
                interleave=self.sharding.interleave, return_lse=return_lse, **options,
            )  # fmt: skip
            if k is not None and self._leads:
                room = self._lengths.room(growth)
                self._lengths.advance(growth, room, drafts=growth.most > 1)
            return result

        return with_memory(call, self.device, work)

    def _extend(self, method: str, k: Tensor, v: Tensor, growth: Growth) -> None:
        """Write those of the tokens that are here behind every sequence's, and count all."""
        lengths = self._lengths
        lengths.check_room(method, growth)
        room = lengths.room(growth)
        # Bytes of a token of all sequences.
        each = self.batch_size * k.element_size() * max(t.shape[2:].numel() for t in (k, v))
        step = self.sharding.stripe * max(1, _TEMPORARY_BYTES // (each * self.sharding.interleave))
        for start in range(0, growth.most, step):
            count = min(step, growth.most - start)
            pieces = k[:, start : start + count], v[:, start : start + count]
            self._place(pieces, lengths.seqlens + start, growth.device - start, room)
        if room is not None:
            lengths.note_overflow(room)
        if self._leads:
            lengths.advance(growth, room)

    def _place(
        self,
        pieces: tuple[Tensor, Tensor],
        starts: Tensor,
        counts: int | Tensor,
        room: Tensor | None,
    ) -> None:
        """Write a piece of what comes.

        Args:
            pieces: K and V of tokens that follow one another, [batch, tokens, heads, dim].
            starts: The numbers of their first ones in the sequences, int32 [batch].
            counts: How many of them there are, below 0 and above for none and all.
            room: Where there is room for them, bool [batch]; None for everywhere.
        """
        sharding, tokens = self.sharding, pieces[0].shape[1]
        if isinstance(counts, Tensor):
            ends = starts + counts.clamp(0, tokens)
        else:
            ends = starts + max(0, min(counts, tokens))
        held = sharding.count(starts)
        here = sharding.count(ends) - held
        most = sharding.most(tokens)
        if not most:
            return
        local = held[:, None] + torch.arange(most, dtype=torch.int32, device=self.device)
        index = (sharding.position(local) - starts[:, None]).clamp_(0, tokens - 1).long()
        pairs = []
        for name, cache, piece in zip("kv", (self.k, self.v), pieces, strict=True):
            places = index[..., None, None].expand(-1, -1, *piece.shape[2:])
            pairs += self._scales.stored(cache, name, piece.gather(1, places))
        through = buffer(widest(cache for cache, _ in pairs), self.batch_size, most)
        scatter(pairs, held, here, room, through)


def _fill(
    caches: Sequence[ShardedKVCache],
    sizes: _Sizes,
    device: torch.device | int | str,
    ranks: Ranks,
    scales: tuple[LayerScales, LayerScales],
) -> None:
    """Allocate for caches that share their lengths.

    Raises:
        InputError: As `allocate` says, or a scale is not allowed.
    """
    memory, of_layers = allocate_scaled(sizes, device, *scales)
    sharding = Sharding(rank=ranks.rank, size=ranks.size, interleave=sizes.interleave)
    lengths = _Lengths(memory.state, sharding.capacity(sizes.local_max), sharding)
    for i, (cache, (k, v)) in enumerate(zip(caches, memory.layers, strict=True)):
        cache._adopt(k, v, lengths, of_layers[i % len(of_layers)], cache is caches[-1])
        cache.sharding, cache._group = sharding, ranks.group
