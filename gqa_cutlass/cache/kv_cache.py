"""A cache of keys and values with its lengths: decoding, prompts, and moving sequences about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, Unpack, overload

import torch
from torch import Tensor

from gqa_cutlass.api import gqa_decode
from gqa_cutlass.cache.counted import CountedCache
from gqa_cutlass.cache.growth import ONE_TOKEN, Growth
from gqa_cutlass.cache.guard import guarded, lack_of_memory, raise_no_temporaries
from gqa_cutlass.cache.inputs import check_apart, ints, new_tokens, one_token, prompt, turned
from gqa_cutlass.cache.lengths import Lengths
from gqa_cutlass.cache.ring import TOKENS, LayerWindows, Ring, lengths_of, rings, sizes_of
from gqa_cutlass.cache.rows import buffer, extend, gather, widest
from gqa_cutlass.cache.scales import (
    GivenScale,
    LayerScales,
    Scales,
    allocate_scaled,
    by_token,
    bytes_with,
    raw,
)
from gqa_cutlass.cache.sizes import BatchSizes
from gqa_cutlass.cache.some import Rows, decode_some, is_foreign
from gqa_cutlass.call.options import Options, listed
from gqa_cutlass.call.plan import Pair, Result
from gqa_cutlass.call.stored import SCALES
from gqa_cutlass.tensors import is_tensor
from gqa_cutlass.tracing import is_traced, mark_static

_VIEWS = "_ring", "_asked"  # attributes that see the memory in pages


class KVCache(CountedCache):
    """Keys and values of a batch of sequences, and how many tokens each holds.

    Nothing but `refresh` and `check` waits for the GPU. The lengths are on the device (`seqlens`),
    and the host follows what it does itself: `lengths` and `bound` say what it knows. While it
    knows the lengths exactly, a token that does not fit is an error before anything is written.
    When it does not (after tensors of lengths or indices from the device, after a CUDA-graph
    capture, after `forget`), the device finds out: it writes nothing to that sequence, leaves its
    length alone, serves the others, and `check` raises. `decode` also returns NaN for that
    sequence, and reports by itself: a later call raises.

    `decode` takes one token per sequence or several; of several, `accept` keeps the first so many.
    It, `accept` and `append` can be captured into CUDA graphs; every replay moves the lengths. The
    host does not see replays: from the capture on it knows nothing until `refresh`, `reset()` or
    `truncate(int)`, and what it knows then is outdated with the next replay, until it asks again.
    Outdated knowledge spoils no data, for after a capture nothing is written or moved by it; only
    `lengths`, `bound` and an overflow that they tell of may be wrong. A capture refuses sequences
    of ints, which no replay could read.

    `decode` works in code that torch.compile compiles, where the device counts and the host forgets
    with every call; what was compiled can be captured as well, if `forget` follows every replay.
    The other methods work there too, but for `accept` and `forget` outside of its graphs.

    Whoever writes into `seqlens` takes the host's knowledge away, and must call `refresh` (which
    waits) or `forget` (which does not) before the next operation.

    A call that an error or an interrupt ends in its middle leaves a cache that works: every
    sequence is as it was, or as it was to become, or (`reorder`) empty, and `lengths` says which,
    or nothing. What lies behind the lengths may have been written. Temporaries take up to 64 MiB,
    and as much as a call's tokens become in 8 bits, scales of tokens included.

    With a `window`, `decode` attends to it, or to a smaller `window_size`; older tokens are
    overwritten, and `max_seq_len` is rounded up to a multiple of 16 (64, for windows of 1024 and
    more). Whatever `decode` appended can be taken back; more only while nothing was lost that the
    window needs: what `truncate` would leave incomplete is an error, and so are lengths that the
    host cannot check. A `prefill` that an error ends in its middle must be repeated, or the
    sequences be reset; so must lengths that somebody else writes to `seqlens`, if they are not the
    latest, for older tokens are gone.

    A copy (`copy.deepcopy`, `pickle`, `torch.save`) has the same sequences, in memory of its own;
    `torch.load(file, map_location=..., weights_only=False)` makes it on any device. Layers that
    share their lengths go together, in their list.

    Works in inference mode or outside; nothing is recorded for gradients. Not thread-safe: one
    thread and one stream at a time.

    Args:
        batch_size: Sequences, 1 to 65535.
        max_seq_len: Tokens that a sequence can hold.
        num_kv_heads: KV heads.
        head_dim: Dimension per head, as `gqa_decode` allows it.
        dtype: torch.float16 or torch.bfloat16; or torch.float8_e4m3fn or torch.float8_e5m2, of
            which `append`, `prefill` and `decode` make what they are given in 16 bits.
        device: A GPU, or "cpu" (simulated, slow).
        head_dim_v: Dimension per head of values; None: as head_dim.
        window: Newest tokens that a query may see, its own included. Only so many and a few more
            are kept, in a ring: see below. None: all.
        tokens_per_call: With a window, query tokens and new tokens of a `decode` at most, 1 to 256.
        k_scale: Of a cache of 8 bits, for all calls: a number, or float32 [] or [num_kv_heads] on
            the device; see `gqa_decode`. Or "token", of both: one for every token and KV head,
            which the cache keeps, and computes of the tokens that it is given. None: 1.
        v_scale: The same of values.

    Attributes:
        k: Keys, [batch_size, max_seq_len, num_kv_heads, head_dim], contiguous. What lies behind a
            sequence's length is not initialised, and never read. With a window, [batch_size,
            slots, ...], where token t of a sequence is in slot t modulo slots, until the slot is
            needed for another.
        v: Values, as k but for head_dim_v.

    Raises:
        InputError: A size, the type or the device is not allowed.
        CacheAllocationError: There is not enough memory. Nothing stays allocated.
        DeviceError: No usable GPU.
    """

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
        window: int | None = None,
        tokens_per_call: int = TOKENS,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
    ) -> None:
        shape = batch_size, max_seq_len, num_kv_heads, head_dim, dtype, head_dim_v
        scaled = by_token("KVCache", k_scale, v_scale)
        sizes = sizes_of(1, *shape, window, tokens_per_call, scaled)
        (layer,) = _layers(sizes, device, k_scale, v_scale)
        self._adopt(*layer)

    @classmethod
    def for_layers(
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
        window: LayerWindows = None,
        tokens_per_call: int = TOKENS,
        k_scale: LayerScales = None,
        v_scale: LayerScales = None,
    ) -> list[Self]:
        """Allocate the caches of a model's layers, which share their lengths.

        A forward pass calls the caches in their order: `decode`, `append`, `prefill` and `reorder`
        on all but the last leave the lengths alone, and on the last one move them. `accept`,
        `truncate`, `reset`, `refresh`, `forget` and `check` concern the lengths only: call one of
        them once, on any of the caches.

        A forward pass that an error ends in its middle has moved no length: it can be repeated from
        the first layer, which writes the same rows again. Not so `reorder`, which moves rows on
        every layer: after an error, go on with the cache that raised it where `lengths` are as
        before; otherwise the sequences that were to change are empty.

        Args:
            num_layers: Caches.
            batch_size: As for `KVCache`, as are the others.
            max_seq_len: As for `KVCache`.
            num_kv_heads: As for `KVCache`.
            head_dim: As for `KVCache`.
            dtype: As for `KVCache`.
            device: As for `KVCache`.
            head_dim_v: As for `KVCache`.
            window: As for `KVCache`; or a list, with one for each layer, None for layers that keep
                all.
            tokens_per_call: As for `KVCache`.
            k_scale: As for `KVCache`; or a list, with one for each layer. "token" is of all.
            v_scale: As k_scale.

        Raises:
            GqaError: As for `KVCache`.
        """
        shape = batch_size, max_seq_len, num_kv_heads, head_dim, dtype, head_dim_v
        scaled = by_token("KVCache", k_scale, v_scale)
        sizes = sizes_of(num_layers, *shape, window, tokens_per_call, scaled)
        layers = _layers(sizes, device, k_scale, v_scale)
        caches = [cls.__new__(cls) for _ in layers]
        for cache, layer in zip(caches, layers, strict=True):
            cache._adopt(*layer)
        return caches

    @staticmethod
    def bytes_needed(
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float16,
        num_layers: int = 1,
        head_dim_v: int | None = None,
        *,
        window: LayerWindows = None,
        tokens_per_call: int = TOKENS,
        k_scale: LayerScales = None,
        v_scale: LayerScales = None,
    ) -> int:
        """Bytes that such caches would take, their lengths and scales of tokens included.

        Allocates nothing.

        Raises:
            InputError: A size, the type, a window or a scale is not allowed.
        """
        shape = batch_size, max_seq_len, num_kv_heads, head_dim, dtype, head_dim_v
        scaled = by_token("KVCache", k_scale, v_scale)
        sizes = sizes_of(num_layers, *shape, window, tokens_per_call, scaled)
        return bytes_with(sizes, k_scale, v_scale)

    def _adopt(
        self,
        k: Tensor,
        v: Tensor,
        lengths: Lengths,
        scales: Scales,
        leads: bool,
        ring: Ring | None = None,
    ) -> None:
        self.k, self.v, self._lengths, self._scales, self._ring = k, v, lengths, scales, ring
        self._asked = scales if ring is None else scales.in_pages(ring.window.page)
        mark_static(k, v, *scales.of_tokens, *self._asked.of_tokens)
        self._leads = leads  # of the caches that share the lengths, the one that moves them

    def __getstate__(self) -> dict[str, object]:
        """The same without views of its memory, for pickling makes memory of its own of each.

        Elements of 8 bits are bytes, for torch cannot read those that it pickled.
        """
        own = {name: value for name, value in vars(self).items() if name not in _VIEWS}
        ring = self._ring and (self._ring.window, self._ring.table)
        return own | {"k": raw(self.k), "v": raw(self.v), "dtype": self.k.dtype, "ring": ring}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dtype, ring = state.pop("dtype"), state.pop("ring")
        k, v = (state.pop(name).view(dtype) for name in ("k", "v"))
        self.__dict__.update(state)
        ring = ring and Ring(ring[0], k, v, ring[1])
        self._adopt(k, v, self._lengths, self._scales, self._leads, ring)

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
    @listed(Options, without=SCALES)
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
        """Append new tokens' K and V, if given, and attend over everything cached: `gqa_decode`.

        Of several tokens, the drafts of speculative decoding for instance, a sequence without room
        for all gets none. `accept` takes back those that are not to stay.

        Args:
            q: As for `gqa_decode`: of one token per sequence, or of several.
            k: As for `gqa_decode`: of one token, or [batch, tokens, num_kv_heads, head_dim].
            v: As k.
            return_lse: As for `gqa_decode`.
            rows: The sequences that q, k and v are for, one for each of their rows: ints, or int32
                on the device, after which the host no longer knows the lengths. None: all. Where a
                token is appended none may come twice, which is seen of ints; a row on the device
                that there is not counts like a full sequence.
            **options: `Options`.

        Returns:
            As `gqa_decode`.

        Raises:
            CacheOverflowError: A sequence has no room for its tokens or `rotary_cos` no positions,
                or an earlier call on this GPU found that. Nothing was launched; the lengths are as
                they were. What `rotary_seqlens` says is found on the device, as are lengths then.
            CacheAllocationError: There is no memory for the output. The lengths are as they were.
            GqaError: As for `gqa_decode`. The lengths are as they were, though the tokens may have
                been written behind them.
        """
        options = self._asked.asked("KVCache.decode", options)
        if rows is not None or (options and is_foreign(options)):
            given = (q, k, v), rows, self._leads, self._ring
            return decode_some(self, self._lengths, *given, return_lse=return_lse, **options)
        if self._ring is not None:
            options = self._ring.options(q, k, options)
        if is_traced():
            return self._decode_traced(q, k, v, return_lse=return_lse, **options)
        growth, positions = ONE_TOKEN, None
        if k is not None:
            if (tokens := new_tokens(k)) != 1:
                growth = Growth.of(tokens)
            self._lengths.check_room("decode", growth)
            if options and (positions := turned(q, k, options)):
                self._lengths.check_positions(positions)
        try:
            memory = self._ring or self
            result: Result = gqa_decode(
                q, memory.k, memory.v, k, v, cache_seqlens=self.seqlens, return_lse=return_lse,
                **options,
            )  # fmt: skip
            if k is not None and self._leads:
                room = self._lengths.room(growth, positions)
                sure = positions is None or positions.starts is None
                self._lengths.advance(growth, room, drafts=growth.most > 1, sure=sure)
            return result
        except RuntimeError as error:
            told = lack_of_memory(error)
        raise_no_temporaries("KVCache.decode", self.device, told)

    @guarded
    def append(self, k: Tensor, v: Tensor) -> None:
        """Append one token to every sequence, without attending.

        Args:
            k: Keys, [batch, num_kv_heads, head_dim] or [batch, 1, num_kv_heads, head_dim], of the
                cache's dtype (16 bits, if it is of 8) and on its device; no part of it.
            v: As k.

        Raises:
            InputError: A tensor is not allowed. Nothing was written.
            CacheOverflowError: A sequence is known to be full. Nothing was written.
            CacheAllocationError: There is no memory for temporaries. The lengths are as they were.
        """
        k = one_token("append", "k", k, (self.k, self.v))
        v = one_token("append", "v", v, (self.k, self.v))
        self._extend("append", k, v, ONE_TOKEN)

    @guarded
    def prefill(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Append a whole prompt, or a piece of one, to every sequence.

        A sequence whose tokens do not all fit gets none of them.

        Args:
            k: Keys, [batch, tokens, num_kv_heads, head_dim], as for `append`.
            v: As k.
            lengths: How many of each sequence's tokens are real, the first ones: all (None), ints,
                or int32 [batch] on the device, which the host never reads. There a number that is
                negative or larger than `tokens` does not fit. No part of k or v of the cache.

        Raises:
            InputError: An argument is not allowed. Nothing was written.
            CacheOverflowError: A sequence is known not to have the room. Nothing was written.
            CacheAllocationError: There is no memory for temporaries. The lengths are as they were.
        """
        k, v = prompt("prefill", k, v, (self.k, self.v))
        growth = self._lengths.growth(k.shape[1], lengths)
        if isinstance(growth.device, Tensor):
            check_apart("KVCache.prefill", "lengths", growth.device, self._held())
        self._extend("prefill", k, v, growth)

    @guarded
    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Let row i hold what row indices[i] held: beam search, continuous batching.

        Of caches that share their lengths, call it on every one, the last one last: that one moves
        the lengths. While rows are moved, those that change are empty, and stay so if an error or
        an interrupt ends the call there.

        Args:
            indices: Ints, of which any may be repeated, and -1 for an empty row; only rows that
                change are moved then. Or int32 or int64 [batch] on the device, which the host never
                reads; there all that names no row counts as -1.

        Raises:
            InputError: Not of these types, or ints out of range. Nothing was moved.
            CacheAllocationError: There is no memory for temporaries. Nothing was moved.
        """
        lengths = self._lengths
        host = targets = None
        if is_tensor(indices):
            order = lengths.order(indices)
            own = torch.arange(self.batch_size, device=self.device)
            sources = torch.where(order < 0, own, order)
        else:
            host = ints("reorder", "indices", indices, -1, self.batch_size - 1, self.batch_size)
            order, sources, targets = (
                lengths.upload("reorder", rows, torch.int64)
                for rows in (host, *lengths.moves(host))
            )
        reach = min(lengths.reach, self.k.shape[1])
        caches = [raw(held) for held in self._held()]
        through = buffer(widest(caches), len(sources), reach)
        with lengths.reordering(order, host, self._leads):
            if len(sources):
                gather(caches, reach, sources, targets, through)

    def _held(self) -> tuple[Tensor, ...]:
        """What it has of every token."""
        return self.k, self.v, *self._scales.of_tokens

    def _decode_traced(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, **options: Any
    ) -> Result:
        """`decode` in code that torch traces: whether there is room, only the device knows."""
        memory = self._ring or self
        result: Result
        result = gqa_decode(q, memory.k, memory.v, k, v, cache_seqlens=self.seqlens, **options)
        if k is not None and self._leads:
            self._lengths.advance_unseen(new_tokens(k), turned(q, k, options))
        return result

    def _extend(self, method: str, k: Tensor, v: Tensor, growth: Growth) -> None:
        """Write tokens behind every sequence's, where there is room, and count them."""
        self._lengths.check_room(method, growth)
        pairs = [
            *self._scales.stored(self.k, "k", k[:, : growth.most]),
            *self._scales.stored(self.v, "v", v[:, : growth.most]),
        ]
        extend(pairs, self._lengths, growth, leads=self._leads)


def _layers(
    sizes: BatchSizes, device: torch.device | int | str, k_scale: LayerScales, v_scale: LayerScales
) -> list[tuple[Tensor, Tensor, Lengths, Scales, bool, Ring | None]]:
    """Allocate for caches that share their lengths: for each what it adopts.

    Raises:
        GqaError: As for `KVCache`.
    """
    memory, scales = allocate_scaled(sizes, device, k_scale, v_scale)
    lengths, last = lengths_of(sizes, memory), len(memory.layers) - 1
    pairs = zip(memory.layers, rings(sizes, memory), strict=True)
    return [
        (k, v, lengths, scales[i % len(scales)], i == last, ring)
        for i, ((k, v), ring) in enumerate(pairs)
    ]
